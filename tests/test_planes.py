"""The scan of features that come first: the kernel in the emulation, the launcher's table, the operator on a CPU."""

import itertools
import random
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from gspn2_diffusion import GSPN2Config
from gspn2_diffusion.layers import GSPN2Layer, scan_layer
from gspn2_diffusion.ops import cuda, eager, gspn2_scan, gspn2_scan_planes, planes, planes_backward
from gspn2_diffusion.ops import scan as scan_module
from gspn2_diffusion.ops.cuda import Launch
from gspn2_diffusion.ops.validation import DIRECTIONS

from .emulated import DEVICES, emulate_driver, execute, library, needs_compiler, row_of_table
from .scan_cases import Case, assert_close, make_features, planes_options, seeded

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
H100 = DEVICES["h100"]


def layout_of(case: Case) -> planes.Layout:
    directions = tuple(DIRECTIONS.index(d) for d in case.directions)
    gates = 1 if case.gates == "shared" else len(directions)
    return planes.Layout(case.D, case.G, directions, gates, case.gates != "none", case.gates in ("each", "shared"))


def run(
    case: Case, dtype: torch.dtype, biased: bool = True, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, Launch]:
    """The emulated kernel's result, torch's in float64, and the launch."""
    features, bias = make_features(case, dtype)
    layout = layout_of(case)
    launches: list[Launch] = []

    def emulate(launch: Launch) -> None:
        launches.append(launch)
        execute(launch, seed)

    options = (layout, case.normalizer == "softmax", case.segment or 0, case.decay)
    torch.use_deterministic_algorithms(True)  # fills the result's memory with NaN
    try:
        got = planes.scan(features, bias if biased else None, *options, device=H100, execute=emulate)
    finally:
        torch.use_deterministic_algorithms(False)
    exact = features.double() + bias.double()[:, None, None, None] if biased else features.double()
    parts = planes.parts(exact, layout)
    expected = eager.scan_forward(*parts, list(layout.directions), *options[1:3], False, False, case.decay)[0]
    return got, expected.flatten(3).permute(3, 0, 1, 2), launches[0]


# Few lines and channels keep the emulation short: halos as wide as a share, blocks with few positions or none, ragged
# slices, odd and even numbers of positions of a lane, weights for each channel, rows of a box outside of the map.
FORCED = [
    (Case(1, 8, 8, 2, directions=("down",)), BF16, dict(width=2, lines=(8, 8))),
    (Case(1, 8, 8, 2, directions=("left",)), BF16, dict(width=2, lines=(8, 8))),
    (Case(2, 9, 16, 5), BF16, dict(width=5, lines=(16, 4))),
    (Case(1, 33, 40, 7, normalizer="softmax"), FP16, dict(width=3, lines=(16, 16))),
    (Case(1, 20, 72, 4), FP32, dict(width=2, cluster=2, lines=(16, 8))),
    (Case(1, 19, 40, 6), BF16, dict(width=2, cluster=3, lines=(8, 2))),
    (Case(1, 70, 32, 6, gates="shared"), BF16, dict(width=4, cluster=2, lines=(32, 16))),
    (Case(1, 24, 64, 4, 4, ("right",), gates="lam"), BF16, dict(width=2, cluster=2, lines=(16, 8))),
    (Case(1, 24, 64, 4, 2, gates="none"), FP16, dict(width=2, cluster=2, lines=(16, 8))),
    (Case(1, 20, 72, 4), FP32, dict(width=2, cluster=2, lines=(8, 8))),
    (Case(1, 32, 32, 4, segment=16), FP16, dict(width=2, lines=(8, 4))),
    (Case(1, 30, 64, 4, decay=True), FP32, dict(width=4, cluster=4, lines=(16, 16))),
    (Case(1, 130, 8, 2, directions=("right", "left")), BF16, dict(width=2, lines=(8, 8))),
    (Case(1, 8, 136, 2, directions=("down", "up")), BF16, dict(width=1, lines=(8, 8))),
    (Case(1, 128, 80, 3), BF16, dict(width=3, cluster=2, lines=(16, 16), places=(5, 8), units=(2, 2))),
    (
        Case(2, 40, 48, 3, 3, ("right", "up"), gates="lam"),
        BF16,
        dict(width=3, lines=(8, 4), places=(3, 2), units=(2, 1)),
    ),
    (Case(1, 32, 32, 10), BF16, dict(width=10, lines=(16, 8), places=(1, 1), units=(2, 1))),
    (Case(1, 72, 64, 4), BF16, dict(width=4, cluster=2, lines=(16, 8), halo=16)),
    (Case(1, 50, 80, 5), FP16, dict(width=5, cluster=3, lines=(16, 16), places=(3, 8), halo=16, most_stages=2)),
    (Case(1, 40, 56, 3), BF16, dict(width=3, cluster=2, lines=(16, 4), places=(5, 8), halo=8, most_stages=2, mixed=1)),
    (Case(2, 20, 32, 5), BF16, dict(width=(2, 4), lines=(16, 8))),
    (Case(1, 24, 40, 5, normalizer="softmax"), FP16, dict(width=(3, 2), cluster=2, lines=(8, 4), mixed=1)),
    (Case(1, 16, 24, 4, 4, gates="lam"), BF16, dict(width=(1, 3), lines=(8, 4))),
]


