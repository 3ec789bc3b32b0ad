"""AuraFlow: joint blocks, then blocks on text and image in one sequence. Register tokens stand before the text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from .base import Family, Layout, Site, patched_map_layout

ATTENTION = re.compile(r"(joint|single)_transformer_blocks\.\d+\.attn")


def find_sites(model: Any) -> Iterator[Site]:
    for name, _ in model.named_modules():
        match = ATTENTION.fullmatch(name)
        if match:
            yield Site(name, scope="", kind=match[1], factor=model.config.patch_size)


def read_layout(module: Any, arguments: dict[str, Any]) -> Layout:
    text = arguments["encoder_hidden_states"].shape[1] + module.register_tokens.shape[1]
    return Layout(patched_map_layout(module, arguments).segments, text)


FAMILIES = (Family("AuraFlowTransformer2DModel", "AuraFlow", find_sites, read_layout),)
