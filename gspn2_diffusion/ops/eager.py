"""The scan in plain torch: a loop over lines, everything else vectorised. Runs on any device; the CPU's path.

Directions whose lines have the same number and length run together (all four on a square map), so one step of the
loop is three fused multiply-adds for all of them. (A dense m x m matrix product for each line was tried: no faster at
m = 8, slower at 64.)
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch


class _Block(NamedTuple):
    """Directions scanned together: place in `directions`, whether horizontal, whether last to first; n lines of m."""

    places: tuple[int, ...]
    horizontal: tuple[bool, ...]
    backwards: tuple[bool, ...]
    n: int
    m: int


@lru_cache(256)
def _blocks(H: int, W: int, directions: tuple[int, ...]) -> list[_Block]:
    lines = [(W, H) if direction < 2 else (H, W) for direction in directions]
    blocks = []
    for n, m in dict.fromkeys(lines):
        places = tuple(place for place, own in enumerate(lines) if own == (n, m))
        horizontal, backwards = zip(*((directions[p] < 2, directions[p] % 2 == 1) for p in places), strict=True)
        blocks.append(_Block(places, horizontal, backwards, n, m))
    return blocks


KEPT = 1 << 16  # pixels of a map up to which its orders are kept for the next call


def _kept(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Results are kept, unless the map is so large that making one again costs nothing beside the scan."""
    remembering = lru_cache(64)(function)
    return lambda shape, *rest: (remembering if math.prod(shape) <= KEPT else function)(shape, *rest)


@_kept
def _order(shape: tuple[int, int, int], block: _Block, sources: int, device: torch.device) -> torch.Tensor:
    """For each of (n, directions of the block, B, m), in scan order, which of (B, H, W, `sources` directions) it is."""
    pixel = torch.arange(shape[0] * shape[1] * shape[2], device=device).view(shape)
    rows = []
    for place, horizontal, backwards in zip(block.places, block.horizontal, block.backwards, strict=True):
        row = pixel.movedim(2, 0) if horizontal else pixel.movedim(1, 0)  # (n, B, m)
        rows.append((row.flip(0) if backwards else row) * sources + (place if sources > 1 else 0))
    return torch.stack(rows, 1).flatten()


@_kept
def _order_back(shape: tuple[int, int, int], block: _Block, device: torch.device) -> torch.Tensor:
    """For each of (B, H, W, directions of the block) which of (n, directions of the block, B, m) it is."""
    count = len(block.places)
    order = _order(shape, block._replace(places=tuple(range(count))), count, device)
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=device))


def _to_lines(t: torch.Tensor, block: _Block) -> torch.Tensor:
    """(B, H, W, K or 1, ...) -> (n, directions of the block, B, m, ...), in scan order; a copy."""
    B, H, W, sources = t.shape[:4]
    rows = t.reshape(B * H * W * sources, math.prod(t.shape[4:]))
    lines = rows.index_select(0, _order((B, H, W), block, sources, t.device))
    return lines.view(block.n, len(block.places), B, block.m, *t.shape[4:])


def _from_lines(parts: list[torch.Tensor], blocks: list[_Block], H: int, W: int) -> torch.Tensor:
    """Lines of each block, (n, directions of the block, B, m, ...) in scan order -> (B, H, W, K, ...)."""
    maps = []
    for lines, block in zip(parts, blocks, strict=True):
        B, rest = lines.shape[2], lines.shape[4:]
        order = _order_back((B, H, W), block, lines.device)
        rows = lines.reshape(order.numel(), math.prod(rest)).index_select(0, order)
        maps.append(rows.view(B, H, W, len(block.places), *rest))
    if len(maps) == 1:
        return maps[0]
    places = [place for block in blocks for place in block.places]
    out = torch.cat(maps, 3)
    return out if places == sorted(places) else out[:, :, :, [places.index(place) for place in range(len(places))]]


def _weights(logits: torch.Tensor, softmax: bool, segment: int) -> torch.Tensor:
    """Weights (n, R, B, m, G, 3) from logits in scan order; missing taps, and lines that restart the scan, get 0.

    Overwrites the logits of the taps that do not exist with -inf.
    """
    logits[:, :, :, 0, :, 0] = float("-inf")
    logits[:, :, :, -1, :, 2] = float("-inf")
    if softmax:
        weights = logits.softmax(-1)
    else:
        # 1 / (exp(c - l) + exp(c)) is sigmoid(l) exp(-c): the largest of the three is at least 1/2, so never 0 / 0.
        c = logits.amax(-1, keepdim=True).clamp_(max=0)
        weights = (c - logits).exp_().add_(c.exp()).reciprocal_()
        weights /= weights.sum(-1, keepdim=True)
    weights[:: segment or logits.shape[0]] = 0
    return weights


