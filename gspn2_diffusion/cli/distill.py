"""`gspn2 distill`: examples/distill.py for those who have no copy of it. Several GPUs: `accelerate launch -m
gspn2_diffusion.cli distill ...`."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: every flag goes to the training script's parser."""


def run(args: argparse.Namespace) -> None:
    from ..training import parse_args, train

    train(parse_args(argv=args.flags, prog="gspn2 distill"))
