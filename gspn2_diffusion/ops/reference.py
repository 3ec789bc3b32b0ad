"""The slow truth: the line scan written as its definition, one line of one direction at a time."""

import torch
import torch.nn.functional as F

from .validation import ScanOptions, check_inputs


def tap_weights(logits: torch.Tensor, normalizer: str) -> torch.Tensor:
    """Normalise `logits` (..., m, G, 3) over the taps that exist in a line of m positions: rows sum to 1.

    Position 0 has no tap j - 1 and position m - 1 no tap j + 1 (GSPN, arXiv 2501.12381: stability-context condition).
    """
    m = logits.shape[-3]
    missing = torch.zeros(m, 1, 3, dtype=torch.bool, device=logits.device)
    missing[0, :, 0] = True
    missing[-1, :, 2] = True
    # sigmoid(l) / sum of sigmoids, written as a softmax of log-sigmoids so that very negative logits do not give 0 / 0.
    scores = F.logsigmoid(logits) if normalizer == "sigmoid" else logits
    return scores.masked_fill(missing, float("-inf")).softmax(-1)


def gspn2_scan_reference(
    x: torch.Tensor,
    lam: torch.Tensor | None,
    u: torch.Tensor | None,
    logits: torch.Tensor,
    *,
    directions: tuple[str, ...] = ("right", "left", "down", "up"),
    normalizer: str = "sigmoid",
    segment: int | None = None,
    merge: str = "concat",
    decay: bool = False,
) -> torch.Tensor:
    """Same arguments and result as `gspn2_scan`; differentiable by autograd on any device, in float64 too.

    h[i, j] = lam[i, j] x[i, j] + sum over t in (-1, 0, 1) of w[i, j, t] h[i-1, j+t], the sum times 1 - lam[i, j] with
    `decay`; y = u h. Each line i is computed from the line before it. State in float32, or float64 for float64 inputs.
    """
    check_inputs(x, lam, u, logits, ScanOptions(directions, normalizer, segment, merge, decay))
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    B, H, W, D = x.shape
    G = logits.shape[-2]
    outputs = []
    for k, direction in enumerate(directions):
        horizontal = direction in ("right", "left")
        n, m, line_dim = (W, H, 2) if horizontal else (H, W, 1)
        gate = [None if t is None else t[:, :, :, k if t.shape[3] > 1 else 0].to(dtype) for t in (lam, u)]
        scan_order = range(n) if direction in ("right", "down") else range(n - 1, -1, -1)
        previous = torch.zeros(B, m, D, dtype=dtype, device=x.device)
        lines: list[torch.Tensor | None] = [None] * n
        for step, line in enumerate(scan_order):
            if segment is not None and step % segment == 0:
                previous = torch.zeros_like(previous)
            w = tap_weights(logits[:, :, :, k].select(line_dim, line).to(dtype), normalizer)  # (B, m, G, 3)
            w = w.repeat_interleave(D // G, dim=2)  # (B, m, D, 3)
            neighbours = F.pad(previous, (0, 0, 1, 1))  # (B, m + 2, D)
            h = x.select(line_dim, line).to(dtype)
            carried = w[..., 0] * neighbours[:, :-2] + w[..., 1] * previous + w[..., 2] * neighbours[:, 2:]
            if gate[0] is not None:
                share = gate[0].select(line_dim, line)
                h, carried = h * share, carried * (1 - share) if decay else carried
            h = h + carried
            lines[line] = h if gate[1] is None else h * gate[1].select(line_dim, line)
            previous = h
        outputs.append(torch.stack([line for line in lines if line is not None], dim=line_dim))
    y = torch.stack(outputs, dim=3)
    return (y.sum(3) if merge == "sum" else y).to(x.dtype)
