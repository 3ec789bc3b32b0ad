"""How far a student is from its teacher at each noise level: with the caption, without one, and guided.

    python benchmarks/guidance.py --adapter outputs/student --data outputs/scenes

Guidance takes the prediction with the caption several times and subtracts the one without, so that an error in either
comes out enlarged. Squared differences over the teacher's squared size. Prints a Markdown table.
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
from gspn2_diffusion.training.student import StudentStep

LEVELS = (0.999, 0.9, 0.8, 0.7, 0.6, 0.4, 0.2)


def relative(student: torch.Tensor, teacher: torch.Tensor) -> float:
    return float((student - teacher).square().sum() / teacher.square().sum())


@torch.no_grad()
def table(pipe, captions: list[str], pictures: list[Image.Image], guidance_scale: float, seed: int = 0) -> str:
    """Pictures of the pipeline's own size, and their captions."""
    size = default_size(pipe)
    own, shared, facts = Conditioner(pipe)([*captions, *[""] * len(captions)], size)
    conditions = [
        {name: value.chunk(2)[half] for name, value in own.items()} | shared  # with the captions, without
        for half in (0, 1)
    ]
    pixels = torch.stack([pixels_of(picture, size) for picture in pictures])
    latents = encode_pictures(pipe, pixels, facts["packed"]).float()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents.device)
    objective = Objective(pipe.scheduler, facts["timestep_scale"])
    step = StudentStep(find_model(pipe), objective, 0, 1, 0)
    lines = ["| noise level | with caption | without | guided |", "|---|---|---|---|"]
    for level in LEVELS:
        index = round((1 - level if objective.flow else level) * (objective.steps - 1))
        noisy, timesteps, _ = objective.noised(latents, noise, torch.full((len(latents),), index))

        def predict() -> torch.Tensor:
            """(2, B, ...): with the captions and without."""
            calls = [step.arguments(noisy, timesteps, given) for given in conditions]  # noqa: B023
            return torch.stack([step.denoiser(**call)[0].float() for call in calls])

        student = predict()
        with gspn2_disabled(pipe):
            teacher = predict()
        guided = [both[1] + guidance_scale * (both[0] - both[1]) for both in (student, teacher)]
        errors = (relative(student[0], teacher[0]), relative(student[1], teacher[1]), relative(*guided))
        lines.append(f"| {level} | " + " | ".join(f"{error:.4f}" for error in errors) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-scenes")
    parser.add_argument("--adapter", help="default: the shipped one for the shipped model")
    parser.add_argument("--data", type=Path, required=True, help="image folder with metadata.jsonl")
    parser.add_argument("--num", type=int, default=48, help="pictures, the folder's first")
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE)
    args = parser.parse_args()
    rows = [json.loads(line) for line in (args.data / "metadata.jsonl").read_text().splitlines()[: args.num]]
    pictures = [open_picture(args.data / row["file_name"]) for row in rows]
    pipe, _ = load_pipeline(args.model, args.adapter)
    print(table(pipe, [row["text"] for row in rows], pictures, args.guidance_scale))


if __name__ == "__main__":
    main()
