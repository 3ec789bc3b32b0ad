"""Gradients of the scan of features that come first: the kernel in the emulation, the table, the operators on a CPU."""

import itertools

import pytest
import torch

from gspn2_diffusion import GSPN2Config
from gspn2_diffusion.layers import GSPN2Layer, scan_layer
from gspn2_diffusion.ops import eager, gspn2_scan_planes, planes, planes_backward
from gspn2_diffusion.ops import scan as scan_module
from gspn2_diffusion.ops.cuda import Launch
from gspn2_diffusion.ops.validation import DIRECTIONS

from .emulated import DEVICES, execute, library, needs_compiler
from .scan_cases import NAMES, Case, assert_close, make_features, planes_options, seeded
from .test_planes import BF16, CASES, FP16, FP32, H100, _operands, layout_of, random_variant, row, works


def in_planes(t: torch.Tensor) -> torch.Tensor:
    return t.flatten(3).permute(3, 0, 1, 2).contiguous()


def exact_parts(case: Case, features: torch.Tensor, bias: torch.Tensor | None) -> list[torch.Tensor | None]:
    """x, lam, u and logits in float64."""
    exact = features.double() if bias is None else features.double() + bias.double()[:, None, None, None]
    return [t if t is None else t.contiguous() for t in planes.parts(exact, layout_of(case))]


def run(
    case: Case, dtype: torch.dtype, biased: bool = True, seed: int = 0
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[Launch]]:
    """The emulated kernel's gradients, float64's from the same saved state, and the launches. (What the state loses in
    the storage type is most of the logits' gradients' error, whoever makes them.)"""
    features, bias = make_features(case, dtype)
    given = bias if biased else None
    parts, layout = exact_parts(case, features, given), layout_of(case)
    directions, options = list(layout.directions), (case.normalizer == "softmax", case.segment or 0)
    y, state = eager.scan_forward(*parts, directions, *options, case.merge == "sum", True, case.decay)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=y.dtype).to(dtype)
    state = state.to(dtype)
    exact = eager.scan_backward(
        grad_y.double(), state.double(), *parts, directions, *options, case.merge == "sum", case.decay
    )
    expected = {f"d_{name}": in_planes(t) for name, t in zip(NAMES, exact, strict=True) if t.numel()}
    launches: list[Launch] = []

    def emulate(launch: Launch) -> None:
        launches.append(launch)
        execute(launch, seed)

    tensors = (in_planes(grad_y), in_planes(state), features, given, layout)
    torch.use_deterministic_algorithms(True)  # fills the result's memory with NaN
    try:
        grad = planes_backward.scan_backward(*tensors, *options, case.decay, device=H100, execute=emulate)
    finally:
        torch.use_deterministic_algorithms(False)
    assert grad is not None
    split = grad.split((*layout.sizes, len(grad) - sum(layout.sizes)))
    assert not split[4].any(), "what pads the features has no gradient"
    got = {f"d_{name}": t for name, t in zip(NAMES, split[:4], strict=True) if len(t)}
    return got, expected, launches


def check(case: Case, dtype: torch.dtype, biased: bool = True, seed: int = 0) -> list[Launch]:
    got, expected, launches = run(case, dtype, biased, seed)
    assert got.keys() == expected.keys()
    for name, grad in got.items():
        assert_close(name, grad, expected[name])
    return launches


