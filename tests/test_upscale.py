"""The progressive upscaling pipeline, on tiny but real pipelines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from gspn2_diffusion.pipelines import gspn2_upscale
from gspn2_diffusion.pipelines.gspn2_upscale import GSPN2UpscalePipeline
from PIL import Image

from gspn2_diffusion import apply_gspn2, fuse_gspn2, gspn2_disabled, plan
from gspn2_diffusion.memory import memory_switches

from . import tiny_models

CALL = dict(prompt="a cat", height=64, width=40, num_inference_steps=4, strengths=(0.75, 0.5), base_size=16)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sd3_pipe() -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=64,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=tiny_models.text_encoder(16, projection=True),
        tokenizer=tiny_models.tokenizer(),
        text_encoder_2=tiny_models.text_encoder(16, projection=True),
        tokenizer_2=tiny_models.tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


@pytest.fixture
def pipe():
    upscale = GSPN2UpscalePipeline.from_pipe(tiny_models.sd_pipe())
    upscale.set_progress_bar_config(disable=True)
    return upscale


@pytest.mark.parametrize("make", [tiny_models.sd_pipe, tiny_models.sdxl_pipe, sd3_pipe])
def test_stages_of_each_family(make):
    pipe = GSPN2UpscalePipeline.from_pipe(make())
    pipe.set_progress_bar_config(disable=True)
    seen: list[tuple[int, int, tuple[int, int]]] = []
    large = {**CALL, "width": 48, "base_size": 32}
    output = pipe(
        **large,
        generator=seeded(),
        callback_on_stage_end=lambda stage, count, image: seen.append((stage, count, image.size)),
    )
    assert seen[-1][2] == output.images[0].size == (48, 64)
    assert [stage for stage, _, _ in seen] == list(range(seen[0][1])) and seen[0][1] == len(output.stages) > 1
    again = pipe(**large, generator=seeded())
    assert again.images[0].tobytes() == output.images[0].tobytes()


@pytest.mark.parametrize(
    "height, width, expected",
    [
        (16384, 16384, [(1024, 1024), (2048, 2048), (4096, 4096), (8192, 8192), (16384, 16384)]),
        (2304, 4096, [(576, 1024), (1152, 2048), (2304, 4096)]),
        (2056, 1000, [(1032, 504), (2056, 1000)]),
        (512, 768, [(512, 768)]),
        (1024, 1536, [(1024, 1536)]),
        (2048, 3072, [(1024, 1536), (2048, 3072)]),
    ],
)
def test_stage_sizes(pipe, height, width, expected):
    assert pipe.stage_sizes(height, width, 1024) == expected


def test_loads_as_custom_pipeline(pipe, tmp_path):
    stock = pipe.stock_pipelines[0]
    stock.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=gspn2_upscale.__file__, trust_remote_code=True)
    assert [type(p).__name__ for p in loaded.stock_pipelines] == [type(p).__name__ for p in pipe.stock_pipelines]
    assert (loaded.native_size, loaded.size_multiple) == (pipe.native_size, pipe.size_multiple) == (32, 8)
    assert all(p.unet is loaded.unet for p in loaded.stock_pipelines)


def test_loads_as_custom_pipeline_without_t5(tmp_path):
    sd3_pipe().save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=gspn2_upscale.__file__, trust_remote_code=True)
    assert type(loaded.stock_pipelines[0]) is StableDiffusion3Pipeline


@pytest.mark.parametrize("guidance_scales", [None, (1.0, 3.0)])
def test_equals_the_stock_pipelines_by_hand(pipe, guidance_scales):
    """Two stages written out with the stock pipelines."""
    text2img, img2img = pipe.stock_pipelines
    img2img.set_progress_bar_config(disable=True)
    own = {"strengths": (0.5,), "guidance_scales": guidance_scales}
    output = pipe("a cat", 64, 64, num_inference_steps=4, generator=seeded(3), guidance_scale=4.0, **own)
    seeds = torch.randint(2**53, (2,), generator=seeded(3)).tolist()
    common = {"prompt": "a cat", "num_inference_steps": 4, "guidance_scale": 4.0}
    first = text2img(height=32, width=32, generator=seeded(seeds[0]), **common).images[0]
    larger = first.resize((64, 64), Image.Resampling.LANCZOS)
    if guidance_scales:
        common["guidance_scale"] = guidance_scales[0]
    second = img2img(image=larger, strength=0.5, generator=seeded(seeds[1]), **common).images[0]
    assert output.stages[0].tobytes() == first.tobytes()
    assert output.images[0].tobytes() == second.tobytes()


def test_patched_model_is_patched_in_every_stage(pipe):
    apply_gspn2(pipe)
    assert hasattr(pipe.stock_pipelines[1].unet.mid_block.attentions[0].transformer_blocks[0].attn1, "gspn2")
    patched = pipe(**CALL, generator=seeded()).stages
    with gspn2_disabled(pipe):
        plain = pipe(**CALL, generator=seeded()).stages
    assert all(a.tobytes() != b.tobytes() for a, b in zip(patched, plain, strict=True))


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(
    "when, seed", [("stage 0", 5), ("stage 1", None), ("inside stage 0", None), ("inside stage 2", 5)]
)
def test_resumes_to_the_same_picture(pipe, tmp_path, when, seed):
    def make(folder, **callbacks):
        return pipe(**CALL, generator=None if seed is None else seeded(seed), folder=folder, **callbacks)

    done = []

    def on_stage(stage, count, image):
        done.append(stage)
        if when == f"stage {stage}":
            raise Interrupted

    def on_step(stock, step, timestep, tensors):
        if when == f"inside stage {len(done)}" and step == 1:
            raise Interrupted

    torch.manual_seed(11)
    whole = make(tmp_path / "whole")
    torch.manual_seed(11)
    with pytest.raises(Interrupted):
        make(tmp_path / "parts", callback_on_stage_end=on_stage, callback_on_step_end=on_step)
    torch.manual_seed(99)
    ran = []
    resumed = make(tmp_path / "parts", callback_on_stage_end=lambda stage, *_: ran.append(stage))
    assert ran == [stage for stage in range(3) if stage not in done]
    assert [image.tobytes() for image in resumed.stages] == [image.tobytes() for image in whole.stages]
    names = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert names == ["stage_1_16x16.png", "stage_2_24x32.png", "stage_3_40x64.png", "state.json"]


@pytest.mark.parametrize("make", [tiny_models.sd_pipe, tiny_models.sdxl_pipe])
def test_resumes_after_every_single_step(make, tmp_path):
    """Stopped again and again, after one further step or stage each time; patched, with a scheduler that adds noise."""
    stock = make()
    stock.scheduler = EulerAncestralDiscreteScheduler.from_config(stock.scheduler.config)
    pipe = GSPN2UpscalePipeline.from_pipe(stock)
    pipe.set_progress_bar_config(disable=True)
    apply_gspn2(pipe)
    whole = pipe(**CALL, generator=seeded(5)).stages
    left = 0

    def stop(*_):
        nonlocal left
        left -= 1
        if left < 0:
            raise Interrupted
        return {}

    stops = 0
    while True:
        left = stops
        try:
            resumed = pipe(
                **CALL,
                generator=seeded(5),
                folder=tmp_path,
                callback_on_step_end=stop,
                callback_on_stage_end=stop,
            )
        except Interrupted:
            stops += 1
            continue
        break
    assert stops > 3
    assert [image.tobytes() for image in resumed.stages] == [image.tobytes() for image in whole]


KILLED = """
import os, signal, sys
from gspn2_diffusion.pipelines import gspn2_upscale
from tests import test_upscale, tiny_models
pipe = gspn2_upscale.GSPN2UpscalePipeline.from_pipe(tiny_models.sd_pipe())
replace = os.replace
def kill(source, target):
    if os.path.basename(target).startswith("stage_2"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = kill
pipe(**test_upscale.CALL, generator=test_upscale.seeded(5), folder=sys.argv[1])
"""


def test_killed_while_a_stage_is_saved(pipe, tmp_path):
    """Once before the picture has its place (by SIGKILL), once before the state knows of it."""
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    whole = pipe(**CALL, generator=seeded(5)).images[0].tobytes()
    state = tmp_path / "state.json"
    ran: list[int] = []
    for _ in range(2):
        before = json.loads(state.read_text())
        assert len(before["stages"]) == 1
        resumed = pipe(
            **CALL, generator=seeded(5), folder=tmp_path, callback_on_stage_end=lambda *at: ran.append(at[0])
        )
        assert resumed.images[0].tobytes() == whole
        state.write_text(json.dumps(before))
    assert ran == [1, 2, 1, 2]


def test_a_changed_stage_is_made_again(pipe, tmp_path):
    whole = pipe(**CALL, generator=seeded(), folder=tmp_path)
    file = tmp_path / json.loads((tmp_path / "state.json").read_text())["stages"][1]["file"]
    file.write_bytes(file.read_bytes()[:100])
    again = pipe(**CALL, generator=seeded(), folder=tmp_path)
    assert again.images[0].tobytes() == whole.images[0].tobytes()


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"prompt": "a dog"}, "prompt"),
        ({"guidance_scale": 2.0}, "arguments"),
        ({"guidance_scales": (1,)}, "guidance_scales"),
        ({"generator": seeded(1)}, "seed"),
    ],
)
def test_a_folder_of_another_picture_is_refused(pipe, tmp_path, changed, named):
    pipe(**CALL, generator=seeded(), folder=tmp_path)
    with pytest.raises(ValueError, match=f"another picture.*{named}.*use another folder"):
        pipe(**{**CALL, "generator": seeded(), **changed}, folder=tmp_path)


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"height": 60}, ValueError, "height is 60; this model needs a multiple of 8, such as 64"),
        ({"width": 0.5}, ValueError, "width is 0.5"),
        ({"strengths": (1.2,)}, ValueError, "strengths is"),
        ({"strengths": ()}, ValueError, "strengths is"),
        ({"guidance_scales": ()}, ValueError, "guidance_scales is"),
        ({"guidance_scales": (-1.0,)}, ValueError, "guidance_scales is"),
        ({"num_inference_steps": 1}, ValueError, "less than one step; use at least 2 steps"),
        ({"num_inference_steps": -1}, ValueError, "num_inference_steps is -1"),
        ({"prompt": ["a", "b"]}, TypeError, "pass one string"),
        ({"negative_promt": "x"}, TypeError, "negative_promt is no argument"),
        ({"latents": torch.zeros(1)}, TypeError, "latents is no argument"),
    ],
)
def test_bad_arguments(pipe, tmp_path, changed, error, message):
    with pytest.raises(error, match=message):
        pipe(**{**CALL, **changed}, folder=tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("guidance_scales", [None, (1.0, 2.0)])
def test_the_quality_benchmarks_batches_are_the_pipelines_pictures(pipe, guidance_scales):
    from benchmarks.large_quality import draw_stages, generator_of

    call = {"num_inference_steps": 4, "guidance_scale": 3.0}
    prompts, strengths = ["a cat", "two dogs"], (0.75, 0.5)
    batches = list(draw_stages(pipe, prompts, 64, strengths, guidance_scales, 5, **call))
    assert len(batches) > 1
    for number, prompt in enumerate(prompts):
        own = {"strengths": strengths, "guidance_scales": guidance_scales, "generator": generator_of(5, prompt)}
        alone = pipe(prompt, 64, 64, **own, **call).stages
        for batch, picture in zip(batches, alone, strict=True):
            difference = torch.tensor(list(batch[number].tobytes())) - torch.tensor(list(picture.tobytes()))
            assert batch[number].size == picture.size and difference.abs().max() <= 1


def test_damaged_state(pipe, tmp_path):
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"state.json is damaged .* remove it to start again"):
        pipe(**CALL, folder=tmp_path)


def test_family_without_image_to_image_is_refused():
    with pytest.raises(ValueError, match="no image-to-image pipeline for PixArtSigmaPipeline"):
        GSPN2UpscalePipeline.from_pipe(PixArtSigmaPipeline(None, None, tiny_models.vae(), None, None))
    with pytest.raises(ValueError, match=r"use GSPN2UpscalePipeline.from_pipe"):
        GSPN2UpscalePipeline(vae=tiny_models.vae())


@pytest.mark.parametrize("part, remedy", [("vae", "vae_tiling"), ("unet", "offload_skips")])
def test_out_of_memory_names_the_switch(pipe, part, remedy):
    def fail(*_):
        raise torch.OutOfMemoryError("Tried to allocate 20 GiB")

    hooked = pipe.vae.decoder if part == "vae" else pipe.unet.mid_block
    handle = hooked.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError, match=rf"stage 1.*turn on .*{remedy}.*20 GiB"):
        pipe(**CALL)
    handle.remove()
    assert len(pipe(**CALL).stages) == 3


def test_out_of_memory_names_the_switches_that_would_have_helped(pipe, monkeypatch):
    """By the plan's walk, on devices made too small for everything, and for all but the halves in turn."""
    apply_gspn2(pipe)
    fuse_gspn2(pipe)

    def fail(module, args):
        if args[0].device.type != "meta":
            raise torch.OutOfMemoryError("Tried to allocate 20 GiB")

    def message(room: int) -> str:
        monkeypatch.setattr(plan, "_memory_of", lambda device: int(room / plan.USABLE) + 1)
        with pytest.raises(torch.OutOfMemoryError) as raised:
            pipe(**CALL)
        return str(raised.value)

    pipe(**CALL)  # folded weights are there now
    whole = plan.rescue(pipe, 16, 16)
    assert whole.switches == {} and whole.before == whole.after < whole.limit
    handle = pipe.unet.mid_block.register_forward_pre_hook(fail)
    assert "turn on guidance_in_turn (" in (enough := message(whole.before - 1))
    assert "it would need about" in enough and "too much" not in enough and "20 GiB" in enough
    assert "which is still too much: make a smaller picture too" in message(1)
    with memory_switches(pipe, guidance_in_turn=True):
        halves = plan.rescue(pipe, 16, 16)
        assert halves.before < whole.before and halves.switches == {}
        assert "no further switch would help: make a smaller picture" in message(1)
        # It should fit: something else holds the memory, so all that is left is named.
        assert "or offload_skips (" in message(10 * whole.before)
    handle.remove()
    assert len(pipe(**CALL).stages) == 3


@pytest.mark.gpu
def test_a_real_lack_of_memory_is_mended_by_the_named_switch():
    pipe = GSPN2UpscalePipeline.from_pipe(tiny_models.sd_pipe().to("cuda"))
    pipe.set_progress_bar_config(disable=True)
    apply_gspn2(pipe)
    call = dict(prompt="a cat", height=768, width=768, num_inference_steps=1, base_size=768, vae_tiling=True)

    def peak() -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        assert pipe(**call).images[0].size == (768, 768)
        return torch.cuda.max_memory_allocated()

    plain = peak()
    with memory_switches(pipe, guidance_in_turn=True):
        halves = peak()
    assert halves < 0.75 * plain
    torch.cuda.empty_cache()
    try:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((0.2 * halves + 0.8 * plain) / total)
        with pytest.raises(torch.OutOfMemoryError, match=r"in the denoiser .*turn on guidance_in_turn \("):
            pipe(**call)
        with memory_switches(pipe, guidance_in_turn=True):
            peak()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_vae_is_tiled_only_above_the_threshold(pipe, monkeypatch):
    monkeypatch.setattr(gspn2_upscale, "VAE_TILING_ABOVE", 32 * 32)
    tiled = []
    pipe(**CALL, callback_on_step_end=lambda stock, step, t, tensors: tiled.append(pipe.vae.use_tiling))
    assert tiled == [False] * (4 + 3) + [True] * 2
    assert not pipe.vae.use_tiling


def test_interrupt_is_said_and_not_saved(pipe, tmp_path):
    def stop(stock, step, timestep, tensors):
        stock._interrupt = True

    with pytest.raises(InterruptedError, match="Stopped in stage 1"):
        pipe(**CALL, folder=tmp_path, callback_on_step_end=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_one_bar_over_all_stages(pipe):
    bars = []
    progress_bar = pipe.progress_bar
    pipe.progress_bar = lambda **kwargs: bars.append(progress_bar(**kwargs)) or bars[-1]
    pipe.set_progress_bar_config(disable=False)
    pipe(**CALL, generator=seeded())
    (bar,) = bars
    assert bar.n == bar.total == 4 + 3 + 2
