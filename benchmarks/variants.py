"""Time the variants of the kernels that a block can have, for each shape: what the launcher's table was chosen from.

    python benchmarks/variants.py --out outputs/benchmarks/variants

The variant from boxes that the table has, those that a rough count of a line puts first (it only orders what is tried
and was wrong by factors), and the general kernel, whose result all are compared with. They are compiled in several
processes first (CuPy keeps the binaries) and timed in one process, as CUDA graphs over rotated inputs; where that one
makes no progress it is killed and started again behind the variant, so one that hangs costs only itself, and so does
one that stops the device. Then the best two of each shape are timed again with their choices at run time (`refined`).
Prints tables; writes variants.jsonl (all) and best.jsonl (a line for each shape and pass).
"""

import argparse
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from scan import ALL, DTYPES, SHAPES, Timer, copy_bandwidth, floor_bytes, make_inputs

from gspn2_diffusion.ops import cuda

NAMES = [name for name in SHAPES if name not in ("tiny", "wide-72x128")]
H100 = cuda.Device((9, 0), 132, 232448, True)
WRONG = 0.02  # of the largest value
LONG = 2e-3  # seconds: beyond, the launches of a graph are not worth their time
EXCHANGE_CYCLES = 700  # from a cluster's block to its neighbour
STOPPED = 3  # exit status: the device takes no more work from this process


def work_of(name: str, dtype: torch.dtype, backward: bool) -> cuda.Work:
    B, H, W, D, G, directions, output_gate = SHAPES[name]
    row = D * dtype.itemsize
    aligned, logits_aligned = min(16, row & -row), 16 if G > 1 else dtype.itemsize
    gates, longest = 1 + output_gate, max(H, W)
    sizes = (dtype.itemsize, dtype.itemsize, aligned, logits_aligned, gates, backward)
    return cuda.Work(B, H, W, D, G, len(directions), longest, *sizes, boxed=True)