# As the forward's: halos as wide as a share, blocks with few positions or none, ragged slices and boxes, odd and even
# numbers of positions of a lane, weights for each channel, more warps than there are tasks.
FORCED = [
    (Case(1, 8, 8, 1, directions=("down",), gates="none"), FP32, dict(width=1, lines=(8, 8))),
    (Case(1, 8, 8, 2, directions=("up",)), BF16, dict(width=2, lines=(8, 8))),
    (Case(1, 8, 24, 2, directions=("left",)), BF16, dict(width=2, lines=(16, 8))),
    (Case(2, 9, 16, 5), BF16, dict(width=5, lines=(16, 4))),
    (Case(1, 33, 48, 7, normalizer="softmax"), FP16, dict(width=3, lines=(16, 16))),
    (Case(1, 19, 40, 6), BF16, dict(width=2, cluster=3, lines=(8, 2), workers=8)),
    (Case(1, 19, 40, 6), BF16, dict(width=4, cluster=2, workers=1, slots=2)),
    (Case(1, 70, 32, 6, gates="shared", merge="sum"), BF16, dict(width=4, cluster=2, lines=(32, 16))),
    (Case(1, 24, 64, 4, 4, ("right",), gates="lam"), BF16, dict(width=2, cluster=2, normalizers=1)),
    (Case(1, 24, 64, 3, 3, ("right", "up"), gates="lam"), FP16, dict(width=2, cluster=2)),
    (Case(1, 24, 64, 4, 2, gates="none"), FP16, dict(width=2, cluster=2)),
    (Case(1, 24, 64, 4, gates="none", merge="sum"), BF16, dict(width=4)),
    (Case(1, 20, 72, 4), FP32, dict(width=2, cluster=2, lines=(8, 8))),
    (Case(1, 20, 36, 2, normalizer="softmax"), FP32, dict(width=2, lines=(16, 4))),
    (Case(1, 32, 32, 4, segment=16), FP16, dict(width=2, lines=(8, 4))),
    (Case(1, 33, 32, 4, segment=16, directions=("up", "down")), FP16, dict(width=2, lines=(8, 8))),
    (Case(1, 30, 64, 4), FP32, dict(width=4, cluster=2, most_stages=2)),
    (Case(1, 30, 64, 4, 2, normalizer="softmax"), FP16, dict(width=2, cluster=2, most_stages=2)),
    (Case(1, 17, 24, 3, directions=("up",), gates="none"), BF16, dict(width=2, lines=(16, 8))),
    (Case(1, 72, 64, 4), BF16, dict(width=4, cluster=2, halo=16)),
    (Case(1, 50, 80, 5), FP16, dict(width=5, cluster=3, lines=(16, 16), places=(3, 8), halo=16, most_stages=2)),
    (Case(1, 128, 80, 3), BF16, dict(width=3, cluster=2, lines=(16, 16), places=(5, 8), units=(2, 2))),
    (Case(1, 32, 32, 10, gates="shared"), BF16, dict(width=10, places=(1, 1), units=(8, 1))),
    (Case(2, 24, 32, 7), BF16, dict(width=(2, 3), mixed=1, keep=1)),
    (
        Case(1, 24, 40, 5, directions=("right", "up", "left", "down"), gates="shared"),
        FP16,
        dict(width=(3, 5), cluster=2, keep=1),
    ),
    (Case(1, 24, 64, 5, 5, ("right", "up"), gates="lam"), FP16, dict(width=(3, 2), cluster=2, mixed=1)),
    (Case(3, 16, 24, 4, 2, ("up", "right")), FP32, dict(width=(1, 2), lines=(8, 8))),
    (Case(2, 24, 40, 5), BF16, dict(width=(2, 5), cluster=2, early=1)),
    (Case(1, 24, 40, 5, directions=("left", "down", "up")), BF16, dict(width=(2, 5))),
    (Case(1, 19, 40, 6, 2, normalizer="softmax"), FP16, dict(width=1, cluster=2, early=1)),
    (Case(3, 19, 32, 3, gates="shared", segment=16), FP16, dict(width=2, lines=(8, 8), workers=1, early=1)),
    (Case(2, 17, 24, 3, directions=("up", "left")), FP32, dict(width=3, lines=(4, 4), workers=8, early=1)),
]


@needs_compiler
@pytest.mark.parametrize(("case", "dtype", "choices"), FORCED, ids=[str(case) for case, _, _ in FORCED])
def test_emulated_variants_match_torch(case, dtype, choices, monkeypatch):
    monkeypatch.setattr(planes_backward, "choose", lambda work, device: planes_backward.make_variant(work, **choices))
    for biased in (True, False) if case.W == 16 else (True,):
        check(case, dtype, biased)


