"""What a family of models has to say about itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

Grid = tuple[int, int]


@dataclass(frozen=True)
class Site:
    """One self-attention that can be replaced.

    Args:
        name: dotted name of the attention module in the model.
        scope: dotted name of the module whose call reveals the map's height and width ("" is the model itself).
        kind: which processor fits, a key of `patching.processors.PROCESSORS`.
        factor: how many latent pixels a token of this map spans along one side.
    """

    name: str
    scope: str
    kind: str
    factor: int


@dataclass(frozen=True)
class Family:
    """One row of the table of supported models.

    Args:
        model_class: the diffusers class, by name, so that old and new diffusers can be served without importing it.
        examples: models that users know it by.
        find_sites: lists the model's self-attentions.
        read_grid: (scope module, bound arguments by name) -> (height, width) in tokens.
    """

    model_class: str
    examples: str
    find_sites: Callable[[nn.Module], Iterator[Site]]
    read_grid: Callable[[nn.Module, dict[str, Any]], Grid]


def last_two_sides(module: nn.Module, arguments: dict[str, Any]) -> Grid:
    """The grid where the scope sees the map itself: `hidden_states` is (B, C, H, W)."""
    height, width = arguments["hidden_states"].shape[-2:]
    return height, width
