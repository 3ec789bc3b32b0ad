"""Run the scan's kernels over awkward shapes under compute-sanitizer's four tools.

python benchmarks/sanitize.py
python benchmarks/sanitize.py --boxes
python benchmarks/sanitize.py --planes
python benchmarks/sanitize.py --planes --tools initcheck --part 0 4

Each shape is named as it begins. `--part` takes every so manieth of them, from the given one on: for several GPUs, or
for less time at once.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from compile_ahead import compile_ahead

from gspn2_diffusion.ops import cuda, gspn2_scan, gspn2_scan_planes, planes_backward, scans_planes

SHAPE = "shape"  # with which the line that names one begins
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# B, H, W, D, G, segment, merge, output gate, K: edges, odd sizes, unaligned channels, split lines, lines longer than a
# block.
SHAPES = [
    (1, 1, 1, 1, 1, None, "concat", True, 4),
    (2, 7, 3, 3, 1, 2, "sum", True, 4),
    (1, 16, 33, 40, 2, None, "concat", True, 4),
    (1, 33, 16, 8, 8, 5, "concat", False, 4),
    (1, 5, 140, 16, 1, None, "sum", True, 4),
    (1, 3, 600, 8, 8, None, "concat", False, 1),
    (1, 1100, 2, 8, 1, None, "concat", True, 4),
]
# For which the table has boxes on Hopper: one block to a line, clusters of 4 to 16, empty blocks, ragged slices.
BOXED = [
    (1, 5, 57, 24, 1, None, "concat", True, 4),
    (1, 9, 64, 40, 1, None, "sum", True, 4),
    (1, 100, 3, 48, 1, 40, "concat", True, 4),
    (1, 4, 200, 32, 2, None, "concat", False, 4),
    (1, 3, 600, 8, 1, None, "concat", True, 2),
]


# From planes: one block to a line, clusters, ragged slices, weights for each channel, slices of two widths.
PLANES = [
    (1, 9, 32, 7, 1, None, "concat", True, 4),
    (1, 20, 64, 10, 1, None, "sum", True, 4),
    (1, 9, 56, 5, 1, None, "concat", True, 4),
    (1, 5, 128, 10, 2, None, "concat", True, 4),
    (1, 3, 200, 14, 1, None, "concat", True, 4),
    (1, 656, 16, 9, 1, None, "concat", True, 2),
    (1, 8, 656, 18, 1, None, "sum", True, 3),
    (1, 250, 16, 3, 1, 32, "concat", True, 4),
    (1, 3, 704, 4, 4, None, "concat", False, 1),
    (1, 8, 704, 30, 1, None, "concat", True, 4),
    (1, 700, 32, 4, 4, None, "concat", False, 4),
    (12, 2, 104, 24, 1, None, "concat", True, 4),
]


def named(shapes: Iterable[Any]) -> Iterator[Any]:
    for shape in shapes:
        print(SHAPE, *shape, flush=True)
        yield shape


def run(inputs: list[torch.Tensor | None], **options: object) -> None:
    """Forward and backward. What is read comes from the host, and gradients are not copied to where they accumulate:
    initcheck follows copies and our kernels alone and would take what torch's kernels wrote for uninitialised."""
    y = gspn2_scan(*inputs, **options)
    torch.autograd.grad(y, [t for t in inputs if t is not None], torch.rand(y.shape, dtype=y.dtype).cuda())
    torch.cuda.synchronize()


