"""`gspn2 generate "a red circle above a blue square"`."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image

from ..compiling import CompileError, compiled
from ..loading import UserError, check_size, default_size, writable_folder
from ..memory import memory_switches
from ..patching import gspn2_disabled
from ..pictures import side_by_side
from ..png_info import save_png
from .arguments import add_pipeline_arguments, finite, load, whole_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="*", help="one or more prompts, each in quotes")
    add_pipeline_arguments(parser)
    parser.add_argument("--negative-prompt", help="what should not be in the picture")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of the first picture; the next adds 1")
    parser.add_argument("--height", type=whole_number(1), help="in pixels (default: the model's)")
    parser.add_argument("--width", type=whole_number(1), help="in pixels (default: the model's)")
    parser.add_argument("--num-images", type=whole_number(1), default=1, help="pictures for each prompt")
    parser.add_argument("--compare", action="store_true", help="put attention's picture, same seed, beside GSPN-2's")
    parser.add_argument("--compile", action="store_true", help="torch.compile: minutes first, then faster pictures")
    parser.add_argument(
        "--upscale",
        action="store_true",
        help="begin near the model's own size and double it in stages; they stay in a folder beside the picture, from "
        "which the same command goes on",
    )
    parser.add_argument(
        "--strengths", type=finite, nargs="+", help="with --upscale: noise of the larger stages, 0 to 1"
    )
    parser.add_argument(
        "--guidance-scales", type=finite, nargs="+", help="with --upscale: guidance of the larger stages"
    )
    parser.add_argument("--out", default="outputs", help="folder, or a .png file for a single picture")


def run(args: argparse.Namespace) -> int:
    prompts = [prompt for prompt in args.prompt if prompt.strip()]
    if not prompts:
        raise UserError('There is no prompt; give one, such as gspn2 generate "a red circle above a blue square".')
    jobs = [(prompt, args.seed + index) for prompt in prompts for index in range(args.num_images)]
    single = Path(args.out) if args.out.lower().endswith(".png") else None
    if single is None and (suffix := Path(args.out).suffix.lower()) in Image.registered_extensions():
        raise UserError(f"--out names a {suffix} file; pictures are PNG: give a folder or a .png file.")
    if single and len(jobs) > 1:
        raise UserError(f"--out names one file for {len(jobs)} pictures; give a folder.")
    stages = {"strengths": args.strengths, "guidance_scales": args.guidance_scales}
    stages = {name: value for name, value in stages.items() if value is not None}
    if stages and not args.upscale:
        raise UserError(f"--{next(iter(stages)).replace('_', '-')} would have no effect; add --upscale.")
    folder = writable_folder(single.parent if single else args.out)
    pipe, adapter = load(args)
    if args.compare and adapter is None:
        raise UserError("--compare needs an adapter to compare with attention; leave --adapter none out.")
    check_size(pipe, args.height, args.width)
    height, width = args.height or default_size(pipe)[0], args.width or default_size(pipe)[1]

    with ExitStack() as stack:
        if args.compile:
            stack.enter_context(compiled(pipe))
        draw: Callable[..., Image.Image] = paint
        if args.upscale:
            draw = stack.enter_context(_in_stages(pipe, height, width, args.steps, stages))
        # Under `accelerate launch` each process takes its share of the pictures.
        share = stack.enter_context(PartialState().split_between_processes(jobs))
        for prompt, seed in share:
            parameters = {
                "prompt": prompt,
                "negative_prompt": args.negative_prompt,
                "seed": seed,
                "steps": args.steps,
                "guidance_scale": args.guidance_scale,
                "height": height,
                "width": width,
                "model": str(args.model),
                "adapter": None if adapter is None else str(args.adapter or "default"),
                **stages,
            }
            path = single or folder / f"{slug(prompt)}-{seed}.png"
            started = time.perf_counter()
            try:
                picture = draw(pipe, parameters, **_stage_folder(args, path, ""))
                seconds = time.perf_counter() - started
                if args.compare:
                    with gspn2_disabled(pipe):
                        teacher = draw(pipe, parameters, **_stage_folder(args, path, "-attention"))
                    picture = side_by_side([("attention", teacher), ("GSPN-2", picture)])
            except CompileError as error:
                raise UserError(f"{error} (leave --compile out)") from error
            save_png(picture, path, parameters)
            print(f"{path}  ({seconds:.1f} s)", flush=True)
    return 0


def paint(pipe: Any, parameters: dict[str, Any], **more: Any) -> Any:
    """One PIL picture. The noise comes from a CPU generator, so a seed means the same on every device.

    `more` goes to the pipeline, such as `callback_on_step_end`.
    """
    negative = parameters["negative_prompt"]
    # Some pipelines (Flux.2) know no negative prompt, and others have a default that is not None.
    given = {} if negative is None else {"negative_prompt": negative}
    return pipe(
        prompt=parameters["prompt"],
        num_inference_steps=parameters["steps"],
        guidance_scale=parameters["guidance_scale"],
        height=parameters["height"],
        width=parameters["width"],
        generator=torch.Generator("cpu").manual_seed(parameters["seed"]),
        **given,
        **more,
    ).images[0]


def _stage_folder(args: argparse.Namespace, path: Path, name: str) -> dict[str, Path]:
    return {"folder": path.with_name(f"{path.stem}-stages{name}")} if args.upscale else {}


@contextmanager
def _in_stages(
    pipe: Any, height: int, width: int, steps: int, stages: dict[str, Any]
) -> Iterator[Callable[..., Image.Image]]:
    """What `paint` does, through `GSPN2UpscalePipeline`, with the memory switches that the plan turns on."""
    from ..pipelines.gspn2_upscale import GSPN2UpscalePipeline
    from ..plan import plan

    try:
        large = GSPN2UpscalePipeline.from_pipe(pipe)
    except ValueError as error:
        raise UserError(f"{error} (leave --upscale out)") from error
    switches: dict[str, Any] = {}
    try:
        strengths = {name: value for name, value in stages.items() if name == "strengths"}
        planned = plan(pipe, height, width, num_inference_steps=steps, **strengths)
        switches = planned.switches
        print(planned, file=sys.stderr)
    except (TypeError, ValueError, RuntimeError) as error:
        print(f"No plan, and no memory switches: {error}", file=sys.stderr)
    switches.pop("vae_tiling", None)  # the pipeline's own decision, stage by stage

    def draw(_: Any, parameters: dict[str, Any], folder: Path) -> Image.Image:
        try:
            return paint(large, parameters, folder=folder, **stages)
        except (ValueError, TypeError, torch.OutOfMemoryError) as error:
            raise UserError(str(error)) from error

    with memory_switches(pipe, **switches):
        yield draw


def slug(prompt: str, length: int = 60) -> str:
    """A file name out of a prompt."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:length].rstrip("-") or "picture"
