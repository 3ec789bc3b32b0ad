"""The CUDA sources, compiled for the host and run by tests/emulation, against float64 torch; the launcher's table."""

import ctypes
import itertools
import shutil
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from gspn2_diffusion.ops import cuda, eager, planes, planes_backward
from gspn2_diffusion.ops.cuda import Device, Launch, Work
from gspn2_diffusion.ops.validation import DIRECTIONS

from .emulated import DEVICES, emulate_driver, execute, library, needs_compiler, row_of_table
from .scan_cases import CASES, NAMES, Case, assert_close, make_inputs, seeded

TYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = Device((8, 0), 108, 20_000)
# Beyond the common cases: lines split over a cluster (ragged last share, weights for each channel), lines longer than a
# block, lines that fit only with narrow vectors or without staging.
EMULATED = [
    *[(case, TYPES[i % 3], DEVICES["h100"]) for i, case in enumerate(CASES) if case.H * case.W < 5000],
    (Case(1, 3, 200, 16, merge="sum", gates="shared"), torch.float32, DEVICES["h100"]),
    (Case(1, 131, 3, 8, 8, gates="lam", directions=("left", "down")), torch.float32, DEVICES["b200"]),
    (Case(1, 3, 520, 16, fused=True, directions=("up",)), torch.bfloat16, DEVICES["h100"]),
    (Case(1, 2, 1100, 8, directions=("down",)), torch.bfloat16, DEVICES["a100"]),
    (Case(1, 3, 600, 8, directions=("down", "right")), torch.bfloat16, SMALL),
    (Case(1, 3, 600, 4, 4, directions=("up",), gates="lam"), torch.float32, SMALL),
    (Case(1, 3, 200, 16, merge="sum", gates="shared", decay=True), torch.float32, DEVICES["h100"]),
    (Case(1, 131, 3, 8, 8, gates="lam", directions=("left", "down"), decay=True), torch.bfloat16, DEVICES["b200"]),
    (Case(1, 3, 600, 8, directions=("down",), decay=True), torch.float16, SMALL),
]
EMULATED_IDS = [
    f"{case}-{str(dtype)[6:]}-sm{device.capability[0]}{device.capability[1]}" for case, dtype, device in EMULATED
]


def options(case: Case) -> tuple[list[int], bool, int, bool]:
    directions = [DIRECTIONS.index(d) for d in case.directions]
    return directions, case.normalizer == "softmax", case.segment or 0, case.merge == "sum"


def in_nan(t: torch.Tensor | None) -> torch.Tensor | None:
    """The same tensor, strides and alignment, in a storage that begins and ends with NaN."""
    if t is None:
        return None
    storage = torch.tensor([], dtype=t.dtype).set_(t.untyped_storage())
    buffer = torch.full((storage.numel() + 128,), float("nan"), dtype=t.dtype)
    buffer[64:-64] = storage
    return buffer.as_strided(t.shape, t.stride(), t.storage_offset() + 64)


