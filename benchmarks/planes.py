"""Time variants of the scan from planes that a block can have, for each shape: what its table was chosen from.

    python benchmarks/planes.py --out outputs/benchmarks/planes

The table's variant and `--most` others, taken at random (`--seed`) from all that a block can have, are compiled in
several processes first (CuPy keeps the binaries; those that spill registers are left out), compared with float64 and
timed as CUDA graphs over rotated inputs. Prints the five fastest of each shape and writes planes.jsonl, a line for each
variant. `--backward` does so for the gradients, of which each other variant differs from a row of their table, or from
the fastest of an earlier run (`--start` its planes.jsonl), in up to three choices. Needs a GPU of compute capability
9.0; `--list` does not.
"""

import argparse
import json
import multiprocessing
import os
import random
from pathlib import Path

import torch
from scan import (
    ALL,
    DTYPES,
    SHAPES,
    Shape,
    Timer,
    backward_operands,
    copy_bandwidth,
    error_of_backward,
    error_of_planes,
    exact_backward,
    floor_bytes,
    make_features,
    scan_features,
)

from gspn2_diffusion.ops import cuda, planes, planes_backward

H100 = cuda.Device((9, 0), 132, 232448, True)
NAMES = [name for name in SHAPES if name not in ("tiny", "wide-72x128")]
WRONG = 0.02  # of the largest value
MOST_THREADS = 512  # beyond, most spill
LEAST_SHARE, MOST_SHARE = 32, 136  # positions
TRIES = 20_000
Variant = planes.Variant | planes_backward.Variant
Job = tuple[Variant, torch.dtype, int]
# Where the search for the backward's begins, beside its table.
OTHERS = (
    planes_backward.Row(129, 2048, False, 2, 64, 6, (16, 8), (3, 4), (8, 4), 4, 3),
    planes_backward.Row(97, 2048, False, 2, 64, 6, (16, 8), (5, 4), (8, 4), 4, 3, 8),
    planes_backward.Row(129, 2048, True, 2, 64, 4, (16, 8), (5, 4), (8, 4), 4, 5, 8, 2),
)
# What a variant of the backward may have.
CHOICES: dict[str, tuple] = dict(
    width=(1, 2, 3, 4, 5, 6, 7, 8, 10),
    cluster=(1, 2, 4, 8, 16),
    lines=((16, 4), (16, 8), (16, 16), (32, 8), (32, 16), (8, 8)),
    places=((1, 1), (2, 2), (2, 4), (3, 4), (4, 4), (5, 4), (3, 8), (5, 8), (6, 8)),
    units=((8, 4), (8, 2), (4, 4), (4, 2), (2, 1)),
    workers=(2, 3, 4, 6, 8),
    normalizers=(2, 3, 4, 5, 6, 8),
    slots=(2, 3, 4),
    halo=(8, 16),
    promotion=(0, 1, 2, 3),
    most_stages=(2, 3, 8),
)


def work_of(shape: Shape, dtype: torch.dtype) -> planes.Work:
    directions = tuple(ALL.index(d) for d in shape.directions)
    layout = planes.Layout(shape.D, shape.G, directions, len(directions), True, shape.output_gate)
    return planes.Work(shape.B, shape.H, shape.W, layout, 0, dtype.itemsize, False)


def variants(work: planes.Work, most: int, seed: int) -> list[planes.Variant]:
    """The table's first, if it has one."""
    choice = random.Random(seed).choice
    table = planes.choose(work, H100)
    found = {} if table is None else {table: None}
    for _ in range(TRIES):
        if len(found) > most:
            break
        cluster, halo = choice((1, 2, 4, 8, 16)), choice((8, 16))
        place = choice((1, 2, 3, 4, 5, 6, 8)), choice((1, 2, 4, 8))
        v = planes.make_variant(
            work,
            choice((1, 2, 3, 4, 5, 6, 8, 10)),
            cluster,
            (choice((8, 16, 32)), choice((4, 8, 16))),
            place,
            choice(((8, 4), (4, 2), (2, 1))),
            choice((4, 6, 8, 10)),
            choice((2, 3)),
            halo if cluster > 1 else 8,
        )
        if v is None or v.threads > MOST_THREADS or v.grid < 60 or max(v.shares) > MOST_SHARE:
            continue
        # A lane may have another number of positions than was asked for; shares are worth a cluster; small maps run all
        # blocks at once.
        asked = all(v.places[along] == place[along] for along in work.ways)
        worth = cluster == 1 or work.longest >= cluster * LEAST_SHARE
        if asked and worth and (work.longest > 64 or v.grid <= H100.processors):
            found[v] = None
    return list(found)


def backward_variants(
    work: planes.Work, most: int, seed: int, start: planes_backward.Variant | None
) -> list[planes_backward.Variant]:
    """The table's first, if it has one, and `start`."""
    draw = random.Random(seed)
    table = planes_backward.choose(work, H100)
    found: dict[planes_backward.Variant, None] = dict.fromkeys(v for v in (table, start) if v is not None)
    bases = [{name: getattr(v, name) for name in CHOICES if name != "most_stages"} for v in found]
    if start is None:  # else all are near it
        kind = (work.layout.G == work.layout.D > 1, work.size)
        rows = [row for row in (*planes_backward.ROWS, *OTHERS) if (row.own, row.size) == kind]
        bases += [planes_backward.choices(row, work) for row in rows]
    else:
        bases = bases[-1:]
    for _ in range(TRIES):
        if len(found) > most:
            break
        changed = {name: draw.choice(CHOICES[name]) for name in draw.sample(list(CHOICES), draw.randint(0, 3))}
        v = planes_backward.make_variant(work, **(draw.choice(bases) | changed))
        if v is None or v.threads > MOST_THREADS or v.grid < 60 or max(v.shares[n] for n in work.ways) > MOST_SHARE:
            continue
        if v.cluster == 1 or work.longest >= v.cluster * LEAST_SHARE:
            found[v] = None
    return list(found)


