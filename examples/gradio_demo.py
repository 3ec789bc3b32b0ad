"""The demo in the browser for pipelines of your own; with no arguments, the shipped model.

    python examples/gradio_demo.py --model my-pipeline --adapter my-adapter

The page is `gspn2_diffusion.demo`; `build_demo` returns it as a `gradio.Blocks` to mount in your own application.
"""

import argparse

from gspn2_diffusion.demo import Limits, launch


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], help="folder of a diffusers pipeline (repeatable)")
    parser.add_argument("--adapter", action="append", default=[], help="folder of a GSPN2Adapter (repeatable)")
    parser.add_argument("--max_side", type=int, default=1024, help="longest side of a picture, in pixels")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    launch(args.model, args.adapter, limits=Limits(side=args.max_side), port=args.port)


if __name__ == "__main__":
    main()
