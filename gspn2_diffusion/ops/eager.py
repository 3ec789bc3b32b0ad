"""The scan in plain torch: a loop over lines, everything else vectorised. Runs on any device; the CPU's path.

Directions whose lines have the same number and length run together (all four on a square map), so one step of the
loop is three fused multiply-adds for all of them. (A dense m x m matrix product for each line was tried: no faster at
m = 8, slower at 64.)
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch


class _Block(NamedTuple):
    """Directions scanned together: place in `directions`, whether horizontal, whether last to first; n lines of m."""

    places: list[int]
    horizontal: list[bool]
    backwards: list[bool]
    n: int
    m: int

    def members(self) -> Iterator[tuple[int, bool, bool]]:
        return zip(self.places, self.horizontal, self.backwards, strict=True)


def _blocks(H: int, W: int, directions: Sequence[int]) -> list[_Block]:
    blocks: dict[tuple[int, int], _Block] = {}
    for place, direction in enumerate(directions):
        horizontal = direction < 2
        n, m = (W, H) if horizontal else (H, W)
        block = blocks.setdefault((n, m), _Block([], [], [], n, m))
        block.places.append(place)
        block.horizontal.append(horizontal)
        block.backwards.append(direction % 2 == 1)
    return list(blocks.values())


def _to_lines(t: torch.Tensor, block: _Block, dtype: torch.dtype) -> torch.Tensor:
    """(B, H, W, K or 1, ...) -> (n, directions of the block, B, m, ...), in scan order."""
    lines = t.new_empty((block.n, len(block.places), t.shape[0], block.m, *t.shape[4:]), dtype=dtype)
    for row, (place, horizontal, backwards) in enumerate(block.members()):
        part = t[:, :, :, place if t.shape[3] > 1 else 0]
        part = part.movedim(2, 0) if horizontal else part.movedim(1, 0)  # (n, B, m, ...)
        lines[:, row] = part.flip(0) if backwards else part
    return lines


def _from_lines(lines: torch.Tensor, block: _Block, out: torch.Tensor) -> None:
    """Write lines in scan order back to `out` (B, H, W, K, ...)."""
    for row, (place, horizontal, backwards) in enumerate(block.members()):
        part = lines[:, row].flip(0) if backwards else lines[:, row]
        out[:, :, :, place] = part.movedim(0, 2 if horizontal else 1)


def _add_lines(lines: torch.Tensor, block: _Block, out: torch.Tensor) -> None:
    """Add lines in scan order to `out` (B, H, W, K, ...), or their sum over the directions to (B, H, W, 1, ...)."""
    for row, (place, horizontal, backwards) in enumerate(block.members()):
        part = lines[:, row].flip(0) if backwards else lines[:, row]
        out[:, :, :, place if out.shape[3] > 1 else 0] += part.movedim(0, 2 if horizontal else 1)


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
    B, H, W, D = x.shape
    K = len(directions)
    y = x.new_zeros((B, H, W, 1, D), dtype=dtype) if merge_sum else x.new_empty(B, H, W, K, D)
    saved = x.new_empty((B, H, W, K, D) if save_state else (0,))
    for block in _blocks(H, W, directions):
        state = _to_lines(x.unsqueeze(3), block, dtype)
        w = _weights(_to_lines(logits, block, dtype), softmax, segment)
        if lam is not None:
            share = _to_lines(lam, block, dtype)
            state *= share
            w = _decayed(w, share) if decay else w
        _propagate(state, w, transposed=False)
        if save_state:
            _from_lines(state, block, saved)
        if u is not None:
            state *= _to_lines(u, block, dtype)
        (_add_lines if merge_sum else _from_lines)(state, block, y)
    return (y.squeeze(3).to(x.dtype) if merge_sum else y), saved


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
    B, H, W, D = x.shape
    G = logits.shape[4]
    grad_x = x.new_zeros((B, H, W, 1, D), dtype=dtype)
    grad_lam = x.new_zeros((0,) if lam is None else lam.shape, dtype=dtype)
    grad_u = x.new_zeros((0,) if u is None else u.shape, dtype=dtype)
    grad_logits = torch.zeros_like(logits, dtype=dtype, memory_format=torch.contiguous_format)
    if merge_sum:
        grad_y = grad_y.unsqueeze(3)
    for block in _blocks(H, W, directions):
        raw = _to_lines(logits, block, dtype)
        w = _weights(raw, softmax, segment)
        h = _to_lines(saved, block, dtype)
        g = _to_lines(grad_y, block, dtype)
        if u is not None:
            _add_lines(g * h, block, grad_u)
            g *= _to_lines(u, block, dtype)
        share = None if lam is None else _to_lines(lam, block, dtype)
        into = g  # what reaches the sum over the taps
        if decay and share is not None:
            _propagate(g, _decayed(w, share), transposed=True)
            into = g * (1 - share)
        else:
            _propagate(g, w, transposed=True)

        grouped = (block.n, len(block.places), B, block.m, G, D // G)
        g_lines, h_lines = into.view(grouped), h.view(grouped)
        grad_w = torch.zeros_like(w)
        grad_w[1:, ..., 1] = (g_lines[1:] * h_lines[:-1]).sum(-1)
        grad_w[1:, :, :, 1:, :, 0] = (g_lines[1:, :, :, 1:] * h_lines[:-1, :, :, :-1]).sum(-1)
        grad_w[1:, :, :, :-1, :, 2] = (g_lines[1:, :, :, :-1] * h_lines[:-1, :, :, 1:]).sum(-1)
        grad_raw = (grad_w - (grad_w * w).sum(-1, keepdim=True)) * w
        if not softmax:
            grad_raw *= torch.sigmoid(-raw)
        _from_lines(grad_raw, block, grad_logits)

        if share is None:
            _add_lines(g, block, grad_x)
        else:
            _add_lines(g * share, block, grad_x)
            fresh = _to_lines(x.unsqueeze(3), block, dtype)
            _add_lines(g * (fresh - _carried(h, w) if decay else fresh), block, grad_lam)
    return grad_x.squeeze(3).to(x.dtype), grad_lam.to(x.dtype), grad_u.to(x.dtype), grad_logits.to(logits.dtype)