def in_boxes(inputs: tuple[torch.Tensor | None, ...]) -> list[torch.Tensor | None]:
    """The same values as views of one projection whose parts and rows begin at multiples of 16 bytes, NaN between."""
    B, H, W, _ = inputs[0].shape
    unit = 16 // inputs[0].element_size()
    widths = [0 if t is None else -(-t[0, 0, 0].numel() // unit) * unit for t in inputs]
    row = torch.full((B * H * W * sum(widths) + 64,), float("nan"), dtype=inputs[0].dtype)
    start = -row.data_ptr() % 64 // row.element_size() + unit
    parts = row[start : start + B * H * W * sum(widths)].view(B, H, W, -1).split(widths, -1)
    placed: list[torch.Tensor | None] = []
    for t, part in zip(inputs, parts, strict=True):
        if t is None:
            placed.append(None)
            continue
        view = part[..., : t[0, 0, 0].numel()].unflatten(-1, t.shape[3:])
        placed.append(view.copy_(t.detach()))
    return placed


def run(
    case: Case, dtype: torch.dtype, device: Device, seed: int = 0, boxed: bool = False, defines: tuple[str, ...] = ()
) -> tuple[dict, dict, list[Launch]]:
    """Results of the emulated kernels and of torch in float64, by name, and the launches."""
    inputs = [t if t is None else t.detach() for t in make_inputs(case, dtype)]
    exact = [t if t is None else t.double() for t in inputs]
    inputs = in_boxes(inputs) if boxed else [in_nan(t) for t in inputs]
    launches: list[Launch] = []

    def emulate(launch: Launch) -> None:
        launches.append(launch)
        execute(launch._replace(defines=(*launch.defines, *defines)), seed)

    torch.use_deterministic_algorithms(True)  # fills the outputs' memory with NaN
    try:
        y, state = cuda.scan_forward(*inputs, *options(case), True, case.decay, device=device, execute=emulate)
        expected_y, expected_state = eager.scan_forward(*exact, *options(case), True, case.decay)
        grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        grads = cuda.scan_backward(grad_y, state, *inputs, *options(case), case.decay, device=device, execute=emulate)
        expected_grads = eager.scan_backward(grad_y.double(), expected_state, *exact, *options(case), case.decay)
    finally:
        torch.use_deterministic_algorithms(False)
    names = ("y", "state", *(f"d_{name}" for name in NAMES))
    return (
        dict(zip(names, (y, state, *grads), strict=True)),
        dict(zip(names, (expected_y, expected_state, *expected_grads), strict=True)),
        launches,
    )


@needs_compiler
@pytest.mark.parametrize(("case", "dtype", "device"), EMULATED, ids=EMULATED_IDS)
def test_emulated_kernels_match_torch(case, dtype, device):
    got, expected, _ = run(case, dtype, device)
    for name, value in got.items():
        assert value.dtype == dtype
        assert_close(name, value, expected[name])


@needs_compiler
@pytest.mark.parametrize("part", range(4))
def test_random_shapes_emulated(part):
    """Shapes and options for any device; on Hopper for half of them tensors that boxes can be of."""
    seed, generator = seeded(part)
    D = generator.choice((1, 2, 3, 8, 12, 16, 24, 40, 80))
    sides = [generator.randint(1, 6), generator.choice((generator.randint(1, 40), generator.randint(40, 300)))]
    case = Case(
        *(
            generator.randint(1, 2),
            *generator.sample(sides, 2),
            D,
            generator.choice([n for n in (1, 2, D) if D % n == 0]),
        ),
        directions=tuple(generator.sample(DIRECTIONS, generator.randint(1, 4))),
        normalizer=generator.choice(("sigmoid", "softmax")),
        segment=generator.choice((None, None, generator.randint(1, 40))),
        merge=generator.choice(("concat", "sum")),
        gates=generator.choice(("each", "shared", "lam", "none")),
    )
    case = case._replace(decay=case.gates != "none" and generator.random() < 0.2)
    dtype, device, boxed = generator.choice(TYPES), generator.choice(list(DEVICES)), generator.random() < 0.5
    print(case, dtype, device, boxed)
    got, expected, _ = run(case, dtype, DEVICES[device], seed, boxed)
    for name, value in got.items():
        assert_close(name, value, expected[name])


@needs_compiler
def test_half_storage_with_float32_logits():
    case, device = Case(1, 4, 6, 8, 2), DEVICES["h100"]
    x, lam, u, logits = (t.detach() for t in make_inputs(case, torch.bfloat16))
    got = cuda.scan_forward(x, lam, u, logits.float(), *options(case), False, device=device, execute=execute)[0]
    assert_close("y", got, eager.scan_forward(x, lam, u, logits, *options(case), False)[0])


@needs_compiler
def test_same_bits_in_any_order_of_threads():
    case = Case(1, 2, 200, 16, merge="sum", gates="shared")
    device = DEVICES["h100"]._replace(boxes=False)
    first, _, launches = run(case, torch.float32, device, seed=1)
    again, _, _ = run(case, torch.float32, device, seed=2)
    assert [launch.cluster for launch in launches] == [1, 4, 1], "meant to cover a split line and its sums over blocks"
    for name, value in first.items():
        assert torch.equal(value, again[name]), name


@needs_compiler
def test_boxes_give_the_same_bits_in_any_order_of_threads():
    case = Case(1, 3, 200, 96, directions=("down", "up"), merge="sum", gates="shared")
    first, _, launches = run(case, torch.bfloat16, DEVICES["h100"], seed=1, boxed=True)
    again, _, _ = run(case, torch.bfloat16, DEVICES["h100"], seed=2, boxed=True)
    assert [bool(launch.boxes) for launch in launches] == [True, True, False], "and the sums over blocks"
    for name, value in first.items():
        assert torch.equal(value, again[name]), name


# Vectors, lanes and clusters that the table would not choose for maps as small as these.
FORCED = [
    (Case(1, 3, 60, 16), torch.bfloat16, dict(vec=2, sets=1, lanes=8, cluster=4)),
    (Case(1, 12, 9, 24), torch.bfloat16, dict(vec=4, sets=1, lanes=4, cluster=2)),
    (Case(1, 20, 34, 8, 8, gates="lam", directions=("down",)), TYPES[1], dict(vec=4, sets=4, lanes=2, cluster=8)),
    (Case(1, 9, 23, 40, 2, segment=4), torch.float16, dict(vec=2, sets=1, lanes=2, cluster=4)),
    (Case(1, 5, 41, 12, gates="shared", merge="sum", decay=True), TYPES[0], dict(vec=4, sets=1, lanes=2, cluster=8)),
]


@needs_compiler
@pytest.mark.parametrize(("case", "dtype", "choices"), FORCED, ids=[str(case) for case, _, _ in FORCED])
def test_emulated_variants_match_torch(case, dtype, choices, monkeypatch):
    monkeypatch.setattr(cuda, "choose", lambda work, _device: cuda.make_variant(work, **choices))
    got, expected, _ = run(case, dtype, DEVICES["h100"])
    for name, value in got.items():
        assert_close(name, value, expected[name])


@needs_compiler
def test_boxes_in_which_every_lane_arrives():
    """What compute-sanitizer's racecheck is given."""

    case, defines = Case(1, 70, 40, 16), ("-DGSPN2_EVERY_LANE",)
    got, expected, launches = run(case, torch.bfloat16, DEVICES["h100"], boxed=True, defines=defines)
    assert all(launch.boxes for launch in launches[:2])
    for name, value in got.items():
        assert_close(name, value, expected[name])


# Each row of the table of boxes: the pass that it is of, and the other one. Few lines across keep the emulation short.
TABLE = [
    (Case(1, 5, 40, 24), "forward"),
    (Case(1, 7, 48, 16, 2, normalizer="softmax", segment=36), "forward"),
    (Case(2, 60, 3, 40, directions=("down", "left")), "both"),
    (Case(1, 3, 64, 8, gates="none"), "both"),
    (Case(1, 5, 100, 48, merge="sum", gates="shared"), "both"),
    (Case(1, 4, 80, 40), "both"),
    (Case(1, 3, 256, 128, directions=("down", "up")), "both"),
    (Case(1, 2, 400, 128, directions=("down",)), "both"),
    (Case(3, 2, 200, 48, 3, directions=("down", "up"), gates="lam"), "both"),
    (Case(1, 2, 200, 24, directions=("down",)), "both"),
    (Case(1, 4, 256, 80, directions=("up", "right"), decay=True), "both"),
    (Case(1, 300, 3, 64, 4, ("right", "down"), gates="shared", normalizer="softmax", segment=40), "both"),
    (Case(1, 2, 600, 16, directions=("down",), gates="lam", merge="sum"), "both"),
    (Case(1, 2, 1024, 40, directions=("up",)), "both"),
    (Case(1, 1, 2048, 24, directions=("down",), decay=True), "forward"),
]


def test_each_row_of_the_table_is_emulated(monkeypatch):
    taken, choose = set(), cuda.choose

    def record(work, device):
        taken.add(cuda.box_row(work))
        return choose(work, device)

    monkeypatch.setattr(cuda, "choose", record)
    monkeypatch.setattr(sys.modules[__name__], "execute", lambda *_: None)
    for case, _ in TABLE:
        run(case, torch.bfloat16, DEVICES["h100"], boxed=True)
    assert taken >= set(cuda.BOXES)


@needs_compiler
@pytest.mark.parametrize(("case", "which"), TABLE, ids=[str(case) for case, _ in TABLE])
def test_emulated_boxes_of_the_table_match_torch(case, which):
    for device in (DEVICES["h100"], DEVICES["h100"]._replace(boxes=False)):
        got, expected, launches = run(case, TYPES[1 + case.W % 2], device, boxed=True)
        boxed = ["forward"] * bool(launches[0].boxes) + ["backward"] * bool(launches[1].boxes)
        assert boxed == ([] if not device.boxes else ["forward", "backward"] if which == "both" else [which])
        for name, value in got.items():
            assert_close(name, value, expected[name])


# Few positions: halos as wide as a share, exchanges within a batch and over several, empty blocks, ragged last slices.
BOXES = [
    (Case(1, 8, 8, 8), torch.bfloat16, dict(width=8)),
    (Case(2, 16, 12, 16), torch.bfloat16, dict(width=16)),
    (Case(1, 19, 40, 40), torch.bfloat16, dict(width=16, cluster=3)),
    (Case(1, 19, 40, 40), torch.float16, dict(width=40, cluster=2, batch=8)),
    (Case(1, 23, 61, 8, decay=True), torch.float32, dict(width=8, cluster=3)),
    (Case(1, 9, 70, 8, gates="lam"), torch.bfloat16, dict(width=8, channels=2, cluster=8)),
    (Case(1, 9, 34, 64), torch.bfloat16, dict(width=64, cluster=4, batch=8, halo=4)),
    (Case(2, 7, 1, 8, segment=3), torch.float32, dict(width=8, cluster=2)),
    (Case(1, 5, 9, 24, gates="shared", merge="sum"), torch.float16, dict(width=24, cluster=5, channels=2)),
    (Case(1, 33, 50, 24, gates="none", directions=("left", "up")), torch.float16, dict(width=16, cluster=2)),
    (Case(1, 30, 26, 16, 2, segment=7, normalizer="softmax"), torch.bfloat16, dict(width=8, most_stages=2)),
    (Case(1, 3, 200, 8), torch.bfloat16, dict(width=8)),
    # Lanes of 16 bytes, in rows that the copy engine swizzles and in others.
    (Case(1, 5, 61, 16, decay=True), torch.bfloat16, dict(width=16, channels=8)),
    (Case(1, 6, 50, 32, gates="lam"), torch.float16, dict(width=32, channels=8, cluster=2)),
    (Case(1, 4, 90, 40), torch.bfloat16, dict(width=40, channels=8)),
    (Case(1, 3, 100, 32, normalizer="softmax"), torch.bfloat16, dict(width=32, channels=8)),
    (Case(1, 4, 40, 64), torch.float16, dict(width=64, channels=8)),
]


@needs_compiler
@pytest.mark.parametrize(("case", "dtype", "choices"), BOXES, ids=[str(case) for case, _, _ in BOXES])
def test_emulated_boxes_match_torch(case, dtype, choices, monkeypatch):
    choose = cuda.choose

    def forced(work, device):
        return cuda.make_bulk(work, **choices) or choose(work._replace(boxed=False), device)

    monkeypatch.setattr(cuda, "choose", forced)
    got, expected, launches = run(case, dtype, DEVICES["h100"], boxed=True)
    # Lanes of four bytes have no backward from boxes; the largest do not fit one.
    forward_only = (
        choices.get("channels") == 2 or choices.get("batch") == 8 or case[2:4] in ((90, 40), (100, 32), (40, 64))
    )
    assert launches[0].boxes and bool(launches[1].boxes) != forward_only
    for name, value in got.items():
        assert_close(name, value, expected[name])


@needs_compiler
@pytest.mark.parametrize("known", [True, False], ids=["", "unknown-maps"])
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 5, 7, 8),
        Case(1, 6, 4, 8, gates="none", merge="sum"),
        Case(1, 5, 60, 16, gates="lam", decay=True, fused=True),
        Case(1, 60, 33, 24, gates="shared", fused=True),
    ],
    ids=str,
)
def test_a_plan_follows_other_tensors(case, known, monkeypatch):
    launches = emulate_driver(monkeypatch, known)
    monkeypatch.setattr(cuda, "device_limits", lambda index: DEVICES["h100"])
    first, second = (
        [t if t is None else t.detach() for t in make_inputs(case, torch.bfloat16, seed)] for seed in (0, 1)
    )
    if case.fused:
        first, second = in_boxes(first), in_boxes(second)
    plan = cuda.Plan(tuple(first), *options(case), case.decay)
    assert bool(launches[0].boxes) == case.fused and bool(plan.launch.maps) == (case.fused and not known)
    for inputs in (second, first):
        exact = [t if t is None else t.double() for t in inputs]
        assert_close("y", plan(tuple(inputs)), eager.scan_forward(*exact, *options(case), False, case.decay)[0])


