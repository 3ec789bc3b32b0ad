"""`gspn2 evaluate`: SceneEval on a pipeline, with a JSON of every verdict, a table and a grid of pictures."""

from __future__ import annotations

import argparse
import json

from ..evaluation import evaluate_pipeline, load_prompts
from ..loading import UserError, check_size, writable_folder
from .arguments import add_pipeline_arguments, load, whole_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pipeline_arguments(parser)
    parser.add_argument("--prompts", help="JSONL file of {prompt, category} (default: the 600 held-out prompts)")
    parser.add_argument("--limit", type=whole_number(1), help="take so many prompts, evenly over the categories")
    parser.add_argument("--seeds", type=whole_number(0), nargs="+", default=[0], help="one picture a prompt for each")
    parser.add_argument("--batch-size", type=whole_number(1), default=8, help="does not change any picture's noise")
    parser.add_argument("--height", type=whole_number(1), help="in pixels (default: the model's)")
    parser.add_argument("--width", type=whole_number(1), help="in pixels (default: the model's)")
    parser.add_argument("--out", default="outputs/evaluation", help="folder for scene_eval.json, .md and .png")


def run(args: argparse.Namespace) -> None:
    folder = writable_folder(args.out)
    try:
        prompts = load_prompts(args.prompts, args.limit)
    except (OSError, json.JSONDecodeError, TypeError) as error:
        raise UserError(
            f"{args.prompts} could not be read ({error}); it needs a JSON object with prompt and category a line."
        ) from error
    pipe, adapter = load(args)
    check_size(pipe, args.height, args.width)
    try:
        result = evaluate_pipeline(
            pipe,
            prompts,
            args.seeds,
            steps=args.steps,
            guidance_scale=args.guidance_scale,
            batch_size=args.batch_size,
            height=args.height,
            width=args.width,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    result.settings |= {
        "model": str(args.model),
        "adapter": None if adapter is None else str(args.adapter or "default"),
    }
    result.save_json(folder / "scene_eval.json")
    (folder / "scene_eval.md").write_text(result.table() + "\n")
    result.grid().save(folder / "scene_eval.png")
    print(result.table())
    print(f"Verdicts, table and pictures: {folder}/scene_eval.{{json,md,png}}")
