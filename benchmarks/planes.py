"""Search the variants of the scan from planes that a block can have, for each shape: what its table was chosen from.

    python benchmarks/planes.py --out outputs/benchmarks/planes

The first round takes the table's variant and one for each width of a slice, cluster and halo that a block can have;
each next one `--most` variants that differ from the fastest so far in one or two choices, at random (`--seed`). They
are compiled in several processes (CuPy keeps the binaries; those that spill registers are left out), compared with
float64 and timed as CUDA graphs over rotated inputs. Prints the five fastest of each shape and writes planes.jsonl, a
line for each variant, as it goes. `--backward` does so for the gradients. Needs a GPU of compute capability 9.0;
`--list`, which shows a first round, does not.
"""

import argparse
import json
import multiprocessing
import os
import random
import time
from itertools import product
from multiprocessing.pool import Pool
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

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
    exact_backward,
    floor_bytes,
    largest_error,
    make_features,
    scan_features,
)

from gspn2_diffusion.ops import cuda, planes, planes_backward

H100 = cuda.Device((9, 0), 132, 232448, True)
NAMES = [name for name in SHAPES if name not in ("tiny", "wide-72x128")]
WRONG = 0.02  # of the largest value
MOST_THREADS = 640  # beyond, most spill
LEAST_SHARE, MOST_SHARE = 32, 256  # positions
MOST_SPILLED = 80  # bytes
TRIES = 20_000
PARENTS = 6  # whose neighbours the next round takes
Chosen = dict[str, int]
Variant = planes.Variant | planes_backward.Variant
COMMON: dict[str, tuple] = dict(
    width=(1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20),
    cluster=(1, 2, 4, 5, 6, 8, 16),
    lines_rows=(8, 16, 32),
    lines_columns=(2, 4, 8, 16),
    places_rows=(1, 2, 3, 4, 5, 6, 7, 8),
    places_columns=(1, 2, 4, 8),
    units_rows=(1, 2, 4, 8),
    units_columns=(1, 2, 4),
    normalizers=(2, 3, 4, 5, 6, 8, 10, 12),
    slots=(2, 3),
    halo=(8, 16, 24, 32),
    promotion=(0, 1, 2),
    most_stages=(2, 3, 4, 8),
    mixed=(0, 1),
    keep=(0, 1),
    columns=(0, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20),  # the width of slices along columns, where it is another one
)
USUAL = dict(lines_rows=16, units_rows=4, units_columns=2, normalizers=4, promotion=2, keep=0, columns=0)


class Pass(NamedTuple):
    module: ModuleType
    kernel: str
    choices: dict[str, tuple]
    usual: Chosen  # in a first round


FORWARD = Pass(planes, "gspn2_planes", COMMON, USUAL | dict(mixed=1))
BACKWARD = Pass(
    planes_backward,
    "gspn2_planes_backward",
    COMMON | dict(workers=(2, 3, 4, 6, 8), early=(0, 1)),
    USUAL | dict(workers=4, mixed=0, early=0),
)
PAIRS = ("lines", "places", "units")
Job = tuple[bool, Variant, torch.dtype, int]


def work_of(shape: Shape, dtype: torch.dtype) -> planes.Work:
    directions = tuple(ALL.index(d) for d in shape.directions)
    layout = planes.Layout(shape.D, shape.G, directions, len(directions), True, shape.output_gate)
    return planes.Work(shape.B, shape.H, shape.W, layout, 0, dtype.itemsize, False)


def variant_of(which: Pass, work: planes.Work, chosen: Chosen) -> Variant | None:
    options: dict[str, Any] = {
        name: value for name, value in chosen.items() if not name.endswith(("_rows", "_columns"))
    }
    pairs = {name: (chosen[f"{name}_rows"], chosen[f"{name}_columns"]) for name in PAIRS}
    if columns := options.pop("columns", 0):
        options["width"] = options["width"], columns
    v = which.module.make_variant(work, **options, **pairs)
    if v is None or v.threads > MOST_THREADS or v.grid < 60 or max(v.shares) > MOST_SHARE:
        return None
    # A lane may have another number of positions than was asked for; shares are worth a cluster.
    asked = all(v.places[along] == pairs["places"][along] for along in work.ways)
    worth = v.cluster == 1 or work.longest >= v.cluster * LEAST_SHARE
    return v if asked and worth and max(v.widths) <= work.layout.D else None


