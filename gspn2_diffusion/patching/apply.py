"""The three verbs: apply, remove, disabled. Either a verb works or nothing has changed."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from ..adapter import GSPN2Adapter, few
from ..layers import GSPN2Config, random_init, teacher_init
from .families import Family, Site, family_of, find_model
from .fuse import unfuse_gspn2
from .grid import BlockHook, GridRecord, ScopeHook, remove_hooks
from .ip_adapters import put_on, refuse_ip_adapter, take_off
from .neighbours import (
    BaseModelSaver,
    GuardHook,
    layer_dtype,
    offloading_lifted,
    refuse_parallelism,
    tell_of_lora,
)
from .processors import LAYER, STATE, PatchState

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
    refuse_parallelism(model)
    if adapter is not None and config is not None:
        raise ValueError("config was given beside an adapter, which brings its own; leave one of them out.")
    if adapter is not None and not isinstance(adapter, GSPN2Adapter):
        adapter = GSPN2Adapter.from_pretrained(adapter)
    sites = {site.name: site for site in family.find_sites(model)}
    with offloading_lifted(model):
        if adapter is None:
            loaded = _new_adapter(model, family, sites, config or GSPN2Config())
        else:
            loaded = cast(GSPN2Adapter, adapter)
            _check_fits(loaded, model, family, sites)
        chosen = [sites[name] for name in loaded.layer_names]
        for site in chosen:
            refuse_ip_adapter(site.kind, model.get_submodule(site.name).processor)
        remove_gspn2(model)
        _attach(model, family, chosen, loaded)
    if adapter is None:
        logger.warning(
            "apply_gspn2 started %d new layers in %s without an adapter; distil them before you expect pictures "
            "(examples/distill.py).",
            len(loaded.layer_names),
            type(model).__name__,
        )
    return loaded


def remove_gspn2(pipe_or_model: Any) -> None:
    """Puts the original self-attention back, exactly: the same modules, state_dict keys, outputs. Nothing to remove is
    fine.

    Raises:
        TypeError: the pipeline or model is not supported.
    """
    model = find_model(pipe_or_model)
    patched = patched_modules(model)
    if not patched:
        remove_hooks(model)
        return
    unfuse_gspn2(model)
    with offloading_lifted(model):
        for _, module, state in patched:
            take_off(module, state)
            delattr(module, LAYER)
            delattr(module, STATE)
        remove_hooks(model)
        vars(model).pop("save_pretrained", None)


@contextmanager
def gspn2_disabled(pipe_or_model: Any) -> Iterator[None]:
    """Inside the block the model runs its original attention, from the same weights: the teacher of a distillation.

    Raises:
        TypeError: the pipeline or model is not supported.
    """
    enabled = [(module, state) for _, module, state in patched_modules(find_model(pipe_or_model)) if state.enabled]
    for module, state in enabled:
        switch(module, state, on=False)
    try:
        yield
    finally:
        for module, state in enabled:
            # The patch may have been removed inside the block.
            if vars(module).get(STATE) is state:
                switch(module, state, on=True)


def switch(module: Any, state: PatchState, on: bool) -> None:
    """Lets a patched attention run as GSPN-2, or as what it was."""
    state.enabled = on
    (put_on if on else take_off)(module, state)


def patched_modules(model: nn.Module) -> list[tuple[str, Any, PatchState]]:
    """(name, attention module, state) of every replaced attention of a model."""
    return [(name, module, vars(module)[STATE]) for name, module in model.named_modules() if STATE in vars(module)]


def _new_adapter(model: nn.Module, family: Family, sites: dict[str, Site], config: GSPN2Config) -> GSPN2Adapter:
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
    widths = {site.name: _widths(model, family, site) for site in chosen}
    # Deferred initialisation: nothing is drawn from the global generator, so users' seeds give the pictures they gave.
    with torch.device("meta"):
        adapter = GSPN2Adapter(type(model).__name__, widths, config.to_dict())
    first = family.matrices(model, chosen[0]).value
    adapter.to_empty(device=first.device if first.device.type != "meta" else "cpu")
    # Not ModelMixin's own `to`, which warns about modules to be kept in float32 even where there are none.
    nn.Module.to(adapter, dtype=layer_dtype(model, first))
    for site in chosen:
        layer = adapter.layer(site.name)
        if config.init == "teacher":
            teacher_init(layer, *family.matrices(model, site))
        else:
            random_init(layer, seed=zlib.crc32(site.name.encode()))
    return adapter


def _widths(model: Any, family: Family, site: Site) -> dict[str, int]:
    """The widths of a layer at a site, as the adapter's config keeps them."""
    value, out, _ = family.matrices(model, site)
    widths = {"channels": value.shape[1], "out_channels": out.shape[1]}
    return widths if site.kind == "self" else {**widths, "text_heads": model.get_submodule(site.name).heads}


