"""Flux, Chroma and Flux.2: joint attention in double-stream blocks, then blocks on text and image in one sequence.
Tokens come packed, with their places in `img_ids`; Kontext and Flux.2 append reference images."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ...layers.init import dense_weight
from .base import Family, Matrices, Site, attention_matrices, packed_layout, packed_layout_guard

ATTENTION = re.compile(r"(single_)?transformer_blocks\.\d+\.attn")


def find_sites(model: Any) -> Iterator[Site]:
    for name, module in model.named_modules():
        match = ATTENTION.fullmatch(name)
        if match:
            single = "single_fused" if hasattr(module, "to_qkv_mlp_proj") else "single"
            yield Site(name, scope="", kind=single if match[1] else "joint", factor=2)


def matrices(model: Any, site: Site) -> Matrices:
    """In the single-stream blocks, W_o is the part of the block's output projection that reads the attention."""
    if site.kind == "joint":
        return attention_matrices(model, site)
    attention = model.get_submodule(site.name)
    if site.kind == "single_fused":
        inner = attention.inner_dim
        fused = attention.to_qkv_mlp_proj
        bias = getattr(fused, "base_layer", fused).bias
        value = dense_weight(fused)[2 * inner : 3 * inner]
        return Matrices(
            value, dense_weight(attention.to_out)[:, :inner], None if bias is None else bias[2 * inner : 3 * inner]
        )
    value = dense_weight(attention.to_v)
    out = dense_weight(model.get_submodule(site.name.rpartition(".")[0]).proj_out)
    return Matrices(value, out[:, : value.shape[0]], getattr(attention.to_v, "base_layer", attention.to_v).bias)


FAMILIES = (
    Family(
        "FluxTransformer2DModel",
        "Flux.1 dev, schnell, Kontext, Fill",
        find_sites,
        packed_layout,
        matrices,
        packed_layout_guard,
    ),
    Family("FluxControlNetModel", "ControlNets of Flux.1", find_sites, packed_layout, matrices, packed_layout_guard),
    Family("ChromaTransformer2DModel", "Chroma", find_sites, packed_layout, matrices, packed_layout_guard),
    Family("Flux2Transformer2DModel", "Flux.2", find_sites, packed_layout, matrices, packed_layout_guard),
)
