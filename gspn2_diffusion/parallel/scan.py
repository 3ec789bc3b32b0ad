"""The line scan over row shards. Once the taps are known its channels are independent (operator's equation: h of a
channel reads only that channel), so an all-to-all turns row shards into channel shards, each rank scans the whole map
for its channels, and an all-to-all turns them back: what DeepSpeed-Ulysses (arXiv 2309.14509) does with heads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops import gspn2_scan
from .exchange import Group, all_to_all, gather_rows


def sharded_gspn2_scan(
    x: Tensor,
    lam: Tensor | None,
    u: Tensor | None,
    logits: Tensor,
    *,
    heights: Sequence[int],
    group: Group = None,
    directions: tuple[str, ...] = ("right", "left", "down", "up"),
    normalizer: str = "sigmoid",
    segment: int | None = None,
    merge: str = "concat",
    decay: bool = False,
) -> Tensor:
    """`gspn2_scan` of a map whose rows are spread over the ranks of a group. A collective: every rank calls it.

    x and lam travel out, the state comes back; the taps' logits, 3 K G numbers a pixel, are gathered by every rank; the
    output gate is applied where its rows are. Equal to `gspn2_scan` of the whole map in float32; in half types the
    state is rounded once more before the output gate.

    Args:
        x: (B, h, W, D), h the rows of this rank, in rank order from the top.
        lam, u: (B, h, W, K, D), (B, h, W, 1, D) or None.
        logits: (B, h, W, K, G, 3).
        heights: rows of each rank; `heights[rank]` is h. See `row_heights`.
        group: the process group, None for the default one.
        directions, normalizer, segment, merge, decay: as in `gspn2_scan`; `segment` counts lines of the whole map.

    Returns:
        (B, h, W, K, D), or (B, h, W, D) with merge "sum": this rank's rows.

    Raises:
        ValueError: `heights` does not fit the group or x, or there are more ranks than channels to share out.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    heights = list(heights)
    if len(heights) != ranks:
        raise ValueError(f"`heights` has {len(heights)} entries for a group of {ranks} ranks; pass the rows of each.")
    if x.ndim != 4 or x.shape[1] != heights[rank]:
        raise ValueError(f"`x` has shape {tuple(x.shape)} on rank {rank}; pass (B, {heights[rank]}, W, D).")
    if ranks == 1:
        return gspn2_scan(
            x,
            lam,
            u,
            logits,
            directions=directions,
            normalizer=normalizer,
            segment=segment,
            merge=merge,
            decay=decay,
        )
    batch, own, width, channels = x.shape
    groups = logits.shape[4]
    slices = channel_slices(channels, groups, ranks)

    # x and lam in one message, so that there are three collectives in all.
    values = x.unsqueeze(3) if lam is None else torch.cat([x.unsqueeze(3), lam], dim=3)
    mine = len(slices[rank][0]) * len(slices[rank][1])
    shapes = [(batch, rows, width, values.shape[3], mine) for rows in heights]
    values = torch.cat(all_to_all([_take(values, groups, part) for part in slices], shapes, group), dim=1)
    taps = gather_rows(logits, heights, group)[..., list(slices[rank][0]), :]
    state = gspn2_scan(
        values[..., 0, :],
        None if lam is None else values[..., 1:, :],
        None,
        taps,
        directions=directions,
        normalizer=normalizer,
        segment=segment,
        decay=decay,
    )
    shapes = [(batch, own, width, len(directions), len(g) * len(c)) for g, c in slices]
    parts = all_to_all(state.split(heights, dim=1), shapes, group)
    y = _put(parts, slices)
    if u is not None:
        y = y * u
    # As the operator does, sum in float32.
    return y if merge == "concat" else y.sum(3, dtype=torch.promote_types(y.dtype, torch.float32)).to(y.dtype)


Slice = tuple[range, range]


def channel_slices(channels: int, groups: int, ranks: int) -> list[Slice]:
    """(weight groups, channels within each of them) of each rank: whole groups where there is one for each rank, else a
    part of every group.

    Raises:
        ValueError: some rank would have no channel.
    """
    within = channels // groups
    if groups >= ranks:
        return [(part, range(within)) for part in _ranges(groups, ranks)]
    if within >= ranks:
        return [(range(groups), part) for part in _ranges(within, ranks)]
    raise ValueError(
        f"{channels} channels in {groups} groups cannot be shared out to {ranks} ranks; use at most "
        f"{max(groups, within)} ranks."
    )


def _ranges(count: int, ranks: int) -> list[range]:
    bounds = [count * rank // ranks for rank in range(ranks + 1)]
    return [range(low, high) for low, high in pairwise(bounds)]


def _take(t: Tensor, groups: int, part: Slice) -> Tensor:
    """(..., D) -> (..., channels of the slice)."""
    in_groups, within = part
    t = t.unflatten(-1, (groups, -1))
    return t[..., in_groups.start : in_groups.stop, within.start : within.stop].flatten(-2)


def _put(parts: list[Tensor], slices: list[Slice]) -> Tensor:
    """The inverse of `_take` for all slices together."""
    parts = [part.unflatten(-1, (len(g), len(c))) for part, (g, c) in zip(parts, slices, strict=True)]
    by_group = slices[0][0] != slices[-1][0]
    return torch.cat(parts, dim=-2 if by_group else -1).flatten(-2)
