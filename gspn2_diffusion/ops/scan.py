"""`gspn2_scan` and `gspn2_scan_planes`: check their arguments and run the scan as `torch.library` operators.

`gspn2::scan` and `gspn2::scan_backward` read channels last. The forward saves the state h (K D elements a pixel, in the
storage type) only when a gradient will be asked for; without it the backward would run the forward scan again and store
h anyway. With `u=None` and `merge="concat"` y is h and nothing more is saved. On CUDA they run `cuda.py`'s kernels;
elsewhere, and in float64, `eager.py`'s torch. `gspn2::scan_planes` and `gspn2::scan_planes_backward` are the same of a
projection's output whose features come first; where these have no kernel, `gspn2_scan_planes` with a gradient is
`gspn2_scan` of its parts.
"""

from typing import Any

import torch

from . import cuda, eager, planes, planes_backward
from .validation import DIRECTIONS, ScanOptions, check_features, check_inputs

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
    if key is not None and x.numel():
        return cuda.remember(key, cuda.Plan(tensors, *options, decay))(tensors)
    return _scan(*tensors, *options, save_state, decay)[0]


_PLANES = f"Tensor features, Tensor? bias, int channels, int groups, int gates, bool lam, bool u, {_OPTIONS}"


@torch.library.custom_op(
    "gspn2::scan_planes",
    mutates_args=(),
    schema=f"({_PLANES}, bool save_state, bool decay=False) -> (Tensor, Tensor)",
)
def _scan_planes(
    features, bias, channels, groups, gates, lam, u, directions, softmax, segment, merge_sum, save_state, decay=False
):
    layout, saves = planes.Layout(channels, groups, tuple(directions), gates, lam, u), save_state and u
    y, state = None, None
    if features.is_cuda and features.dtype in cuda.STORAGE_NAMES:
        state = features.new_empty(len(directions) * channels, *features.shape[1:]) if saves else None
        with torch.cuda.device(features.device):
            y = planes.scan(features, bias, layout, softmax, segment, decay, state)
    if y is None:
        y, state = _scan(*_parts(features, bias, layout), directions, softmax, segment, False, saves, decay)
        y, state = _planes_of(y), _planes_of(state) if saves else None
    if merge_sum and save_state and state is None:
        state = y
    merged = planes.sum_of_directions(y, len(directions)) if merge_sum else y
    return merged, features.new_empty(0) if state is None else state


@_scan_planes.register_fake
def _(
    features, bias, channels, groups, gates, lam, u, directions, softmax, segment, merge_sum, save_state, decay=False
):
    each = (len(directions) * channels, *features.shape[1:])
    y = features.new_empty(channels if merge_sum else each[0], *each[1:])
    return y, features.new_empty(each if save_state and (u or merge_sum) else (0,))


@torch.library.custom_op(
    "gspn2::scan_planes_backward",
    mutates_args=(),
    schema=f"(Tensor grad_y, Tensor saved, {_PLANES}, bool decay=False) -> Tensor",
)
def _scan_planes_backward(
    grad_y, saved, features, bias, channels, groups, gates, lam, u, directions, softmax, segment, merge_sum, decay=False
):
    layout = planes.Layout(channels, groups, tuple(directions), gates, lam, u)
    if features.is_cuda and features.dtype in cuda.STORAGE_NAMES:
        with torch.cuda.device(features.device):
            grad = planes_backward.scan_backward(grad_y, saved, features, bias, layout, softmax, segment, decay)
        if grad is not None:
            return grad

    def last(t: torch.Tensor) -> torch.Tensor:
        each = t.permute(1, 2, 3, 0).contiguous()
        return each if len(t) == channels and merge_sum else each.unflatten(-1, (len(directions), channels))

    inputs, shape = _parts(features, bias, layout), (len(directions), channels)
    state = saved.permute(1, 2, 3, 0).contiguous().unflatten(-1, shape)
    grads = _scan_backward(last(grad_y), state, *inputs, directions, softmax, segment, merge_sum, decay)
    parts = [_planes_of(g) for g, t in zip(grads, inputs, strict=True) if t is not None]
    return torch.cat([*parts, features.new_zeros(len(features) - sum(layout.sizes), *features.shape[1:])])


@_scan_planes_backward.register_fake
def _(grad_y, saved, features, *_options):
    return features.new_empty(features.shape)


