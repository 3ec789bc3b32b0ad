"""What apply and remove do about the other tools that touch the same model: offloading, LoRA, calls that replace
processors, saving, parallelism."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, remove_hook_from_module
from torch import nn

from .grid import PatchHook
from .ip_adapters import put_on, refuse_ip_adapter, runs_gspn2
from .processors import LAYER, STATE, PatchState

logger = logging.getLogger(__name__)


class GuardHook(PatchHook):
    """On the model: notices at each call whether something took our processors off, and puts them back.

    `set_attn_processor`, attention slicing, xFormers and `fuse_qkv_projections` replace every processor of a model
    without a word; a model of which half is patched would make silently wrong pictures. An IP-Adapter that was loaded
    or unloaded is followed.
    """

    def __init__(self, attentions: list[Any]) -> None:
        self.attentions = attentions
        self.told_of_lora = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refuse_parallelism(module)
        replaced: dict[str, Any] = {}
        for attention in self.attentions:
            state: PatchState = getattr(attention, STATE)
            if not state.enabled:
                return
            if runs_gspn2(attention, state):
                continue
            name = type(attention.processor).__name__
            # Perturbed-attention guidance puts its processors on for one call and then ours back.
            if name.startswith("PAG"):
                continue
            refuse_ip_adapter(state.kind, attention.processor)
            if not put_on(attention, state):
                replaced[name] = replaced.get(name, 0) + 1
        if replaced:
            found = ", ".join(f"{count} x {name}" for name, count in replaced.items())
            logger.warning(
                "The GSPN-2 processors had been replaced (%s) and were put back; remove_gspn2 is the way back to "
                "attention.",
                found,
            )
        if not self.told_of_lora:
            self.told_of_lora = tell_of_lora(self.attentions)


class BaseModelSaver:
    """Stands in for a patched model's `save_pretrained`: saves the model as if it were not patched."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        attentions = [module for module in self.model.modules() if LAYER in module._modules]
        layers = [attention._modules.pop(LAYER) for attention in attentions]
        try:
            result = type(self.model).save_pretrained(self.model, *args, **kwargs)  # type: ignore[attr-defined]
        finally:
            for attention, layer in zip(attentions, layers, strict=True):
                attention._modules[LAYER] = layer
        logger.warning(
            "Saved %s without its %d GSPN-2 layers; save those with the save_pretrained of the adapter that "
            "apply_gspn2 returned.",
            type(self.model).__name__,
            len(layers),
        )
        return result


def refuse_parallelism(model: nn.Module) -> None:
    """
    Raises:
        ValueError: the model splits its tokens over devices.
    """
    config: Any = getattr(model, "_parallel_config", None)
    if config is not None and getattr(config, "context_parallel_config", None) is not None:
        raise ValueError(
            "Context parallelism splits the tokens of a map over devices, which the line scan cannot follow; load the "
            "model without it, or remove_gspn2."
        )


def tell_of_lora(attentions: list[Any]) -> bool:
    """Warns if a LoRA sits on projections that the patch bypasses. Returns whether it did."""
    idle = 0
    for attention in attentions:
        projections = [getattr(attention, name, None) for name in ("to_q", "to_k", "to_v")]
        idle += getattr(attention, STATE).kind == "self" and any(hasattr(part, "lora_A") for part in projections)
    if idle:
        logger.warning(
            "LoRA weights on to_q, to_k and to_v of %d replaced self-attentions have no effect while GSPN-2 is applied "
            "(to_out and all other layers keep theirs).",
            idle,
        )
    return bool(idle)


@contextmanager
def offloading_lifted(model: Any) -> Iterator[None]:
    """Inside the block the model has its weights and no offloading hooks; after it, the same offloading as before.

    Sequential offload keeps weights on the meta device, and new layers need hooks of their own. Offloading of whole
    models moves whatever is in them and needs nothing.
    """
    hook = next(filter(None, map(_sequential_hook, model.modules())), None)
    if hook is not None:
        remove_hook_from_module(model, recurse=True)
    try:
        yield
    finally:
        if hook is not None:
            cpu_offload(model, hook.execution_device, offload_buffers=hook.offload_buffers)
        # diffusers' LoRA and textual inversion loaders do this after they changed a module in place.
        # Here and not above: diffusers.hooks imports peft, which takes seconds.
        from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

        _maybe_remove_and_reapply_group_offloading(model)


def _sequential_hook(module: Any) -> AlignDevicesHook | None:
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])
    return next((hook for hook in hooks if isinstance(hook, AlignDevicesHook) and hook.offload), None)


def layer_dtype(model: Any, weight: torch.Tensor) -> torch.dtype:
    """The type for new layers beside `weight`: its own, or the type that the model computes in where `weight` is only
    stored (float8, quantised)."""
    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    for dtype in (weight.dtype, getattr(model, "dtype", None)):
        if dtype in floats:
            return dtype
    return torch.float32
