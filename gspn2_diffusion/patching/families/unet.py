"""UNets whose Transformer2DModel blocks see the map: Stable Diffusion 1.x, 2.x, SDXL, and their ControlNets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from .base import Family, Site, last_two_sides

ATTENTION = re.compile(r"((?:down_blocks|up_blocks)\.(\d+)|mid_block)\.attentions\.\d+\.transformer_blocks\.\d+\.attn1")


def find_sites(model: Any) -> Iterator[Site]:
    levels = len(model.config.down_block_types)
    for name, module in model.named_modules():
        match = ATTENTION.fullmatch(name)
        # With only_cross_attention, attn1 reads the prompt instead of the map.
        if not match or module.is_cross_attention:
            continue
        if match[1] == "mid_block":
            level = levels - 1
        else:
            block = int(match[2])
            level = block if name.startswith("down") else levels - 1 - block
        yield Site(name, scope=name.split(".transformer_blocks.")[0], kind="self", factor=2**level)


FAMILIES = (
    Family("UNet2DConditionModel", "Stable Diffusion 1.5, 2.1, SDXL", find_sites, last_two_sides),
    Family("ControlNetModel", "ControlNets of Stable Diffusion and SDXL", find_sites, last_two_sides),
)