def _setup_planes_context(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    features, bias, *options, save_state, decay = inputs
    y_is_state = not (options[4] or options[8])  # neither u nor merge_sum
    ctx.has_state = save_state or y_is_state
    ctx.save_for_backward(output[0 if y_is_state else 1], features, bias)
    ctx.options = *options, decay


def _planes_backward(ctx: Any, grad_y: torch.Tensor, _grad_saved: Any) -> tuple[torch.Tensor | None, ...]:
    if not ctx.has_state:
        raise RuntimeError(
            "gspn2::scan_planes ran with save_state=False, so it has no gradient; call it through gspn2_scan_planes."
        )
    saved, features, bias = ctx.saved_tensors
    grad = _scan_planes_backward(grad_y, saved, features, bias, *ctx.options)
    return (grad, None if bias is None else grad.sum((1, 2, 3)), *[None] * (len(ctx.options) + 1))


torch.library.register_autograd("gspn2::scan_planes", _planes_backward, setup_context=_setup_planes_context)


def _parts(features: torch.Tensor, bias: torch.Tensor | None, layout: planes.Layout) -> Any:
    """Channels last."""
    parts = planes.parts(features if bias is None else features + bias[:, None, None, None], layout)
    return [t if t is None else t.contiguous() for t in parts]


def _planes_of(y: torch.Tensor) -> torch.Tensor:
    """(B, H, W, K, D) or (B, H, W, D) -> (K D or D, B, H, W)."""
    return y.flatten(3).permute(3, 0, 1, 2).contiguous()


def gspn2_scan_planes(
    features: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    channels: int,
    groups: int = 1,
    shared_gates: bool = False,
    input_gate: bool = True,
    output_gate: bool = True,
    directions: tuple[str, ...] = DIRECTIONS,
    normalizer: str = "sigmoid",
    segment: int | None = None,
    merge: str = "concat",
    decay: bool = False,
) -> torch.Tensor:
    """`gspn2_scan` of a projection's output whose features come first: W @ tokens.T instead of tokens @ W.T.

    On Hopper this is the fastest way to scan most maps: whatever the direction and the channels, what a block of the
    kernel reads is whole parts of memory (docs/kernel.md). Elsewhere, and in shapes that the kernels do not have, the
    parts are copied to channels last and scanned by `gspn2_scan`.

    Args:
        features: (F, B, H, W), one after another x (D), lam (K D), u (K D), logits (K G 3) and whatever pads them; with
            gates shared by the directions lam and u have D each; D = channels, K = len(directions), G = groups.
        bias: (F,), added to the features, in their type; None for none.
        channels: D.
        groups: G.
        shared_gates: whether the directions share lam and u.
        input_gate, output_gate: whether there are lam and u; else they are 1 and have no features.
        directions, normalizer, segment, merge, decay: as in `gspn2_scan`.

    Returns:
        (K D, B, H, W), or (D, B, H, W) with merge="sum".

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it needs.
    """
    shape = (channels, groups, shared_gates, input_gate, output_gate)
    key = cuda.plan_key((features, bias), directions, shape, normalizer, segment, merge, decay)
    if key is not None and (plan := cuda.planned(key)) is not None:
        return plan(features, bias)
    check_features(features, bias, channels, groups, ScanOptions(directions, normalizer, segment, merge, decay))
    indices = [DIRECTIONS.index(d) for d in directions]
    layout = planes.Layout(
        channels, groups, tuple(indices), 1 if shared_gates else len(indices), input_gate, output_gate
    )
    if sum(layout.sizes) > features.shape[0]:
        raise ValueError(
            f"`features` has {features.shape[0]} planes and these options need {sum(layout.sizes)}; pass the output of "
            "a projection to as many."
        )
    chosen = (indices, normalizer == "softmax", segment or 0, merge == "sum")
    given = (features, bias, channels, groups, layout.gates, input_gate, output_gate)
    if torch.is_grad_enabled() and (features.requires_grad or (bias is not None and bias.requires_grad)):
        height, width = features.shape[2:]
        if scans_planes(features, height, width, channels, groups, training=True):
            return _scan_planes(*given, *chosen, True, decay)[0]
        inputs = _parts(features, bias, layout)
        y = gspn2_scan(*inputs, directions=directions, normalizer=normalizer, segment=segment, merge=merge, decay=decay)
        return _planes_of(y)
    if key is not None:
        launches: list[cuda.Launch] = []
        scanned = planes.scan(features, bias, layout, *chosen[1:3], decay, execute=launches.append)
        if scanned is not None:
            count = len(indices) if merge == "sum" else 0
            plan = planes.Plan(features, bias, launches[0], scanned, count)
            return cuda.remember(key, plan)(features, bias)
    return _scan_planes(*given, *chosen, False, decay)[0]


def scans_planes(
    tensor: torch.Tensor, height: int, width: int, channels: int, groups: int = 1, training: bool = False
) -> bool:
    """Whether `gspn2_scan_planes` is the faster way to scan such maps on `tensor`'s device and in its type; `training`:
    with the gradient, too."""
    shape = (height, width, channels, groups, tensor.element_size())
    known = tensor.dtype in cuda.STORAGE_NAMES and bool(planes.rows_of(*shape))
    if training:
        known = known and bool(planes_backward.rows_of(*shape))
    return known and tensor.is_cuda and _has_planes(tensor.get_device())


@torch.compiler.assume_constant_result
def _has_planes(index: int) -> bool:
    return cuda.device_limits(index).boxes