def boxed_work(shapes: Iterable[Any]) -> None:
    """Inputs as they come out of the layer's projection: aligned views of one tensor."""
    for B, H, W, D, G, segment, merge, gated, K in shapes:
        widths = [D, K * D, K * D * gated, K * G * 3]
        row = torch.rand(B, H, W, -(-sum(widths) // 8) * 8, dtype=torch.bfloat16).cuda().requires_grad_()
        x, lam, u, logits = row[..., : sum(widths)].split(widths, -1)
        gates = [g.unflatten(-1, (K, D)) if g.shape[-1] else None for g in (lam, u)]
        directions = ("right", "left", "down", "up")[-K:]
        run([x, *gates, logits.unflatten(-1, (K, G, 3))], directions=directions, segment=segment, merge=merge)


@contextmanager
def engine_known(planes: int) -> Iterator[None]:
    """initcheck does not follow what the copy engine and torch's kernels write and reports each read of it: what the
    engine may write of gradients, their first `planes` at most, which are of scans along rows, is cleared before, and
    so are the counts of what is done, once more. (That nothing is left unwritten is for the tests, which fill new
    memory with NaN.)"""
    make_launch = planes_backward.make_launch

    def clear(address: int, size: int) -> None:
        cuda._import_cupy().cuda.runtime.memsetAsync(address, 0, size, torch.cuda.current_stream().cuda_stream)

    def cleared_before(*args: Any) -> cuda.Launch:
        launch, done = make_launch(*args), args[-1]
        for box in launch.boxes:
            if box.tensor in (planes_backward.G, planes_backward.GRAD_U):
                clear(box.address, min(planes, box.sizes[3]) * box.strides[2])
        if done is not None:
            clear(done.data_ptr(), done.nbytes)
        return launch

    with mock.patch.object(planes_backward, "make_launch", cleared_before):
        yield


def planes_work(shapes: Iterable[Any]) -> None:
    for B, H, W, D, G, segment, merge, gated, K in shapes:
        for dtype in (torch.bfloat16, torch.float32)[: 1 + (G > 2)]:
            count = D * (1 + K * (1 + gated)) + 3 * G * K
            features, bias = (torch.rand(*shape, dtype=dtype).cuda() for shape in ((count, B, H, W), (count,)))
            directions = ("right", "left", "down", "up")[:K]
            options = dict(channels=D, groups=G, output_gate=gated, directions=directions, segment=segment, merge=merge)
            gspn2_scan_planes(features, bias, **options)
            # Other gradients are made from copies that torch made, of which initcheck would report each element.
            if not scans_planes(features, H, W, D, G, training=True):
                continue
            y = gspn2_scan_planes(features.requires_grad_(), bias, **options)
            with engine_known(2 * D):  # of one direction those of x and lam
                torch.autograd.grad(y, features, torch.rand(y.shape, dtype=dtype).cuda())
            torch.cuda.synchronize()


def work(shapes: Iterable[Any]) -> None:
    for B, H, W, D, G, segment, merge, gated, K in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            each = [(D,), (K, D), (1, D) if gated else None, (K, G, 3)]
            inputs = [s and torch.rand(B, H, W, *s, dtype=dtype).cuda().requires_grad_() for s in each]
            directions = ("right", "left", "down", "up")[-K:]
            run(inputs, directions=directions, segment=segment, merge=merge)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--boxes", action="store_true", help="the shapes that have boxes, not the others")
    parser.add_argument("--planes", action="store_true", help="the shapes that are scanned from planes, not the others")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("FIRST", "STEP"), help="of the shapes")
    parser.add_argument("--work", action="store_true", help="run the shapes, without a tool")
    args = parser.parse_args()
    runs, shapes = (boxed_work, BOXED) if args.boxes else (planes_work, PLANES) if args.planes else (work, SHAPES)
    shapes = shapes[args.part[0] :: args.part[1]]
    if args.work:
        return runs(named(shapes))
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        raise SystemExit("compute-sanitizer is not on the PATH; install the CUDA toolkit that has it.")
    failed, compiled = [], set()
    for tool in args.tools:
        # Only our kernels: initcheck would report torch's own buffers.
        command = [sanitizer, "--tool", tool, "--kernel-name", "kns=gspn2_", "--error-exitcode", "1"]
        if tool == "synccheck":  # each block has four, and the tool follows few of them unless told
            command += ["--num-cuda-barriers", "65536"]
        environment, every_lane = dict(os.environ), tool == "racecheck"
        if every_lane:  # a stage's readers tell the storing warp, and only that one the loading warp
            command += ["--racecheck-indirect-barrier-dependency"]
            environment["GSPN2_EVERY_LANE"] = "1"  # a lane that arrives for its warp is counted for itself
        if every_lane not in compiled:
            compiled.add(every_lane)
            with mock.patch.dict(os.environ, environment):
                compile_ahead(lambda: runs(shapes))  # the tool would do so much more slowly, one after another
        command += [sys.executable, __file__, "--work", *["--boxes"] * args.boxes, *["--planes"] * args.planes]
        command += ["--part", *map(str, args.part)]
        report: list[str] = []
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as tool_run:
            for line in tool_run.stdout or ():
                report.append(line.rstrip())
                if line.startswith(SHAPE):
                    print(f"{tool}, {report.pop()}", flush=True)
        print(f"{tool}: {'errors' if tool_run.returncode else 'clean'}", flush=True)
        if tool_run.returncode:
            failed.append(tool)
            found = [line for line in report if line.startswith("=====")]
            rest = [line for line in report if not line.startswith("=====")]
            print("\n".join(found[:60] + rest[-10:]))
    if failed:
        raise SystemExit(f"compute-sanitizer found errors with {', '.join(failed)}.")


if __name__ == "__main__":
    main()
