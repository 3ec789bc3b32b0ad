"""benchmarks/guidance.py against the pipeline's own calls."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gspn2_diffusion import GSPN2Config, apply_gspn2, remove_gspn2
from gspn2_diffusion.loading import default_size

from . import tiny_models

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "guidance.py"


def rows(text: str) -> dict[float, list[float]]:
    cells = [[float(c) for c in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    return {level: errors for level, *errors in cells}


@torch.no_grad()
def test_errors_are_those_of_the_denoiser() -> None:
    torch.manual_seed(0)
    pipe = tiny_models.sd_pipe()
    height, width = default_size(pipe)
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(2)]
    captions = ["a red circle", "two blue squares"]
    module = runpy.run_path(str(SCRIPT))
    apply_gspn2(pipe, config=GSPN2Config(proxy_dim=4))
    measured = rows(module["table"](pipe, captions, pictures, 3.0))

    pixels = torch.stack([torch.from_numpy(np.array(p)) for p in pictures]).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    states = [pipe.encode_prompt(texts, "cpu", 1, False)[0] for texts in (captions, ["", ""])]
    time = torch.full((2,), round(0.8 * (pipe.scheduler.config.num_train_timesteps - 1)))
    noisy = pipe.scheduler.add_noise(latents, noise, time)
    student = [pipe.unet(noisy, time, state).sample for state in states]
    remove_gspn2(pipe)
    teacher = [pipe.unet(noisy, time, state).sample for state in states]
    for both in (student, teacher):
        both.append(3 * both[0] - 2 * both[1])
    expected = [float((s - t).square().sum() / t.square().sum()) for s, t in zip(student, teacher, strict=True)]
    assert min(expected) > 0
    assert measured[0.8] == pytest.approx(expected, rel=2e-3, abs=6e-5)
