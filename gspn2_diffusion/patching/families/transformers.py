"""Diffusion transformers whose blocks have a self-attention of their own and read the text by cross-attention, if at
all: DiT, PixArt, Sana, HunyuanDiT, Lumina-Next."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from ...layers.init import dense_weight
from .base import Family, Layout, Matrices, Site, attention_matrices, patched_map_layout


def blocks_named(blocks: str) -> Callable[[Any], Iterator[Site]]:
    """Lists the self-attentions `<blocks>.N.attn1`."""
    pattern = re.compile(rf"{blocks}\.\d+\.attn1")

    def find_sites(model: Any) -> Iterator[Site]:
        for name, module in model.named_modules():
            # With only_cross_attention, attn1 reads the condition instead of the map.
            if pattern.fullmatch(name) and not module.is_cross_attention:
                yield Site(name, scope="", kind="self", factor=getattr(model.config, "patch_size", None) or 1)

    return find_sites


def transformer_2d_layout(module: Any, arguments: dict[str, Any]) -> Layout:
    """Transformer2DModel takes maps, patched or not, or (B, N) codes of the map that its config gives."""
    if arguments["hidden_states"].ndim == 4:
        return patched_map_layout(module, arguments)
    return Layout(((module.height, module.width),))


def lumina_matrices(model: Any, site: Site) -> Matrices:
    """Lumina-Next: heads share values in groups, and attn1's output goes through attn2's projection."""
    block = model.get_submodule(site.name.rpartition(".")[0])
    attention = block.attn1
    value = dense_weight(attention.to_v)
    out = dense_weight(block.attn2.to_out[0])
    head = out.shape[1] // attention.heads
    repeats = out.shape[1] // value.shape[0]
    value = value.unflatten(0, (-1, head)).repeat_interleave(repeats, dim=0).flatten(0, 1)
    return Matrices(value, out, None)


FAMILIES = (
    Family("DiTTransformer2DModel", "DiT-XL/2", blocks_named("transformer_blocks"), patched_map_layout),
    Family(
        "Transformer2DModel",
        "DiT and PixArt in older checkpoints",
        blocks_named("transformer_blocks"),
        transformer_2d_layout,
    ),
    Family(
        "PixArtTransformer2DModel", "PixArt-alpha, PixArt-Sigma", blocks_named("transformer_blocks"), patched_map_layout
    ),
    Family(
        "SanaTransformer2DModel", "Sana, Sana-1.5, Sana-Sprint", blocks_named("transformer_blocks"), patched_map_layout
    ),
    Family("HunyuanDiT2DModel", "Hunyuan-DiT", blocks_named("blocks"), patched_map_layout, attention_matrices),
    Family("LuminaNextDiT2DModel", "Lumina-Next", blocks_named("layers"), patched_map_layout, lumina_matrices),
)
