"""How far a student is from its teacher at each noise level: with the caption, without one, and guided.

    python benchmarks/guidance.py --adapter outputs/student --data outputs/scenes

Guidance takes the prediction with the caption several times and subtracts the one without, so that an error in either
comes out enlarged. Squared differences over the teacher's squared size. `--sampling` looks at the states that the
student meets when it samples with guidance, instead of noised pictures. Prints a Markdown table.
"""

import argparse
import json
from pathlib import Path

import torch
from PIL import Image

from gspn2_diffusion import gspn2_disabled
from gspn2_diffusion.loading import GUIDANCE_SCALE, default_size, load_pipeline
from gspn2_diffusion.patching.families import find_model
from gspn2_diffusion.training.data import open_picture
from gspn2_diffusion.training.encode import Conditioner, encode_pictures, pixels_of
from gspn2_diffusion.training.objective import Objective
from gspn2_diffusion.training.student import StudentStep, relative

LEVELS = (0.999, 0.9, 0.8, 0.7, 0.6, 0.4, 0.2)


class Comparison:
    """Student and teacher in one state: squared differences over the teacher's squared size."""

    def __init__(self, pipe, captions: list[str], guidance_scale: float) -> None:
        """Captions for pictures of the pipeline's own size."""
        self.pipe, self.guidance_scale, self.size = pipe, guidance_scale, default_size(pipe)
        own, shared, self.facts = Conditioner(pipe)([*captions, *[""] * len(captions)], self.size)
        self.conditions = [
            {name: value.chunk(2)[half] for name, value in own.items()} | shared  # with the captions, without
            for half in (0, 1)
        ]
        self.objective = Objective(pipe.scheduler, self.facts["timestep_scale"])
        self.step = StudentStep(find_model(pipe), self.objective, 0, 1, 0)

    def __call__(self, noisy: torch.Tensor, indices: torch.Tensor) -> tuple[str, torch.Tensor]:
        """(B, ...) states at timestep indices (B,) -> cells of a table, and the student's guided output."""
        timesteps = self.objective.timesteps(indices.to(noisy.device))

        def predict() -> torch.Tensor:
            """(3, B, ...): with the captions, without, and guided."""
            calls = [self.step.arguments(noisy, timesteps, given) for given in self.conditions]
            given, empty = (self.step.denoiser(**call)[0].float() for call in calls)
            return torch.stack((given, empty, empty + self.guidance_scale * (given - empty)))

        student = predict()
        with gspn2_disabled(self.pipe):
            teacher = predict()
        return " | ".join(f"{relative(*both):.4f}" for both in zip(student, teacher, strict=True)), student[2]


@torch.no_grad()
def table(pipe, captions: list[str], pictures: list[Image.Image], guidance_scale: float, seed: int = 0) -> str:
    """On noised pictures of the pipeline's own size, with their captions."""
    compare = Comparison(pipe, captions, guidance_scale)
    pixels = torch.stack([pixels_of(picture, compare.size) for picture in pictures])
    latents = encode_pictures(pipe, pixels, compare.facts["packed"]).float()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents.device)
    lines = ["| noise level | with caption | without | guided |", "|---|---|---|---|"]
    for level in LEVELS:
        index = round((1 - level if compare.objective.flow else level) * (compare.objective.steps - 1))
        indices = torch.full((len(latents),), index)
        cells, _ = compare(compare.objective.noised(latents, noise, indices)[0], indices)
        lines.append(f"| {level} | {cells} |")
    return "\n".join(lines)


@torch.no_grad()
def sampled_table(
    pipe, captions: list[str], like: Image.Image, guidance_scale: float, steps: int = 25, seed: int = 0
) -> str:
    """In the states of the student's own sampling, from noise of the shape that a picture's latents have."""
    compare = Comparison(pipe, captions, guidance_scale)
    shape = encode_pictures(pipe, pixels_of(like, compare.size)[None], compare.facts["packed"]).shape[1:]
    state = torch.randn(len(captions), *shape, generator=torch.Generator().manual_seed(seed)).to(pipe.device)
    indices = torch.tensor(compare.objective.schedule(steps))
    lines = ["| step | with caption | without | guided |", "|---|---|---|---|"]
    for place in range(steps):
        at, following = (indices[min(i, steps - 1)].repeat(len(captions)) for i in (place, place + 1))
        cells, guided = compare(state, at)
        lines.append(f"| {place + 1} | {cells} |")
        state = compare.objective.move(state, guided, at, following)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-scenes")
    parser.add_argument("--adapter", help="default: the shipped one for the shipped model")
    parser.add_argument("--data", type=Path, required=True, help="image folder with metadata.jsonl")
    parser.add_argument("--num", type=int, default=48, help="pictures, the folder's first")
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE)
    parser.add_argument("--sampling", action="store_true", help="in states of the student's sampling, not noised ones")
    args = parser.parse_args()
    rows = [json.loads(line) for line in (args.data / "metadata.jsonl").read_text().splitlines()[: args.num]]
    pictures = [open_picture(args.data / row["file_name"]) for row in rows]
    pipe, _ = load_pipeline(args.model, args.adapter)
    captions = [row["text"] for row in rows]
    if args.sampling:
        print(sampled_table(pipe, captions, pictures[0], args.guidance_scale))
    else:
        print(table(pipe, captions, pictures, args.guidance_scale))


if __name__ == "__main__":
    main()
