"""Stable Diffusion 3 and 3.5: joint attention over image and text; 3.5-medium adds `attn2` over the image alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from .base import Family, Site, patched_map_layout

ATTENTION = re.compile(r"transformer_blocks\.\d+\.(attn2?)")


def find_sites(model: Any) -> Iterator[Site]:
    for name, module in model.named_modules():
        match = ATTENTION.fullmatch(name)
        if match:
            # Some ControlNets have blocks without text; their only attention reads the image alone.
            joint = match[1] == "attn" and hasattr(module, "add_k_proj")
            yield Site(name, scope="", kind="joint" if joint else "self", factor=model.config.patch_size)


FAMILIES = (
    Family("SD3Transformer2DModel", "Stable Diffusion 3, 3.5 medium, 3.5 large", find_sites, patched_map_layout),
    Family("SD3ControlNetModel", "ControlNets of Stable Diffusion 3 and 3.5", find_sites, patched_map_layout),
)
