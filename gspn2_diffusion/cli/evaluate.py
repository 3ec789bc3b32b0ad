"""`gspn2 evaluate`: SceneEval, FID, KID and CLIP score of a pipeline, or of a folder of pictures."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from ..evaluation import PictureFolder, draw, evaluate_pipeline, load_prompts, picture_metrics
from ..evaluation.picture_metrics import CLIP_MODEL, METRICS, load_networks
from ..loading import UserError, check_size, pick_device, writable_folder
from .arguments import add_pipeline_arguments, load, whole_number

SCENE_EVAL = "scene_eval"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pipeline_arguments(parser)
    parser.add_argument(
        "--metrics", nargs="+", choices=(SCENE_EVAL, *METRICS), default=[SCENE_EVAL], help="default: scene_eval"
    )
    parser.add_argument("--prompts", help="JSONL file of {prompt, category} (default: the 600 held-out prompts)")
    parser.add_argument("--limit", type=whole_number(1), help="take so many prompts, evenly over the categories")
    parser.add_argument("--seeds", type=whole_number(0), nargs="+", default=[0], help="one picture a prompt for each")
    parser.add_argument("--batch-size", type=whole_number(1), default=8, help="does not change any picture's noise")
    parser.add_argument("--height", type=whole_number(1), help="in pixels (default: the model's)")
    parser.add_argument("--width", type=whole_number(1), help="in pixels (default: the model's)")
    parser.add_argument("--pictures", help="score the pictures of this folder; none are generated")
    parser.add_argument("--reference", help="folder of real pictures, for fid and kid")
    parser.add_argument("--clip-model", default=CLIP_MODEL, help=f"hub id or folder, for clip (default: {CLIP_MODEL})")
    parser.add_argument("--out", default="outputs/evaluation", help="folder for the results, and the pictures scored")


def run(args: argparse.Namespace) -> None:
    """Under `accelerate launch --no_python gspn2 evaluate ...` the processes share the pictures out."""
    others = [name for name in METRICS if name in args.metrics]
    if args.pictures and SCENE_EVAL in args.metrics:
        raise UserError("SceneEval makes its own pictures; leave --pictures out, or pass --metrics fid kid clip.")
    if {"fid", "kid"} & set(others) and not args.reference:
        raise UserError("FID and KID compare with real pictures; pass --reference FOLDER.")
    folder = writable_folder(args.out)
    main = True
    if not args.pictures:
        if others:
            load_networks(others, args.clip_model)  # what is missing is said before an hour of drawing
        main = _generate(args, folder, save=bool(others))
    if others and main:
        _score(args, others, Path(args.pictures) if args.pictures else folder / "pictures", folder)


def _generate(args: argparse.Namespace, folder: Path, save: bool) -> bool:
    """Draws the prompts, judges the pictures if that is asked for; whether this process goes on to score them."""
    prompts = load_prompts(args.prompts, args.limit)
    state = _join(args)
    main = state is None or state.is_main_process
    try:
        pictures = PictureFolder(folder / "pictures") if save else None
    except FileExistsError as error:
        raise UserError(str(error)) from error
    pipe, adapter = load(args)
    check_size(pipe, args.height, args.width)
    options: dict[str, Any] = {
        name: getattr(args, name) for name in ("steps", "guidance_scale", "batch_size", "height", "width")
    }
    if SCENE_EVAL in args.metrics:
        try:
            result = evaluate_pipeline(pipe, prompts, args.seeds, save_to=pictures, **options)
        except ValueError as error:
            raise UserError(str(error)) from error
        result.settings |= _settings(args, adapter is not None)
        if main:
            result.save_json(folder / "scene_eval.json")
            (folder / "scene_eval.md").write_text(result.table() + "\n")
            result.grid().save(folder / "scene_eval.png")
            print(result.table())
            print(f"Verdicts, table and pictures: {folder}/scene_eval.{{json,md,png}}")
    elif pictures is not None:
        for drawn in draw(pipe, prompts, args.seeds, **options):
            pictures.save(drawn)
    if pictures is not None:
        pictures.finish()
    if state is not None:
        state.destroy_process_group()
    return main


def _join(args: argparse.Namespace) -> Any:
    """The processes that a launcher started, and this one's device; None for a single process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from accelerate import PartialState

    state = PartialState(cpu=pick_device(args.device).type == "cpu")
    args.device = str(state.device)
    return state


def _settings(args: argparse.Namespace, adapted: bool) -> dict[str, str | None]:
    return {"model": str(args.model), "adapter": str(args.adapter or "default") if adapted else None}


def _score(args: argparse.Namespace, metrics: list[str], pictures: Path, folder: Path) -> None:
    result = picture_metrics(
        pictures, args.reference, metrics, device=pick_device(args.device), batch_size=32, clip=args.clip_model
    )
    settings = {"pictures": str(pictures), "reference": args.reference}
    settings |= {"clip_model": args.clip_model} if "clip" in metrics else {}
    (folder / "metrics.json").write_text(json.dumps({"settings": settings, **result}, indent=1) + "\n")
    names = {"fid": "FID", "kid": "KID", "kid_std": "KID, deviation over subsets", "clip": "CLIP score"}
    table = ["| metric | value |", "|---|---|"]
    table += [f"| {label} | {result[name]:.4g} |" for name, label in names.items() if name in result]
    (folder / "metrics.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))
    print(f"{result['pictures']} pictures; {folder}/metrics.{{json,md}}")