def _propagate(state: torch.Tensor, w: torch.Tensor, transposed: bool) -> None:
    """In place on `state` (n, R, B, m, D): state[i] += w[i] state[i-1]; transposed, state[i] += w[i+1]^T state[i+1]."""
    n, R, B, m, D = state.shape
    G = w.shape[4]
    last_to_first = range(n - 2, -1, -1)
    state, w = state.view(n, R * B, m, G, D // G), w.view(n, R * B, m, G, 3)
    whole, low, high = state.unbind(0), state[:, :, :-1].unbind(0), state[:, :, 1:].unbind(0)
    centre = w[..., 1:2].unbind(0)
    below = w[:, :, 1:, :, 0:1].unbind(0)  # weight of j - 1 at j = 1 ... m - 1
    above = w[:, :, :-1, :, 2:3].unbind(0)  # weight of j + 1 at j = 0 ... m - 2
    if transposed:
        for i in last_to_first:
            whole[i].addcmul_(centre[i + 1], whole[i + 1])
            low[i].addcmul_(below[i + 1], high[i + 1])
            high[i].addcmul_(above[i + 1], low[i + 1])
    else:
        for i in range(1, n):
            whole[i].addcmul_(centre[i], whole[i - 1])
            high[i].addcmul_(below[i], low[i - 1])
            low[i].addcmul_(above[i], high[i - 1])


def _decayed(w: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Weights (n, R, B, m, G, 3) times 1 - share (n, R, B, m, D): each channel its own, (n, R, B, m, D, 3)."""
    return w.repeat_interleave(share.shape[4] // w.shape[4], dim=4) * (1 - share).unsqueeze(-1)


def _carried(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The sum over the taps of w[i] h[i-1], as h (n, R, B, m, D)."""
    n, R, B, m, D = h.shape
    before = h.new_zeros(n, R, B, m + 2, w.shape[4], D // w.shape[4])
    before[1:, :, :, 1:-1] = h.view(n, R, B, m, w.shape[4], -1)[:-1]
    carried = torch.zeros_like(before[:, :, :, 1:-1])
    for t in range(3):
        carried.addcmul_(w[..., t : t + 1], before[:, :, :, t : t + m])
    return carried.reshape(h.shape)


def _accumulation_type(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def scan_forward(
    x: torch.Tensor,
    lam: torch.Tensor | None,
    u: torch.Tensor | None,
    logits: torch.Tensor,
    directions: Sequence[int],
    softmax: bool,
    segment: int,
    merge_sum: bool,
    save_state: bool,
    decay: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y, and the state (B, H, W, K, D) if `save_state` (else no elements). `segment` 0 is the global scan."""
    dtype = _accumulation_type(x)
    _, H, W, _ = x.shape
    blocks = _blocks(H, W, tuple(directions))
    gated = x.to(dtype).unsqueeze(3)
    if lam is not None:
        gated = gated * lam
    logits = logits.to(dtype)
    states = []
    for block in blocks:
        state = _to_lines(gated, block)
        w = _weights(_to_lines(logits, block), softmax, segment)
        if decay and lam is not None:
            w = _decayed(w, _to_lines(lam.to(dtype), block))
        _propagate(state, w, transposed=False)
        states.append(state)
    h = _from_lines(states, blocks, H, W)
    # Without output gate y may be h; an operator's results are never the same tensor.
    saved = h.to(x.dtype, copy=u is None) if save_state else x.new_empty((0,))
    y = h if u is None else h * u
    return (y.sum(3) if merge_sum else y).to(x.dtype), saved


def scan_backward(
    grad_y: torch.Tensor,
    saved: torch.Tensor,
    x: torch.Tensor,
    lam: torch.Tensor | None,
    u: torch.Tensor | None,
    logits: torch.Tensor,
    directions: Sequence[int],
    softmax: bool,
    segment: int,
    merge_sum: bool,
    decay: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, lam, u, logits, in their shapes and types (no elements where the argument is None)."""
    dtype = _accumulation_type(x)
    _, H, W, D = x.shape
    G = logits.shape[4]
    blocks = _blocks(H, W, tuple(directions))
    h = saved.to(dtype)
    into_h = grad_y.to(dtype)
    if merge_sum:
        into_h = into_h.unsqueeze(3)
    grad_u = x.new_zeros((0,))
    if u is not None:
        grad_u = _as_given(into_h * h, u)
        into_h = into_h * u
    accurate = logits.to(dtype)
    states, grads, carried = [], [], []
    for block in blocks:
        raw = _to_lines(accurate, block)
        w = _weights(raw, softmax, segment)
        h_lines = _to_lines(h, block)
        g = _to_lines(into_h, block)
        reaching = g  # the sum over the taps
        if decay and lam is not None:
            share = _to_lines(lam.to(dtype), block)
            _propagate(g, _decayed(w, share), transposed=True)
            reaching = g * (1 - share)
            carried.append(_carried(h_lines, w))
        else:
            _propagate(g, w, transposed=True)
        states.append(g)

        g_lines, h_lines = (t.unflatten(-1, (G, D // G)) for t in (reaching, h_lines))
        grad_w = torch.zeros_like(w)
        grad_w[1:, ..., 1] = (g_lines[1:] * h_lines[:-1]).sum(-1)
        grad_w[1:, :, :, 1:, :, 0] = (g_lines[1:, :, :, 1:] * h_lines[:-1, :, :, :-1]).sum(-1)
        grad_w[1:, :, :, :-1, :, 2] = (g_lines[1:, :, :, :-1] * h_lines[:-1, :, :, 1:]).sum(-1)
        grad_raw = (grad_w - (grad_w * w).sum(-1, keepdim=True)) * w
        if not softmax:
            grad_raw *= torch.sigmoid(-raw)
        grads.append(grad_raw)

    g = _from_lines(states, blocks, H, W)
    grad_lam = x.new_zeros((0,))
    if lam is not None:
        fresh = x.to(dtype).unsqueeze(3)
        grad_lam = _as_given(g * (fresh - _from_lines(carried, blocks, H, W) if decay else fresh), lam)
        g = g * lam
    return g.sum(3).to(x.dtype), grad_lam, grad_u, _from_lines(grads, blocks, H, W).to(logits.dtype)


def _as_given(grad: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A gradient for each direction, summed where the directions share `t`, in t's type."""
    return (grad.sum(3, keepdim=True) if t.shape[3] < grad.shape[3] else grad).to(t.dtype)