# One direction, whose gradients of x and lam the scan makes itself: either way and sense, lanes without a task, blocks
# with few positions or none, ragged slices and boxes, parts of the logits' gradients. Last, whether there is neither
# padding nor more than one part, and so nothing left for a second launch.
ALONE = [
    (Case(1, 8, 8, 7, directions=("right",)), BF16, dict(width=7, lines=(8, 8)), True),
    (Case(2, 9, 16, 3, 3, ("left",), gates="lam"), FP16, dict(width=2, lines=(16, 4), workers=8), False),
    (Case(1, 19, 40, 8, 8, ("right",), gates="lam"), BF16, dict(width=1, cluster=2, keep=1), True),
    (Case(1, 19, 40, 8, 8, ("left",), gates="lam"), FP32, dict(width=3, lines=(16, 4), cluster=3, places=(5, 4)), True),
    (Case(1, 27, 16, 4, 4, ("right",), "softmax"), FP32, dict(width=3, lines=(8, 4), most_stages=2), True),
    (Case(1, 33, 48, 7, directions=("left",)), BF16, dict(width=3, lines=(32, 8), places=(5, 4)), False),
    (
        Case(1, 70, 24, 6, 2, ("right",), gates="shared", merge="sum"),
        FP32,
        dict(width=3, cluster=3, lines=(8, 4)),
        True,
    ),
    (Case(1, 33, 32, 4, segment=16, directions=("left",)), FP16, dict(width=2, lines=(8, 8)), False),
    (Case(1, 8, 8, 7, directions=("down",)), FP32, dict(width=4, lines=(8, 8)), False),
    (Case(2, 9, 16, 8, 8, ("up",), gates="lam"), BF16, dict(width=3, lines=(16, 4), keep=1), True),
    (Case(1, 21, 72, 8, 8, ("down",), gates="lam"), FP32, dict(width=1, cluster=2, lines=(16, 8)), True),
    (Case(1, 21, 72, 3, 3, ("up",)), BF16, dict(width=2, cluster=3, workers=1, slots=2), False),
    (Case(1, 30, 56, 7, normalizer="softmax", directions=("up",), gates="shared"), FP16, dict(width=7, halo=16), True),
    (Case(1, 33, 32, 4, 2, ("down",), segment=16, gates="lam"), BF16, dict(width=1, cluster=2, lines=(8, 8)), False),
]


@needs_compiler
@pytest.mark.parametrize(("case", "dtype", "choices", "whole"), ALONE, ids=[str(each[0]) for each in ALONE])
def test_one_direction_alone_takes_one_launch(case, dtype, choices, whole, monkeypatch):
    v = planes_backward.make_variant(
        planes.Work(case.B, case.H, case.W, layout_of(case), case.segment or 0, dtype.itemsize, False), **choices
    )
    monkeypatch.setattr(planes_backward, "choose", lambda work, device: v)
    for biased in (True, False) if case.W == 16 else (True,):
        launches = check(case, dtype, biased)
        assert [launch.kernel for launch in launches] == ["gspn2_planes_backward", "gspn2_finish_planes"][: 2 - whole]
    # The second launch makes the same of g.
    got = run(case, dtype)[0]
    monkeypatch.setattr(planes_backward, "choose", lambda work, device: v._replace(inputs=False))
    expected, _, launches = run(case, dtype)
    assert len(launches) == 2 and all(torch.equal(grad, expected[name]) for name, grad in got.items())


@needs_compiler
def test_one_direction_without_lam_has_nothing_to_make(monkeypatch):
    for case, choices in (
        (Case(1, 9, 16, 5, directions=("right",), gates="none"), dict(width=5, lines=(8, 8))),
        (Case(1, 9, 32, 4, 4, ("down",), gates="none"), dict(width=2, cluster=2)),
    ):
        monkeypatch.setattr(
            planes_backward, "choose", lambda work, device, c=choices: planes_backward.make_variant(work, **c)
        )
        launches = check(case, BF16)
        assert len(launches) == 1 and "-DGSPN2_HAS=4" in launches[0].defines


@needs_compiler
@pytest.mark.parametrize("part", range(8))
def test_random_variants_emulated(part, monkeypatch):
    seed, generator = seeded(part)
    more = dict(gates=("each", "shared", "lam", "none"), merge=("concat", "sum"), workers=(1, 3, 8))
    more |= dict(mixed=(0, 1), keep=(0, 1), width=(1, 2, 5, (1, 3), (4, 2)))
    if part >= 4:
        more |= dict(directions=tuple((direction,) for direction in DIRECTIONS), gates=("each", "shared", "lam"))
    case, dtype, chosen = random_variant(generator, planes_backward.make_variant, **more)
    monkeypatch.setattr(planes_backward, "choose", lambda work, device: planes_backward.make_variant(work, **chosen))
    check(case, dtype, generator.random() < 0.7, seed)


