"""Switches that trade time for memory, for pictures that would not fit otherwise.

Each is diffusers' own where it has one (VAE tiling, a transformer block's chunked feed-forward) and a hook of the same
style where it has none. They are on inside a `with` block and leave nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

SWITCHES = {
    "vae_tiling": "the VAE works tile by tile",
    "guidance_in_turn": "the two halves of classifier-free guidance run one after the other",
    "feed_forward_tokens": "feed-forward layers take so many tokens at a time",
    "offload_skips": "the UNet's skip connections wait in host memory",
}


@contextmanager
def memory_switches(
    pipe_or_model: Any,
    *,
    vae_tiling: bool = False,
    guidance_in_turn: bool = False,
    feed_forward_tokens: int | None = None,
    offload_skips: bool = False,
) -> Iterator[None]:
    """Inside the block the pipeline needs less memory; afterwards everything is as it was, also after an error.

    Args:
        pipe_or_model: a diffusers pipeline, or its UNet or transformer (then without `vae_tiling`).
        vae_tiling: diffusers' `vae.enable_tiling()`: encode and decode overlapping tiles and blend them. Pixels change
            slightly near the tiles' borders.
        guidance_in_turn: halves the batch of a denoising call: first the unconditional half, then the other. Same
            result within rounding; slower only where the GPU was not full.
        feed_forward_tokens: at most so many tokens at a time in the feed-forward layers of the transformer blocks,
            through diffusers' `set_chunk_feed_forward` with the largest divisor of the map's tokens that is not above
            it. Same result within rounding.
        offload_skips: the down blocks' outputs, which the UNet keeps for its up blocks, wait in pinned host memory.
            Same result, bit for bit. Not together with ControlNet or a T2I-Adapter, which change them on their way.

    Raises:
        ValueError: the model has no such switch; nothing is switched.
    """
    asked = {
        "vae_tiling": vae_tiling,
        "guidance_in_turn": guidance_in_turn,
        "feed_forward_tokens": feed_forward_tokens is not None,
        "offload_skips": offload_skips,
    }
    available = available_switches(pipe_or_model)
    if feed_forward_tokens is not None and feed_forward_tokens < 1:
        raise ValueError(f"feed_forward_tokens is {feed_forward_tokens}; pass at least 1 token, or None.")
    if missing := [name for name, on in asked.items() if on and name not in available]:
        raise ValueError(
            f"{type(pipe_or_model).__name__} has no {' and no '.join(missing)}; it has {', '.join(available)}."
        )
    model = denoiser(pipe_or_model)
    with ExitStack() as stack:
        if vae_tiling:
            stack.enter_context(_vae_tiling(pipe_or_model.vae))
        if guidance_in_turn:
            stack.enter_context(_guidance_in_turn(model))
        if feed_forward_tokens is not None:
            stack.enter_context(_chunked_feed_forward(model, feed_forward_tokens))
        if offload_skips:
            stack.enter_context(_offloaded_skips(model))
        yield


def available_switches(pipe_or_model: Any) -> list[str]:
    """The names in `SWITCHES` that `memory_switches` can turn on for this pipeline or model."""
    model = denoiser(pipe_or_model)
    available = ["guidance_in_turn"]
    if hasattr(getattr(pipe_or_model, "vae", None), "use_tiling"):
        available.insert(0, "vae_tiling")
    if any(isinstance(module, BasicTransformerBlock) for module in model.modules()):
        available.append("feed_forward_tokens")
    if hasattr(model, "down_blocks") and hasattr(model, "up_blocks"):
        available.append("offload_skips")
    return available


def active_switches(pipe_or_model: Any) -> list[str]:
    """The names in `SWITCHES` that are on, however they were turned on."""
    model = denoiser(pipe_or_model)
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    on = {
        "vae_tiling": getattr(getattr(pipe_or_model, "vae", None), "use_tiling", False),
        "guidance_in_turn": isinstance(vars(model).get("_compiled_call_impl"), _HalvesInTurn),
        "feed_forward_tokens": any(isinstance(hook, _ChunkHook) for hook in hooks)
        or any(getattr(module, "_chunk_size", None) for module in model.modules()),
        "offload_skips": any(isinstance(hook, _FetchHook) for hook in hooks),
    }
    return [name for name in SWITCHES if on[name]]


def denoiser(pipe_or_model: Any) -> nn.Module:
    """The UNet or transformer of a pipeline, or the model itself.

    Raises:
        TypeError: there is neither.
    """
    for candidate in (pipe_or_model, getattr(pipe_or_model, "unet", None), getattr(pipe_or_model, "transformer", None)):
        if isinstance(candidate, nn.Module):
            return candidate
    raise TypeError(
        f"{type(pipe_or_model).__name__} has no unet and no transformer; pass a diffusers pipeline or model."
    )


def skip_buffers(model: nn.Module) -> list[Tensor]:
    """Where the skip connections of `offload_skips` wait."""
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return [buffer for hook in hooks if isinstance(hook, _StoreHook) for buffer in hook.buffers]


@contextmanager
def _vae_tiling(vae: Any) -> Iterator[None]:
    before = vae.use_tiling
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.use_tiling = before


class _HalvesInTurn:
    """Stands for a model's call: splits the batch in two, calls the model on each half and joins the results."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        sample: Tensor = args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"]
        batch = sample.shape[0]
        if batch % 2:
            return self.call(*args, **kwargs)
        first, second = (
            self.call(*_half(args, batch, half), **{name: _half(kwargs[name], batch, half, name) for name in kwargs})
            for half in (0, 1)
        )
        return _join(first, second)


