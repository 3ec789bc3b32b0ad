"""The scan from planes on a GPU: pytest -m gpu tests/gpu/test_planes_gpu.py"""

import pytest
import torch

from gspn2_diffusion import GSPN2Config
from gspn2_diffusion.layers import GSPN2Layer, scan_layer
from gspn2_diffusion.ops import cuda, gspn2_scan_planes
from gspn2_diffusion.ops import scan as scan_module

from ..scan_cases import NAMES, Case, assert_close, make_features, planes_options, seeded
from ..test_planes import _operands, layout_of
from .test_scan_gpu import HALF, TYPES, _poison_outputs  # noqa: F401

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
if torch.cuda.is_available():
    pytest.importorskip("cupy")

# Each row of the table, with clusters and without: ragged slices and shares, groups, weights for each channel,
# segments, sums, decay; and shapes that it has no row for.
CASES = [
    (Case(2, 32, 32, 160), HALF),
    (Case(1, 17, 32, 7), HALF),
    (Case(2, 64, 64, 80), HALF),
    (Case(1, 57, 64, 24, 2, gates="shared"), HALF),
    (Case(1, 72, 96, 10, merge="sum"), HALF),
    (Case(1, 128, 128, 160), HALF),
    (Case(1, 100, 128, 40, 2), HALF),
    (Case(9, 100, 128, 32), HALF),
    (Case(4, 24, 256, 30), HALF),
    (Case(4, 24, 256, 40), HALF),
    (Case(2, 90, 512, 40), HALF),
    (Case(2, 16, 1008, 20), HALF),
    (Case(1, 40, 1000, 8, 8, ("down",), gates="lam"), TYPES),
    (Case(2, 256, 256, 20, normalizer="softmax"), HALF),
    (Case(1, 250, 96, 12, segment=32), HALF),
    (Case(1, 90, 512, 9, decay=True), HALF),
    (Case(1, 1024, 1008, 8), HALF),
    (Case(1, 24, 2048, 5, gates="none"), HALF),
    (Case(1, 24, 2048, 48), HALF),
    (Case(1, 700, 96, 8, 8, ("right", "up"), gates="lam"), TYPES),
    (Case(1, 72, 88, 10), HALF),
    (Case(1, 72, 104, 10), HALF),
    (Case(1, 17, 40, 7), HALF),
    (Case(1, 1024, 1000, 8), HALF),
    (Case(1, 64, 60, 8), ()),
]


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """The kernels that are launched."""
    kernels: list[str] = []
    function = cuda._function

    def record(launch: cuda.Launch, index: int):
        kernels.append(launch.kernel)
        return function(launch, index)

    monkeypatch.setattr(cuda, "_function", record)
    monkeypatch.setattr(cuda, "_plans", {})
    return kernels


@torch.no_grad()
def check(case: Case, dtype: torch.dtype, seed: int = 0) -> None:
    features, bias = make_features(case, dtype, seed, "cuda")
    got = gspn2_scan_planes(features, bias, **planes_options(case))
    # float64 takes the torch path, itself tested against the line-by-line reference.
    expected = gspn2_scan_planes(features.double().cpu(), bias.double().cpu(), **planes_options(case))
    assert got.dtype == dtype and got.shape == expected.shape and got.is_contiguous()
    assert_close("y", got, expected)


@pytest.mark.parametrize("dtype", TYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("case", "types"), CASES, ids=[str(case) for case, _ in CASES])
def test_matches_float64(case, types, dtype, launched):
    check(case, dtype)
    expected = "planes" if cuda.device_limits(0).boxes and dtype in types else "forward|bulk"
    assert len(launched) == 1 and launched[0].removeprefix("gspn2_") in expected.split("|")


def random_case(choice) -> Case:
    D = choice.choice((1, 3, 8, 12, 20, 40))
    case = Case(
        choice.choice((1, 1, 2)),
        choice.randint(1, 150),
        8 * choice.randint(1, 20),
        D,
        choice.choice([g for g in (1, 2, D) if D % g == 0]),
        tuple(choice.sample(("right", "left", "down", "up"), choice.randint(1, 4))),
        choice.choice(("sigmoid", "softmax")),
        choice.choice((None, None, 16, 32, 5)),
        choice.choice(("concat", "sum")),
        choice.choice(("each", "shared", "lam", "none")),
    )
    print(case)
    return case


@pytest.mark.parametrize("part", range(8))
def test_random_shapes(part):
    """64 shapes, types and options; those that the kernel does not have take gspn2_scan."""
    _, choice = seeded(part)
    for n in range(8):
        check(random_case(choice), choice.choice(TYPES), seed=n)


