"""`gspn2 plan`: what a size will cost, before it is run."""

from __future__ import annotations

import argparse

from .arguments import add_pipeline_arguments, finite, load, whole_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pipeline_arguments(parser)
    parser.add_argument("--height", type=whole_number(1), required=True, help="in pixels")
    parser.add_argument("--width", type=whole_number(1), required=True, help="in pixels")
    parser.add_argument("--strengths", type=finite, nargs="+", help="of the larger stages: their noise, 0 to 1")


def run(args: argparse.Namespace) -> None:
    from ..loading import UserError, check_size
    from ..plan import plan

    pipe, _ = load(args)
    check_size(pipe, args.height, args.width)
    strengths = {} if args.strengths is None else {"strengths": args.strengths}
    try:
        print(plan(pipe, args.height, args.width, num_inference_steps=args.steps, **strengths))
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
