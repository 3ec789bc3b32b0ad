"""gspn2_scan against the line-by-line reference in float64, and the reference against a plain Python oracle."""

import math

import pytest
import torch

from gspn2_diffusion.ops import gspn2_scan, gspn2_scan_reference

from .scan_cases import CASES, TOLERANCE, Case, assert_close, gradients, make_inputs

ALL = ("right", "left", "down", "up")


def oracle(x, lam, u, logits, directions, normalizer, segment, merge, decay):
    """The definition with nested lists and scalar arithmetic: shares no tensor operation with the implementations."""
    B, H, W, D = x.shape
    K, G = logits.shape[3:5]
    score = (lambda v: 1 / (1 + math.exp(-v))) if normalizer == "sigmoid" else math.exp
    y = torch.zeros(B, H, W, K, D, dtype=torch.float64)
    X, Z = x.tolist(), logits.tolist()
    LAM, U = (None if t is None else t.expand(B, H, W, K, D).tolist() for t in (lam, u))
    for b in range(B):
        for k, direction in enumerate(directions):
            n, m = (W, H) if direction in ("right", "left") else (H, W)
            for c in range(D):
                previous = [0.0] * m
                for i in range(n):
                    line = i if direction in ("right", "down") else n - 1 - i
                    if segment and i % segment == 0:
                        previous = [0.0] * m
                    current = []
                    for j in range(m):
                        r, q = (j, line) if direction in ("right", "left") else (line, j)
                        taps = [t for t in range(3) if 0 <= j + t - 1 < m]
                        scores = {t: score(Z[b][r][q][k][c // (D // G)][t]) for t in taps}
                        share = LAM[b][r][q][k][c] if LAM else 1.0
                        carried = sum(scores[t] / sum(scores.values()) * previous[j + t - 1] for t in taps)
                        h = share * X[b][r][q][c] + (1 - share if decay else 1.0) * carried
                        current.append(h)
                        y[b, r, q, k, c] = h * (U[b][r][q][k][c] if U else 1.0)
                    previous = current
    return y.sum(3) if merge == "sum" else y


@pytest.mark.parametrize("normalizer", ["sigmoid", "softmax"])
@pytest.mark.parametrize(
    ("H", "W", "D", "G", "segment"), [(1, 1, 1, 1, None), (3, 5, 4, 2, 2), (6, 2, 3, 3, None), (1, 7, 2, 1, 3)]
)
@pytest.mark.parametrize(("merge", "decay"), [("concat", False), ("sum", False), ("concat", True)])
def test_reference_matches_oracle(H, W, D, G, segment, normalizer, merge, decay):
    case = Case(2, H, W, D, G, segment=segment, normalizer=normalizer, merge=merge, decay=decay)
    inputs = make_inputs(case, torch.float64)
    torch.testing.assert_close(gspn2_scan_reference(*inputs, **case.options), oracle(*inputs, *case.options.values()))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case, dtype):
    inputs = make_inputs(case, dtype)
    got = gspn2_scan(*inputs, **case.options)
    exact = [t if t is None else t.detach().double().requires_grad_() for t in inputs]
    expected = gspn2_scan_reference(*exact, **case.options)
    assert got.dtype == dtype
    assert_close("y", got, expected)
    grad_y = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for (name, grad), grad_expected in zip(
        gradients(got, inputs, grad_y).items(), gradients(expected, exact, grad_y.double()).values(), strict=True
    ):
        assert grad.dtype == dtype
        assert_close(name, grad, grad_expected)


@pytest.mark.parametrize("direction", ALL)
def test_impulse_lights_the_cone_ahead(direction):
    H, W, row, column = 7, 9, 2, 5
    x = torch.zeros(1, H, W, 1)
    x[0, row, column] = 1
    lit = gspn2_scan(x, None, None, torch.zeros(1, H, W, 1, 1, 3), directions=(direction,))[0, :, :, 0, 0] > 0
    for r in range(H):
        for q in range(W):
            ahead = {"right": q - column, "left": column - q, "down": r - row, "up": row - r}[direction]
            aside = abs(r - row) if direction in ("right", "left") else abs(q - column)
            assert lit[r, q] == (ahead >= aside), (r, q)


@pytest.mark.parametrize("normalizer", ["sigmoid", "softmax"])
@pytest.mark.parametrize("scale", [1, 1000])
def test_rows_sum_to_one_and_state_grows_linearly(normalizer, scale):
    """With x = lam = 1 line i holds exactly i + 1: a wrong row sum shows; with lam in [0, 1] that is the bound."""
    H, W = 6, 11
    logits = torch.randn(1, H, W, 4, 2, 3, generator=torch.Generator().manual_seed(0)) * scale
    y = gspn2_scan(torch.ones(1, H, W, 4), None, None, logits, normalizer=normalizer)
    rows, columns = torch.arange(1.0, H + 1)[:, None], torch.arange(1.0, W + 1)[None]
    expected = torch.stack([t.expand(H, W) for t in (columns, columns.flip(1), rows, rows.flip(0))], -1)
    torch.testing.assert_close(y[0], expected[..., None].expand(H, W, 4, 4))
    lam = torch.rand(1, H, W, 4, 4)
    x = torch.rand(1, H, W, 4) * 2 - 1
    bounded = gspn2_scan(x, lam, None, logits, normalizer=normalizer)
    assert (bounded[0].abs() <= expected[..., None] + 1e-5).all()


@pytest.mark.parametrize("normalizer", ["sigmoid", "softmax"])
@pytest.mark.parametrize("scale", [1, 1000])
def test_a_decaying_state_never_exceeds_the_largest_value(normalizer, scale):
    """Each state is lam x + (1 - lam) (a mean of states): a mean of values seen. Over 200 lines; y is the state."""
    generator = torch.Generator().manual_seed(0)
    H, W = 5, 200
    logits = torch.randn(1, H, W, 4, 2, 3, generator=generator) * scale
    x = torch.rand(1, H, W, 4, generator=generator) * 2 - 1
    lam = torch.rand(1, H, W, 4, 4, generator=generator)
    y = gspn2_scan(x, lam, None, logits, normalizer=normalizer, decay=True)
    assert (y.abs().amax((1, 2, 3)) <= x.abs().amax((1, 2)) + 1e-6).all()
    ones = gspn2_scan(torch.ones_like(x), lam, None, logits, normalizer=normalizer, decay=True)
    assert (ones <= 1 + 1e-6).all() and (ones[:, :, -20:, 0] > 0.999).all(), "a mean of ones is one"
    loud = gspn2_scan(torch.ones_like(x), lam, None, logits, normalizer=normalizer)
    assert loud.max() > 50, "without decay the same input grows with the lines"


def test_segment_longer_than_the_map_is_the_global_scan():
    inputs = make_inputs(Case(1, 5, 4, 2), torch.float32)
    torch.testing.assert_close(gspn2_scan(*inputs, segment=99), gspn2_scan(*inputs), rtol=0, atol=0)


def test_empty_batch():
    inputs = make_inputs(Case(0, 3, 4, 2), torch.float32)
    assert gspn2_scan(*inputs).shape == (0, 3, 4, 4, 2)


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 3, 4, 4, 2, segment=2),
        Case(1, 2, 2, 2, normalizer="softmax", merge="sum"),
        Case(1, 3, 4, 4, 2, decay=True),
        Case(1, 4, 3, 2, segment=2, gates="shared", merge="sum", decay=True),
    ],
    ids=str,
)
def test_gradcheck(case):
    inputs = make_inputs(case, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: gspn2_scan(*t, **case.options), inputs)


