"""Sends mixed requests from several visitors at once to the demo, a fifth of them malformed, and judges every answer.

    python benchmarks/stress_demo.py --requests 200 --clients 8

It starts `gspn2 demo` itself (the shipped model, or `--model` and `--adapter`). Every good request must come back with
the very pixels that the same request paints alone; every malformed one must be refused with words; a healthy request
must still work at the end; the server's memory may not grow by a tenth after the first quarter (of 100 requests or
more). Exit status 1 if anything of this fails.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from gradio_client import Client
from PIL import Image

from gspn2_diffusion.demo import Limits
from gspn2_diffusion.demo.library import ATTENTION_LABEL, Library
from gspn2_diffusion.demo.painting import Request, paint

ORDER = (
    "prompt", "negative_prompt", "seed", "steps", "guidance_scale", "height", "width", "model", "adapter", "num_images",
    "compare",
)  # fmt: skip
SPOILT = [
    {"prompt": ""},
    {"prompt": "x" * 5000},
    {"prompt": ["a"]},
    {"seed": -5},
    {"seed": None},
    {"steps": 0},
    {"steps": 10**9},
    {"steps": "many"},
    {"guidance_scale": -1},
    {"guidance_scale": 1e308},
    {"height": 33.3},
    {"height": 10**7},
    {"width": None},
    {"width": -64},
    {"num_images": 1000},
    {"compare": "yes"},
    {"model": "../../etc/passwd"},
    {"model": "/etc"},
    {"adapter": "nowhere"},
    {"adapter": ATTENTION_LABEL, "compare": True},
]


@dataclass
class Report:
    """What came back."""

    right: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)
    refusals: dict[str, str] = field(default_factory=dict)
    memory: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def good_requests(library: Library, steps: int) -> list[dict]:
    model, adapter = next(iter(library.models)), next(iter(library.adapters))
    with library.lock:
        pipe, _ = library.pipeline(model, adapter)
    unit = 8 * pipe.vae_scale_factor
    base = {
        "prompt": "a red circle", "negative_prompt": "", "seed": 0, "steps": steps, "guidance_scale": 5.0,
        "height": unit, "width": unit, "model": model, "adapter": adapter, "num_images": 1, "compare": False,
    }  # fmt: skip
    changes = [
        {},
        {"seed": 1},
        {"prompt": "two small blue squares"},
        {"width": 2 * unit},
        {"height": unit + 8},
        {"adapter": ATTENTION_LABEL},
        {"compare": True, "seed": 2},
        {"num_images": 2, "seed": 3},
        {"negative_prompt": "a green ring", "guidance_scale": 2.5},
        {"steps": steps + 1},
    ]
    return [{**base, **change} for change in changes]


def alone(library: Library, request: dict) -> list[np.ndarray]:
    asked = Request.checked(Limits(), **request)
    return [np.asarray(picture.image) for picture in paint(library, asked, threading.Event())]


def pictures_of(answer: tuple) -> list[np.ndarray]:
    return [np.asarray(Image.open(entry["image"]).convert("RGB")) for entry in answer[0]]


def visitor(
    address: str, server: psutil.Process, work: queue.Queue, report: Report, guard: threading.Lock, folder: str
) -> None:
    client = Client(
        address, verbose=False, download_files=folder, analytics_enabled=False, httpx_kwargs={"timeout": 300}
    )
    while True:
        try:
            request, wanted = work.get_nowait()
        except queue.Empty:
            return
        begun = time.perf_counter()
        try:
            answer, refusal = client.predict(*(request[name] for name in ORDER), api_name="/generate"), None
        except Exception as error:  # whatever the client makes of a refusal is what a script's author reads
            answer, refusal = None, str(error)
        seconds = time.perf_counter() - begun
        with guard:
            report.seconds.append(seconds)
            report.memory.append(server.memory_info().rss)
            short = json.dumps({name: str(request[name])[:30] for name in ORDER})
            if wanted is None:
                if refusal is None:
                    report.failures.append(f"accepted: {short}")
                elif len(refusal) < 15 or "Traceback" in refusal or "server's log" in refusal:
                    report.failures.append(f"refused without a reason ({refusal!r}): {short}")
                else:
                    report.refused += 1
                    report.refusals[short] = refusal
            elif refusal is not None:
                report.failures.append(f"refused ({refusal}): {short}")
            else:
                got = pictures_of(answer)
                if len(got) == len(wanted) and all(np.array_equal(a, b) for a, b in zip(got, wanted, strict=True)):
                    report.right += 1
                else:
                    report.failures.append(f"wrong picture: {short}")


@contextmanager
def served(models: list[str], adapters: list[str]) -> Iterator[tuple[str, psutil.Process]]:
    """`gspn2 demo` in a process of its own: its address, and the process, whose memory is the server's alone."""
    options = [f"--model={model}" for model in models] + [f"--adapter={adapter}" for adapter in adapters]
    command = [sys.executable, "-m", "gspn2_diffusion.cli", "demo", "--device", "cpu", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = next((re.search(r"http://\S+", line) for line in process.stdout if "The demo is at" in line), None)
            if found is None:
                raise SystemExit("gspn2 demo ended before it served anything; what it says is above.")
            yield found[0], psutil.Process(process.pid)
        finally:
            process.terminate()


def stress(
    address: str,
    server: psutil.Process,
    models: list[str],
    adapters: list[str],
    requests: int,
    clients: int,
    steps: int,
    seed: int = 0,
) -> Report:
    """Runs the whole of it against the demo at `address`, which offers `models` and `adapters`."""
    print(f"seed {seed}")
    chance = random.Random(seed)
    library = Library(models, adapters, device="cpu")
    pool = [(request, alone(library, request)) for request in good_requests(library, steps)]
    jobs: list[tuple[dict, list[np.ndarray] | None]] = []
    for index in range(requests):
        if index % 5 == 4:
            jobs.append(({**pool[0][0], **SPOILT[index // 5 % len(SPOILT)]}, None))
        else:
            jobs.append(chance.choice(pool))
    chance.shuffle(jobs)
    work: queue.Queue = queue.Queue()
    for job in jobs:
        work.put(job)
    report, guard = Report(), threading.Lock()
    folder = tempfile.mkdtemp(prefix="gspn2-stress-")
    common = (address, server, work, report, guard, folder)
    try:
        threads = [threading.Thread(target=visitor, args=common) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        work.put(pool[0])
        visitor(*common)  # still alive, still right
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], help="folder of a pipeline (default: shipped)")
    parser.add_argument("--adapter", action="append", default=[], help="folder of an adapter (default: shipped)")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the refusals' words")
    args = parser.parse_args()
    with served(args.model, args.adapter) as (address, server):
        begun = time.perf_counter()
        report = stress(address, server, args.model, args.adapter, args.requests, args.clients, args.steps, args.seed)
    last = len(report.memory) - 1
    memory = [report.memory[round(last * part / 4)] // 2**20 for part in range(5)]
    if args.requests >= 100 and memory[-1] > 1.1 * memory[1]:
        report.failures.append(f"memory grew from {memory[1]} to {memory[-1]} MB")
    print(
        f"{args.requests} requests from {args.clients} clients in {time.perf_counter() - begun:.0f} s on "
        f"{platform.processor() or platform.machine()}, {datetime.date.today()}: {report.right} right pictures, "
        f"{report.refused} refused with a reason, {len(report.failures)} failures; longest wait "
        f"{max(report.seconds):.1f} s; the server's memory at the start, each quarter and the end: "
        f"{', '.join(map(str, memory))} MB"
    )
    for failure in report.failures:
        print(failure)
    if args.out:
        args.out.write_text(json.dumps(report.refusals, indent=1))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
