"""UNets: those whose Transformer2DModel blocks see the map (Stable Diffusion 1.x, 2.x, SDXL and their ControlNets) and
those without text, whose attentions get the map itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from .base import Family, Layout, Site, map_layout

BLOCK = r"(?:(?:down_blocks|up_blocks)\.(\d+)|mid_block)\.attentions\.\d+"
ATTENTION = re.compile(BLOCK + r"\.transformer_blocks\.\d+\.attn1")
MAP_ATTENTION = re.compile(BLOCK)


def find_sites(model: Any) -> Iterator[Site]:
    for name, module in model.named_modules():
        match = ATTENTION.fullmatch(name)
        # With only_cross_attention, attn1 reads the prompt instead of the map.
        if match and not module.is_cross_attention:
            yield Site(name, scope=name.split(".transformer_blocks.")[0], kind="self", factor=_factor(model, match))


def find_map_sites(model: Any) -> Iterator[Site]:
    for name, module in model.named_modules():
        match = MAP_ATTENTION.fullmatch(name)
        if match and hasattr(module, "to_q"):
            yield Site(name, scope="", kind="self", factor=_factor(model, match))


def _factor(model: Any, match: re.Match[str]) -> int:
    levels = len(model.config.down_block_types)
    if match[1] is None:
        return 2 ** (levels - 1)
    level = int(match[1])
    return 2 ** (level if match[0].startswith("down") else levels - 1 - level)


def sample_layout(module: Any, arguments: dict[str, Any]) -> Layout:
    """The latents' own sides. The attentions of a UNet2DModel get maps and need none."""
    height, width = arguments["sample"].shape[-2:]
    return Layout(((height, width),))


FAMILIES = (
    Family("UNet2DConditionModel", "Stable Diffusion 1.5, 2.1, SDXL", find_sites, map_layout),
    Family("ControlNetModel", "ControlNets of Stable Diffusion and SDXL", find_sites, map_layout),
    Family("UNet2DModel", "DDPM, unconditional UNets", find_map_sites, sample_layout),
)