@needs_compiler
@pytest.mark.parametrize(("case", "dtype", "choices"), FORCED, ids=[str(case) for case, _, _ in FORCED])
def test_emulated_variants_match_torch(case, dtype, choices, monkeypatch):
    monkeypatch.setattr(planes, "choose", lambda work, device: planes.make_variant(work, **choices))
    for biased in (True, False) if case.W == 16 else (True,):
        got, expected, _ = run(case, dtype, biased)
        assert_close("y", got, expected)


def random_variant(
    generator: random.Random, make_variant: Callable[..., Any], **more: tuple
) -> tuple[Case, torch.dtype, dict[str, Any]]:
    """A shape with options, and choices of a variant that a block can have for it; `more`: of a case, of a variant."""
    of_case = {name: values for name, values in more.items() if name in Case._fields}
    while True:
        D = generator.choice((1, 3, 4, 6, 9))
        case = Case(
            *(1, generator.randint(1, 60), 8 * generator.randint(1, 8), D, generator.choice((1, D))),
            directions=tuple(generator.sample(DIRECTIONS, generator.randint(1, 4))),
            normalizer=generator.choice(("sigmoid", "softmax")),
            segment=generator.choice((None, None, 16)),
        )
        case = case._replace(**{name: generator.choice(values) for name, values in of_case.items()})
        dtype = generator.choice((BF16, FP16, FP32))
        chosen: dict[str, Any] = dict(
            width=generator.choice((1, 2, 4, 5, 8)),
            cluster=generator.choice((1, 2, 3, 4)),
            lines=(generator.choice((8, 16, 32)), generator.choice((2, 4, 8, 16))),
            places=(generator.randint(1, 8), generator.choice((1, 2, 4, 8))),
            units=(generator.choice((2, 4, 8)), generator.choice((1, 2, 4))),
            normalizers=generator.choice((1, 3)),
            slots=generator.choice((2, 3)),
            halo=generator.choice((8, 16)),
            most_stages=generator.choice((2, 3, 8)),
        )
        chosen |= {name: generator.choice(values) for name, values in more.items() if name not in of_case}
        segment = case.segment if case.segment and case.segment < max(case.H, case.W) else 0
        work = planes.Work(1, case.H, case.W, layout_of(case), segment, dtype.itemsize, case.decay)
        if make_variant(work, **chosen) is not None:
            print(case, dtype, chosen)
            return case, dtype, chosen


@needs_compiler
@pytest.mark.parametrize("part", range(4))
def test_random_variants_emulated(part, monkeypatch):
    seed, generator = seeded(part)
    more = dict(gates=("each", "shared", "lam"), decay=(False, False, False, True), mixed=(0, 1), keep=(0, 1))
    more |= dict(width=(1, 2, 4, 5, 8, (1, 3), (2, 4), (5, 2)))
    case, dtype, chosen = random_variant(generator, planes.make_variant, **more)
    monkeypatch.setattr(planes, "choose", lambda work, device: planes.make_variant(work, **chosen))
    got, expected, _ = run(case, dtype, generator.random() < 0.7, seed)
    assert_close("y", got, expected)


