"""Time every variant of the kernels that a block can have, for each shape: what the launcher's table was chosen from.

    python benchmarks/variants.py --out outputs/benchmarks/variants

Compiles the variants in several processes first (CuPy keeps the binaries), then times each as a CUDA graph and compares
its result with the first variant's. Prints the fastest four of each shape; writes variants.json.
"""

import argparse
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from scan import ALL, DTYPES, SHAPES, Timer, copy_bandwidth, floor_bytes, make_inputs

from gspn2_diffusion.ops import cuda

NAMES = [name for name in SHAPES if name not in ("tiny", "wide-72x128")]


def work_of(name: str, dtype: torch.dtype, backward: bool) -> cuda.Work:
    B, H, W, D, G, directions, output_gate = SHAPES[name]
    row = D * dtype.itemsize
    aligned, logits_aligned = min(16, row & -row), 16 if G > 1 else dtype.itemsize
    gates, longest = 1 + output_gate, max(H, W)
    sizes = (dtype.itemsize, dtype.itemsize, aligned, logits_aligned, gates, backward)
    return cuda.Work(B, H, W, D, G, len(directions), longest, *sizes)


def variants(name: str, dtype: torch.dtype, backward: bool) -> Iterator[cuda.Variant]:
    """One position a thread, 16 to 64 bytes of a position in a block, enough threads and blocks to be worth a try."""
    work = work_of(name, dtype, backward)
    for vec, lanes, cluster, ahead in itertools.product((1, 2, 4), (1, 2, 4, 8, 16), (1, 2, 4, 8), (2, 4, 8)):
        each = vec * lanes * dtype.itemsize
        if work.D % vec or not 16 <= each <= 64 or vec * lanes > work.D or vec * dtype.itemsize > work.aligned:
            continue
        v = cuda.make_variant(work, vec, vec if work.G > 1 else 1, lanes, cluster, ahead)
        if v is None or v.turns > 1 or v.grid < 32 or v.block[0] * v.block[1] < (64 if cluster == 1 else 128):
            continue
        yield v


def has(name: str, backward: bool, v: cuda.Variant) -> int:
    return (3 if SHAPES[name].output_gate else 1) + 4 * (backward and v.parts > 1)


def compile_one(job: tuple[str, str, bool, cuda.Variant]) -> str:
    name, dtype, backward, v = job
    kernel = "BACKWARD" if backward else "FORWARD"
    defines = cuda.defines(kernel, v, DTYPES[dtype], DTYPES[dtype], has(name, backward, v))
    try:
        import cupy

        module = cupy.RawModule(code=cuda.kernel_source(), options=("-std=c++17", *defines))
        module.get_function(f"gspn2_{kernel.lower()}")
    except Exception as error:
        return f"{job}: {str(error)[:300]}"
    return ""


def call(name: str, dtype: torch.dtype, backward: bool) -> Callable[[], tuple[torch.Tensor, ...]]:
    """The operator's launches, whatever `cuda.choose` says."""
    shape = SHAPES[name]
    x, lam, u, logits = make_inputs(shape, dtype, torch.device("cuda"))
    options = ([ALL.index(d) for d in shape.directions], False, 0, False)
    if not backward:
        return lambda: cuda.scan_forward(x, lam, u, logits, *options, False)
    y, state = cuda.scan_forward(x, lam, u, logits, *options, u is not None)
    grad_y, saved = torch.randn_like(y), y if u is None else state
    return lambda: cuda.scan_backward(grad_y, saved, x, lam, u, logits, *options)


def measure(name: str, dtype: torch.dtype, backward: bool, timer: Timer) -> list[dict]:
    table = cuda.choose
    work = call(name, dtype, backward)
    rows, first = [], None
    for v in variants(name, dtype, backward):
        cuda.choose = lambda _work, _device, v=v: v
        try:
            result = torch.cat([t.flatten()[:100_000].float() for t in work() if t.numel()])
            first = result if first is None else first
            difference = ((result - first).abs().max() / first.abs().max()).item()
            row = dict(shape=name, backward=backward, us=timer(lambda _: work()) * 1e6, difference=difference)
            rows.append(row | v._asdict())
        finally:
            cuda.choose = table
    return sorted(rows, key=lambda row: row["us"])


def shown(row: dict) -> str:
    chosen = " ".join(f"{name}{row[name]}" for name in ("vec", "lanes", "cluster", "ahead", "grid"))
    return f"{row['us']:.1f} us ({chosen}{', WRONG' if row['difference'] > 0.02 else ''})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/variants"))
    parser.add_argument("--shapes", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile")
    parser.add_argument("--count", action="store_true", help="only say how many there are; needs no GPU")
    args = parser.parse_args()
    dtype = DTYPES[args.dtype]
    jobs = [(n, args.dtype, b, v) for n in args.shapes for b in (False, True) for v in variants(n, dtype, b)]
    print(f"{len(jobs)} variants of {len(args.shapes)} shapes", flush=True)
    if args.count:
        return
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for problem in filter(None, pool.imap_unordered(compile_one, jobs)):
            print(problem)
    timer = Timer(torch.device("cuda"), 4)
    bandwidth = copy_bandwidth(torch.device("cuda"), timer)
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e12:.2f} TB/s")
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    for name in args.shapes:
        for backward in (False, True):
            found = measure(name, dtype, backward, timer)
            rows += found
            floor = floor_bytes(SHAPES[name], dtype, backward) / bandwidth * 1e6
            best = "; ".join(shown(row) for row in found[:4])
            print(f"{name} {'backward' if backward else 'forward'}, floor {floor:.1f} us: {best}", flush=True)
            (args.out / "variants.json").write_text(json.dumps(rows))
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
