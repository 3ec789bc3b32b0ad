"""CogView4: joint attention whose projections are shared by text and image."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from .base import Family, Site, patched_map_layout

ATTENTION = re.compile(r"transformer_blocks\.\d+\.attn1")


def find_sites(model: Any) -> Iterator[Site]:
    for name, _ in model.named_modules():
        if ATTENTION.fullmatch(name):
            yield Site(name, scope="", kind="joint_shared", factor=model.config.patch_size)


FAMILIES = (Family("CogView4Transformer2DModel", "CogView4", find_sites, patched_map_layout),)
