"""Time the fused scan against its floor and against what it replaces, and check it against float64, in one run.

    python benchmarks/scan.py --out outputs/benchmarks/scan

For each shape, type and pass: GPU time (median of CUDA-graph replays over rotated inputs), floor (every element moved
once, at the copy bandwidth measured in this run), their ratio, the largest error, and, forward: both layouts of the
features (`us` is the one that the layer takes, planes_us and last_us features first and last), the scan as one
compiled torch graph, one compiled launch per line, and softmax attention (SDPA) over as many tokens. Writes scan.csv,
scaling.csv and two plots. On a CPU (`--device cpu --shapes tiny`) it only shows that it runs.
"""

import argparse
import csv
import gc
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from compile_ahead import compile_ahead

from gspn2_diffusion.ops import eager, gspn2_scan, gspn2_scan_planes, scans_planes

ALL = ("right", "left", "down", "up")


class Shape(NamedTuple):
    B: int
    H: int
    W: int
    D: int
    G: int = 1
    directions: tuple[str, ...] = ALL
    output_gate: bool = True


SHAPES = {
    "first-gspn": Shape(16, 1024, 1024, 8, 8, ("right",), output_gate=False),
    "first-gspn-down": Shape(16, 1024, 1024, 8, 8, ("down",), output_gate=False),
    "sdxl-64": Shape(2, 64, 64, 80),
    "sdxl-32": Shape(2, 32, 32, 160),
    "4k-256": Shape(2, 256, 256, 80),
    "4k-128": Shape(2, 128, 128, 160),
    "16k-1024": Shape(1, 1024, 1024, 40),
    "batch-1024": Shape(16, 1024, 1024, 8),
    "sdxl-4k-256": Shape(1, 256, 256, 80),
    "sdxl-4k-128": Shape(1, 128, 128, 160),
    "sdxl-8k-512": Shape(1, 512, 512, 80),
    "sdxl-8k-256": Shape(1, 256, 256, 160),
    "sdxl-16k-1024": Shape(1, 1024, 1024, 80),
    "sdxl-16k-512": Shape(1, 512, 512, 160),
    "wide-72x128": Shape(2, 72, 128, 40),
    "tiny": Shape(1, 8, 8, 8),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LONGEST_LOOP = 128  # lines: beyond, compiling the unrolled torch loop takes minutes
LONG = 1.0  # seconds of a call: beyond, it is timed once, without a graph
MOST_TOKENS = 70_000  # beyond, softmax attention alone would take the whole run


class Timer:
    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def __call__(self, work: Callable[[int], object], sets: int = 1) -> float:
        """Median seconds of `work(i)`, i cycling over `sets` inputs: of graph replays on a GPU, of calls on a CPU."""
        if self.device.type == "cpu":
            work(0)
            return self._median(lambda: work(0), 1)
        once = [self._once(lambda: work(0)) for _ in range(2)][-1]
        if once > LONG:
            return once
        for i in range(2 * sets):
            work(i % sets)
        # A graph of several calls hides the launch gaps; enough input sets keep the second-level cache cold.
        calls = max(sets, 8)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(calls):
                work(i % sets)
        graph.replay()
        return self._median(graph.replay, calls)

    def _once(self, work: Callable[[], object]) -> float:
        if self.device.type == "cpu":
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        work()
        end_event.record()
        end_event.synchronize()
        return start_event.elapsed_time(end_event) / 1e3

    def _median(self, work: Callable[[], object], calls: int) -> float:
        return median(self._once(work) for _ in range(self.repeats)) / calls


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor | None]:
    """x, lam, u, logits: strided views of one projection, as in the layer; separate for the first GSPN's work."""
    B, H, W, D, G, directions, output_gate = shape
    K = len(directions)
    widths = [D, K * D, K * D if output_gate else 0, K * G * 3]
    if output_gate:
        padded = -(-sum(widths) // 8) * 8
        parts = torch.randn(B, H, W, padded, device=device, dtype=dtype)[..., : sum(widths)].split(widths, -1)
    else:
        parts = tuple(torch.randn(B, H, W, width, device=device, dtype=dtype) for width in widths)
    x, lam, u, logits = parts
    gates = [g.unflatten(-1, (K, D)).sigmoid_() if g.shape[-1] else None for g in (lam, u)]
    return [x, *gates, logits.unflatten(-1, (K, G, 3))]


def make_features(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same projection with its features first, and its bias."""
    B, H, W, D, G, directions, output_gate = shape
    K = len(directions)
    gates = K * D * (1 + output_gate)
    features = torch.randn(-(-(D + gates + 3 * G * K) // 8) * 8, B, H, W, device=device, dtype=dtype)
    features[D : D + gates].sigmoid_()
    return features, torch.randn(len(features), device=device, dtype=dtype) / 8 if output_gate else None


def scan_features(features: torch.Tensor, bias: torch.Tensor | None, shape: Shape) -> torch.Tensor:
    options = dict(channels=shape.D, groups=shape.G, directions=shape.directions, output_gate=shape.output_gate)
    return gspn2_scan_planes(features, bias, **options)


def floor_bytes(shape: Shape, dtype: torch.dtype, backward: bool) -> int:
    """Forward: x, lam, u and the logits in, y out. Backward: those, dy and the state in, the gradients out."""
    B, H, W, D, G, directions, output_gate = shape
    K = len(directions)
    inputs = D + K * D * (1 + output_gate) + 3 * G * K
    elements = 2 * inputs + 2 * K * D if backward else inputs + K * D
    return B * H * W * elements * dtype.itemsize


def copy_bandwidth(device: torch.device, timer: Timer) -> float:
    """Bytes read plus bytes written a second by a large device-to-device copy."""
    source = torch.randn((1 << 28) if device.type == "cuda" else (1 << 22), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timer(lambda _: target.copy_(source))


def line_step(h, x, lam, u, w):
    padded = F.pad(h, (0, 0, 1, 1))
    h = x * lam + sum(w[..., t : t + 1] * padded[:, :, t : t + h.shape[2]] for t in range(3))
    return h, h * u


def launch_per_line(inputs: list[torch.Tensor | None], shape: Shape) -> Callable[[int], object]:
    """All directions of a square map together, one compiled kernel for each line: torch's best without unrolling."""
    B, H, _, D, _, directions, _ = shape
    lines, K = H, len(directions)
    x, lam, u, w = (torch.rand(lines, B, K, H, n, device=inputs[0].device, dtype=inputs[0].dtype) for n in (D, D, D, 3))
    step = torch.compile(line_step)

    def run(_: int) -> None:
        h = torch.zeros_like(x[0])
        for i in range(lines):
            h, _y = step(h, x[i], lam[i], u[i], w[i])

    return run


def compiled_loop(shape: Shape) -> Callable:
    indices = [ALL.index(d) for d in shape.directions]
    return torch.compile(lambda *t: eager.scan_forward(*t, indices, False, 0, False, False)[0])


def largest_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the largest value."""
    return ((result - expected).abs_().max() / expected.abs().max()).item()


def error_of_last(inputs: list[torch.Tensor | None], shape: Shape) -> float:
    """Against float64 on the same device, one image at a time."""
    images = [[t if t is None else t[b : b + 1] for t in inputs] for b in range(min(shape.B, 2))]
    scan = partial(gspn2_scan, directions=shape.directions)
    return max(largest_error(scan(*i), scan(*(t if t is None else t.double() for t in i))) for i in images)


def error_of_planes(features: torch.Tensor, bias: torch.Tensor | None, shape: Shape) -> float:
    exact = None if bias is None else bias.double()
    images = [features[:, b : b + 1] for b in range(min(shape.B, 2))]
    return max(largest_error(scan_features(i, bias, shape), scan_features(i.double(), exact, shape)) for i in images)


def last_backward(inputs: list[torch.Tensor | None], shape: Shape, timer: Callable) -> float:
    """Seconds, with channels last."""
    options = ([ALL.index(d) for d in shape.directions], False, 0, False)
    y, state = torch.ops.gspn2.scan(*inputs, *options, shape.output_gate)
    grad_y = torch.randn_like(y)
    state = state if shape.output_gate else y
    return timer(lambda _: torch.ops.gspn2.scan_backward(grad_y, state, *inputs, *options))


def operands(features: torch.Tensor, bias: torch.Tensor | None, shape: Shape) -> tuple:
    """Of the operators that scan planes."""
    directions = [ALL.index(d) for d in shape.directions]
    options = (directions, False, 0, False)
    return (features, bias, shape.D, shape.G, len(directions), True, shape.output_gate, *options)


def backward_operands(features: torch.Tensor, bias: torch.Tensor | None, shape: Shape) -> tuple:
    given = operands(features, bias, shape)
    y, state = torch.ops.gspn2.scan_planes(*given, True)
    return (torch.randn_like(y), state if shape.output_gate else y, *given)


def exact_backward(
    features: torch.Tensor, bias: torch.Tensor | None, shape: Shape
) -> tuple[tuple, tuple[torch.Tensor, ...]]:
    """Operands for the first image, and float64's gradients from the same state, part by part."""
    grad_y, state, image, *_ = given = backward_operands(features[:, :1].contiguous(), bias, shape)
    exact = (grad_y.double(), state.double(), image.double(), None if bias is None else bias.double(), *given[4:])
    return given, gradient_parts(torch.ops.gspn2.scan_planes_backward(*exact).float(), shape)


def gradient_parts(grad: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, ...]:
    K = len(shape.directions)
    sizes = [shape.D, K * shape.D, K * shape.D * shape.output_gate, 3 * K * shape.G]
    return grad.split([*sizes, len(grad) - sum(sizes)])


def error_of_backward(given: tuple, expected: tuple[torch.Tensor, ...], shape: Shape) -> float:
    """Each part's relative to its largest value."""
    got = gradient_parts(torch.ops.gspn2.scan_planes_backward(*given), shape)
    return max(largest_error(a.float(), b) for a, b in list(zip(got, expected, strict=True))[:4] if len(a))


def python_us(work: Callable[[], object]) -> float:
    """Without waiting for the GPU: what a call costs the host, as long as the GPU keeps up; the median of 9 rounds."""
    times = []
    for _ in range(9):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(50):
            work()
        times.append(time.perf_counter() - start)
    return median(times) / 50 * 1e6


def attempt(what: str, work: Callable[[], float]) -> float | None:
    try:
        return work()
    except (RuntimeError, torch.OutOfMemoryError) as error:
        print(f"  {what}: {str(error).splitlines()[0]}")
        return None


@torch.no_grad()
def launch_all(args: argparse.Namespace, device: torch.device) -> None:
    """What the run will, once."""
    shapes = [(SHAPES[name], DTYPES[dtype]) for name in args.shapes for dtype in args.dtypes]
    squares = [square(side, channels) for channels in args.side_channels for side in args.sides]
    for shape, dtype in shapes + [(shape, torch.bfloat16) for shape in squares]:
        like, sizes = torch.empty(0, dtype=dtype, device=device), (shape.H, shape.W, shape.D, shape.G)
        planes = [scans_planes(like, *sizes, training=training) for training in (False, True)]
        if planes[0]:
            scan_features(*make_features(shape, dtype, device), shape)
        if planes[1] and not args.no_backward:
            torch.ops.gspn2.scan_planes_backward(*backward_operands(*make_features(shape, dtype, device), shape))
        if not (args.taken and planes[0]):
            gspn2_scan(*make_inputs(shape, dtype, device), directions=shape.directions)
        if not (args.taken and planes[1]) and not args.no_backward:
            last_backward(make_inputs(shape, dtype, device), shape, lambda work: work(0))


def square(side: int, channels: int) -> Shape:
    return Shape(1, side, side, channels)


def measure(
    name: str, dtype_name: str, timer: Timer, bandwidth: float, compare: bool, backward: bool, both: bool
) -> list[dict]:
    shape, dtype, device = SHAPES[name], DTYPES[dtype_name], timer.device
    bytes_moved = floor_bytes(shape, dtype, False)
    sets = max(1, min(8, (200 << 20) // bytes_moved)) if device.type == "cuda" else 1
    inputs = [make_inputs(shape, dtype, device) for _ in range(sets)]
    rows = []
    with torch.no_grad():
        first = scans_planes(inputs[0][0], shape.H, shape.W, shape.D, shape.G)
        row = dict(shape=name, dtype=dtype_name, work="forward")
        if first:
            featured = [make_features(shape, dtype, device) for _ in range(sets)]
            row["planes_us"] = timer(lambda i: scan_features(*featured[i], shape), sets) * 1e6
            row["error"] = error_of_planes(*featured[0], shape)
            row["python_us"] = python_us(lambda: scan_features(*featured[0], shape))
            del featured
        if both or not first:
            row["last_us"] = timer(lambda i: gspn2_scan(*inputs[i], directions=shape.directions), sets) * 1e6
        if not first:
            row["error"] = error_of_last(inputs[0], shape)
            row["python_us"] = python_us(lambda: gspn2_scan(*inputs[0], directions=shape.directions))
        row["us"] = row["planes_us"] if first else row["last_us"]
        row |= dict(floor_us=bytes_moved / bandwidth * 1e6, fraction=bytes_moved / bandwidth / row["us"] * 1e6)
        if compare and shape.output_gate:
            if max(shape.H, shape.W) <= LONGEST_LOOP:
                loop = compiled_loop(shape)
                row["compiled_loop_us"] = attempt("compiled loop", lambda: timer(lambda _: loop(*inputs[0])) * 1e6)
            if shape.H == shape.W:
                row["line_launches_us"] = attempt(
                    "launch per line", lambda: timer(launch_per_line(inputs[0], shape)) * 1e6
                )
            if shape.H * shape.W <= MOST_TOKENS and shape.D % 8 == 0:
                heads = (shape.B, shape.D // 8, shape.H * shape.W, 64)  # D is an eighth of the model's width
                q, k, v = (torch.randn(heads, device=device, dtype=dtype) for _ in range(3))
                row["sdpa_us"] = attempt("SDPA", lambda: timer(lambda _: F.scaled_dot_product_attention(q, k, v)) * 1e6)
        rows.append(row)
        if not backward:
            return rows

        row = dict(shape=name, dtype=dtype_name, work="backward")
        bytes_moved = floor_bytes(shape, dtype, True)
        first = scans_planes(inputs[0][0], shape.H, shape.W, shape.D, shape.G, training=True)
        if both or not first:
            row["us"] = row["last_us"] = last_backward(inputs[0], shape, timer) * 1e6
        if first:
            featured = make_features(shape, dtype, device)
            given = backward_operands(*featured, shape)
            row["us"] = row["planes_us"] = timer(lambda _: torch.ops.gspn2.scan_planes_backward(*given)) * 1e6
            row["error"] = error_of_backward(*exact_backward(*featured, shape), shape)
        rows.append(
            row | dict(floor_us=bytes_moved / bandwidth * 1e6, fraction=bytes_moved / bandwidth / row["us"] * 1e6)
        )
    return rows


def scaling(timer: Timer, bandwidth: float, sides: list[int], channels: int) -> list[dict]:
    rows: list[dict] = []
    for side in sides:
        shape = square(side, channels)
        with torch.no_grad():
            if scans_planes(torch.empty(0, dtype=torch.bfloat16, device=timer.device), side, side, shape.D):
                features = make_features(shape, torch.bfloat16, timer.device)
                seconds = timer(lambda _, features=features: scan_features(*features, shape))  # noqa: B023
            else:
                inputs = make_inputs(shape, torch.bfloat16, timer.device)
                seconds = timer(lambda _, inputs=inputs: gspn2_scan(*inputs))
        floor = floor_bytes(shape, torch.bfloat16, False) / bandwidth * 1e6
        ratio = seconds * 1e6 / rows[-1]["us"] if rows else None
        rows.append(dict(channels=channels, side=side, us=seconds * 1e6, floor_us=floor, ratio=ratio))
    return rows


def plot(rows: list[dict], sides: list[dict], out: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("No plots: install matplotlib (in the extra [train]).")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for channels in dict.fromkeys(r["channels"] for r in sides):
        times = {r["side"]: r["us"] for r in sides if r["channels"] == channels}
        axes.loglog(times.keys(), times.values(), "o-", base=2, label=f"D{channels}")
    axes.set(xlabel="side (tokens)", ylabel="forward, µs", title="Four directions, B1 bf16")
    axes.legend()
    figure.savefig(out / "scaling.png", dpi=150)
    shapes = list(dict.fromkeys(r["shape"] for r in rows))
    kinds = list(dict.fromkeys((r["work"], r["dtype"]) for r in rows))
    figure, axes = pyplot.subplots(figsize=(8, 0.15 * len(rows) + 1), layout="constrained")
    for n, kind in enumerate(kinds):
        of_kind = [r for r in rows if (r["work"], r["dtype"]) == kind]
        places = [shapes.index(r["shape"]) + (n + 0.5) / len(kinds) * 0.8 - 0.4 for r in of_kind]
        axes.barh(places, [r["fraction"] for r in of_kind], 0.8 / len(kinds), label=" ".join(kind))
    axes.set(xlabel="fraction of the floor", xlim=(0, 1), yticks=range(len(shapes)), yticklabels=shapes)
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(out / "fraction.png", dpi=150)


def write(rows: list[dict], path: Path) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/scan"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[name for name in SHAPES if name != "tiny"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--sides", nargs="*", type=int, default=[256, 512, 1024, 2048])
    parser.add_argument("--side-channels", nargs="+", type=int, default=[16, 80], help="D of these, each on its own")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-backward", action="store_true", help="only the forward")
    parser.add_argument("--no-compare", action="store_true", help="only the scan itself")
    parser.add_argument("--taken", action="store_true", help="only with the features as the layer takes them")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    timer = Timer(device, args.repeats)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    compile_ahead(lambda: launch_all(args, device))
    bandwidth = copy_bandwidth(device, timer)
    print(f"{name}, torch {torch.__version__}: copy {bandwidth / 1e12:.3f} TB/s (read + write)", flush=True)
    rows: list[dict] = []
    for shape in args.shapes:
        for dtype in args.dtypes:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                new = measure(shape, dtype, timer, bandwidth, not args.no_compare, not args.no_backward, not args.taken)
            except torch.OutOfMemoryError as error:
                print(f"{shape} {dtype}: {str(error).splitlines()[0]}")
                continue
            for row in new:
                shown = {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items()}
                print(" ".join(f"{k}={v}" for k, v in shown.items()), flush=True)
            rows += new
            write(rows, args.out / "scan.csv")
    few = torch.zeros(8, device=device)
    print(f"Beside python_us: an add_ of torch's costs the host {python_us(lambda: few.add_(1)):.3g} us")
    sides = [row for channels in args.side_channels for row in scaling(timer, bandwidth, args.sides, channels)]
    for row in sides:
        times = f"{row['us']:.1f} us, floor {row['floor_us']:.1f}" + (f", x{row['ratio']:.2f}" if row["ratio"] else "")
        print(f"D{row['channels']}, side {row['side']}: {times}")
    if sides:
        write(sides, args.out / "scaling.csv")
        plot(rows, sides, args.out)
    print(f"Wrote {args.out}/")


if __name__ == "__main__":
    main()
