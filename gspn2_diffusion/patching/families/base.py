"""What a family of models has to say about itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...layers.init import dense_weight

Grid = tuple[int, int]


class Layout(NamedTuple):
    """How the tokens of one call stand in their sequence.

    Args:
        segments: (height, width) in tokens of the image and of any reference images behind it, each in row-major order.
        text: number of text tokens in front of them, in an attention that gets both in one sequence.
    """

    segments: tuple[Grid, ...]
    text: int = 0


class Matrices(NamedTuple):
    """An attention's value matrix (inner, C), its output matrix (C_out, inner) and the value bias (inner,) or None."""

    value: Tensor
    out: Tensor
    bias: Tensor | None


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


def attention_matrices(model: nn.Module, site: Site) -> Matrices:
    """W_v and W_o where the attention has both: `to_v` and `to_out[0]`."""
    attention: Any = model.get_submodule(site.name)
    bias = getattr(attention.to_v, "base_layer", attention.to_v).bias
    return Matrices(dense_weight(attention.to_v), dense_weight(attention.to_out[0]), bias)


@dataclass(frozen=True)
class Family:
    """One row of the table of supported models.

    Args:
        model_class: the diffusers class, by name, so that old and new diffusers can be served without importing it.
        examples: models that users know it by.
        find_sites: lists the model's self-attentions.
        read_layout: (scope module, bound arguments by name) -> the layout of this call's tokens.
        matrices: (model, site) -> the attention's value and output matrices, for the start from the teacher.
        guard: where `read_layout` reads numbers out of a tensor, which a compiled graph takes for constants:
            (arguments, layout) -> arguments to pass instead, by name, behind a check at each call of the graph.
    """

    model_class: str
    examples: str
    find_sites: Callable[[nn.Module], Iterator[Site]]
    read_layout: Callable[[nn.Module, dict[str, Any]], Layout]
    matrices: Callable[[nn.Module, Site], Matrices] = attention_matrices
    guard: Callable[[dict[str, Any], Layout], dict[str, Tensor]] | None = None


def map_layout(module: nn.Module, arguments: dict[str, Any]) -> Layout:
    """The layout where the scope sees the map itself: `hidden_states` is (B, C, H, W)."""
    height, width = arguments["hidden_states"].shape[-2:]
    return Layout(((height, width),))


def patched_map_layout(module: Any, arguments: dict[str, Any]) -> Layout:
    """The layout where the model cuts its (B, C, H, W) `hidden_states` into patches of `config.patch_size`."""
    height, width = arguments["hidden_states"].shape[-2:]
    patch = module.config.patch_size or 1
    return Layout(((height // patch, width // patch),))


def packed_layout(module: nn.Module, arguments: dict[str, Any]) -> Layout:
    """The layout of tokens that come packed, from their position ids: `img_ids` (N, 3 or more) of time, row, column.

    Reading the ids waits for the device, so the result stays with the tensor, which a pipeline passes at every step.

    Raises:
        ValueError: the ids are no whole grids, or Flux.2 is asked to keep the keys of its reference images.
    """
    if arguments.get("kv_cache_mode") is not None:
        raise ValueError(
            "kv_cache_mode keeps the keys of reference images, which a line scan does not have; call without it, or "
            "remove_gspn2."
        )
    ids = arguments["img_ids"]
    text = arguments["encoder_hidden_states"].shape[1]
    return Layout((_while_compiling if torch.compiler.is_compiling() else known_segments)(ids), text)


def packed_layout_guard(arguments: dict[str, Any], layout: Layout) -> dict[str, Tensor]:
    """In a compiled graph, the position ids behind a check that they are still those of the layout it was compiled for:
    24 x 16 and 16 x 24 tokens have ids of one shape."""
    sides = [side for grid in layout.segments for side in grid]
    return {"img_ids": torch.ops.gspn2.same_segments(arguments["img_ids"], sides)}


def known_segments(ids: Tensor) -> tuple[Grid, ...]:
    """`segments_of`, kept with the tensor until it is written to."""
    version = None if ids.is_inference() else ids._version
    known = getattr(ids, "_gspn2_segments", None)
    if known is None or known[0] != version:
        known = version, segments_of(ids)
        ids._gspn2_segments = known  # type: ignore[attr-defined]
    return known[1]


@torch.compiler.assume_constant_result
def _while_compiling(ids: Tensor) -> tuple[Grid, ...]:
    """`segments_of` the ids that the graph is compiled with."""
    return segments_of(ids)


# It may wait for the device, which a CUDA graph cannot; torch before 2.9 has no name for that, and its oldest no tags.
_UNSAFE: dict[str, Any] = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


@torch.library.custom_op("gspn2::same_segments", mutates_args=(), **_UNSAFE)
def _same_segments(ids: Tensor, sides: list[int]) -> Tensor:
    found = [side for grid in known_segments(ids) for side in grid]
    if found != sides:
        raise RuntimeError(
            f"The compiled model was made for images of sides {sides} in tokens and img_ids now say {found}; call "
            "torch.compiler.reset() to compile it again, or compile its blocks alone (compile_repeated_blocks)."
        )
    return ids.clone()


@_same_segments.register_fake
def _(ids: Tensor, sides: list[int]) -> Tensor:
    return torch.empty_like(ids)


def segments_of(ids: Tensor) -> tuple[Grid, ...]:
    """Sides of the images whose position ids (N, 3 or more) or (B, N, 3 or more) follow one another.

    A new image starts where the time (column 0) changes. Sides are read from where the columns start anew, not from the
    largest row or column: ids in bfloat16 are rounded beyond 256.

    Raises:
        ValueError: an image's ids are not a whole grid in row-major order.
    """
    values = (ids[0] if ids.ndim == 3 else ids)[:, :3].detach().float().cpu()
    sizes = torch.unique_consecutive(values[:, 0], return_counts=True)[1].tolist()
    return tuple(_sides(part) for part in values.split(sizes))


def _sides(ids: Tensor) -> Grid:
    rows, columns = ids[:, 1], ids[:, 2]
    tokens = len(ids)
    restarts = (columns[1:] < columns[:-1]).nonzero()
    one_line = tokens if columns[0] != columns[-1] else 1
    width = int(restarts[0]) + 1 if len(restarts) else one_line
    if tokens % width == 0:
        rows, columns = rows.view(-1, width), columns.view(-1, width)
        whole = (rows == rows[:, :1]).all() and (columns == columns[:1]).all() and (rows[1:] >= rows[:-1]).all()
        if whole and (columns[:, 1:] >= columns[:, :-1]).all():
            return tokens // width, width
    raise ValueError(
        f"img_ids of {tokens} tokens are not a whole grid in row-major order; pass ids as the pipelines prepare "
        "them, or remove_gspn2."
    )