def grid(which: Pass, work: planes.Work) -> dict[Variant, Chosen]:
    found: dict[Variant, Chosen] = {}
    outer = [which.choices["width"], which.choices["cluster"], which.choices["halo"], (4, 8, 2)]
    for width, cluster, halo, places_columns in product(*outer):
        # Narrow slices that share weights make the same ones too often.
        narrow = width < 4 and work.layout.G < work.layout.D
        if narrow or halo > (8, 32)[cluster == 2] + 8 * (cluster > 2):
            continue
        for slots, lines_columns, places_rows in product((3, 2), (8, 4), (3, 5, 7, 6, 4, 2)):
            chosen = dict(width=width, cluster=cluster, halo=halo, slots=slots, places_rows=places_rows)
            chosen |= dict(lines_columns=lines_columns, places_columns=places_columns) | which.usual
            v = variant_of(which, work, chosen | dict(most_stages=planes.MOST_STAGES))
            if v is not None:
                found[v] = chosen | dict(most_stages=planes.MOST_STAGES)
                break
    return found


def neighbours(
    which: Pass, work: planes.Work, most: int, rng: random.Random, parents: list[Chosen]
) -> dict[Variant, Chosen]:
    found: dict[Variant, Chosen] = {}
    for _ in range(TRIES):
        if len(found) >= most:
            break
        changed = rng.sample(list(which.choices), rng.choice((1, 2)))
        chosen = rng.choice(parents) | {name: rng.choice(which.choices[name]) for name in changed}
        v = variant_of(which, work, chosen)
        if v is not None:
            found.setdefault(v, chosen)
    return found


def of_table(which: Pass, work: planes.Work) -> dict[Variant, Chosen]:
    v = which.module.choose(work, H100)
    if v is None:
        return {}
    chosen = {name: getattr(v, name) for name in which.choices if name in v._fields}
    chosen |= dict(width=v.widths[0], columns=v.widths[1])
    for name in PAIRS:
        chosen |= dict(zip((f"{name}_rows", f"{name}_columns"), getattr(v, name), strict=True))
    return {v: chosen | dict(most_stages=max(v.stages))}


def compile_one(job: Job) -> int:
    """Bytes of registers that it spills."""
    import cupy

    backward, variant, dtype, has = job
    which = BACKWARD if backward else FORWARD
    chosen = planes_backward.defines(variant, dtype, has) if backward else planes.defines(variant, dtype, has, False)
    options = ("-std=c++17", *chosen)
    return cupy.RawModule(code=cuda.kernel_source(), options=options).get_function(which.kernel).local_size_bytes