def _side(model: nn.Module, site: Site, config: GSPN2Config) -> int:
    """The smaller side of the site's map at the size the model was made for; only looked up when a limit is set."""
    if not config.min_side:
        return 0
    sample = getattr(model.config, "sample_size", None)
    if sample is None:
        raise ValueError("min_side needs the model's config.sample_size, which is not set; name the layers instead.")
    smaller = sample if isinstance(sample, int) else min(sample)
    return -(-smaller // site.factor)


def _check_fits(adapter: GSPN2Adapter, model: nn.Module, family: Family, sites: dict[str, Site]) -> None:
    base = adapter.base_class
    if base not in (type(model).__name__, family.model_class):
        raise ValueError(
            f"The adapter is for {base}, this model is {type(model).__name__}; use an adapter made for it."
        )
    unknown = [name for name in adapter.layer_names if name not in sites]
    differing = []
    for name in adapter.layer_names:
        if name in sites:
            needs, has = _widths(model, family, sites[name]), adapter.config["layers"][name]
            if needs != has:
                differing.append(f"{name} is for {_in_words(has)}, the model needs {_in_words(needs)}")
    problems = ([f"the model has no self-attention {few(unknown)}"] if unknown else []) + (
        [few(differing)] if differing else []
    )
    if problems:
        raise ValueError(
            f"The adapter was made for another {base}: {'; '.join(problems)}; use one made for this model."
        )


def _in_words(widths: dict[str, int]) -> str:
    text = f" and {widths['text_heads']} text heads" if "text_heads" in widths else ""
    return f"{widths['channels']} -> {widths['out_channels']} channels{text}"


def _attach(model: nn.Module, family: Family, sites: list[Site], adapter: GSPN2Adapter) -> None:
    records: dict[str, GridRecord] = {}
    hooked_blocks = set()
    attentions = []
    try:
        for site in sites:
            attention: Any = model.get_submodule(site.name)
            if site.scope not in records:
                record, scope = GridRecord(site.scope), model.get_submodule(site.scope)
                records[site.scope] = record
                scope.register_forward_pre_hook(ScopeHook(record, family, scope), with_kwargs=True)
            record = records[site.scope]
            block = site.name.rpartition(".")[0]
            if block not in hooked_blocks:
                hooked_blocks.add(block)
                model.get_submodule(block).register_forward_pre_hook(BlockHook(record), with_kwargs=True)
            weight = next(parameter for parameter in attention.parameters() if parameter.ndim == 2)
            layer = adapter.layer(site.name)
            if weight.device.type != "meta":
                layer.to(weight.device, layer_dtype(model, weight))
            layer.train(attention.training)
            layer.stays_out_of_parts(site.name)
            attention.add_module(LAYER, layer)
            state = PatchState(site.name, (attention.processor,), record, site.kind)
            object.__setattr__(attention, STATE, state)
            put_on(attention, state)
            attentions.append(attention)
        guard = GuardHook(attentions)
        guard.told_of_lora = tell_of_lora(attentions)
        model.register_forward_pre_hook(guard, with_kwargs=True)
        object.__setattr__(model, "save_pretrained", BaseModelSaver(model))
    except BaseException:
        remove_gspn2(model)
        raise
