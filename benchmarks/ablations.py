"""Ablations of the GSPN-2 layer on the shipped tiny model: one option changed at a time, several seeds, one table.

    python benchmarks/ablations.py --out outputs/ablations --minutes 9 --docs docs/ablations.md

Every run is `examples/distill.py`'s training from the same teacher, data and schedule; its student then answers
SceneEval's prompts at the size it was trained at and, with no further training, at sizes it never saw. Small models
leave a GPU idle between launches, so many runs share it, each a process with one CPU thread. The pictures are encoded
once.

A finished run is not run again, and an unfinished one goes on from its checkpoint: repeat the command until the table
is full. OUT holds results/RUN.json, runs/RUN (adapter, log, report), ablations.md and ablations.svg.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import multiprocessing
import os
import platform
import queue
import sys
import time
import traceback
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "proxy width 4": {"proxy_dim": "4"},
    "proxy width 1/4": {"proxy_dim": "0.25"},
    "8 weight groups": {"groups": 8},
    "shared gates": {"gates": "shared"},
    "softmax weights": {"normalizer": "softmax"},
    "merge by sum": {"merge": "sum"},
    "segments of 4 lines": {"segment": 4},
    "decay 1 - lam": {"decay": True},
    "random start": {"init": "random"},
    "no mixing": {"control": "none"},
}
TEACHER = "teacher (attention)"
MEASURED = ("<!-- measured by benchmarks/ablations.py -->", "<!-- end of what was measured -->")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/ablations"))
    parser.add_argument("--model", default="tiny-scenes", help="teacher: tiny-scenes, or the folder of one like it")
    parser.add_argument("--data", type=Path, help="scenes with metadata.jsonl; default: drawn into OUT/scenes")
    parser.add_argument("--samples", type=int, default=4000, help="scenes to train on")
    parser.add_argument("--variants", nargs="+", default=[*VARIANTS], choices=[*VARIANTS], metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant")
    parser.add_argument("--steps", type=int, default=600, help="steps of a run; the first sixth are layer by layer")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--sizes", nargs="+", default=["128x128", "192x192", "256x256", "256x128"], help="WIDTHxHEIGHT")
    parser.add_argument("--limit", type=int, default=120, help="SceneEval's prompts for each run and size")
    parser.add_argument("--inference-steps", type=int, default=25)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--eval-batch", type=int, default=60, help="pictures made at a time")
    parser.add_argument("--processes", type=int, default=max(1, min(12, (os.cpu_count() or 2) * 3 // 4)))
    parser.add_argument("--device", help="default: CUDA where there is one")
    parser.add_argument("--minutes", type=float, default=30.0, help="end after so long, finished or not")
    parser.add_argument("--report-only", action="store_true", help="only write the table and plot of what is finished")
    parser.add_argument(
        "--docs", type=Path, help="Markdown file whose measured part is replaced; the plot goes beside it"
    )
    args = parser.parse_args(argv)
    for size in args.sizes:
        if not all(side.isdigit() for side in size.split("x")) or size.count("x") != 1:
            parser.error(f"--sizes got {size!r}; write WIDTHxHEIGHT, such as 256x128.")
    return args


def slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def run_name(name: str, seed: int) -> str:
    return f"{slug(name)}-seed{seed}"


def write_json(path: Path, content: Any) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


def model_folder(model: str) -> Path:
    from gspn2_diffusion.assets import tiny_scenes_path

    return tiny_scenes_path() if model == "tiny-scenes" else Path(model)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What all runs of a table share."""
    weights = model_folder(args.model) / "unet" / "diffusion_pytorch_model.safetensors"
    shared = ("model", "samples", "steps", "batch", "limit", "inference_steps", "guidance_scale")
    return {key: getattr(args, key) for key in shared} | {
        "teacher_sha256": hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
    }