def test_threads_do_not_share_the_parameters_of_a_launch(monkeypatch):
    met, made, given = threading.Barrier(2, timeout=30), [], []

    class Starter(NamedTuple):
        function: None
        launch: Launch
        params: bytearray

        def __call__(self, _index: int) -> None:
            if len(given) < 2:
                met.wait()  # both have written theirs
            given.append(struct.unpack("2Q", self.params))

    monkeypatch.setattr(cuda, "_function", lambda launch, index: None)
    monkeypatch.setattr(cuda, "Starter", lambda *args: made.append(Starter(*args)) or made[-1])
    repeated = cuda.Repeated(Launch("gspn2_forward", (), bytes(16), 1, (32, 1), 1, 0), 0, [(0, 1), (1, 0)])
    threads = [threading.Thread(target=repeated, args=((n, n + 1),)) for n in (10, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    repeated((30, 31))
    assert sorted(given[:2]) == [(11, 10), (21, 20)] and given[2] == (31, 30)
    assert len(made) == 2, "parameters are laid out once for each of the threads that launch at the same time"


@needs_compiler
@pytest.mark.parametrize("scale", [30, 3000])
def test_extreme_logits_stay_finite(scale):
    case = Case(1, 4, 5, 4)
    x, lam, u, logits = (t.detach() for t in make_inputs(case, torch.float32))
    inputs = (x, lam, u, logits * scale)
    y, state = cuda.scan_forward(*inputs, *options(case), True, device=DEVICES["h100"], execute=execute)
    expected = eager.scan_forward(*(t.double() for t in inputs), *options(case), True)[0]
    assert_close("y", y, expected)
    grads = cuda.scan_backward(y, state, *inputs, *options(case), device=DEVICES["h100"], execute=execute)
    assert all(grad.isfinite().all() for grad in grads)


# The self-attentions of SDXL and SD 1.5 at their sizes, 4K, 16K, odd sides, and the first GSPN's shape.
SHAPES = {
    "sdxl-1024-640": (2, 64, 64, 80, 1, 4),
    "sdxl-1024-1280": (2, 32, 32, 160, 1, 4),
    "sd15-512-320": (2, 64, 64, 40, 1, 4),
    "sd15-512-640": (2, 32, 32, 80, 1, 4),
    "sd15-512-1280": (2, 16, 16, 160, 1, 4),
    "sd15-512-middle": (2, 8, 8, 160, 1, 4),
    "sdxl-4k-640": (2, 256, 256, 80, 1, 4),
    "sdxl-4k-1280": (2, 128, 128, 160, 1, 4),
    "one-4k-640": (1, 256, 256, 80, 1, 4),
    "one-4k-1280": (1, 128, 128, 160, 1, 4),
    "sdxl-8k-640": (1, 512, 512, 80, 1, 4),
    "sdxl-8k-1280": (1, 256, 256, 160, 1, 4),
    "sdxl-16k-640": (1, 1024, 1024, 80, 1, 4),
    "sdxl-16k-1280": (1, 512, 512, 160, 1, 4),
    "sd15-8k-320": (1, 1024, 1024, 40, 1, 4),
    "longest": (1, 2048, 2048, 40, 1, 4),
    "batch-16": (16, 1024, 1024, 8, 1, 4),
    "first-gspn": (16, 1024, 1024, 8, 8, 1),
    "wide-1024x576": (2, 72, 128, 40, 1, 4),
    "bottom-9x16": (2, 9, 16, 160, 1, 4),
    "odd": (1, 57, 31, 3, 1, 4),
    "groups": (2, 64, 64, 40, 2, 4),
    "narrow": (1, 256, 256, 16, 1, 4),
}


def work_of(shape: tuple[int, ...], size: int, backward: bool, segment: int | None = None, aligned: int = 16) -> Work:
    B, H, W, D, G, K = shape
    while aligned > size and D * size % aligned:
        aligned //= 2
    gates = 1 if G == D else 2
    return Work(
        *(B, H, W, D, G, K, segment or max(H, W), size, size, aligned, aligned, gates, backward),
        boxed=aligned == 16,
    )


PASSES = {
    "forward": (False, False),
    "forward-boxes": (False, True),
    "backward": (True, False),
    "backward-boxes": (True, True),
}
"""(backward, whether boxes may be chosen)"""


@pytest.mark.parametrize(("backward", "boxes"), PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("size", [2, 4], ids=["half", "float32"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("device", DEVICES)
def test_table_gives_a_launch_that_fits(device, name, size, backward, boxes):
    limits = DEVICES[device]
    limits = limits._replace(boxes=boxes and limits.boxes)
    for segment in (None, 4):
        for aligned in (16, 8, 4, size):
            work = work_of(SHAPES[name], size, backward, segment, aligned)
            variant = cuda.choose(work, limits)
            threads = variant.block[0] * variant.block[1]
            assert variant.shared <= limits.shared
            assert variant.vec * size <= max(aligned, size) and work.D % variant.vec == 0
            assert variant.slices * variant.lanes * variant.vec >= work.D
            if variant.places:
                share = -(-work.line // variant.cluster)
                halos = 0 if variant.cluster == 1 else 2 * variant.halo
                assert 32 * variant.places >= variant.span >= share + halos and variant.span % 8 == 0
                assert variant.span <= 256 and 2 <= variant.stages <= cuda.MOST_STAGES
                assert threads % 32 == 0 and threads <= 1024 and size == 2
                assert variant.ahead % variant.halo == 0 or variant.halo % variant.ahead == 0
            else:
                assert threads % 32 == 0 and threads <= cuda.largest_block(
                    work, variant.vec, variant.sets, variant.cluster
                )
                assert variant.lanes == variant.block[0]
                assert variant.block[1] * variant.turns * variant.cluster >= work.line
            assert variant.cluster == 1 or limits.capability >= (9, 0)
            assert variant.cluster <= 8 or (variant.places and variant.cluster == 16)
            assert variant.grid == work.B * work.K * work.segments * variant.slices * variant.cluster < 2**31
            assert variant.ahead % 2 == 0


@pytest.mark.parametrize(
    ("name", "kind", "vec", "lanes", "cluster", "blocks"),
    [
        ("sdxl-1024-640", "forward", 4, 2, 1, 80),  # half sectors rather than less than half of the processors
        ("sdxl-1024-640", "backward", 4, 4, 1, 40),  # the backward writes more: whole sectors
        ("sdxl-1024-1280", "forward", 4, 4, 1, 80),
        ("sdxl-4k-640", "forward", 4, 2, 1, 80),
        ("sdxl-4k-640", "backward", 4, 4, 2, 80),
        ("sdxl-4k-1280", "forward", 4, 4, 1, 80),
        ("sd15-8k-320", "forward", 4, 4, 8, 96),  # longer than a block
        ("batch-16", "forward", 4, 2, 4, 256),
        ("first-gspn", "forward", 4, 2, 8, 128),
        ("first-gspn", "backward", 4, 2, 8, 128),
    ],
)
def test_table_on_an_h100(name, kind, vec, lanes, cluster, blocks):
    variant = cuda.choose(work_of(SHAPES[name], 2, PASSES[kind][0]), DEVICES["h100"]._replace(boxes=False))
    assert not variant.places
    assert (variant.vec, variant.lanes, variant.cluster, variant.grid) == (vec, lanes, cluster, blocks)


# vec, lanes, cluster, ahead, halo, span, stages, promotion, storers, normalizers, grid; None: the other was as fast.
BEST_BOXES = {
    ("first-gspn", "forward"): None,
    ("first-gspn", "backward"): None,
    ("sdxl-1024-640", "forward"): (4, 4, 1, 4, 8, 64, 6, 2, 1, 4, 40),
    ("sdxl-1024-640", "backward"): (8, 4, 3, 2, 4, 32, 8, 0, 2, 2, 72),
    ("sdxl-1024-1280", "forward"): (4, 4, 1, 8, 8, 32, 5, 0, 1, 4, 80),
    ("sdxl-1024-1280", "backward"): None,
    ("sdxl-4k-640", "forward"): (8, 6, 4, 2, 4, 72, 4, 0, 1, 4, 64),
    ("sdxl-4k-640", "backward"): (8, 10, 16, 2, 4, 24, 5, 0, 2, 2, 128),
    ("sdxl-4k-1280", "forward"): (8, 10, 6, 4, 4, 32, 3, 1, 1, 4, 96),
    ("sdxl-4k-1280", "backward"): (8, 10, 6, 2, 4, 32, 3, 1, 2, 2, 96),
    ("sdxl-8k-640", "forward"): (8, 6, 8, 2, 4, 72, 4, 0, 1, 4, 64),
    ("sdxl-8k-1280", "forward"): (8, 4, 4, 2, 8, 80, 5, 0, 1, 4, 80),
    ("sdxl-16k-640", "forward"): (8, 6, 16, 2, 4, 72, 4, 0, 1, 4, 128),
    ("sdxl-16k-1280", "forward"): (4, 8, 5, 2, 8, 120, 3, 0, 1, 4, 100),
    ("sd15-8k-320", "forward"): (8, 5, 16, 2, 8, 80, 4, 0, 1, 4, 64),
    ("sd15-8k-320", "backward"): (4, 6, 16, 2, 8, 80, 4, 0, 2, 2, 128),
    ("batch-16", "forward"): (4, 2, 16, 8, 8, 80, 3, 2, 1, 4, 1024),
    ("batch-16", "backward"): (4, 2, 16, 4, 8, 80, 5, 2, 2, 2, 1024),
}


@pytest.mark.parametrize(("name", "which"), BEST_BOXES)
def test_table_has_the_boxes_that_were_fastest(name, which):
    work, best = work_of(SHAPES[name], 2, which == "backward"), BEST_BOXES[name, which]
    variant = cuda.choose(work, DEVICES["h100"])
    shown = (*variant[:1], variant.lanes, variant.cluster, variant.ahead, variant.halo, variant.span, variant.stages)
    shown += (variant.promotion, variant.storers, variant.normalizers, variant.grid)
    assert shown == best if best else not variant.places


@pytest.mark.parametrize(
    ("shape", "size", "segment"),
    [
        ((2, 16, 16, 160, 1, 4), 2, None),  # shorter lines and other types than were timed
        ((2, 64, 64, 80, 1, 4), 4, None),
        ((2, 256, 256, 80, 1, 4), 2, 16),  # segments of few lines
        ((8, 64, 64, 80, 1, 4), 2, None),  # a small map in more blocks than run at once
        ((2, 256, 256, 80, 4, 4), 2, None),  # a slice would have two sets of weights
        ((1, 4096, 4096, 40, 1, 4), 2, None),
    ],
)
def test_boxes_only_where_they_were_timed(shape, size, segment):
    for backward in (False, True):
        works = [work_of(shape, size, backward, segment)]
        works.append(work_of(SHAPES["sdxl-4k-640"], 2, backward, aligned=8))
        assert not any(v.places for w in works for v in cuda._bulks(w, DEVICES["h100"]))


def test_line_that_cannot_fit_says_so():
    with pytest.raises(ValueError, match=r"A line of 2048 positions does not fit a block of this GPU; .*\.$"):
        cuda.choose(work_of(SHAPES["longest"], 4, backward=False), Device((8, 0), 108, 10_000))


@needs_compiler
@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize(("name", "size"), [("first-gspn", 4), ("sdxl-1024-640", 2), ("odd", 2)])
def test_shared_memory_is_counted_as_the_kernels_count_it(name, size, kind):
    backward, boxes = PASSES[kind]
    dtype = torch.float32 if size == 4 else torch.bfloat16
    work = work_of(SHAPES[name], size, backward)
    variant = cuda.choose(work, DEVICES["h100"]._replace(boxes=boxes))
    kernel = "BULK_" * bool(variant.places) + "BACKWARD" if backward else "BULK" if variant.places else "FORWARD"
    defines = cuda.defines(kernel, variant, dtype, dtype, has=3 if work.gates == 2 else 1)
    positions = variant.span or -(-work.line // variant.cluster)
    assert library(defines).needed_shared_bytes(positions, variant.stages) == variant.shared
    assert library(defines).params_bytes() == (
        -(-(2 * cuda.MAPS * 128 + cuda.PARAMS.size + 12) // 64) * 64 if variant.places else cuda.PARAMS.size
    )


ARCHITECTURES = ("80", "86", "89", "90", "100", "120")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_kernels_compile_for_every_architecture_without_spills(tmp_path):
    by_capability = {f"{major}{minor}": limits for limits in DEVICES.values() for major, minor in [limits.capability]}
    jobs = set()
    for name, size in [
        ("sdxl-1024-640", 2),
        ("sdxl-4k-1280", 2),
        ("sdxl-8k-1280", 2),
        ("sdxl-16k-640", 2),
        ("sdxl-16k-1280", 2),
        ("sd15-8k-320", 2),
        ("first-gspn", 4),
        ("first-gspn", 2),
    ]:
        for architecture in ARCHITECTURES:
            decays = (False, True) if architecture in ("86", "90") else (False,)
            for (backward, boxes), decay in itertools.product(PASSES.values(), decays):
                dtype = torch.float32 if size == 4 else torch.bfloat16
                limits = by_capability[architecture]
                limits = limits._replace(boxes=boxes and limits.boxes)
                variant = cuda.choose(work_of(SHAPES[name], size, backward)._replace(decay=decay), limits)
                kernel = "BACKWARD" if backward else "BULK" if variant.places else "FORWARD"
                kernel = "BULK_BACKWARD" if backward and variant.places else kernel
                if variant.turns > 1:  # long lines without clusters: several positions a thread spill, docs/kernel.md
                    continue
                # The most that a kernel has: the state that the forward saves, the backward's sums over blocks.
                has = (1 if name == "first-gspn" else 3) + 4 * (not backward or variant.parts > 1)
                jobs.add((architecture, cuda.defines(kernel, variant, dtype, dtype, has, decay)))
    rows = set()
    more = {
        "longest-narrow": (1, 2048, 2048, 16, 1, 4),
        "16k-narrow": (1, 1024, 1024, 16, 1, 4),
        "8k-narrow": (1, 512, 512, 16, 1, 4),
        "first-gspn-down": SHAPES["first-gspn"],
    }
    for name, size in [
        ("sdxl-1024-1280", 2),
        ("sdxl-1024-640", 2),
        ("sdxl-4k-1280", 2),
        ("one-4k-1280", 2),
        ("sdxl-4k-640", 2),
        ("one-4k-640", 2),
        ("narrow", 2),
        ("sdxl-8k-640", 2),
        ("sd15-8k-320", 2),
        ("batch-16", 2),
        ("16k-narrow", 2),
        ("longest", 2),
        ("longest-narrow", 2),
        ("8k-narrow", 2),
        ("first-gspn", 4),
        ("first-gspn", 2),
        ("first-gspn-down", 4),
        ("first-gspn-down", 2),
    ]:
        B, H, W, D, G, K = (SHAPES | more)[name]
        directions = (2,) if name.endswith("down") else tuple(range(K))
        layout = planes.Layout(D, G, directions, K, True, G == 1)
        dtype = torch.float32 if size == 4 else torch.bfloat16
        work, has = planes.Work(B, H, W, layout, 0, size, False), 1 + 2 * (G == 1) + 4
        from_planes, gradients = planes.choose(work, DEVICES["h100"]), planes_backward.choose(work, DEVICES["h100"])
        assert from_planes is not None
        rows.add(row_of_table(work))
        jobs.add(("90", planes.defines(from_planes, dtype, has, False)))
        if gradients is not None:
            jobs.add(("90", planes.defines(from_planes, dtype, has + 8 * (G == 1), False)))
            jobs.add(("90", planes_backward.defines(gradients, dtype, has)))
            rows.add(row_of_table(work, planes_backward))
    assert rows == {*planes.ROWS, *planes_backward.ROWS}
    source = tmp_path / "gspn2.cu"
    source.write_text(cuda.kernel_source())

    def compile_one(job: tuple[str, tuple[str, ...]]) -> str:
        architecture, defines = job
        flags = [
            "-std=c++17",
            "-cubin",
            "-Xptxas=-v",
            "-Werror=all-warnings",
            f"-arch=sm_{architecture}",
            "-o",
            "/dev/null",
        ]
        done = subprocess.run(["nvcc", *flags, *defines, str(source)], capture_output=True, text=True)
        assert done.returncode == 0, f"{job}: {done.stderr[:2000]}"
        return "" if "0 bytes spill stores, 0 bytes spill loads" in done.stderr else f"{job}: {done.stderr}"

    with ThreadPoolExecutor(2) as pool:
        spilled = [report for report in pool.map(compile_one, sorted(jobs)) if report]
    assert not spilled, "\n".join(spilled)


class Driver:
    """Stands for the CUDA driver: what it is asked to launch."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.launched: list[tuple] = []

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = self.version
        return 0

    def cuLaunchKernelEx(self, config: int, function: int, params: int, _extra: None) -> int:
        given = cuda._Config.from_address(config)
        grid, block = (tuple(getattr(given, f"{what}_{axis}") for axis in "xyz") for what in ("grid", "block"))
        bytes_given = ctypes.string_at(ctypes.c_void_p.from_address(params).value, 4)
        self.launched.append((function, grid, block, given.shared, given.stream, given.count, bytes_given))
        return 0 if function else 400


@pytest.mark.parametrize(("version", "follows"), [(12020, 0), (12030, 1), (13000, 1)])
def test_the_driver_gets_a_launch(version, follows, monkeypatch):
    driver = Driver(version)
    monkeypatch.setattr(cuda, "_driver", lambda: driver)
    monkeypatch.setattr(cuda, "_raw_stream", lambda index: 70 + index)
    launch = Launch("gspn2_forward", (), b"", 3, (32, 2), 1, 100)
    cuda._attributes.cache_clear()
    try:
        for each in (launch, launch._replace(follows=True)):
            params = bytearray(b"abcd")
            start = cuda.Starter(SimpleNamespace(ptr=5), each, params)
            start(7)
            params[:] = b"efgh"  # a later call starts it with what is there then, on the stream of then
            start(8)
        with pytest.raises(RuntimeError, match="did not start gspn2_forward \\(CUDA error 400\\)"):
            cuda.Starter(SimpleNamespace(ptr=0), launch, params)(7)
    finally:
        cuda._attributes.cache_clear()
    calls = [(count, *call) for count in (0, follows) for call in ((77, b"abcd"), (78, b"efgh"))]
    assert driver.launched[:4] == [
        (5, (3, 1, 1), (32, 2, 1), 100, stream, count, given) for count, stream, given in calls
    ]
