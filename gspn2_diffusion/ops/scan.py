"""`gspn2_scan`: checks its arguments and runs the scan as a `torch.library` operator with autograd.

Two operators, `gspn2::scan` and `gspn2::scan_backward`. The forward saves the state h (K D elements a pixel, in the
storage type) only when a gradient will be asked for; without it the backward would run the forward scan again and store
h anyway. With `u=None` and `merge="concat"` y is h and nothing more is saved. On CUDA they run `cuda.py`'s kernels;
elsewhere, and in float64, `eager.py`'s torch.
"""

from typing import Any

import torch

from . import cuda, eager
from .validation import DIRECTIONS, ScanOptions, check_inputs

_OPTIONS = "int[] directions, bool softmax, int segment, bool merge_sum"


@torch.library.custom_op(
    "gspn2::scan",
    mutates_args=(),
    schema=f"(Tensor x, Tensor? lam, Tensor? u, Tensor logits, {_OPTIONS}, bool save_state, bool decay=False)"
    " -> (Tensor, Tensor)",
)
def _scan(x, lam, u, logits, directions, softmax, segment, merge_sum, save_state, decay=False):
    if x.is_cuda and x.dtype != torch.float64:
        with torch.cuda.device(x.device):
            return cuda.scan_forward(x, lam, u, logits, directions, softmax, segment, merge_sum, save_state, decay)
    return eager.scan_forward(x, lam, u, logits, directions, softmax, segment, merge_sum, save_state, decay)


@_scan.register_fake
def _(x, lam, u, logits, directions, softmax, segment, merge_sum, save_state, decay=False):
    B, H, W, D = x.shape
    state = (B, H, W, len(directions), D)
    return x.new_empty((B, H, W, D) if merge_sum else state), x.new_empty(state if save_state else (0,))


@torch.library.custom_op(
    "gspn2::scan_backward",
    mutates_args=(),
    schema=f"(Tensor grad_y, Tensor saved, Tensor x, Tensor? lam, Tensor? u, Tensor logits, {_OPTIONS},"
    " bool decay=False) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _scan_backward(grad_y, saved, x, lam, u, logits, directions, softmax, segment, merge_sum, decay=False):
    if x.is_cuda and x.dtype != torch.float64:
        with torch.cuda.device(x.device):
            return cuda.scan_backward(grad_y, saved, x, lam, u, logits, directions, softmax, segment, merge_sum, decay)
    return eager.scan_backward(grad_y, saved, x, lam, u, logits, directions, softmax, segment, merge_sum, decay)


@_scan_backward.register_fake
def _(grad_y, saved, x, lam, u, logits, directions, softmax, segment, merge_sum, decay=False):
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, lam, u, logits))


def _setup_context(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, lam, u, logits, directions, softmax, segment, merge_sum, save_state, decay = inputs
    y, saved = output
    y_is_state = u is None and not merge_sum
    ctx.has_state = save_state or y_is_state
    ctx.save_for_backward(y if y_is_state else saved, x, lam, u, logits)
    ctx.options = directions, softmax, segment, merge_sum, decay


def _backward(ctx: Any, grad_y: torch.Tensor, _grad_saved: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if not ctx.has_state:
        raise RuntimeError("gspn2::scan ran with save_state=False, so it has no gradient; call it through gspn2_scan.")
    saved, x, lam, u, logits = ctx.saved_tensors
    grad_x, grad_lam, grad_u, grad_logits = _scan_backward(grad_y, saved, x, lam, u, logits, *ctx.options)
    return (grad_x, None if lam is None else grad_lam, None if u is None else grad_u, grad_logits, *[None] * 6)


torch.library.register_autograd("gspn2::scan", _backward, setup_context=_setup_context)


def gspn2_scan(
    x: torch.Tensor,
    lam: torch.Tensor | None,
    u: torch.Tensor | None,
    logits: torch.Tensor,
    *,
    directions: tuple[str, ...] = DIRECTIONS,
    normalizer: str = "sigmoid",
    segment: int | None = None,
    merge: str = "concat",
    decay: bool = False,
) -> torch.Tensor:
    """Scan a channels-last map line by line in up to four directions (GSPN-2, arXiv 2512.07884).

    With i the line in scan order and j the position in the line, for each direction:

        h[i, j, c] = lam[i, j, c] x[i, j, c] + sum over t in (-1, 0, 1) of w[i, j, t] h[i-1, j+t, c]
        y[i, j, c] = u[i, j, c] h[i, j, c]

    "right" scans columns from left to right, "left" from right to left, "down" rows from top to bottom, "up" from
    bottom to top. w is `logits` normalised over the taps that exist: each row of weights sums to 1 (GSPN, arXiv
    2501.12381). Gates live at, and results land at, the pixel they belong to. State and gradients are accumulated in
    float32 (float64 for float64 inputs).

    Args:
        x: (B, H, W, D) values; float32, float16, bfloat16 or float64.
        lam: input gate, (B, H, W, K, D) with K = len(directions), (B, H, W, 1, D) shared by them, or None for 1.
        u: output gate, as `lam`.
        logits: (B, H, W, K, G, 3), G dividing D, of x's type or float32; group g owns channels g D/G ... (g+1) D/G - 1.
            Tap 0 weighs position j-1 of the line before, 1 position j, 2 position j+1; j is the row (right, left) or
            the column (down, up).
        directions: one to four different names.
        normalizer: "sigmoid" (each tap's sigmoid over their sum, as in GSPN) or "softmax".
        segment: the scan restarts every `segment` lines, in scan order (GSPN-local); None scans the whole map.
        merge: "concat" keeps the directions apart, "sum" adds them.
        decay: the state before is multiplied by 1 - lam, h = lam x + (1 - lam) sum of w h: with lam in [0, 1] a
            weighted mean of what was scanned, never beyond the largest |x|. Without it a scan over n lines can gather
            n times that. Needs `lam`.

    Any strides are accepted as long as, on CUDA, the last dimension is contiguous.

    Returns:
        (B, H, W, K, D), or (B, H, W, D) with merge="sum", in x's type.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it needs.
    """
    # A sampler calls with the same shapes again and again, without gradient: the dispatcher and the checks would cost
    # more than the launch.
    tensors = (x, lam, u, logits)
    key = cuda.plan_key(tensors, directions, normalizer, segment, merge, decay)
    if key is not None and (plan := cuda.planned(key)) is not None:
        return plan(tensors)
    check_inputs(*tensors, ScanOptions(directions, normalizer, segment, merge, decay))
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    merge_sum = merge == "sum"
    save_state = needs_grad and (merge_sum or u is not None)
    options = ([DIRECTIONS.index(d) for d in directions], normalizer == "softmax", segment or 0, merge_sum)
    if key is not None:
        return cuda.remember(key, cuda.Plan(tensors, *options, decay))(tensors)
    return _scan(*tensors, *options, save_state, decay)[0]