def claim(args: argparse.Namespace) -> None:
    """Refuses a folder whose results were made with other settings."""
    (args.out / "results").mkdir(parents=True, exist_ok=True)
    path, now = args.out / "settings.json", settings(args)
    found = json.loads(path.read_text()) if path.is_file() else now
    if found != now:
        differing = [f"{key} {found.get(key)!r}, now {now[key]!r}" for key in now if found.get(key) != now[key]]
        raise SystemExit(f"{args.out} holds results of other settings ({'; '.join(differing)}); pass another --out.")
    write_json(path, now)


def training_arguments(args: argparse.Namespace, options: dict[str, Any], seed: int, out: Path) -> Any:
    """docs/tiny_model.md's recipe."""
    from gspn2_diffusion.training import TrainingArguments

    return TrainingArguments(
        pretrained_model_name_or_path=args.model,
        train_data_dir=str(args.data or args.out / "scenes"),
        max_train_samples=args.samples,
        cache_dir=str(args.out / "cache"),
        cache_dtype="float32",
        encode_batch_size=100,
        output_dir=str(out),
        seed=seed,
        train_batch_size=args.batch,
        max_train_steps=args.steps,
        layerwise_steps=args.steps // 6,
        layerwise_learning_rate=2e-3 if args.steps >= 6 else None,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        allow_tf32=True,
        holdout_samples=32,
        distance_steps=[0, args.steps // 6],
        validation_steps=args.steps,
        checkpointing_steps=max(1, args.steps // 3),
        checkpoints_total_limit=1,
        resume_from_checkpoint="latest",
        **options,
    )


def prepare(args: argparse.Namespace) -> None:
    """Draws the scenes and encodes them."""
    data = args.data or args.out / "scenes"
    if not (data / "metadata.jsonl").is_file():
        sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "scenes"))
        import scenes

        argv, sys.argv = sys.argv, ["scenes.py", "--out", str(data), "--num", str(args.samples), "--workers",
                                    str(args.processes)]  # fmt: skip
        scenes.main()
        sys.argv = argv
    from gspn2_diffusion.training import train

    arguments = training_arguments(args, {}, 0, args.out / "encoding")
    arguments.encode_only = True
    train(arguments)


def perform(args: argparse.Namespace, name: str, seed: int) -> None:
    """One run: distils unless that is done, then scores at each size that has no score yet."""
    from gspn2_diffusion.evaluation import evaluate_pipeline, load_prompts
    from gspn2_diffusion.loading import load_pipeline
    from gspn2_diffusion.training import train

    path = args.out / "results" / f"{run_name(name, seed)}.json"
    folder = args.out / "runs" / run_name(name, seed)
    result: dict[str, Any] = {"name": name, "seed": seed, "sizes": {}}
    result |= {"date": str(date.today()), "device": device_name(args.device)}
    if path.is_file():
        result = json.loads(path.read_text())
    elif name != TEACHER:
        started = time.perf_counter()
        train(training_arguments(args, VARIANTS[name], seed, folder))
        result["train_seconds"] = round(time.perf_counter() - started, 1)
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        result["distances"] = [line for line in log if "distance" in line]
        write_json(path, result)
    missing = [size for size in args.sizes if size not in result["sizes"]]
    if not missing:
        return
    # A fresh copy: training leaves parts of its pipeline behind.
    pipe, adapter = load_pipeline(args.model, "none" if name == TEACHER else str(folder), device=args.device)
    if adapter is not None:
        result["parameters"] = sum(p.numel() for p in adapter.parameters())
    prompts = load_prompts(limit=args.limit)
    for size in missing:
        width, height = map(int, size.split("x"))
        started = time.perf_counter()
        scores = evaluate_pipeline(
            pipe, prompts, (seed,), steps=args.inference_steps, guidance_scale=args.guidance_scale,
            batch_size=args.eval_batch, height=height, width=width, keep_pictures=False, progress=False,
        )  # fmt: skip
        result["sizes"][size] = {"seconds": round(time.perf_counter() - started, 1), **scores.summary()}
        write_json(path, result)