# Each row of the backward's table, with clusters and without, and shapes that it has no row for.
GRADIENTS = [
    (Case(2, 32, 32, 160), HALF),
    (Case(1, 17, 32, 7), HALF),
    (Case(2, 64, 64, 80), HALF),
    (Case(1, 57, 64, 24, 2, gates="shared"), HALF),
    (Case(1, 72, 88, 10, merge="sum"), HALF),
    (Case(1, 128, 128, 40), HALF),
    (Case(1, 90, 72, 12, 2), HALF),
    (Case(9, 100, 128, 32), HALF),
    (Case(4, 24, 256, 30), HALF),
    (Case(2, 256, 256, 20, normalizer="softmax"), HALF),
    (Case(1, 250, 96, 12, segment=32), HALF),
    (Case(1, 90, 512, 9, decay=True), ()),
    (Case(1, 1000, 152, 8), HALF),
    (Case(1, 24, 2048, 5, gates="none"), HALF),
    (Case(1, 24, 1400, 5, gates="none", merge="sum"), HALF),
    (Case(1, 700, 96, 8, 8, ("right", "up"), gates="lam"), TYPES),
    (Case(1, 656, 136, 4, 4, ("left", "down"), gates="lam"), TYPES),
    (Case(2, 700, 96, 8, 8, ("right",), gates="lam"), TYPES),
    (Case(1, 90, 648, 4, 4, ("up",)), TYPES),
    (Case(2, 57, 64, 7, directions=("left",)), HALF),
    (Case(1, 90, 256, 24, 2, ("down",), gates="shared", merge="sum"), HALF),
    (Case(9, 100, 128, 48), HALF),
    (Case(2, 40, 256, 64, gates="shared", merge="sum"), HALF),
    (Case(1, 648, 104, 48, 2, ("right", "up", "left")), HALF),
    (Case(1, 648, 104, 30), HALF),
    (Case(1, 24, 2048, 48), HALF),
    (Case(1, 64, 60, 8), ()),
]


@torch.no_grad()
def check_gradients(case: Case, dtype: torch.dtype, seed: int = 0) -> None:
    features, bias = make_features(case, dtype, seed, "cuda")
    y, state = scan_module._scan_planes(*_operands(features, bias, case, True))
    saved = state if case.gates in ("each", "shared") or case.merge == "sum" else y
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y)
    got = torch.ops.gspn2.scan_planes_backward(grad_y, saved, *_operands(features, bias, case))
    # From the same state: what that loses in the storage type is most of the logits' gradients' error.
    exact = [t.double().cpu() for t in (grad_y, saved, features, bias)]
    expected = torch.ops.gspn2.scan_planes_backward(*exact[:2], *_operands(*exact[2:], case))
    assert got.dtype == dtype and got.shape == features.shape
    sizes = layout_of(case).sizes
    sizes = (*sizes, len(got) - sum(sizes))
    for name, a, b in zip((*NAMES, "padding"), got.split(sizes), expected.split(sizes), strict=True):
        # In float32 the sums over neighbours' differences lose as much in torch on long lines.
        assert_close(f"d_{name}", a, b, 2e-4 if name == "logits" and dtype == torch.float32 else None)


@pytest.mark.parametrize("dtype", TYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("case", "types"), GRADIENTS, ids=[str(case) for case, _ in GRADIENTS])
def test_gradients_match_float64(case, types, dtype, launched):
    check_gradients(case, dtype)
    boxes = cuda.device_limits(0).boxes and dtype in types
    assert ("gspn2_planes_backward" in launched) == boxes, launched


@pytest.mark.parametrize("part", range(8))
def test_gradients_of_random_shapes(part):
    """64 shapes, types and options; those that the kernel does not have take gspn2_scan's."""
    _, choice = seeded(100 + part)
    for n in range(8):
        check_gradients(random_case(choice), choice.choice(TYPES), seed=n)


@pytest.mark.parametrize("case", [GRADIENTS[n][0] for n in (2, 7, 13, 17, 22)], ids=str)
def test_autograd_gives_the_same_bits_every_time(case, launched):
    features, bias = (t.requires_grad_() for t in make_features(case, torch.bfloat16, device="cuda"))

    def run() -> tuple[torch.Tensor, ...]:
        y = gspn2_scan_planes(features, bias, **planes_options(case))
        return torch.autograd.grad(y.float().square().sum(), (features, bias))

    first = run()
    if cuda.device_limits(0).boxes:
        assert launched[:2] == ["gspn2_planes", "gspn2_planes_backward"]
    assert all(torch.equal(a, b) for _ in range(20) for a, b in zip(run(), first, strict=True))