# Each row of the table.
TABLE = [
    (Case(1, 9, 32, 5), BF16),
    (Case(1, 57, 16, 3, directions=("left", "down")), FP16),
    (Case(1, 9, 96, 3, directions=("left", "down")), BF16),
    (Case(1, 9, 56, 3, directions=("left", "up")), BF16),
    (Case(1, 127, 16, 5, directions=("left", "up")), BF16),
    (Case(1, 5, 320, 2, directions=("up", "right")), BF16),
    (Case(17, 3, 136, 1, directions=("up", "right")), BF16),
    (Case(133, 2, 104, 8, directions=("down",)), BF16),
    (Case(4, 2, 136, 32), BF16),
    (Case(6, 392, 8, 15, directions=("left", "down")), BF16),
    (Case(5, 2, 648, 20, directions=("down",)), FP16),
    (Case(1, 500, 16, 2, directions=("right", "down")), FP16),
    (Case(1, 700, 16, 1, directions=("left",)), BF16),
    (Case(1, 2, 2048, 1, directions=("down",)), BF16),
    (Case(5, 1, 1288, 12, directions=("down",)), BF16),
    (Case(1, 650, 32, 2, 2, ("right",), gates="lam"), FP16),
    (Case(1, 650, 16, 2, 2, ("left",), gates="lam"), FP32),
    (Case(1, 2, 648, 2, 2, ("down",), gates="lam"), BF16),
    (Case(1, 2, 656, 2, 2, ("up", "down"), gates="lam"), FP32),
]


def row(case: Case, dtype: torch.dtype, module: ModuleType = planes) -> planes.Row | planes_backward.Row:
    work = planes.Work(case.B, case.H, case.W, layout_of(case), case.segment or 0, dtype.itemsize, case.decay)
    return row_of_table(work, module)


@needs_compiler
@pytest.mark.parametrize(("case", "dtype"), TABLE, ids=[str(case) for case, _ in TABLE])
def test_the_table_emulated(case, dtype):
    got, expected, _ = run(case, dtype)
    assert_close("y", got, expected)


def test_each_row_of_the_table_is_emulated():
    assert {row(*work) for work in TABLE} == set(planes.ROWS)


@needs_compiler
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_weights_sum_to_1_over_many_lines(dtype, monkeypatch):
    """What half precision does to weights moves the state, and adds nothing to it: a constant stays as it is."""
    case = Case(1, 24, 512, 1, directions=("right",), gates="none")
    monkeypatch.setattr(planes, "choose", lambda work, device: planes.make_variant(work, 1, 2, lines=(8, 8)))
    features = make_features(case, dtype)[0]
    features[0] = 0
    features[0, ..., 0] = 1
    y = planes.scan(features, None, layout_of(case), False, 0, False, device=H100, execute=execute)
    assert y is not None
    torch.testing.assert_close(y.float(), torch.ones(1, 1, 24, 512), rtol=0, atol=1e-5)


@needs_compiler
def test_same_bits_in_any_order_of_threads():
    case = Case(1, 9, 144, 5)
    first, _, launch = run(case, BF16, seed=1)
    assert launch.cluster > 1
    assert torch.equal(first, run(case, BF16, seed=2)[0])


SIDES = [
    (32, 32),
    (17, 48),
    (64, 64),
    (96, 16),
    (56, 72),
    (72, 128),
    (128, 128),
    (250, 96),
    (256, 256),
    (512, 512),
    (1024, 1024),
    (999, 2048),
]
LAYOUTS = [(160, 1), (80, 1), (40, 2), (8, 8), (7, 1), (1, 1)]


def works():
    for (H, W), (D, G), K, dtype, B in itertools.product(SIDES, LAYOUTS, (1, 4), (BF16, FP32), (1, 16)):
        layout = planes.Layout(D, G, tuple(range(K)), K, True, G == 1)
        for segment in (0, 32):
            yield planes.Work(B, H, W, layout, segment, dtype.itemsize, False)


