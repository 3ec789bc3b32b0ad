"""The three verbs: apply, remove, disabled. Either a verb works or nothing has changed."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..adapter import GSPN2Adapter, few
from ..layers import GSPN2Config, random_init, teacher_init
from ..layers.init import dense_weight
from .families import Family, Site, family_of, find_model
from .grid import BlockHook, GridRecord, ScopeHook, remove_hooks
from .processors import LAYER, PROCESSORS, STATE, PatchState

logger = logging.getLogger(__name__)


def apply_gspn2(
    pipe_or_model: Any,
    adapter: GSPN2Adapter | str | os.PathLike[str] | None = None,
    *,
    config: GSPN2Config | None = None,
) -> GSPN2Adapter:
    """Replaces the self-attention of a pipeline or model with GSPN-2 line scans, in place.

    The model is shared by every pipeline that holds it (`from_pipe`, img2img, ControlNet), so it is patched for all of
    them. Applying to a patched model replaces the patch. The adapter's layers become child modules `gspn2` of the
    attentions they replace; nothing else of the model changes, and `remove_gspn2` undoes it exactly.

    Args:
        pipe_or_model: a diffusers pipeline, or one of `supported_models()`.
        adapter: a trained adapter: a folder, a hub id or a `GSPN2Adapter`. None starts new layers from the attention
            they replace (or at random, by `config.init`); pictures need distillation first, so this warns.
        config: options for new layers; an adapter brings its own.

    Returns:
        The adapter that owns the layers: train its parameters, call its `save_pretrained`.

    Raises:
        TypeError: the pipeline or model is not supported.
        ValueError: `config` selects no layer or is given beside an adapter, or the adapter is for another model (the
            message says which names or shapes differ).
        OSError: the adapter cannot be read.
    """
    model = find_model(pipe_or_model)
    family = family_of(model)
    assert family is not None
    sites = {site.name: site for site in family.find_sites(model)}
    if adapter is None:
        loaded = _new_adapter(model, sites, config or GSPN2Config())
        logger.warning(
            "apply_gspn2 started %d new layers in %s without an adapter; distil them before you expect pictures "
            "(examples/distill.py).",
            len(loaded.layer_names),
            type(model).__name__,
        )
    elif config is not None:
        raise ValueError("config was given beside an adapter, which brings its own; leave one of them out.")
    else:
        loaded = adapter if isinstance(adapter, GSPN2Adapter) else GSPN2Adapter.from_pretrained(adapter)
        _check_fits(loaded, model, sites)
    remove_gspn2(model)
    _attach(model, family, [sites[name] for name in loaded.layer_names], loaded)
    return loaded


def remove_gspn2(pipe_or_model: Any) -> None:
    """Puts the original self-attention back, exactly: the same modules, state_dict keys, outputs. Nothing to remove is
    fine.

    Raises:
        TypeError: the pipeline or model is not supported.
    """
    model = find_model(pipe_or_model)
    for _, module, state in patched_modules(model):
        module.set_processor(state.original[0])
        delattr(module, LAYER)
        delattr(module, STATE)
    remove_hooks(model)


@contextmanager
def gspn2_disabled(pipe_or_model: Any) -> Iterator[None]:
    """Inside the block the model runs its original attention, from the same weights: the teacher of a distillation.

    Raises:
        TypeError: the pipeline or model is not supported.
    """
    states = [state for _, _, state in patched_modules(find_model(pipe_or_model))]
    before = [state.enabled for state in states]
    for state in states:
        state.enabled = False
    try:
        yield
    finally:
        for state, enabled in zip(states, before, strict=True):
            state.enabled = enabled


def patched_modules(model: nn.Module) -> list[tuple[str, Any, PatchState]]:
    """(name, attention module, state) of every replaced attention of a model."""
    return [(name, module, vars(module)[STATE]) for name, module in model.named_modules() if STATE in vars(module)]


def _new_adapter(model: nn.Module, sites: dict[str, Site], config: GSPN2Config) -> GSPN2Adapter:
    chosen = [
        site for site in sites.values() if config.selects(site.name) and _side(model, site, config) >= config.min_side
    ]
    if isinstance(config.layers, tuple) and (unknown := [name for name in config.layers if name not in sites]):
        raise ValueError(f"layers names {few(unknown)}, not a self-attention of this model; it has {few(sites)}.")
    if not chosen:
        raise ValueError(
            f"layers={config.layers!r} with min_side={config.min_side} selects none of the {len(sites)} "
            f"self-attentions ({few(sites)}); widen the choice."
        )
    widths = {}
    for site in chosen:
        value, out, _ = attention_matrices(model.get_submodule(site.name))
        widths[site.name] = {"channels": value.shape[1], "out_channels": out.shape[1]}
    # Deferred initialisation: nothing is drawn from the global generator, so users' seeds give the pictures they gave.
    with torch.device("meta"):
        adapter = GSPN2Adapter(type(model).__name__, widths, config.to_dict())
    first = attention_matrices(model.get_submodule(chosen[0].name))[0]
    adapter = adapter.to_empty(device=first.device if first.device.type != "meta" else "cpu").to(_float_type(first))
    for site in chosen:
        layer = adapter.layer(site.name)
        if config.init == "teacher":
            value, out, bias = attention_matrices(model.get_submodule(site.name))
            teacher_init(layer, value, out, bias)
        else:
            random_init(layer, seed=zlib.crc32(site.name.encode()))
    return adapter


def _side(model: nn.Module, site: Site, config: GSPN2Config) -> int:
    """The smaller side of the site's map at the size the model was made for; only looked up when a limit is set."""
    if not config.min_side:
        return 0
    sample = getattr(model.config, "sample_size", None)
    if sample is None:
        raise ValueError("min_side needs the model's config.sample_size, which is not set; name the layers instead.")
    smaller = sample if isinstance(sample, int) else min(sample)
    return -(-smaller // site.factor)


def _check_fits(adapter: GSPN2Adapter, model: nn.Module, sites: dict[str, Site]) -> None:
    base = adapter.base_class
    family = family_of(model)
    if base not in (type(model).__name__, family.model_class if family else None):
        raise ValueError(
            f"The adapter is for {base}, this model is {type(model).__name__}; use an adapter made for it."
        )
    unknown = [name for name in adapter.layer_names if name not in sites]
    differing = []
    for name in adapter.layer_names:
        if name in sites:
            value, out, _ = attention_matrices(model.get_submodule(name))
            layer = adapter.layer(name)
            needs, has = (value.shape[1], out.shape[1]), (layer.channels, layer.out_channels)
            if needs != has:
                differing.append(f"{name} is {has[0]} -> {has[1]} channels, the model needs {needs[0]} -> {needs[1]}")
    problems = ([f"the model has no self-attention {few(unknown)}"] if unknown else []) + (
        [few(differing)] if differing else []
    )
    if problems:
        raise ValueError(
            f"The adapter was made for another {base}: {'; '.join(problems)}; use one made for this model."
        )


def _attach(model: nn.Module, family: Family, sites: list[Site], adapter: GSPN2Adapter) -> None:
    records: dict[str, GridRecord] = {}
    hooked_blocks = set()
    try:
        for site in sites:
            attention: Any = model.get_submodule(site.name)
            if site.scope not in records:
                record = records[site.scope] = GridRecord(site.scope)
                model.get_submodule(site.scope).register_forward_pre_hook(
                    ScopeHook(record, family.read_grid), with_kwargs=True
                )
            record = records[site.scope]
            block = site.name.rpartition(".")[0]
            if block not in hooked_blocks:
                hooked_blocks.add(block)
                model.get_submodule(block).register_forward_pre_hook(BlockHook(record), with_kwargs=True)
            weight = attention_matrices(attention)[0]
            layer = adapter.layer(site.name)
            if weight.device.type != "meta":
                layer.to(weight.device, _float_type(weight))
            layer.train(attention.training)
            attention.add_module(LAYER, layer)
            object.__setattr__(attention, STATE, PatchState(site.name, (attention.processor,), record))
            attention.set_processor(PROCESSORS[site.kind]())
    except BaseException:
        remove_gspn2(model)
        raise


def attention_matrices(attention: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """W_v (inner, C), W_o (C_out, inner) and the value bias (inner,) or None of an attention module."""
    value = dense_weight(attention.to_v)
    bias = getattr(attention.to_v, "base_layer", attention.to_v).bias
    to_out = getattr(attention, "to_out", None)
    if to_out is None or isinstance(to_out[0], nn.Identity):
        return value, torch.eye(value.shape[0], device=value.device, dtype=value.dtype), bias
    return value, dense_weight(to_out[0]), bias


def _float_type(weight: torch.Tensor) -> torch.dtype:
    """The type for new layers beside `weight`: its own, or float32 beside a quantised or float8 one."""
    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    return weight.dtype if weight.dtype in floats else torch.float32