@pytest.mark.parametrize(
    "case",
    [Case(2, 3, 4, 4, 2), Case(1, 4, 3, 2, gates="none", merge="sum"), Case(1, 3, 4, 4, decay=True)],
    ids=str,
)
def test_opcheck(case):
    x, lam, u, logits = make_inputs(case, torch.float32)
    directions = [ALL.index(d) for d in case.directions]
    torch.library.opcheck(
        torch.ops.gspn2.scan.default, (x, lam, u, logits, directions, False, 0, case.merge == "sum", True, case.decay)
    )


def test_compiles_in_one_graph():
    case = Case(1, 4, 5, 4)
    inputs = make_inputs(case, torch.float32)
    compiled = torch.compile(lambda *t: gspn2_scan(*t, **case.options) * 2, fullgraph=True, backend="aot_eager")
    expected = gspn2_scan(*inputs, **case.options) * 2
    got = compiled(*inputs)
    torch.testing.assert_close(got, expected)
    for a, b in zip(gradients(got, inputs).values(), gradients(expected, inputs).values(), strict=True):
        torch.testing.assert_close(a, b)


def test_operator_without_state_refuses_a_gradient():
    x, lam, u, logits = make_inputs(Case(1, 2, 3, 2), torch.float32)
    y, _ = torch.ops.gspn2.scan(x, lam, u, logits, [0, 1, 2, 3], False, 0, False, False)
    with pytest.raises(RuntimeError, match="save_state=False"):
        y.sum().backward()


