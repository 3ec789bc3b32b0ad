"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from ..loading import DTYPES, GUIDANCE_SCALE, SHIPPED


def whole_number(at_least: int) -> Callable[[str], int]:
    """An argparse type: an integer with a lower bound."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = at_least - 1
        if value < at_least:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {at_least}")
        return value

    return parse


def finite(text: str) -> float:
    """An argparse type: a number that is neither NaN nor infinite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def add_pipeline_arguments(parser: argparse.ArgumentParser) -> None:
    """--model, --adapter, --device, --dtype, --steps, --guidance-scale."""
    parser.add_argument("--model", default=SHIPPED, help="folder or hub id of a diffusers pipeline (default: shipped)")
    parser.add_argument("--adapter", help='folder or hub id of a GSPN2Adapter; "none" leaves attention in place')
    parser.add_argument("--device", help="cpu, cuda, cuda:N or mps (default: the best there is)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on the CPU, float16 elsewhere")
    parser.add_argument("--steps", type=whole_number(1), default=25, help="denoising steps (default: 25)")
    parser.add_argument(
        "--guidance-scale",
        type=finite,
        default=GUIDANCE_SCALE,
        help=f"classifier-free guidance (default: {GUIDANCE_SCALE:g})",
    )


def load(args: argparse.Namespace):
    """The pipeline and adapter that `add_pipeline_arguments` describes."""
    from ..loading import load_pipeline, pick_device

    return load_pipeline(
        args.model, args.adapter, device=pick_device(args.device), dtype=DTYPES[args.dtype] if args.dtype else None
    )