def counted_cycles(work: cuda.Work, v: cuda.Variant, device: cuda.Device = H100) -> float:
    """From counts: of a line the slowest of the copy engine's rows, of wavefronts of shared memory, of issued
    instructions and of one scanning warp's; the exchanges; the times the device is filled."""
    row = v.vec * v.lanes * work.size
    share = -(-work.line // v.cluster)
    moved = max(2.4, 1.1 * -(-row // 32)) + (row % 32 > 0)
    tensors = 2 + work.gates if not work.backward else 6 + 2 * work.gates
    rows = v.span * (2.4 + moved * (tensors - 1 - work.backward * (1 + work.gates)))
    rows += share * 2 * moved * (1 + work.backward * work.gates)
    scanning = 30 + v.places * (10 + v.vec * (12 + 10 * work.backward))
    wavefronts = v.lanes * (v.places * 4 * (tensors + 1) + 2 * v.vec * (1 + work.backward)) + v.span
    issued = (v.lanes * scanning + v.span * 2) / 4
    line = max(rows, 1.3 * wavefronts, 1.5 * issued, 60 + 1.8 * scanning) + 200 / v.ahead
    line += EXCHANGE_CYCLES / v.halo if v.cluster > 1 else 0
    # A cluster stays within a group of processors, 16 or 18 of them.
    at_once = device.processors // 16 * (16 // v.cluster) * v.cluster if v.cluster > 1 else device.processors
    return -(-v.grid // at_once) * (min(work.segment, work.line) * line + 4 * EXCHANGE_CYCLES)


def bulks(work: cuda.Work, most: int) -> list[cuda.Variant]:
    """The table's, then of each cluster size, width and channels of a lane those that are best by count, in turn."""
    found: dict[tuple[int, int, int], dict[cuda.Variant, float]] = {}
    widths = [w for w in (8, 16, 24, 32, 40, 48, 64, 80) if w <= work.D + 8]
    clusters = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16)
    for cluster, width, channels in itertools.product(clusters, widths, (8, 4)):
        for batch, halo, blocks in itertools.product((8, 4, 2), (8, 4) if cluster > 1 else (8,), (1, 2)):
            shared = (228 << 10) // blocks - (1 << 10)
            promotion = 2 if width == 8 else 0
            v = cuda.make_bulk(work, width, cluster, batch, channels, halo, shared, promotion=promotion)
            halos = v is not None and cluster > 1 and v.span * cluster > 2 * work.line
            if v is None or halos or v.grid < 40 or (v.stages < 3 and batch > 2):
                continue
            if blocks == 1 or v.grid > H100.processors:
                found.setdefault((cluster, width, channels), {})[v] = counted_cycles(work, v)
    ranked = [
        (rank, cost, v)
        for same in found.values()
        for rank, (v, cost) in enumerate(sorted(same.items(), key=lambda pair: pair[1])[:4])
    ]
    chosen = cuda.choose(work, H100)
    return [chosen] * (chosen.places > 0) + [v for _, _, v in sorted(ranked)[:most]]


def refined(v: cuda.Variant, backward: bool) -> list[cuda.Variant]:
    """The same with other choices at run time: promotion into the second-level cache, storing and normalising warps."""
    others = [v._replace(promotion=promotion) for promotion in range(4)]
    for storers, normalizers in itertools.product((1, 2, 4) if backward else (1,), (1, 2, 4, 8)):
        threads = 32 * (1 + storers + normalizers + v.lanes)
        if threads <= 1024:
            others.append(v._replace(storers=storers, normalizers=normalizers, block=(threads, 1)))
    return [other for other in others if other != v]


def general(work: cuda.Work) -> cuda.Variant:
    """What the table chooses without boxes."""
    return cuda.choose(work._replace(boxed=False), H100)


Job = tuple[str, str, bool, cuda.Variant]


def all_jobs(args: argparse.Namespace) -> list[Job]:
    """The first of each shape and pass is the one that the others are compared with."""
    jobs: list[Job] = []
    for name, which in itertools.product(args.shapes, args.passes):
        work = work_of(name, DTYPES[args.dtype], which == "backward")
        jobs += [(name, args.dtype, work.backward, v) for v in (general(work), *bulks(work, args.most))]
    return jobs


def compile_one(job: Job) -> str:
    name, dtype, backward, v = job
    kernel = "BULK_" * bool(v.places) + "BACKWARD" if backward else "BULK" if v.places else "FORWARD"
    has = (3 if SHAPES[name].output_gate else 1) + 4 * (backward and v.parts > 1)
    try:
        import cupy

        options = ("-std=c++17", *cuda.defines(kernel, v, DTYPES[dtype], DTYPES[dtype], has))
        module = cupy.RawModule(code=cuda.kernel_source(), options=options)
        spilled = module.get_function(f"gspn2_{kernel.lower()}").local_size_bytes
    except Exception as error:
        return f"{name} {shown(v)}: {str(error)[:300]}"
    return f"{name} {shown(v)}: {spilled} bytes spilled" if spilled else ""


def call(
    name: str, dtype: torch.dtype, backward: bool, device: str = "cuda"
) -> tuple[Callable[[int], tuple[torch.Tensor, ...]], int]:
    """The operator's launches on input set i, whatever `cuda.choose` says, and how many sets keep the cache cold."""
    shape = SHAPES[name]
    torch.manual_seed(0)
    count = 1 if backward else max(1, min(8, (200 << 20) // floor_bytes(shape, dtype, False)))
    sets = [make_inputs(shape, dtype, torch.device(device)) for _ in range(count)]
    options = ([ALL.index(d) for d in shape.directions], False, 0, False)
    if not backward:
        return lambda i: cuda.scan_forward(*sets[i], *options, False)[:1], count
    y, state = cuda.scan_forward(*sets[0], *options, shape.output_gate)
    grad_y, saved = torch.randn_like(y), state if shape.output_gate else y
    return lambda _: cuda.scan_backward(grad_y, saved, *sets[0], *options), count


def largest_error(result: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> float:
    """Relative to the largest value, one image at a time."""
    errors = [0.0]
    for r, e in zip(result, expected, strict=True):
        errors += [((r[b] - e[b]).abs().max() / e[b].abs().max()).item() for b in range(len(r)) if r.numel()]
    return float(torch.tensor(errors).max())  # NaN if any is


def seconds(timer: Timer, work: Callable[[int], object], sets: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(3):
        work(0)
    end.record()
    end.synchronize()
    once = start.elapsed_time(end) / 3e3
    return once if once > LONG else timer(work, sets)


def time_group(jobs: list[tuple[int, Job]], first: int, out: Path) -> None:
    """Times the jobs from number `first` on, of one shape and pass, a line of JSON each."""
    name, dtype, backward, _ = jobs[0][1]
    timer, table = Timer(torch.device("cuda"), 4), cuda.choose
    work, sets = call(name, DTYPES[dtype], backward)
    expected: tuple[torch.Tensor, ...] | None = None
    times: list[tuple[float, cuda.Variant]] = []

    def attempt(v: cuda.Variant, row: dict, wanted: bool) -> None:
        nonlocal expected
        cuda.choose = lambda _work, _device: v
        try:
            result = work(0)
            expected = result if expected is None else expected
            row |= dict(error=largest_error(result, expected))
            del result
            if wanted:
                row |= dict(us=seconds(timer, work, sets) * 1e6)
        except Exception as problem:
            row |= dict(problem=f"{problem}"[:200])
        finally:
            cuda.choose = table
        if wanted:
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")
        try:
            torch.cuda.synchronize()
        except Exception:
            os._exit(STOPPED)  # what a kernel did wrong is told to every later call

    for number, (_, _, _, v) in jobs:
        if expected is None or number >= first:
            row = dict(number=number, shape=name, backward=backward, variant=list(v))
            attempt(v, row, number >= first)
            if v.places and row.get("error", 1) <= WRONG and "us" in row:
                times.append((row["us"], v))
    for _, v in sorted(times)[:2]:
        for other in refined(v, backward):
            attempt(other, dict(shape=name, backward=backward, variant=list(other)), True)


def shown(v: cuda.Variant) -> str:
    of_boxes = ("halo", "span", "stages", "promotion", "storers", "normalizers")
    names = ("vec", "lanes", "cluster", "ahead", *(of_boxes if v.places else ("turns",)))
    return " ".join(f"{name}{getattr(v, name)}" for name in names) + f" grid{v.grid} threads{v.block[0] * v.block[1]}"


def report(rows: list[dict], jobs: list[Job], bandwidth: float, out: Path) -> None:
    best = []
    for (name, dtype, backward), group in itertools.groupby(jobs, key=lambda job: job[:3]):
        count = len(list(group))
        mine = [row for row in rows if (row["shape"], row["backward"]) == (name, backward)]
        timed = sorted((row for row in mine if "us" in row), key=lambda row: row["us"])
        floor = floor_bytes(SHAPES[name], DTYPES[dtype], backward) / bandwidth * 1e6
        bad = sum(not row.get("error", 1) <= WRONG for row in mine)
        which = "backward" if backward else "forward"
        print(f"\n{name} {which}: floor {floor:.1f} us, {count} variants, {bad} wrong or failed")
        reference = [row for row in timed if not cuda.Variant(*row["variant"]).places]
        for row in timed[:5] + [row for row in reference if row not in timed[:5]]:
            v = cuda.Variant(*row["variant"])
            counted = counted_cycles(work_of(name, DTYPES[dtype], backward), v) / 1755 if v.places else 0
            note = f"WRONG by {row['error']:.2g}" if not row["error"] <= WRONG else f"{row['error']:.1g}"
            print(f"  {row['us']:8.1f} us  counted {counted:7.1f}  {note}  {shown(v)}")
        for row in mine:
            if "problem" in row:
                print(f"  {shown(cuda.Variant(*row['variant']))}: {row['problem'][:100]}")
        right = [row for row in timed if row["error"] <= WRONG and row not in reference]
        fastest = right[0] if right else {}
        line = dict(shape=name, work=which, floor_us=floor, table_us=reference[0]["us"] if reference else None)
        line |= dict(boxes_us=fastest.get("us"), variant=fastest.get("variant"))
        best.append(line)
    (out / "best.jsonl").write_text("".join(json.dumps(line) + "\n" for line in best))
    print("\nshape        work        floor   table   boxes us  of floor  variant")
    for line in best:
        times = [line["floor_us"], line["table_us"], line["boxes_us"]]
        known = [us for us in times[1:] if us]
        v = shown(cuda.Variant(*line["variant"])) if line["variant"] else ""
        shown_times = " ".join(f"{us:8.1f}" if us else "       -" for us in times)
        share = f"{times[0] / min(known):8.2f}" if known else "       -"
        print(f"{line['shape']:11s} {line['work']:8s} {shown_times} {share}  {v}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/variants"))
    parser.add_argument("--shapes", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--passes", nargs="+", choices=("forward", "backward"), default=["forward"])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--most", type=int, default=60, help="variants from boxes of a shape")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile; 0: none does")
    parser.add_argument("--patience", type=float, default=20, help="seconds for one variant")
    parser.add_argument("--limit", type=float, default=600, help="seconds in all; what is timed until then is reported")
    parser.add_argument("--list", action="store_true", help="only say which there are; needs no GPU")
    parser.add_argument("--from-job", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    started = time.monotonic()
    jobs = all_jobs(args)
    rows_path = args.out / "variants.jsonl"
    if args.from_job is not None:
        for _, group in itertools.groupby(enumerate(jobs), key=lambda job: job[1][:3]):
            numbered = list(group)
            if numbered[-1][0] >= args.from_job:
                time_group(numbered, args.from_job, rows_path)
                torch.cuda.empty_cache()
        return
    print(f"{len(jobs)} variants of {len(args.shapes)} shapes", flush=True)
    if args.list:
        for name, _, backward, v in jobs:
            print(name, "backward" if backward else "forward", shown(v), f"{v.shared // 1024} KB")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    rows_path.write_text("")
    if args.processes:
        with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
            for problem in filter(None, pool.imap_unordered(compile_one, jobs)):
                print(problem, flush=True)
        print(f"compiled after {time.monotonic() - started:.0f} s", flush=True)

    def rows() -> list[dict]:
        return [json.loads(line) for line in rows_path.read_text().split("\n")[:-1]]

    def finished() -> int:
        """Jobs that need not be done again."""
        return max((row["number"] + 1 for row in rows() if "number" in row), default=0)

    while (done := finished()) < len(jobs) and time.monotonic() - started < args.limit:
        child = subprocess.Popen([sys.executable, *sys.argv, "--from-job", str(done)])
        seen, count = time.monotonic() + 20, len(rows())  # to start
        while child.poll() is None and time.monotonic() - seen < args.patience:
            if time.monotonic() - started > args.limit:
                break
            time.sleep(0.2)
            if len(rows()) > count:
                count, seen = len(rows()), max(seen, time.monotonic())
        ended = child.poll()
        child.kill()
        child.wait()
        stuck = finished()
        if stuck < len(jobs) and time.monotonic() - started < args.limit and (ended != STOPPED or stuck == done):
            name, _, backward, v = jobs[stuck]
            problem = f"nothing for {args.patience:.0f} s" if ended is None else f"ended with {ended}"
            row = dict(number=stuck, shape=name, backward=backward, variant=list(v), problem=problem)
            with rows_path.open("a") as file:
                file.write(json.dumps(row) + "\n")
    bandwidth = copy_bandwidth(torch.device("cuda"), Timer(torch.device("cuda"), 4))
    print(
        f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e12:.2f} TB/s, {time.monotonic() - started:.0f} s in all"
    )
    report(rows(), jobs, bandwidth, args.out)


if __name__ == "__main__":
    main()