# In one wave of blocks, and in several, where the second launch begins within the first.
@pytest.mark.parametrize("case", [GRADIENTS[2][0], GRADIENTS[7][0], Case(2, 256, 256, 80)], ids=str)
@torch.no_grad()
def test_gradients_in_graphs_and_on_two_streams(case):
    def operands(seed: int) -> list[torch.Tensor]:
        features, bias = make_features(case, torch.bfloat16, seed, "cuda")
        y, state = scan_module._scan_planes(*_operands(features, bias, case, True))
        return [torch.randn_like(y), state, features, bias]

    def run(grad_y, state, features, bias) -> torch.Tensor:
        return torch.ops.gspn2.scan_planes_backward(grad_y, state, *_operands(features, bias, case))

    inputs = [operands(seed) for seed in range(2)]
    expected = [run(*i) for i in inputs]
    given, graph = [t.clone() for t in inputs[0]], torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [run(*given) for _ in range(3)]
    for n in (0, 1, 0, 1):
        for to, value in zip(given, inputs[n], strict=True):
            to.copy_(value)
        graph.replay()
        assert all(torch.equal(g, expected[n]) for g in got)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(10):
        both = []
        for i, stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                both.append(run(*i))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(both, expected, strict=True))


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_the_layer_trains_the_same_either_way(compiled, autocast, monkeypatch, launched):
    layer = GSPN2Layer(64, 64, GSPN2Config(init="random", proxy_dim=24))
    layer = layer.to("cuda", torch.float32 if autocast else torch.bfloat16)
    torch.nn.init.normal_(layer.scan_in.bias)
    tokens = torch.randn(2, 40 * 48, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(2, 40 * 48, 64, device="cuda", dtype=torch.bfloat16)

    def run(forward) -> tuple[torch.Tensor, ...]:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            y = forward(tokens, 40, 48)
        return torch.autograd.grad(y, [tokens, *layer.parameters()], grad)

    got = run(torch.compile(layer, fullgraph=True) if compiled else layer)
    if cuda.device_limits(0).boxes:
        assert launched == ["gspn2_planes", "gspn2_planes_backward", "gspn2_finish_planes"]
    monkeypatch.setattr(scan_layer, "scans_planes", lambda *_, **__: False)
    for n, (a, b) in enumerate(zip(got, run(layer), strict=True)):
        assert_close(f"gradient {n}", a, b, 0.05)


@pytest.mark.parametrize("case", [CASES[2][0], CASES[7][0]], ids=str)
@torch.no_grad()
def test_same_bits_every_time(case):
    features, bias = make_features(case, torch.bfloat16, device="cuda")
    first = gspn2_scan_planes(features, bias, **planes_options(case))
    assert all(torch.equal(gspn2_scan_planes(features, bias, **planes_options(case)), first) for _ in range(20))


@torch.no_grad()
def test_a_graph_replays_with_new_values_and_calls_follow_other_tensors():
    case = CASES[2][0]
    features, bias = make_features(case, torch.bfloat16, device="cuda")
    gspn2_scan_planes(features, bias, **planes_options(case))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gspn2_scan_planes(features, bias, **planes_options(case))
    others = make_features(case, torch.bfloat16, 1, "cuda")
    expected = gspn2_scan_planes(*others, **planes_options(case))
    features.copy_(others[0]), bias.copy_(others[1])
    graph.replay()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", HALF, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@torch.no_grad()
def test_the_layer_gives_the_same_either_way(dtype, compiled, monkeypatch, launched):
    layer = GSPN2Layer(64, 64, GSPN2Config(init="random", proxy_dim=24)).to("cuda", dtype)
    torch.nn.init.normal_(layer.scan_in.bias)
    tokens = torch.randn(2, 40 * 48, 64, device="cuda", dtype=dtype)
    forward = torch.compile(layer, fullgraph=True) if compiled else layer
    got = forward(tokens, 40, 48)
    assert launched == ["gspn2_planes" if cuda.device_limits(0).boxes else "gspn2_forward"]
    monkeypatch.setattr(scan_layer, "scans_planes", lambda *_, **__: False)
    assert_close("y", got, layer(tokens, 40, 48).double())
    assert got.is_contiguous()


@torch.no_grad()
def test_two_streams():
    cases = [CASES[2][0], CASES[7][0]]
    inputs = [make_features(case, torch.bfloat16, device="cuda") for case in cases]
    expected = [gspn2_scan_planes(*i, **planes_options(c)) for i, c in zip(inputs, cases, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    for _ in range(10):
        for n, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got = gspn2_scan_planes(*inputs[n], **planes_options(cases[n]))
                assert torch.equal(got, expected[n])
