"""Qwen-Image: joint attention with complex rotary embeddings; `img_shapes` names the sides of the packed images."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from .base import Family, Layout, Site

ATTENTION = re.compile(r"transformer_blocks\.\d+\.attn")


def find_sites(model: Any) -> Iterator[Site]:
    for name, _ in model.named_modules():
        if ATTENTION.fullmatch(name):
            yield Site(name, scope="", kind="joint_complex", factor=2)


def read_layout(module: Any, arguments: dict[str, Any]) -> Layout:
    """`img_shapes` is, for each picture of the batch, a list of (frames, height, width), or one such triple.

    Raises:
        ValueError: the pictures of the batch have different shapes.
    """
    shapes = [[shape] if isinstance(shape[0], int) else list(shape) for shape in arguments["img_shapes"]]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"img_shapes differ within the batch ({shapes}); pass pictures of one shape in a batch.")
    segments = tuple((height, width) for frames, height, width in shapes[0] for _ in range(frames))
    return Layout(segments, arguments["encoder_hidden_states"].shape[1])


FAMILIES = (Family("QwenImageTransformer2DModel", "Qwen-Image, Qwen-Image-Edit", find_sites, read_layout),)