def options_of(job: Job) -> tuple[str, ...]:
    variant, dtype, has = job
    if isinstance(variant, planes_backward.Variant):
        return planes_backward.defines(variant, dtype, has, False)
    return planes.defines(variant, dtype, has, False)


def compile_one(job: Job) -> int:
    """Bytes of registers that it spills."""
    import cupy

    name = "gspn2_planes_backward" if isinstance(job[0], planes_backward.Variant) else "gspn2_planes"
    module = cupy.RawModule(code=cuda.kernel_source(), options=("-std=c++17", *options_of(job)))
    return module.get_function(name).local_size_bytes


def measure(name: str, dtype: torch.dtype, chosen: list[planes.Variant], timer: Timer) -> list[dict]:
    """Fastest first."""
    shape = SHAPES[name]
    sets = max(1, min(8, (200 << 20) // floor_bytes(shape, dtype, False)))
    features = [make_features(shape, dtype, timer.device) for _ in range(sets)]
    rows, table = [], planes.choose
    try:
        for variant in chosen:
            planes.choose = lambda _work, _device, variant=variant: variant
            cuda._plans.clear()
            row = dict(shape=name, error=error_of_planes(*features[0], shape), variant=list(variant))
            rows.append(row | dict(us=timer(lambda i: scan_features(*features[i], shape), sets) * 1e6))
    finally:
        planes.choose = table
        cuda._plans.clear()
    return sorted(rows, key=lambda row: row["us"])


def measure_backward(name: str, dtype: torch.dtype, chosen: list[Variant], timer: Timer) -> list[dict]:
    """Fastest first."""
    shape = SHAPES[name]
    features = make_features(shape, dtype, timer.device)
    given, exact = backward_operands(*features, shape), exact_backward(*features, shape)
    rows, table = [], planes_backward.choose
    try:
        for variant in chosen:
            planes_backward.choose = lambda _work, _device, variant=variant: variant
            row = dict(shape=name, backward=True, variant=list(variant))
            row["error"] = error_of_backward(*exact, shape)
            rows.append(row | dict(us=timer(lambda _: torch.ops.gspn2.scan_planes_backward(*given)) * 1e6))
    finally:
        planes_backward.choose = table
    return sorted(rows, key=lambda row: row["us"])


def shown(v: Variant) -> str:
    names = [
        "width",
        "cluster",
        "lines",
        "places",
        "units",
        "stages",
        "normalizers",
        "halo",
        "promotion",
        "grid",
        "threads",
    ]
    if isinstance(v, planes_backward.Variant):
        names += ["workers", "slots", "parts"]
    return " ".join(f"{name} {getattr(v, name)}" for name in names) + f" {v.shared >> 10} KB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/planes"))
    parser.add_argument("--shapes", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--most", type=int, default=60, help="variants of a shape")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile")
    parser.add_argument("--list", action="store_true", help="only say which there are; needs no GPU")
    parser.add_argument("--backward", action="store_true", help="the gradients'")
    parser.add_argument("--start", type=Path, help="planes.jsonl of an earlier --backward, from whose fastest to go on")
    args = parser.parse_args()
    dtype = DTYPES[args.dtype]
    kind = planes_backward.Variant if args.backward else planes.Variant
    chosen: dict[str, list[Variant]] = {}
    for name in args.shapes:
        work = work_of(SHAPES[name], dtype)
        if args.backward:
            rows = [json.loads(line) for line in args.start.read_text().splitlines()] if args.start else []
            rows = sorted((row for row in rows if row["shape"] == name and row["error"] < WRONG), key=lambda r: r["us"])
            start = kind(*(tuple(n) if isinstance(n, list) else n for n in rows[0]["variant"])) if rows else None
            chosen[name] = [*backward_variants(work, args.most, args.seed, start)]
        else:
            chosen[name] = [*variants(work, args.most, args.seed)]
    if args.list:
        for name in args.shapes:
            print("\n".join(f"{name} {shown(v)}" for v in chosen[name]))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = {(v, dtype, 7 if SHAPES[name].output_gate else 1) for name in chosen for v in chosen[name]}
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        spills = dict(zip(jobs, pool.map(compile_one, jobs), strict=True))
    spilling = {v for (v, *_), spilled in spills.items() if spilled}
    print(f"{len(jobs)} kernels, of which {len(spilling)} spill", flush=True)
    timer = Timer(torch.device("cuda"), 5)
    bandwidth = copy_bandwidth(timer.device, timer)
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e12:.2f} TB/s")
    with (args.out / "planes.jsonl").open("w") as file:
        for name in args.shapes:
            timed = measure_backward if args.backward else measure
            rows = timed(name, dtype, [v for v in chosen[name] if v not in spilling], timer)
            floor = floor_bytes(SHAPES[name], dtype, args.backward) / bandwidth * 1e6
            print(f"\n{name} {args.dtype}: floor {floor:.1f} us, {len(rows)} variants", flush=True)
            for row in rows:
                file.write(json.dumps(row) + "\n")
            table = [row for row in rows if row["variant"] == list(chosen[name][0])]
            for row in rows[:5] + [row for row in table if row not in rows[:5]]:
                note = f"{row['error']:.0e}" if row["error"] < WRONG else f"WRONG by {row['error']:.2g}"
                print(f"  {row['us']:8.1f} us {floor / row['us']:.2f}  {note}  {shown(kind(*row['variant']))}")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
