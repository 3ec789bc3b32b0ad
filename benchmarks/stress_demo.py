"""Sends mixed requests from several visitors at once to the demo, a fifth of them malformed, and judges every answer.

    python benchmarks/stress_demo.py --requests 200 --clients 8

It starts the demo itself (the shipped model, or `--model` and `--adapter`). Every good request must come back with the
very pixels that the same request paints alone; every malformed one must be refused with words; a healthy request must
still work at the end. Memory is printed. Exit status 1 if anything of this fails.
"""

from __future__ import annotations

import argparse
import json
import platform
import queue
import random
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from gradio_client import Client
from PIL import Image

from gspn2_diffusion.demo import Limits, launch
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
        {"negative_prompt": "a green star", "guidance_scale": 2.5},
        {"steps": steps + 1},
    ]
    return [{**base, **change} for change in changes]


def alone(library: Library, request: dict) -> list[np.ndarray]:
    asked = Request.checked(Limits(), **request)
    return [np.asarray(picture.image) for picture in paint(library, asked, threading.Event())]


def pictures_of(answer: tuple) -> list[np.ndarray]:
    return [np.asarray(Image.open(entry["image"]).convert("RGB")) for entry in answer[0]]


def visitor(address: str, work: queue.Queue, report: Report, guard: threading.Lock, folder: str) -> None:
    client = Client(address, verbose=False, download_files=folder, analytics_enabled=False)
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
            report.memory.append(psutil.Process().memory_info().rss)
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


def stress(models: list[str], adapters: list[str], requests: int, clients: int, steps: int, seed: int = 0) -> Report:
    """Runs the whole of it against a demo of its own."""
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
    demo, address = launch(models, adapters, device="cpu", block=False)
    report, guard = Report(), threading.Lock()
    folder = tempfile.mkdtemp(prefix="gspn2-stress-")
    try:
        threads = [
            threading.Thread(target=visitor, args=(address, work, report, guard, folder)) for _ in range(clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        work.put(pool[0])
        visitor(address, work, report, guard, folder)  # still alive, still right
    finally:
        demo.close()
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
    begun = time.perf_counter()
    report = stress(args.model, args.adapter, args.requests, args.clients, args.steps, args.seed)
    half = report.memory[len(report.memory) // 2 :]
    print(
        f"{args.requests} requests from {args.clients} clients in {time.perf_counter() - begun:.0f} s on "
        f"{platform.processor() or platform.machine()}: {report.right} right pictures, {report.refused} refused with a "
        f"reason, {len(report.failures)} failures; longest wait {max(report.seconds):.1f} s; memory "
        f"{half[0] / 2**20:.0f} MB half-way, {half[-1] / 2**20:.0f} MB at the end"
    )
    for failure in report.failures:
        print(failure)
    if args.out:
        args.out.write_text(json.dumps(report.refusals, indent=1))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
