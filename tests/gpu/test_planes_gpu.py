"""The scan from planes on a GPU: pytest -m gpu tests/gpu/test_planes_gpu.py"""

import pytest
import torch

from gspn2_diffusion import GSPN2Config
from gspn2_diffusion.layers import GSPN2Layer, scan_layer
from gspn2_diffusion.ops import cuda, gspn2_scan_planes

from ..scan_cases import Case, assert_close, make_features, planes_options
from .test_scan_gpu import HALF, TYPES, _poison_outputs, seeded  # noqa: F401

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
    (Case(2, 256, 256, 20, normalizer="softmax"), HALF),
    (Case(1, 250, 96, 12, segment=32), HALF),
    (Case(1, 90, 512, 9, decay=True), HALF),
    (Case(1, 1024, 1008, 8), HALF),
    (Case(1, 24, 2048, 5, gates="none"), HALF),
    (Case(1, 700, 96, 8, 8, ("right", "up"), gates="lam"), TYPES),
    (Case(1, 72, 88, 10), HALF),
    (Case(1, 72, 104, 10), ()),
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


@pytest.mark.parametrize("part", range(8))
def test_random_shapes(part):
    """64 shapes, types and options; those that the kernel does not have take gspn2_scan."""
    _, choice = seeded(part)
    for n in range(8):
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
        check(case, choice.choice(TYPES), seed=n)


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