X = torch.zeros(2, 3, 4, 6)
LOGITS = torch.zeros(2, 3, 4, 4, 1, 3)
BAD = {
    "x-not-tensor": (dict(x=[1]), TypeError, "`x` is a list"),
    "x-int": (dict(x=X.long()), TypeError, "`x` is torch.int64"),
    "x-3d": (dict(x=X[0]), ValueError, r"`x` has shape \(3, 4, 6\); pass \(B, H, W, D\)"),
    "x-empty": (dict(x=X[:, :0]), ValueError, "at least 1"),
    "lam-shape": (dict(lam=X), ValueError, r"`lam` has shape .* pass \(2, 3, 4, 4, 6\)"),
    "u-type": (dict(u=X[:, :, :, None].half()), TypeError, "`u` is torch.float16; convert it to torch.float32"),
    "u-device": (dict(u=X[:, :, :, None].to("meta")), ValueError, "`u` is on meta and `x` on cpu"),
    "logits-shape": (dict(logits=LOGITS[..., :2]), ValueError, "`logits` has shape"),
    "logits-directions": (dict(directions=("right",)), ValueError, "`logits` has shape"),
    "logits-type": (dict(logits=LOGITS.double()), TypeError, "`logits` is torch.float64"),
    "groups": (
        dict(logits=LOGITS.expand(2, 3, 4, 4, 4, 3)),
        ValueError,
        "G = 4 groups, which does not divide the D = 6",
    ),
    "direction-name": (dict(directions=("right", "sideways")), ValueError, "`directions` is"),
    "direction-twice": (dict(directions=("up", "up")), ValueError, "different names"),
    "direction-string": (dict(directions="right"), TypeError, "pass a tuple"),
    "normalizer": (dict(normalizer="tanh"), ValueError, "`normalizer` is 'tanh'"),
    "merge": (dict(merge="mean"), ValueError, "`merge` is 'mean'"),
    "decay-without-lam": (dict(decay=True), ValueError, "`decay` is True and `lam` None"),
    "decay-number": (dict(decay=0.5), TypeError, "`decay` is 0.5"),
    "segment-zero": (dict(segment=0), ValueError, "`segment` is 0"),
    "segment-float": (dict(segment=2.0), TypeError, "`segment` is a float"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("scan", [gspn2_scan, gspn2_scan_reference], ids=["fast", "reference"])
def test_bad_input_is_named(change, error, message, scan):
    arguments = dict(x=X, lam=None, u=None, logits=LOGITS) | change
    with pytest.raises(error, match=message) as caught:
        scan(**arguments)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
