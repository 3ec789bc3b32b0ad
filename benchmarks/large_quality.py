"""SceneEval of the tiny model through the upscaling pipeline, GSPN-2 against attention: same prompts, same seeds.

    python benchmarks/large_quality.py --sizes 128 256 512 1024 --limit 300 --workers 8 --minutes 3 --out large_quality

A picture of the largest size passes through the smaller ones, so one call scores every size. Pictures are drawn in
batches, each as the upscaling pipeline draws it alone; calls are small and judging is the CPU's, so several processes
share one device. Writes `large_quality.json` (every verdict), `.md` (the
table) and `.png` (the first prompts' pictures, side by side).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gspn2_diffusion.pipelines.gspn2_upscale import GSPN2UpscalePipeline, for_stages
from PIL import Image

from gspn2_diffusion import fuse_gspn2, gspn2_disabled
from gspn2_diffusion.evaluation import judge, load_prompts
from gspn2_diffusion.evaluation.runner import EvalPrompt
from gspn2_diffusion.loading import DTYPES, GUIDANCE_SCALE, load_pipeline, pick_device
from gspn2_diffusion.pictures import side_by_side

MIXERS = ("attention", "GSPN-2")
SHOWN = 192  # pixels of a picture on the sheet
worker: dict[str, Any] = {}


def start(args: argparse.Namespace, deadline: float) -> None:
    """In each process: the pipeline, patched and folded."""
    torch.set_num_threads(1)
    dtype = DTYPES[args.dtype] if args.dtype else None
    pipe, adapter = load_pipeline(args.model, args.adapter, device=pick_device(args.device), dtype=dtype)
    if adapter is None:
        raise SystemExit("--adapter none leaves nothing to compare; pass an adapter.")
    fuse_gspn2(pipe)
    large = GSPN2UpscalePipeline.from_pipe(pipe)
    for stock in large.stock_pipelines:
        stock.set_progress_bar_config(disable=True)
    worker.update(pipe=pipe, large=large, args=args, deadline=deadline)


def generator_of(seed: int, prompt: str) -> torch.Generator:
    mixed = np.random.SeedSequence([seed, *prompt.encode()]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed))


def draw_stages(
    large: GSPN2UpscalePipeline,
    prompts: Sequence[str],
    side: int,
    strengths: Sequence[float],
    guidance_scales: Sequence[float] | None,
    seed: int,
    **options: Any,
) -> Iterator[list[Image.Image]]:
    """For each stage its pictures, one for each prompt: those that `large`, which takes one prompt, draws of each with
    `generator_of(seed, prompt)`, within rounding."""
    text2img, img2img = large.stock_pipelines
    sizes = large.stage_sizes(side, side)
    seeds = [torch.randint(2**53, (len(sizes),), generator=generator_of(seed, prompt)) for prompt in prompts]
    noise = for_stages(strengths, len(sizes) - 1)
    guidance = for_stages(guidance_scales or [options["guidance_scale"]], len(sizes) - 1)
    pictures: list[Image.Image] = []
    for stage, (height, width) in enumerate(sizes):
        generators = [torch.Generator().manual_seed(int(own[stage])) for own in seeds]
        common: dict[str, Any] = {"prompt": list(prompts), "generator": generators, **options}
        if stage:
            larger = [picture.resize((width, height), Image.Resampling.LANCZOS) for picture in pictures]
            common.update(strength=noise[stage - 1], guidance_scale=guidance[stage - 1])
            pictures = img2img(image=larger, **common).images
        else:
            pictures = text2img(height=height, width=width, **common).images
        yield pictures


def score(first: int, prompts: list[EvalPrompt]) -> list[dict[str, Any]]:
    """Records of a batch of prompts, one for each prompt, mixer and size; none where the time is over."""
    args, records = worker["args"], []
    if time.time() > worker["deadline"]:
        return []
    texts = [prompt.prompt for prompt in prompts]
    options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    for mixer in MIXERS:
        with gspn2_disabled(worker["pipe"]) if mixer == "attention" else nullcontext():
            stages = (args.strengths, args.guidance_scales, args.seed)
            for pictures in draw_stages(worker["large"], texts, max(args.sizes), *stages, **options):
                for number, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True), start=first):
                    verdict = judge(picture, prompt.prompt)
                    about = {"mixer": mixer, "pixels": picture.width, "passed": verdict.passed}
                    records.append({**asdict(prompt), **about, "claims": verdict.claims})
                    if number < args.show and picture.width in args.sizes:
                        picture.save(args.out / f".{number}-{mixer}-{picture.width}.png")
    return records


def table(records: list[dict[str, Any]]) -> str:
    """Score of each size in percent, and the difference with its standard error over the prompts, which are paired."""
    lines = ["| pixels | attention | GSPN-2 | difference | prompts |", "|---|---|---|---|---|"]
    for pixels in sorted({record["pixels"] for record in records}):
        passed: dict[str, list[int]] = {
            mixer: [int(r["passed"]) for r in records if (r["mixer"], r["pixels"]) == (mixer, pixels)]
            for mixer in MIXERS
        }
        teacher, student = (passed[mixer] for mixer in MIXERS)
        change = [100 * (b - a) for a, b in zip(teacher, student, strict=True)]
        error = statistics.stdev(change) / math.sqrt(len(change)) if len(change) > 1 else float("nan")
        scores = " | ".join(f"{100 * statistics.mean(values):.1f} %" for values in (teacher, student))
        lines.append(f"| {pixels} | {scores} | {statistics.mean(change):+.1f} ± {error:.1f} | {len(change)} |")
    return "\n".join(lines)


def sheet(args: argparse.Namespace, count: int) -> Image.Image:
    """A row for each of the first prompts: the mixers at each size."""
    rows = []
    for number in range(count):
        row = []
        for pixels in args.sizes:
            for mixer in MIXERS:
                file = args.out / f".{number}-{mixer}-{pixels}.png"
                with Image.open(file) as picture:
                    row.append((f"{mixer}, {pixels} px", picture.resize((SHOWN, SHOWN), Image.Resampling.BOX)))
                file.unlink()
        rows.append(side_by_side(row))
    whole = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
    for number, row in enumerate(rows):
        whole.paste(row, (0, number * row.height))
    return whole


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-scenes", help="folder or hub id of a pipeline (default: shipped)")
    parser.add_argument("--adapter", default=None, help="folder of its adapter (default: the shipped one)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024], help="sides in pixels, each doubled")
    parser.add_argument("--limit", type=int, default=300, help="prompts, evenly over the categories")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=25, help="of a full denoising")
    parser.add_argument("--guidance_scale", type=float, default=GUIDANCE_SCALE)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.16, 0.08, 0.04], help="of the larger stages")
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=[1.0], help="of them")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=1, help="processes that share the device")
    parser.add_argument("--minutes", type=float, default=60, help="no further batch after so many")
    parser.add_argument("--show", type=int, default=6, help="prompts on the sheet of pictures")
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="default: float32 on a CPU, float16 elsewhere")
    parser.add_argument("--out", type=Path, default=Path("large_quality"))
    args = parser.parse_args(argv)
    args.sizes = sorted(args.sizes)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    prompts = load_prompts(limit=args.limit)
    # Categories in turn, so that a run that the clock ends has scored about as many of each.
    before: Counter[str] = Counter()
    turn = {}
    for prompt in prompts:
        turn[prompt], before[prompt.category] = before[prompt.category], before[prompt.category] + 1
    prompts.sort(key=lambda prompt: turn[prompt])
    began, deadline = time.time(), time.time() + 60 * args.minutes
    records: list[dict[str, Any]] = []
    done = 0
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(args.workers, context, initializer=start, initargs=(args, deadline)) as pool:
            starts = range(0, len(prompts), args.batch_size)
            batches = [prompts[start : start + args.batch_size] for start in starts]
            for batch, part in zip(batches, pool.map(score, starts, batches), strict=True):
                records += part
                done += len(batch) if part else 0
                if part:
                    print(f"{time.time() - began:4.0f} s, {done} of {len(prompts)} prompts", flush=True)
    except Exception:  # what was scored is still worth having
        traceback.print_exc()
        if not records:
            raise
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    device = pick_device(args.device)
    settings["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    settings |= {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "seconds": round(time.time() - began)}
    content = {"settings": settings, "records": records}
    (args.out / "large_quality.json").write_text(json.dumps(content, indent=1) + "\n")
    (args.out / "large_quality.md").write_text(table(records) + "\n")
    if count := min(args.show, done):
        sheet(args, count).save(args.out / "large_quality.png")
    print(f"{done} prompts in {time.time() - began:.0f} s\n{table(records)}")


if __name__ == "__main__":
    main()