def work(args: argparse.Namespace, jobs: Any, ready: Any, logs: Path) -> None:
    """A process that performs runs until none is left. What they print goes to a file."""
    log = open(logs / f"{os.getpid()}.log", "w", buffering=1)  # noqa: SIM115 (as long as the process)
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        import torch

        import gspn2_diffusion.training  # noqa: F401 (takes seconds: while the pictures are encoded)

        torch.set_num_threads(1)
        ready.wait()
        while True:
            try:
                name, seed = jobs.get(timeout=1)
            except queue.Empty:
                return
            print(f"{run_name(name, seed)} starts")
            try:
                perform(args, name, seed)
            except Exception:
                write_json(args.out / "results" / f"{run_name(name, seed)}.failed", traceback.format_exc())


def run_all(args: argparse.Namespace, deadline: float) -> None:
    """Shares the runs out over processes, seed by seed, so that a table cut short still has every variant."""
    todo = [
        (name, seed)
        for seed in range(args.seeds)
        for name in [TEACHER, *args.variants]
        if not finished(args, name, seed)
    ]
    for failed in (args.out / "results").glob("*.failed"):
        failed.unlink()
    if not todo:
        return
    logs = args.out / "logs"
    logs.mkdir(exist_ok=True)
    context = multiprocessing.get_context("spawn")
    jobs, ready = context.Queue(), context.Event()
    for job in todo:
        jobs.put(job)
    os.environ["OMP_NUM_THREADS"] = "1"
    workers = [
        context.Process(target=work, args=(args, jobs, ready, logs), daemon=True)
        for _ in range(min(args.processes, len(todo)))
    ]
    for worker in workers:
        worker.start()
    prepare(args)
    ready.set()
    told = time.monotonic()
    while any(worker.is_alive() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.5)
        if time.monotonic() - told > 30:
            told = time.monotonic()
            done = sum(finished(args, name, seed) for name, seed in todo)
            print(f"{done} of {len(todo)} runs, {deadline - told:.0f} s left", flush=True)
    for worker in workers:
        worker.kill()
        worker.join()
    for failed in sorted((args.out / "results").glob("*.failed")):
        print(f"{failed.stem} failed:\n{json.loads(failed.read_text())}")


def finished(args: argparse.Namespace, name: str, seed: int) -> bool:
    path = args.out / "results" / f"{run_name(name, seed)}.json"
    return path.is_file() and set(args.sizes) <= set(json.loads(path.read_text())["sizes"])