def test_table_gives_a_variant_that_fits():
    taken = 0
    for work in works():
        v = planes.choose(work, H100)
        layout = work.layout
        if not planes.rows_of(work.H, work.W, layout.D, layout.G, work.size):
            assert v is None
            continue
        if work.segment and work.W % 16:  # a box would reach into the next segment
            continue
        taken += 1
        assert v is not None and v.shared <= H100.shared, work
        assert v.threads <= 1024 and v.normalizers >= 1 and v.slices * min(v.widths) >= layout.D
        assert v.sets == (max(v.widths) if layout.G == layout.D > 1 else 1)
        assert v.sets > 1 or layout.D // layout.G % v.widths[0] == 0 or layout.G == 1
        for along in work.ways:
            lines = work.lines(along)
            halos = min(v.cluster - 1, 2) * v.halo
            assert v.shares[along] * v.cluster >= work.length(along) and v.spans[along] == v.shares[along] + halos
            assert v.spans[along] <= 32 * v.places[along] and v.spans[along] % v.places[along] == 0
            assert v.stages[along] >= min(2, -(-lines // v.lines[along]))
            assert not along or v.places[along] & (v.places[along] - 1) == 0
    assert taken > 200


# As an H100 timed them (docs/kernel.md).
@pytest.mark.parametrize(
    ("B", "side", "D", "width", "cluster", "blocks"),
    [
        (2, 32, 160, 10, 1, 128),
        (2, 64, 80, 5, 1, 128),
        (2, 128, 160, 4, 1, 320),
        (1, 128, 160, 4, 1, 160),
        (2, 256, 80, 7, 4, 384),
        (1, 256, 80, 5, 2, 128),
        (1, 256, 160, 7, 4, 368),
        (1, 256, 6, 6, 4, 16),
        (1, 512, 80, 5, 8, 512),
        (1, 1024, 40, 5, 16, 512),
        (1, 1024, 80, 5, 16, 1024),
        (16, 1024, 8, 8, 16, 1024),
        (1, 2048, 40, 3, 16, 896),
    ],
)
def test_the_table_takes_what_was_timed(B, side, D, width, cluster, blocks):
    layout = planes.Layout(D, 1, (0, 1, 2, 3), 4, True, True)
    v = planes.choose(planes.Work(B, side, side, layout, 0, 2, False), H100)
    assert (v.widths[0], v.cluster, v.grid) == (width, cluster, blocks)


def test_other_devices_and_shapes_have_none():
    layout = planes.Layout(8, 1, (0, 1, 2, 3), 4, True, True)
    assert planes.choose(planes.Work(1, 64, 64, layout, 0, 2, False), DEVICES["a100"]) is None
    for sides in ((64, 60), (16, 16), (64, 4096)):
        assert planes.choose(planes.Work(1, *sides, layout, 0, 2, False), H100) is None


@needs_compiler
@pytest.mark.parametrize("choices", [dict(width=5), dict(width=4, cluster=4, halo=16, slots=2)], ids=["one", "cluster"])
def test_shared_memory_is_what_the_kernel_needs(choices):
    work = planes.Work(1, 64, 64, layout_of(Case(1, 64, 64, 20)), 0, 2, False)
    v = planes.make_variant(work, **choices, lines=(16, 16), places=(4, 4), most_stages=3)
    assert v.stages == (3, 3)
    assert library(planes.defines(v, BF16, 7, False)).needed_shared_bytes(0, 3) == v.shared


CASES = [
    Case(1, 5, 8, 3),
    Case(2, 7, 4, 8, 2, ("up", "left"), "softmax", 3, "sum", "shared"),
    Case(1, 4, 9, 4, 4, gates="lam", decay=True),
    Case(1, 3, 3, 2, gates="none"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_a_cpu_it_is_the_scan_of_the_parts(case):
    features, bias = (t.requires_grad_() for t in make_features(case, torch.float64))
    options = planes_options(case)
    got = gspn2_scan_planes(features, bias, **options)
    parts = planes.parts(features + bias[:, None, None, None], layout_of(case))
    expected = gspn2_scan(*parts, **case.options).flatten(3).permute(3, 0, 1, 2)
    torch.testing.assert_close(got, expected)
    grad = torch.randn(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(expected, (features, bias), grad)
    for a, b in zip(torch.autograd.grad(got, (features, bias), grad), wanted, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(gspn2_scan_planes(features, bias, **options), expected)
        torch.library.opcheck(torch.ops.gspn2.scan_planes, _operands(features.detach(), bias.detach(), case, False))


def _operands(features: torch.Tensor, bias: torch.Tensor, case: Case, save_state: bool | None = None) -> tuple:
    """Of the operator, and of its gradient, which has no `save_state`."""
    layout = layout_of(case)
    options = (
        list(layout.directions),
        case.normalizer == "softmax",
        case.segment or 0,
        case.merge == "sum",
        *([] if save_state is None else [save_state]),
        case.decay,
    )
    return (features, bias, case.D, case.G, layout.gates, layout.lam, layout.u, *options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(features=[1]), TypeError, "`features` is a list"),
        (dict(features=torch.zeros(60, 2, 3)), ValueError, r"`features` has shape \(60, 2, 3\)"),
        (dict(features=torch.zeros(60, 1, 2, 3, dtype=torch.int)), TypeError, "`features` is torch.int32"),
        (dict(channels=0), ValueError, "`channels` is 0"),
        (dict(groups=3), ValueError, "`groups` is 3, which does not divide the 4 channels"),
        (dict(bias=torch.zeros(3)), ValueError, r"`bias` has shape \(3,\)"),
        (dict(bias=torch.zeros(60, dtype=torch.half)), TypeError, "`bias` is torch.float16"),
        (dict(channels=8), ValueError, "`features` has 60 planes and these options need 84"),
        (dict(merge="mean"), ValueError, "`merge` is 'mean'"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        gspn2_scan_planes(**(dict(features=torch.zeros(60, 1, 2, 3), channels=4) | change))


@pytest.mark.parametrize("merge", ["concat", "sum"])
@pytest.mark.parametrize("gates", ["per_direction", "shared"])
@torch.no_grad()
def test_the_layer_gives_the_same_either_way(merge, gates, monkeypatch):
    config = GSPN2Config(init="random", proxy_dim=8, merge=merge, gates=gates, groups=2)
    layer = GSPN2Layer(48, 40, config)
    torch.nn.init.normal_(layer.scan_in.bias)
    tokens = torch.randn(2, 96, 48)
    expected = layer(tokens, 8, 12)
    calls = []

    def spy(*args, **options):
        calls.append(args[0].shape)
        return gspn2_scan_planes(*args, **options)

    monkeypatch.setattr(scan_layer, "gspn2_scan_planes", spy)
    monkeypatch.setattr(scan_layer, "scans_planes", lambda *_, training: not training)
    torch.testing.assert_close(layer(tokens, 8, 12), expected)
    assert len(calls) == 1 and calls[0][1:] == (2, 8, 12)
    with torch.enable_grad():
        layer(tokens, 8, 12)
    layer.scan_in.register_forward_hook(lambda *_: None)
    layer(tokens, 8, 12)
    assert len(calls) == 1, "where training takes channels last, and where somebody listens, the projection is called"


@torch.no_grad()
def test_compiles_into_one_graph(monkeypatch):
    """With what asks for the device, whose answer is a constant."""
    monkeypatch.setattr(cuda, "device_limits", lambda index: H100)

    def scan(features, bias):
        known = bool(planes.rows_of(features.shape[2], features.shape[3], 4, 1, 2))
        assert known and scan_module._has_planes(features.get_device() + 1)
        return gspn2_scan_planes(features, bias, channels=4)

    features, bias = make_features(Case(1, 32, 32, 4), torch.float32)
    compiled = torch.compile(scan, fullgraph=True)
    torch.testing.assert_close(compiled(features, bias), gspn2_scan_planes(features, bias, channels=4))


def test_no_planes_without_a_gpu():
    assert not scan_layer.scans_planes(torch.zeros(1, dtype=torch.bfloat16), 64, 64, 8)


@needs_compiler
def test_a_plan_follows_other_tensors(monkeypatch):
    case = Case(1, 9, 32, 3)
    launches: list[Launch] = []
    emulate_driver(monkeypatch)
    layout = layout_of(case)
    features, bias = make_features(case, BF16)
    y = planes.scan(features, bias, layout, False, 0, False, device=H100, execute=launches.append)
    plan = planes.Plan(features, bias, launches[0], y, 0)
    for seed in (1, 0):
        others = make_features(case, BF16, seed)
        exact = planes.parts(others[0].double() + others[1].double()[:, None, None, None], layout)
        expected = eager.scan_forward(*exact, list(layout.directions), False, 0, False, False)[0]
        assert_close("y", plan(*others), expected.flatten(3).permute(3, 0, 1, 2))
