"""The compiled denoiser: same pictures, one graph, nothing left behind, and errors that say what to do."""

from __future__ import annotations

import pytest
import torch
import torch._inductor.config
from diffusers import StableDiffusionPipeline

from gspn2_diffusion import apply_gspn2, fuse_gspn2, gspn2_disabled
from gspn2_diffusion.cli import main
from gspn2_diffusion.compiling import CompileError, compiled
from gspn2_diffusion.memory import memory_switches

from . import tiny_models


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def small_unet():
    """Compiling takes seconds for each block."""
    one = {"block_out_channels": (16,), "down_block_types": ("CrossAttnDownBlock2D",), "mid_block_type": None}
    return tiny_models.unet(**one, up_block_types=("UpBlock2D",))


@pytest.fixture
def model():
    unet = small_unet()
    apply_gspn2(unet)
    return unet


@pytest.fixture
def no_compiler():
    with torch._inductor.config.patch({"force_disable_caches": True, "cpp.cxx": ("no-such-compiler",)}):
        yield


@torch.no_grad()
def test_same_result_with_every_switch_and_without_the_patch(model):
    fuse_gspn2(model)
    inputs = tiny_models.unet_inputs()
    expected, before = model(**inputs).sample, sorted(vars(model))
    with compiled(model, backend="aot_eager"):
        torch.testing.assert_close(model(**inputs).sample, expected, rtol=1e-4, atol=1e-5)
        with memory_switches(model, guidance_in_turn=True):
            torch.testing.assert_close(model(**inputs).sample, expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="compiled already"), compiled(model):
            pass
    with gspn2_disabled(model):
        teacher = model(**inputs).sample
        with compiled(model, backend="aot_eager"):
            torch.testing.assert_close(model(**inputs).sample, teacher, rtol=1e-4, atol=1e-5)
    assert sorted(vars(model)) == before and torch.equal(model(**inputs).sample, expected)
    with (
        memory_switches(model, guidance_in_turn=True),
        pytest.raises(ValueError, match="outside of memory_switches"),
        compiled(model),
    ):
        pass


@torch.no_grad()
def test_a_missing_compiler_is_explained(model, no_compiler):
    with (
        compiled(model),
        pytest.raises(CompileError, match=r"does not compile here .*install what torch\.compile needs"),
    ):
        model(**tiny_models.unet_inputs())
    assert model(**tiny_models.unet_inputs()).sample.isfinite().all()


@torch.no_grad()
def test_a_broken_graph_is_explained(model):
    model.conv_in.register_forward_pre_hook(lambda module, args: torch._dynamo.graph_break())
    with compiled(model, backend="eager"), pytest.raises(CompileError, match="or run without compiling"):
        model(**tiny_models.unet_inputs())
    with compiled(model, backend="eager", fullgraph=False):
        assert model(**tiny_models.unet_inputs()).sample.isfinite().all()


def test_the_command_line_says_how_to_go_on(tmp_path, no_compiler, capsys):
    components = {**tiny_models.sd_components(), "unet": small_unet()}
    StableDiffusionPipeline(**components, requires_safety_checker=False).save_pretrained(tmp_path / "pipe")
    flags = ["--model", str(tmp_path / "pipe"), "--device", "cpu", "--steps", "1", "--compile"]
    assert main(["generate", "a", *flags, "--out", str(tmp_path / "out")]) == 1
    assert "leave --compile out" in capsys.readouterr().err and not list((tmp_path / "out").iterdir())


@pytest.mark.gpu
@torch.no_grad()
def test_inductor_gives_the_same_on_the_gpu(model):
    model = model.cuda()
    inputs = {name: value.cuda() for name, value in tiny_models.unet_inputs().items()}
    expected = model(**inputs).sample
    with compiled(model):
        torch.testing.assert_close(model(**inputs).sample, expected, rtol=1e-3, atol=1e-3)