def collect(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Results by variant, in the table's order, those that there are."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in [TEACHER, *VARIANTS]:
        paths = [args.out / "results" / f"{run_name(name, seed)}.json" for seed in range(args.seeds)]
        if results := [json.loads(path.read_text()) for path in paths if path.is_file()]:
            found[name] = results
    return found


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation (0 for one value)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def cell(values: list[float], scale: float, digits: int) -> str:
    if not values:
        return ""
    mean, deviation = spread([scale * value for value in values])
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def scores(results: list[dict[str, Any]], size: str) -> list[float]:
    return [result["sizes"][size]["overall"]["score"] for result in results if size in result["sizes"]]


def last(results: list[dict[str, Any]], key: str) -> list[float]:
    return [result["distances"][-1][key] for result in results if result.get("distances")]


def beside_default(found: dict[str, list[dict[str, Any]]], results: list[dict[str, Any]], size: str) -> list[float]:
    """Points more than the default has with the same seed, hence from the same noise."""
    default = {r["seed"]: r["sizes"][size]["overall"]["score"] for r in found.get("default", []) if size in r["sizes"]}
    shared = [r for r in results if size in r["sizes"] and r["seed"] in default]
    return [r["sizes"][size]["overall"]["score"] - default[r["seed"]] for r in shared]


def table(args: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: distances to the teacher after training, SceneEval at each size; mean and deviation over the seeds."""
    heads = ["", "seeds", "parameters", "distance, output", "distance, attentions", *args.sizes]
    heads.insert(6, f"less default, {args.sizes[0]}")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, results in found.items():
        parameters = next((f"{result['parameters']:,}" for result in results if "parameters" in result), "")
        cells = [name, str(len(results)), parameters, cell(last(results, "distance"), 1, 4)]
        cells += [cell(last(results, "layer_distance"), 1, 4)]
        cells += [cell(scores(results, size), 100, 1) for size in args.sizes]
        cells.insert(6, "" if name == "default" else cell(beside_default(found, results, args.sizes[0]), 100, 1))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def device_name(device: str | None) -> str:
    import torch

    if torch.cuda.is_available() and device != "cpu":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}"


def report(args: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> str:
    """The measured part of docs/ablations.md."""
    ran = settings(args)
    known = " ".join(f"--{key.replace('_', '-')} {ran[key]}" for key in ran if key != "teacher_sha256")
    results = [result for results in found.values() for result in results]
    pictures = max((s["overall"]["pictures"] for r in results for s in r["sizes"].values()), default=0)
    where = "; ".join(dict.fromkeys(f"{result['device']}, {result['date']}" for result in results))
    return "\n".join([
        f"`python benchmarks/ablations.py {known} --seeds {args.seeds}`; {where}. "
        f"Teacher {ran['teacher_sha256']} (SHA-256 of the UNet's file).",
        "",
        "Distances are squared, over the teacher's own square, on 32 samples never trained on. SceneEval in percent, "
        f"{pictures} pictures for each seed and size (width x height), all variants and the teacher from the same "
        "noise. Mean ± standard deviation over the seeds.",
        "",
        table(args, found),
    ])  # fmt: skip


def plot(args: argparse.Namespace, found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """One row for each variant, one mark for each size, bars of one standard deviation."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "gspn2"
    import matplotlib.pyplot as plt

    names = list(found)
    figure, axes = plt.subplots(figsize=(8, 0.5 + 0.45 * len(names)))
    for place, size in enumerate(args.sizes):
        rows = [(row, spread(values)) for row, name in enumerate(names) if (values := scores(found[name], size))]
        if not rows:
            continue
        height = [row + 0.16 * (place - (len(args.sizes) - 1) / 2) for row, _ in rows]
        means, deviations = zip(*(value for _, value in rows), strict=True)
        axes.errorbar(100 * np.array(means), height, xerr=100 * np.array(deviations), fmt="o", ms=4, label=f"{size} px")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    # A deviation may reach below 0, a score may not.
    axes.set_xlim(-1, 100)
    axes.set_xlabel("SceneEval, % of pictures in which every claim holds")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def write_docs(docs: Path, text: str, image: Path) -> None:
    """Replaces what stands between the marks of `MEASURED`."""
    page = docs.read_text()
    start, end = (page.index(mark) for mark in MEASURED)
    (docs.parent / "images").mkdir(exist_ok=True)
    (docs.parent / "images" / image.name).write_bytes(image.read_bytes())
    picture = f"![SceneEval of each variant at each size](images/{image.name})"
    docs.write_text(f"{page[: start + len(MEASURED[0])]}\n\n{text}\n\n{picture}\n\n{page[end:]}")


def main(argv: list[str] | None = None) -> None:
    started = time.monotonic()
    args = parse_args(argv)
    claim(args)
    if not args.report_only:
        run_all(args, started + 60 * args.minutes)
        print(f"{(time.monotonic() - started) / 60:.1f} minutes")
    found = collect(args)
    text = report(args, found)
    (args.out / "ablations.md").write_text(text + "\n")
    if importlib.util.find_spec("matplotlib"):
        plot(args, found, args.out / "ablations.svg")
    if args.docs:
        write_docs(args.docs, text, args.out / "ablations.svg")
    print(text)


if __name__ == "__main__":
    main()
