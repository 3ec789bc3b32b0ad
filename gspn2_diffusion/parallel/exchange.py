"""What the ranks of a group tell each other, on torch.distributed (NCCL, gloo), with gradients.

Everything is one primitive, the all-to-all, whose gradient is the all-to-all back. Sums over ranks are taken in rank
order, so the same inputs give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any


def row_heights(height: int, ranks: int, unit: int = 1) -> list[int]:
    """How many of `height` rows each rank holds: whole units of `unit` rows, the first ranks one unit more, the last
    rank whatever is left of the last unit.

    Raises:
        ValueError: there are fewer units than ranks.
    """
    units = -(-height // unit)
    if units < ranks:
        each = f"{unit} rows" if unit > 1 else "one row"
        raise ValueError(f"{height} rows do not give each of {ranks} ranks {each}; use at most {units} ranks.")
    heights = [(units // ranks + (rank < units % ranks)) * unit for rank in range(ranks)]
    heights[-1] -= units * unit - height
    return heights


def all_to_all(parts: Sequence[Tensor], shapes: Sequence[Sequence[int]], group: Group = None) -> list[Tensor]:
    """Sends `parts[q]` to rank q and returns what each rank q sent here, which has shape `shapes[q]`."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    flat = torch.cat([part.reshape(-1) for part in parts])
    received = _AllToAll.apply(flat, [part.numel() for part in parts], sizes, group)
    return [chunk.view(tuple(shape)) for chunk, shape in zip(received.split(sizes), shapes, strict=True)]


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flat: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
        ctx.sizes, ctx.group = (sent, received), group
        return _exchange(flat, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        sent, received = ctx.sizes
        return _exchange(grads[0].contiguous(), received, sent, ctx.group), None, None, None


def _exchange(flat: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    out = flat.new_empty(sum(received))
    dist.all_to_all_single(out, flat, received, sent, group=group)
    return out


def gather_rows(shard: Tensor, heights: Sequence[int], group: Group = None) -> Tensor:
    """(B, own rows, ...) -> (B, all rows, ...) on every rank. In backward each row's gradients of all ranks add up."""
    shapes = [(shard.shape[0], rows, *shard.shape[2:]) for rows in heights]
    return torch.cat(all_to_all([shard] * len(heights), shapes, group), dim=1)


def neighbour_rows(shard: Tensor, group: Group = None) -> tuple[Tensor, Tensor]:
    """The row above and the row below a shard (B, C, rows, W), each (B, C, 1, W): zeros at the picture's edges."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    edges = {rank - 1: shard[:, :, :1], rank + 1: shard[:, :, -1:]}
    parts = [edges[other] if other in edges else shard[:, :, :0] for other in range(ranks)]
    came = dict(enumerate(all_to_all(parts, [part.shape for part in parts], group)))
    above, below = (came[other] if other in came else torch.zeros_like(edges[other]) for other in (rank - 1, rank + 1))
    return above, below
