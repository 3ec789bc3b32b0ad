"""benchmarks/guidance.py against the pipeline's own calls."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from gspn2_diffusion import GSPN2Config, apply_gspn2, remove_gspn2
from gspn2_diffusion.loading import default_size
from gspn2_diffusion.patching.apply import patched_modules

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


@torch.no_grad()
def test_the_sampled_states_are_the_pipelines() -> None:
    torch.manual_seed(0)
    pipe = tiny_models.sd_pipe()
    config = {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "trailing"}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **config)
    height, width = default_size(pipe)
    apply_gspn2(pipe, config=GSPN2Config(proxy_dim=4))
    module = runpy.run_path(str(SCRIPT))
    measured = rows(module["sampled_table"](pipe, ["a red circle"], Image.new("RGB", (width, height)), 3.0, steps=4))

    seen: list[torch.Tensor] = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0].chunk(2)[0].clone()))
    shape = (1, pipe.unet.config.in_channels, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    pipe("a red circle", num_inference_steps=4, guidance_scale=3.0, latents=noise, output_type="latent")
    hook.remove()
    state, time = seen[2], pipe.scheduler.timesteps[2]
    text = pipe.encode_prompt(["a red circle", ""], "cpu", 1, False)[0]
    student = pipe.unet(torch.cat((state, state)), time, text).sample
    remove_gspn2(pipe)
    teacher = pipe.unet(torch.cat((state, state)), time, text).sample
    guided = [both[1] + 3 * (both[0] - both[1]) for both in (student, teacher)]
    expected = float((guided[0] - guided[1]).square().sum() / guided[1].square().sum())
    assert expected > 0
    assert measured[3][2] == pytest.approx(expected, rel=1e-2, abs=6e-5)


def test_the_student_does_what_it_is_told() -> None:
    module = runpy.run_path(str(SCRIPT.with_name("exchange.py")))
    which = module["students_layers"]
    assert [which("steps:1-3", step, 2) for step in range(4)] == [set(), {0, 1}, {0, 1}, set()]
    assert which("layers:", 0, 3) == set() and which("layers:0,2", 7, 3) == {0, 2} and which("but:0,2", 7, 3) == {1}
    for wrong in ("layers:3", "step:1-2"):
        with pytest.raises(ValueError, match=wrong):
            which(wrong, 0, 3)
    unet = tiny_models.unet()
    apply_gspn2(unet)
    inputs, modules = tiny_models.unet_inputs(8, 8), patched_modules(unet)
    with torch.no_grad():
        student = unet(**inputs).sample
        module["let"](modules, set())
        with_teacher = unet(**inputs).sample
        module["let"](modules, set(range(len(modules))))
        torch.testing.assert_close(unet(**inputs).sample, student)
        remove_gspn2(unet)
        torch.testing.assert_close(unet(**inputs).sample, with_teacher)