class Search:
    """Of one shape."""

    def __init__(self, name: str, dtype: torch.dtype, timer: Timer, seed: int, backward: bool) -> None:
        self.name, self.shape, self.dtype, self.timer = name, SHAPES[name], dtype, timer
        self.backward, self.which = backward, BACKWARD if backward else FORWARD
        self.work, self.rng = work_of(self.shape, dtype), random.Random(seed)
        self.rows: list[dict] = []
        self.seen: dict[Variant, Chosen] = {}

    def load(self) -> None:
        sets = max(1, min(8, (200 << 20) // floor_bytes(self.shape, self.dtype, False)))
        self.features = [
            make_features(self.shape, self.dtype, self.timer.device) for _ in range(1 if self.backward else sets)
        ]
        first, bias = self.features[0]
        if self.backward:
            self.given, self.exact = backward_operands(first, bias, self.shape), exact_backward(first, bias, self.shape)
            return
        exact = None if bias is None else bias.double()
        images = [first[:, b : b + 1].double() for b in range(min(self.shape.B, 2))]
        self.expected = torch.cat([scan_features(image, exact, self.shape).float() for image in images], 1)

    def round(self, most: int, pool: Pool) -> list[dict]:
        parents = [self.seen[row["key"]] for row in self.rows[:PARENTS]]
        first = of_table(self.which, self.work) | grid(self.which, self.work)
        found = neighbours(self.which, self.work, most, self.rng, parents) if parents else first
        new = {v: chosen for v, chosen in found.items() if v not in self.seen}
        self.seen |= new
        jobs = [(self.backward, v, self.dtype, 7 if self.shape.output_gate else 1) for v in new]
        spilled = pool.map(compile_one, jobs, chunksize=1)
        timed = [self.measure(v) for v, spills in zip(new, spilled, strict=True) if spills <= MOST_SPILLED]
        self.rows = sorted(self.rows + timed, key=lambda row: row["us"] if row["error"] < WRONG else float("inf"))
        return timed

    def measure(self, variant: Variant) -> dict:
        def take(v: Variant) -> None:
            self.which.module.choose = lambda _work, _device: v
            cuda._plans.clear()

        table = self.which.module.choose
        try:
            if self.backward:
                take(variant._replace(grid=variant.grid // self.shape.B))
                error = error_of_backward(*self.exact, self.shape)
                take(variant)
                us = self.timer(lambda _: torch.ops.gspn2.scan_planes_backward(*self.given)) * 1e6
            else:
                take(variant)
                images = scan_features(*self.features[0], self.shape)[:, : self.expected.shape[1]]
                error = largest_error(images.float(), self.expected)
                us = self.timer(lambda i: scan_features(*self.features[i], self.shape), len(self.features)) * 1e6
        finally:
            self.which.module.choose = table
            cuda._plans.clear()
        return dict(shape=self.name, us=us, error=error, key=variant, **variant._asdict())


SHOWN = (
    "widths cluster spans lines places units stages slots normalizers halo workers promotion mixed keep early grid"
    " threads"
)


def shown(v: Variant) -> str:
    names = [name for name in SHOWN.split() if name in v._fields]
    return " ".join(f"{name} {getattr(v, name)}" for name in names) + f" {v.shared >> 10} KB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/planes"))
    parser.add_argument("--shapes", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--most", type=int, default=60, help="variants of a shape and round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for each shape; then no new round begins")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile")
    parser.add_argument("--list", action="store_true", help="only say which there are; needs no GPU")
    parser.add_argument("--backward", action="store_true", help="the gradients'")
    args = parser.parse_args()
    dtype, which = DTYPES[args.dtype], BACKWARD if args.backward else FORWARD
    if args.list:
        for name in args.shapes:
            work = work_of(SHAPES[name], dtype)
            found = of_table(which, work) | grid(which, work)
            print("\n".join(f"{name} {shown(v)}" for v in found))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    timer = Timer(torch.device("cuda"), 5)
    bandwidth = copy_bandwidth(timer.device, timer)
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    with (
        multiprocessing.get_context("spawn").Pool(args.processes) as pool,
        (args.out / "planes.jsonl").open("w") as file,
    ):
        for name in args.shapes:
            search, begun = Search(name, dtype, timer, args.seed, args.backward), time.monotonic()
            search.load()
            for _ in range(args.rounds):
                if time.monotonic() - begun > args.seconds:
                    break
                for row in search.round(args.most, pool):
                    file.write(json.dumps(row) + "\n")
                file.flush()
            floor = floor_bytes(search.shape, dtype, args.backward) / bandwidth * 1e6
            timed = f"{len(search.rows)} of {len(search.seen)} variants"
            print(f"\n{name} {args.dtype}: floor {floor:.1f} us, {timed}", flush=True)
            table = [row for row in search.rows if row["key"] in of_table(which, search.work)]
            for row in search.rows[:5] + [row for row in table if row not in search.rows[:5]]:
                note = f"{row['error']:.0e}" if row["error"] < WRONG else f"WRONG by {row['error']:.2g}"
                print(f"  {row['us']:8.1f} us {floor / row['us']:.2f}  {note}  {shown(row['key'])}", flush=True)
            del search
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