def _half(value: Any, batch: int, half: int, name: str = "") -> Any:
    """The half of every tensor of `batch` rows in a nest of lists, tuples and dicts."""
    if isinstance(value, Tensor):
        # Flux's position ids have no batch.
        per_sample = value.ndim > 0 and value.shape[0] == batch and name not in ("img_ids", "txt_ids")
        return value.chunk(2)[half] if per_sample else value
    if isinstance(value, dict):
        return {key: _half(item, batch, half, key) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_half(item, batch, half) for item in value)
    return value


def _join(first: Any, second: Any) -> Any:
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    if isinstance(first, dict):
        return type(first)(**{key: _join(first[key], second[key]) for key in first})
    if isinstance(first, (list, tuple)):
        return type(first)(_join(a, b) for a, b in zip(first, second, strict=True))
    return first


@contextmanager
def _guidance_in_turn(model: nn.Module) -> Iterator[None]:
    # The attribute that `model.compile()` sets. It is called above every hook, so offloading hooks, which replace
    # `forward` and come and go, neither undo this nor are undone by it.
    before = model._compiled_call_impl
    model._compiled_call_impl = _HalvesInTurn(before or model._call_impl)
    try:
        yield
    finally:
        if before is None:
            vars(model).pop("_compiled_call_impl", None)
        else:
            model._compiled_call_impl = before


class _ChunkHook:
    """Pre-hook of a transformer block: diffusers wants a chunk size that divides the map's tokens."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = (args[0] if args else kwargs["hidden_states"]).shape[1]
        block.set_chunk_feed_forward(largest_divisor(tokens, self.tokens), 1)


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is not above `limit`."""
    return next(number // parts for parts in range(1, number + 1) if number % parts == 0 and number // parts <= limit)


@contextmanager
def _chunked_feed_forward(model: nn.Module, tokens: int) -> Iterator[None]:
    blocks: list[Any] = [module for module in model.modules() if isinstance(module, BasicTransformerBlock)]
    before = [(block._chunk_size, block._chunk_dim) for block in blocks]
    handles = [block.register_forward_pre_hook(_ChunkHook(tokens), with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for block, handle, (size, dim) in zip(blocks, handles, before, strict=True):
            handle.remove()
            block.set_chunk_feed_forward(size, dim)


class _StoreHook:
    """Hook of a down block: moves the outputs that it leaves for the up blocks to host memory.

    The buffers are pinned and used again in each call. Copies are queued on the current stream, in order, so the host
    never waits.
    """

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def __call__(self, block: nn.Module, args: Any, output: tuple[Tensor, tuple[Tensor, ...]]) -> Any:
        hidden_states, skips = output
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            raise RuntimeError("offload_skips keeps no gradients; run under torch.no_grad(), or train without it.")
        if hidden_states.device.type == "meta":  # a walk that counts bytes: these are not on the device
            return hidden_states, tuple(skip.new_empty(1).expand(skip.shape) for skip in skips)
        stale = [(b.shape, b.dtype) for b in self.buffers] != [(skip.shape, skip.dtype) for skip in skips]
        if stale:
            pin = hidden_states.device.type == "cuda"
            self.buffers = [torch.empty(skip.shape, dtype=skip.dtype, pin_memory=pin) for skip in skips]
        for buffer, skip in zip(self.buffers, skips, strict=True):
            buffer.copy_(skip, non_blocking=True)
        return hidden_states, tuple(self.buffers)


class _Waiting(tuple[Tensor, ...]):
    """Skip connections in host memory. A block takes them one by one, `skips[-1]` and then `skips[:-1]`: each comes to
    the device when it is asked for, and none waits there for its turn."""

    device: torch.device

    @classmethod
    def of(cls, skips: tuple[Tensor, ...], device: torch.device) -> _Waiting:
        waiting = cls(skips)
        waiting.device = device
        return waiting

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        if isinstance(index, slice):
            return _Waiting.of(found, self.device)
        # On the meta device all of them stand for the one element that was kept.
        return found.contiguous() if self.device.type == "meta" else found.to(self.device, non_blocking=True)


class _FetchHook:
    """Pre-hook of an up block: lets it fetch its skip connections."""

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        device = (args[0] if args else kwargs["hidden_states"]).device
        return args, {**kwargs, "res_hidden_states_tuple": _Waiting.of(kwargs["res_hidden_states_tuple"], device)}


class _RefuseResiduals:
    """Pre-hook of the UNet: what ControlNet and T2I-Adapter add to the skips would miss those that are away."""

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for name in ("down_block_additional_residuals", "down_intrablock_additional_residuals"):
            if kwargs.get(name) is not None:
                raise ValueError(f"offload_skips cannot run with {name} (ControlNet, T2I-Adapter); turn either off.")


@contextmanager
def _offloaded_skips(model: Any) -> Iterator[None]:
    handles = [model.register_forward_pre_hook(_RefuseResiduals(), with_kwargs=True)]
    handles += [block.register_forward_hook(_StoreHook()) for block in model.down_blocks]
    handles += [block.register_forward_pre_hook(_FetchHook(), with_kwargs=True) for block in model.up_blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
