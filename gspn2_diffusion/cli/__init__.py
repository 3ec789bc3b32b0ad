"""`gspn2`, the command line. Each command is a module with `add_arguments(parser)` and `run(args)`."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys

from ..version import __version__

COMMANDS = {
    "generate": "make pictures from prompts",
    "demo": "paint in the browser",
    "distill": "train the GSPN-2 layers of a pipeline from the attention they replace (examples/distill.py)",
    "evaluate": "score a pipeline on scenes whose pictures can be checked (SceneEval)",
    "plan": "say what time and memory a size will take, and which switches it needs",
    "info": "show versions, the device, which kernel would run, and supported models",
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit status: 1 for a mistake that the user can mend, 2 (argparse's) for one in the
    flags, 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    # Without torchvision transformers warns of image processors, which text to image has no use for.
    logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(prog="gspn2", description="Linear-cost attention for diffusers pipelines.")
    parser.add_argument("--version", action="version", version=f"gspn2 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    # Only the chosen command's module is imported: torch takes seconds.
    chosen = next((word for word in argv if word in COMMANDS), None)
    for name, help_text in COMMANDS.items():
        # distill's flags are the training script's, which has a parser of its own.
        own_parser = name != "distill"
        sub = commands.add_parser(name, help=help_text, description=help_text, allow_abbrev=False, add_help=own_parser)
        if name == chosen:
            module = importlib.import_module(f".{name}", __name__)
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    args, rest = parser.parse_known_args(argv)
    if args.command == "distill":
        args.flags = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    from ..loading import UserError

    try:
        status = args.run(args) or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"gspn2 {args.command}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # as in `gspn2 info | head`; nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"\ngspn2 {args.command}: interrupted.", file=sys.stderr)
        return 130
