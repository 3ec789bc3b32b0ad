"""The scan on a GPU: the CPU's suite, and what only a GPU can show. One command: pytest -m gpu tests/gpu"""

import threading

import pytest
import torch

from gspn2_diffusion.ops import cuda, gspn2_scan, gspn2_scan_reference

from ..scan_cases import CASES, Case, assert_close, gradients, make_inputs, seeded

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
if torch.cuda.is_available():
    pytest.importorskip("cupy")

TYPES = (torch.float32, torch.float16, torch.bfloat16)
LONG = [
    # The segment keeps the states small: over 2048 lines they grow so far that the logits' gradients, differences of
    # products with states stored in half precision, lose all of their digits.
    Case(1, 3, 2048, 8, directions=("up", "right"), segment=300),
    Case(1, 5, 1100, 8, 8, gates="lam", directions=("down",)),
    Case(1, 200, 300, 16, fused=True),
    Case(1, 300, 3, 40, 2, segment=7, merge="sum", gates="shared"),
]
# Each row of the launcher's table of boxes, and the passes that take it on Hopper: with clusters and without, segments,
# groups, gates, sums, a ragged last share.
BOXES = [
    (Case(2, 32, 32, 160, fused=True), ["BULK"]),
    (Case(2, 64, 64, 80, fused=True), ["BULK", "BULK_BACKWARD"]),
    (Case(1, 57, 60, 24, directions=("left", "up"), gates="lam", fused=True, decay=True), ["BULK", "BULK_BACKWARD"]),
    (Case(1, 70, 88, 40, fused=True), ["BULK", "BULK_BACKWARD"]),
    (Case(2, 40, 128, 160, fused=True), ["BULK", "BULK_BACKWARD"]),
    (Case(1, 30, 256, 160, fused=True), ["BULK", "BULK_BACKWARD"]),
    (Case(1, 450, 20, 128, fused=True), ["BULK", "BULK_BACKWARD"]),
    (Case(1, 100, 256, 80, merge="sum", gates="shared", fused=True), ["BULK", "BULK_BACKWARD"]),
    (Case(1, 200, 90, 32, 2, ("down", "right"), "softmax", 50, fused=True), ["BULK", "BULK_BACKWARD"]),
    (Case(1, 40, 1024, 40, fused=True, decay=True), ["BULK", "BULK_BACKWARD"]),
    (Case(1, 601, 48, 8, segment=100, merge="sum", gates="lam", fused=True), ["BULK", "BULK_BACKWARD"]),
    (Case(1, 30, 2048, 16, segment=300, fused=True), ["BULK"]),
]
HALF = (torch.float16, torch.bfloat16)


@pytest.fixture
def boxed(monkeypatch) -> list[str]:
    """The kernels from boxes that are launched."""
    launched: list[str] = []
    execute = cuda._execute

    def record(launch: cuda.Launch) -> None:
        launched.extend([launch.kernel.removeprefix("gspn2_").upper()] * bool(launch.boxes))
        execute(launch)

    monkeypatch.setattr(cuda, "_execute", record)
    return launched


