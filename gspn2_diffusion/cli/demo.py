"""`gspn2 demo`."""

from __future__ import annotations

import argparse

from .arguments import whole_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", action="append", default=[], help="folder of a pipeline to offer (repeatable)")
    parser.add_argument("--adapter", action="append", default=[], help="folder of an adapter to offer (repeatable)")
    parser.add_argument("--allow-hub", action="store_true", help="let visitors type hub ids, which are downloaded")
    parser.add_argument("--device", help="cpu, cuda, cuda:N or mps (default: the best there is)")
    parser.add_argument("--max-side", type=whole_number(8), default=1024, help="longest side of a picture, in pixels")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=whole_number(1), help="default: the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="ask Gradio for a public address")
    parser.add_argument("--open", action="store_true", help="open the page on this machine")


def run(args: argparse.Namespace) -> None:
    from ..demo import Limits, launch

    launch(
        args.model,
        args.adapter,
        allow_hub=args.allow_hub,
        device=args.device,
        limits=Limits(side=args.max_side),
        host=args.host,
        port=args.port,
        share=args.share,
        open_browser=args.open,
    )
