"""Where a student loses what its teacher can: let it do only some of the denoising steps, or only some of the layers.

    python benchmarks/exchange.py --adapter outputs/student --student steps:0-5 steps:5-25 layers:0 layers:1,2

Each entry is one run of SceneEval's prompts: `steps:A-B` gives the student steps A to B - 1 and the teacher the others,
`layers:I,J` gives it those self-attentions (numbered in the model's order; `--list` shows them) in all steps, and
`but:I,J` all others. Prints a Markdown table.
"""

import argparse
from collections import defaultdict
from typing import Any

import torch

from gspn2_diffusion.evaluation import CATEGORIES, EvalPrompt, judge, load_prompts
from gspn2_diffusion.loading import GUIDANCE_SCALE, load_pipeline
from gspn2_diffusion.patching.apply import patched_modules, switch
from gspn2_diffusion.patching.families import find_model

HARD = ("two_objects", "counting", "colour_attribution")


def students_layers(entry: str, step: int, count: int) -> set[int]:
    """Which of the `count` layers are the student's in a step."""
    kind, _, values = entry.partition(":")
    everything = set(range(count))
    if kind == "steps":
        first, last = map(int, values.split("-"))
        return everything if first <= step < last else set()
    if kind in ("layers", "but"):
        named = {int(value) for value in values.split(",") if value}
        if not named <= everything:
            raise ValueError(f"{entry!r} names a layer beyond {count - 1}; --list shows them.")
        return named if kind == "layers" else everything - named
    raise ValueError(f"{entry!r} is not steps:A-B, layers:I,J or but:I,J; write one of these.")


def let(modules: list[Any], chosen: set[int]) -> None:
    """The student's processors in the chosen attentions, the model's own in the others."""
    for number, (_, module, state) in enumerate(modules):
        if state.enabled != (number in chosen):
            switch(module, state, on=number in chosen)


@torch.no_grad()
def scores(pipe: Any, prompts: list[EvalPrompt], entry: str, args: argparse.Namespace) -> dict[str, list[bool]]:
    modules = patched_modules(find_model(pipe))
    passed: dict[str, list[bool]] = defaultdict(list)

    def after(_pipe: Any, step: int, _timestep: Any, _tensors: dict) -> dict:
        let(modules, students_layers(entry, step + 1, len(modules)))
        return {}

    for start in range(0, len(prompts), args.batch_size):
        part = prompts[start : start + args.batch_size]
        let(modules, students_layers(entry, 0, len(modules)))
        pictures = pipe(
            [p.prompt for p in part],
            num_inference_steps=args.steps,
            guidance_scale=args.guidance_scale,
            generator=[torch.Generator().manual_seed(1000 * args.seed + start + n) for n in range(len(part))],
            callback_on_step_end=after,
        ).images
        for asked, picture in zip(part, pictures, strict=True):
            passed[asked.category].append(judge(picture, asked.prompt).passed)
    let(modules, set(range(len(modules))))
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-scenes")
    parser.add_argument("--adapter", help="default: the shipped one for the shipped model")
    parser.add_argument(
        "--student", nargs="+", default=["steps:0-0", "steps:0-25", "steps:0-5", "steps:5-10", "steps:10-25"]
    )
    parser.add_argument("--categories", nargs="+", choices=CATEGORIES, default=HARD)
    parser.add_argument("--limit", type=int, default=36, help="prompts of each category")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--list", action="store_true", help="only number the layers")
    args = parser.parse_args()
    pipe, _ = load_pipeline(args.model, args.adapter)
    pipe.set_progress_bar_config(disable=True)
    names = [name for name, _, _ in patched_modules(find_model(pipe))]
    if args.list:
        print("\n".join(f"{number} {name}" for number, name in enumerate(names)))
        return
    for entry in args.student:
        students_layers(entry, 0, len(names))
    prompts = [p for c in args.categories for p in [q for q in load_prompts() if q.category == c][: args.limit]]
    print(
        "| the student does | all | " + " | ".join(args.categories) + " |\n" + "|---" * (len(args.categories) + 2) + "|"
    )
    for entry in args.student:
        passed = scores(pipe, prompts, entry, args)
        groups = [[p for ps in passed.values() for p in ps], *(passed[c] for c in args.categories)]
        print(f"| {entry} | " + " | ".join(f"{100 * sum(g) / len(g):.1f}" for g in groups) + " |", flush=True)


if __name__ == "__main__":
    main()