@needs_compiler
@pytest.mark.parametrize(("scale", "shift"), [(30, 0), (6, -60), (1, -35), (1, 25)])
@pytest.mark.parametrize("normalizer", ["sigmoid", "softmax"])
def test_logits_far_from_zero(scale, shift, normalizer, monkeypatch):
    case = Case(1, 9, 16, 3, directions=("right", "up"), normalizer=normalizer)
    first, near = sum(layout_of(case).sizes[:3]), make_features

    def far(*args):
        features, bias = near(*args)
        features[first:], bias[first:] = features[first:] * scale, bias[first:] + shift
        return features, bias

    made = planes_backward.make_variant(planes.Work(1, 9, 16, layout_of(case), 0, 4, False), 3, lines=(8, 4))
    monkeypatch.setattr(planes_backward, "choose", lambda work, device: made)
    monkeypatch.setitem(globals(), "make_features", far)
    check(case, FP32)


STATES = [
    (Case(1, 9, 16, 5), BF16, dict(width=5, lines=(16, 4))),
    (Case(1, 24, 64, 4, 2, gates="shared"), FP32, dict(width=2, cluster=2, lines=(16, 8))),
    (Case(1, 33, 32, 3, segment=16, decay=True), FP16, dict(width=3, lines=(16, 8))),
    (Case(1, 20, 64, 5), BF16, dict(width=(2, 3), cluster=2, lines=(16, 8))),
]


def check_state(case: Case, dtype: torch.dtype) -> None:
    features, bias = make_features(case, dtype)
    layout, options = layout_of(case), (case.normalizer == "softmax", case.segment or 0)
    state = torch.full((len(layout.directions) * case.D, *features.shape[1:]), torch.nan, dtype=dtype)
    y = planes.scan(features, bias, layout, *options, case.decay, state, device=H100, execute=execute)
    expected = eager.scan_forward(
        *exact_parts(case, features, bias), list(layout.directions), *options, False, True, case.decay
    )
    assert_close("y", y, in_planes(expected[0]))
    assert_close("h", state, in_planes(expected[1]))


@needs_compiler
@pytest.mark.parametrize(("case", "dtype", "choices"), STATES, ids=[str(case) for case, _, _ in STATES])
def test_the_forward_leaves_the_state(case, dtype, choices, monkeypatch):
    monkeypatch.setattr(planes, "choose", lambda work, device: planes.make_variant(work, **choices))
    check_state(case, dtype)


@needs_compiler
@pytest.mark.parametrize("part", range(2))
def test_random_variants_leave_the_state(part, monkeypatch):
    _, generator = seeded(part)
    more = dict(gates=("each", "shared"), decay=(False, True), mixed=(0, 1), keep=(0, 1))
    more |= dict(width=(1, 2, 5, (1, 3), (4, 2)))
    case, dtype, chosen = random_variant(generator, planes.make_variant, **more)
    monkeypatch.setattr(planes, "choose", lambda work, device: planes.make_variant(work, **chosen))
    check_state(case, dtype)


# Each row of the table.
TABLE = [
    (Case(1, 9, 32, 5, directions=("right", "up")), BF16),
    (Case(1, 9, 56, 3, directions=("left", "down")), BF16),
    (Case(1, 9, 104, 3, directions=("right", "up")), BF16),
    (Case(17, 2, 104, 24, directions=("right", "up")), BF16),
    (Case(1, 9, 136, 9, directions=("left", "up")), BF16),
    (Case(9, 2, 136, 16, directions=("left", "up")), BF16),
    (Case(1, 2, 1288, 1, directions=("down",)), BF16),
    (Case(5, 1, 1288, 12, directions=("up",)), BF16),
    (Case(1, 660, 16, 2, directions=("right", "down")), FP16),
    (Case(1, 650, 16, 9, directions=("left",)), FP16),
    (Case(2, 650, 8, 30, directions=("left", "up")), FP16),
    (Case(1, 660, 16, 2, 2, ("right",), gates="lam"), FP16),
    (Case(1, 650, 8, 2, 2, ("left", "down"), gates="lam"), BF16),
    (Case(1, 660, 16, 2, 2, ("left",), gates="lam"), FP32),
    (Case(1, 5, 648, 2, 2, ("up",), gates="lam"), FP32),
    (Case(1, 650, 8, 2, 2, ("right", "left"), gates="lam"), FP32),
]