@pytest.fixture(autouse=True)
def _poison_outputs(monkeypatch):
    """Every new tensor starts as NaN, so that an element that no thread writes fails: also a plan's, whose faster way
    to memory does not fill it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(cuda, "_empty_strided", None)
    monkeypatch.setattr(cuda, "_plans", {})
    yield
    torch.use_deterministic_algorithms(False)


def check(case: Case, dtype: torch.dtype, seed: int = 0, device: str = "cuda") -> None:
    inputs = make_inputs(case, dtype, seed, device)
    got = gspn2_scan(*inputs, **case.options)
    exact = [t if t is None else t.detach().cpu().double().requires_grad_() for t in inputs]
    # float64 on the CPU: the torch path, itself tested against the line-by-line reference.
    expected = gspn2_scan(*exact, **case.options)
    assert got.dtype == dtype and got.device == inputs[0].device
    assert_close("y", got, expected)
    grad_y = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    grads = gradients(got, inputs, grad_y.to(device))
    for name, wanted in gradients(expected, exact, grad_y.double()).items():
        assert_close(name, grads[name], wanted)


@pytest.mark.parametrize("dtype", TYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES + LONG, ids=str)
def test_matches_float64(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("dtype", HALF, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("case", "kernels"), BOXES, ids=[str(case) for case, _ in BOXES])
def test_boxes_match_float64(case, kernels, dtype, boxed):
    check(case, dtype)
    assert boxed == (kernels if cuda.device_limits(0).boxes else [])


@pytest.mark.parametrize("case", [BOXES[1][0], BOXES[7][0]], ids=str)
def test_without_boxes_by_the_environment(case, boxed, monkeypatch):
    monkeypatch.setenv("GSPN2_BOXES", "0")
    limits = cuda.device_limits.__wrapped__(0)
    assert not limits.boxes
    monkeypatch.setattr(cuda, "device_limits", lambda index: limits)
    check(case, torch.bfloat16)
    assert not boxed


@pytest.mark.parametrize("part", range(8))
def test_random_shapes_of_boxes(part, boxed):
    """64 shapes for which the table has boxes."""
    seed, generator = seeded(part)
    D = generator.choice([8, 16, 24, 40, 64, 80, 160])
    row = generator.choice(cuda.BOXES)
    for number in range(8):
        line = generator.randint(row.shortest, min(row.longest, 1500))
        sides = [line, generator.randint(1, min(line, 1 + 300_000 // (line * D)))]
        generator.shuffle(sides)
        gates = generator.choice(["each", "shared", "lam", "none"])
        case = Case(
            generator.randint(1, 2),
            *sides,
            D,
            generator.choice([g for g in (1, 1, 2, 5) if D % (8 * g) == 0]),
            tuple(generator.sample(("right", "left", "down", "up"), generator.randint(1, 4))),
            generator.choice(["sigmoid", "softmax"]),
            generator.choice([None, 32, 100]) if line <= 300 else generator.choice([32, 100, 250]),
            generator.choice(["concat", "sum"]),
            gates,
            gates != "none" and generator.random() < 0.2,
            True,
        )
        dtype = generator.choice(HALF)
        try:
            check(case, dtype, seed=number)
        except Exception as error:
            raise AssertionError(f"seed {seed}, number {number}: {case} {dtype}") from error
    assert boxed or not cuda.device_limits(0).boxes


def test_float64_on_the_gpu_equals_the_reference():
    case = Case(1, 5, 6, 4, 2)
    inputs = make_inputs(case, torch.float64, device="cuda")
    torch.testing.assert_close(gspn2_scan(*inputs, **case.options), gspn2_scan_reference(*inputs, **case.options))


@pytest.mark.parametrize("part", range(20))
def test_random_shapes_types_and_strides(part):
    """1,000 of them, in twenty parts of one width each."""
    seed, generator = seeded(part)
    D = generator.choice([1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 40, 48, 80])
    G = generator.choice([g for g in range(1, D + 1) if D % g == 0])
    gates = generator.choice(["each", "shared", "lam", "none"])
    fused = generator.random() < 0.5
    for number in range(50):
        side = generator.choice([8, 40, 150])
        case = Case(
            generator.randint(1, 3),
            generator.randint(1, side),
            generator.randint(1, side),
            D,
            G,
            tuple(generator.sample(("right", "left", "down", "up"), generator.randint(1, 4))),
            generator.choice(["sigmoid", "softmax"]),
            generator.choice([None, None, 1, 3, 16]),
            generator.choice(["concat", "sum"]),
            gates,
            gates != "none" and generator.random() < 0.2,
            fused,
        )
        dtype = generator.choice(TYPES)
        try:
            check(case, dtype, seed=number)
        except Exception as error:
            raise AssertionError(f"seed {seed}, number {number}: {case} {dtype}") from error


@pytest.mark.parametrize("case", [CASES[6], CASES[9], LONG[0], LONG[3], *(case for case, _ in BOXES[:8])], ids=str)
def test_same_bits_twenty_times(case):
    inputs = make_inputs(case, torch.bfloat16, device="cuda")
    first = None
    for _ in range(20):
        y = gspn2_scan(*inputs, **case.options)
        results = [y.detach(), *gradients(y, inputs).values()]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


def test_streams_and_threads():
    cases = [Case(2, 33, 40, 16), Case(1, 64, 64, 40, 2), Case(1, 17, 70, 8, 8, gates="lam")]
    expected = [gspn2_scan(*make_inputs(case, torch.float32, device="cuda"), **case.options).detach() for case in cases]
    failures: list[str] = []

    def work(name: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for turn in range(30):
                    case = cases[(name + turn) % len(cases)]
                    y = gspn2_scan(*make_inputs(case, torch.float32, device="cuda"), **case.options)
                    torch.cuda.current_stream().synchronize()
                    assert torch.equal(y, expected[(name + turn) % len(cases)])
        except Exception as error:
            failures.append(f"thread {name}: {error!r}")

    threads = [threading.Thread(target=work, args=(name,)) for name in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_cuda_graph_replays_with_new_values():
    case = Case(2, 64, 64, 80, fused=True)
    inputs = make_inputs(case, torch.bfloat16, device="cuda")
    with torch.no_grad():
        gspn2_scan(*inputs, **case.options)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            y = gspn2_scan(*inputs, **case.options)
        fresh = make_inputs(case, torch.bfloat16, seed=5, device="cuda")
        for old, new in zip(inputs, fresh, strict=True):
            old.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, gspn2_scan(*fresh, **case.options))


def test_calls_without_gradient_equal_those_with_one():
    """The first plans its launch, the second follows the plan, the third has other strides and needs its own."""
    for case in (Case(2, 9, 14, 16, fused=True), Case(2, 9, 14, 16), Case(1, 7, 5, 8, gates="lam", merge="sum")):
        for seed in range(3):
            inputs = make_inputs(case, torch.bfloat16, seed, "cuda")
            expected = gspn2_scan(*inputs, **case.options).detach()
            with torch.no_grad():
                assert torch.equal(gspn2_scan(*inputs, **case.options), expected)
                x, *rest = inputs
                wide = torch.cat([x, x], -1)[..., : x.shape[-1]]
                assert torch.equal(gspn2_scan(wide, *rest, **case.options), expected)
                with pytest.raises(TypeError, match="`x` is torch"):
                    gspn2_scan(x.int(), *rest, **case.options)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(backend):
    case = Case(2, 16, 24, 16)
    inputs = make_inputs(case, torch.float32, device="cuda")
    compiled = torch.compile(lambda *t: gspn2_scan(*t, **case.options) * 2, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*inputs), gspn2_scan(*inputs, **case.options) * 2)


def test_autocast_keeps_the_storage_type():
    case = Case(1, 4, 5, 8, merge="sum")
    inputs = make_inputs(case, torch.bfloat16, device="cuda")
    with torch.autocast("cuda", torch.float16):
        y = gspn2_scan(*inputs, **case.options)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, gspn2_scan(*inputs, **case.options), rtol=0, atol=0)


def test_opcheck():
    inputs = make_inputs(Case(2, 3, 4, 4, 2), torch.float32, device="cuda")
    arguments = (*inputs, [0, 1, 2, 3], False, 0, False, True)
    torch.library.opcheck(torch.ops.gspn2.scan.default, arguments)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_device_that_is_not_the_current_one():
    assert torch.cuda.current_device() == 0
    check(Case(2, 16, 16, 16), torch.float32, device="cuda:1")
    assert torch.cuda.current_device() == 0


def test_line_that_cannot_fit_says_so_before_it_runs():
    x = torch.zeros(1, 1, 400_000, 1, device="cuda")
    with pytest.raises(ValueError, match="does not fit a block of this GPU"):
        gspn2_scan(x, None, None, torch.zeros(1, 1, 400_000, 1, 1, 3, device="cuda"), directions=("down",))


def test_strided_last_dimension_is_refused():
    x = torch.zeros(1, 4, 4, 8, device="cuda")[..., ::2]
    with pytest.raises(ValueError, match="`x` has stride 2 in its last dimension"):
        gspn2_scan(x, None, None, torch.zeros(1, 4, 4, 4, 1, 3, device="cuda"))