@needs_compiler
@pytest.mark.parametrize(("case", "dtype"), TABLE, ids=[str(case) for case, _ in TABLE])
def test_the_table_emulated(case, dtype):
    check(case, dtype)


def test_each_row_of_the_table_is_emulated():
    assert {row(*work, planes_backward) for work in TABLE} == set(planes_backward.ROWS)


@needs_compiler
def test_same_bits_in_any_order_of_threads():
    case = Case(1, 9, 144, 5, directions=("left", "up"))
    first, _, launches = run(case, BF16, seed=1)
    assert launches[0].cluster > 1
    second = run(case, BF16, seed=2)[0]
    assert all(torch.equal(grad, second[name]) for name, grad in first.items())


def test_table_gives_a_variant_that_fits():
    taken = 0
    for work in works():
        v = planes_backward.choose(work, H100)
        layout = work.layout
        if work.decay or not planes_backward.rows_of(work.H, work.W, layout.D, layout.G, work.size):
            assert v is None
            continue
        if v is None:  # a segment that boxes do not divide
            assert work.segment
            continue
        taken += 1
        assert v.shared <= H100.shared and v.threads <= 1024 and v.workers >= 1 and v.normalizers >= 1, work
        own = layout.G == layout.D > 1
        assert v.slices * min(v.widths) >= layout.D and v.sets == (max(v.widths) if own else 1)
        for width, parts in zip(v.widths, v.parts, strict=True):
            assert own or layout.G == 1 or layout.D // layout.G % width == 0
            assert parts == (1 if own else -(-layout.D // layout.G // width))
        for along in work.ways:
            halos = 2 * v.halo if v.cluster > 1 else 0
            assert v.shares[along] * v.cluster >= work.length(along) and v.spans[along] == v.shares[along] + halos
            assert v.spans[along] <= 32 * v.places[along] and v.spans[along] % v.places[along] == 0
            assert v.stages[along] >= min(2, -(-work.lines(along) // v.lines[along]))
            assert not along or v.places[along] & (v.places[along] - 1) == 0
    assert taken > 200


def test_launches_overlap_in_more_than_two_waves_of_blocks_only():
    def early(B: int, side: int, D: int, G: int, directions: tuple[int, ...], size: int = 2) -> list[int]:
        layout = planes.Layout(D, G, directions, len(directions), True, G == 1)
        v = planes_backward.choose(planes.Work(B, side, side, layout, 0, size, False), H100)
        return [v.early, v.grid]

    assert early(2, 256, 80, 1, (0, 1, 2, 3)) == [1, 640] and early(1, 256, 30, 1, (0, 1, 2, 3))[0] == 0
    assert early(16, 1024, 8, 1, (0, 1, 2, 3)) == [1, 1024] and early(1, 128, 160, 1, (0, 1, 2, 3))[0] == 0
    # Several blocks of so little shared memory are on a processor at once.
    assert early(2, 1024, 8, 8, (2, 3), 4) == [0, 512] and early(16, 1024, 8, 8, (2, 3), 4)[0] == 1


# As an H100 timed them (docs/kernel.md).
@pytest.mark.parametrize(
    ("B", "side", "D", "widths", "cluster", "blocks"),
    [
        (2, 32, 160, (15, 15), 1, 88),
        (2, 64, 80, (8, 8), 1, 80),
        (2, 128, 160, (6, 8), 2, 432),
        (1, 128, 160, (12, 12), 4, 224),
        (2, 256, 80, (8, 16), 8, 640),
        (1, 256, 80, (8, 16), 8, 320),
        (1, 512, 80, (8, 16), 16, 640),
        (1, 1024, 40, (6, 10), 16, 448),
        (16, 1024, 8, (8, 8), 16, 1024),
        (1, 2048, 40, (3, 6), 16, 896),
    ],
)
def test_the_table_takes_what_was_timed(B, side, D, widths, cluster, blocks):
    layout = planes.Layout(D, 1, (0, 1, 2, 3), 4, True, True)
    v = planes_backward.choose(planes.Work(B, side, side, layout, 0, 2, False), H100)
    assert (v.widths, v.cluster, v.grid) == (widths, cluster, blocks)


def test_other_devices_and_shapes_have_none():
    layout = planes.Layout(8, 1, (0, 1, 2, 3), 4, True, True)
    assert planes_backward.choose(planes.Work(1, 64, 64, layout, 0, 2, False), DEVICES["a100"]) is None
    for sides in ((64, 60), (16, 16), (64, 4096)):
        assert planes_backward.choose(planes.Work(1, *sides, layout, 0, 2, False), H100) is None


@needs_compiler
@pytest.mark.parametrize("choices", [dict(width=5), dict(width=4, cluster=4, halo=16, slots=2)], ids=["one", "cluster"])
@pytest.mark.parametrize(
    "directions", [("right", "left", "down", "up"), ("right",), ("up",)], ids=["four", "row", "column"]
)
def test_shared_memory_is_what_the_kernel_needs(choices, directions):
    work = planes.Work(1, 64, 64, layout_of(Case(1, 64, 64, 20, directions=directions)), 0, 2, False)
    v = planes_backward.make_variant(work, **choices, places=(4, 4), most_stages=2)
    assert library(planes_backward.defines(v, BF16, 15)).needed_shared_bytes(0, 0) == v.shared


@pytest.mark.parametrize("case", [*CASES, Case(1, 4, 5, 3, gates="none", merge="sum")], ids=str)
def test_on_a_cpu_the_operators_are_the_scan_of_the_parts(case):
    features, bias = (t.requires_grad_() for t in make_features(case, torch.float64))
    expected = gspn2_scan_planes(features, bias, **planes_options(case))
    operands = _operands(features, bias, case, True)
    got, state = scan_module._scan_planes(*operands)
    torch.testing.assert_close(got, expected)
    grad = torch.randn(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(expected, (features, bias), grad)
    for a, b in zip(torch.autograd.grad(got, (features, bias), grad), wanted, strict=True):
        torch.testing.assert_close(a, b)
    torch.library.opcheck(torch.ops.gspn2.scan_planes, operands)
    saved = got if case.gates in ("lam", "none") and case.merge != "sum" else state
    with torch.no_grad():
        torch.library.opcheck(
            torch.ops.gspn2.scan_planes_backward, (grad, saved.detach(), *_operands(features, bias, case))
        )


def test_operator_without_state_refuses_a_gradient():
    case = Case(1, 4, 5, 3)
    features, bias = (t.requires_grad_() for t in make_features(case, torch.float32))
    y, state = torch.ops.gspn2.scan_planes(*_operands(features, bias, case, False))
    assert not state.numel()
    with pytest.raises(RuntimeError, match="save_state=False"):
        y.sum().backward()


@pytest.mark.parametrize("merge", ["concat", "sum"])
def test_training_compiles_into_one_graph(merge, monkeypatch):
    monkeypatch.setattr(scan_module, "scans_planes", lambda *_, **__: True)
    features, bias = (t.requires_grad_() for t in make_features(Case(1, 8, 8, 4), torch.float32))

    def loss(features, bias):
        return gspn2_scan_planes(features, bias, channels=4, merge=merge).square().sum()

    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(features, bias), (features, bias))
    for a, b in zip(got, torch.autograd.grad(loss(features, bias), (features, bias)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("merge", "gates"), list(itertools.product(["concat", "sum"], ["per_direction", "shared"])))
def test_the_layer_trains_the_same_either_way(merge, gates, monkeypatch):
    layer = GSPN2Layer(48, 40, GSPN2Config(init="random", proxy_dim=8, merge=merge, gates=gates, groups=2))
    torch.nn.init.normal_(layer.scan_in.bias)
    tokens = torch.randn(2, 96, 48, requires_grad=True)
    leaves = [tokens, *layer.parameters()]
    grad = torch.randn(2, 96, 40)
    expected = torch.autograd.grad(layer(tokens, 8, 12), leaves, grad)
    asked = []

    def always(*_, training=False):
        asked.append(training)
        return True

    monkeypatch.setattr(scan_module, "scans_planes", always)
    monkeypatch.setattr(scan_layer, "scans_planes", always)
    for a, b in zip(torch.autograd.grad(layer(tokens, 8, 12), leaves, grad), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert asked == [True, True]
