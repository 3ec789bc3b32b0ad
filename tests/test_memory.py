"""Each switch: same output, less of what it saves, nothing left behind."""

from __future__ import annotations

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from gspn2_diffusion import apply_gspn2, plan
from gspn2_diffusion.memory import active_switches, available_switches, largest_divisor, memory_switches

from . import tiny_models


def snapshot(model):
    """Everything that a switch could leave behind."""
    return [
        (name, len(m._forward_pre_hooks), len(m._forward_hooks), getattr(m, "_chunk_size", None), sorted(vars(m)))
        for name, m in model.named_modules()
    ]


SWITCH = [{"guidance_in_turn": True}, {"feed_forward_tokens": 40}, {"offload_skips": True}]
ALL = {key: value for switch in SWITCH for key, value in switch.items()}


@torch.no_grad()
@pytest.mark.parametrize("switch", [*SWITCH, ALL], ids=lambda switch: "+".join(switch))
@pytest.mark.parametrize("make", [tiny_models.unet, tiny_models.sdxl_unet])
def test_unet_gives_the_same(make, switch):
    model = make()
    apply_gspn2(model)
    inputs = tiny_models.unet_inputs(18, 10, dim=model.config.cross_attention_dim)
    if make is tiny_models.sdxl_unet:
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 16), "time_ids": torch.randn(2, 6)}
    expected, before = model(**inputs).sample, snapshot(model)
    with memory_switches(model, **switch):
        assert active_switches(model) == list(switch)
        torch.testing.assert_close(model(**inputs).sample, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(**inputs, return_dict=False)[0], expected, atol=1e-5, rtol=1e-5)
    assert snapshot(model) == before and active_switches(model) == []
    assert torch.equal(model(**inputs).sample, expected)


@torch.no_grad()
def test_halves_run_in_turn():
    model, batches = tiny_models.unet(), []
    model.mid_block.register_forward_pre_hook(lambda module, args: batches.append(args[0].shape[0]))
    inputs = tiny_models.unet_inputs(batch=4)
    expected = model(**inputs).sample
    positional = (inputs["sample"], inputs["timestep"])
    with memory_switches(model, guidance_in_turn=True):
        got = model(*positional, encoder_hidden_states=inputs["encoder_hidden_states"]).sample
        model(**tiny_models.unet_inputs(batch=1))
    assert batches == [4, 2, 2, 1]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_feed_forward_sees_chunks():
    model, tokens = tiny_models.unet(), []
    for module in model.modules():
        if type(module).__name__ == "FeedForward":
            module.register_forward_pre_hook(lambda module, args: tokens.append(args[0].shape[1]))
    with memory_switches(model, feed_forward_tokens=50):
        model(**tiny_models.unet_inputs(18, 10))
    assert set(tokens) == {45}  # 180 = 4 x 45 tokens above, 9 x 5 = 45 below


def test_largest_divisor():
    assert [largest_divisor(180, 50), largest_divisor(7, 6), largest_divisor(64, 64), largest_divisor(64, 99)] == [
        45,
        1,
        64,
        64,
    ]


@torch.no_grad()
def test_skips_wait_in_the_same_buffers():
    model, places = tiny_models.unet(), []
    model.up_blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: places.append([s.data_ptr() for s in kwargs["res_hidden_states_tuple"]]),
        with_kwargs=True,
    )
    with memory_switches(model, offload_skips=True):
        model(**tiny_models.unet_inputs(seed=0))
        second = model(**tiny_models.unet_inputs(seed=1)).sample
    assert places[0] == places[1]
    assert torch.equal(second, model(**tiny_models.unet_inputs(seed=1)).sample)


def test_offloaded_skips_refuse_what_cannot_work():
    model = tiny_models.unet()
    with memory_switches(model, offload_skips=True):
        with pytest.raises(RuntimeError, match="keeps no gradients"):
            model(**tiny_models.unet_inputs())
        with torch.no_grad(), pytest.raises(ValueError, match="ControlNet"):
            model(**tiny_models.unet_inputs(), down_block_additional_residuals=())
    assert active_switches(model) == []


def test_transformer_switches():
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=16,
        use_additional_conditions=False,
    ).eval()
    inputs = {
        "hidden_states": torch.randn(2, 4, 16, 12),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "timestep": torch.tensor([3, 3]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    assert available_switches(model) == ["guidance_in_turn", "feed_forward_tokens"]
    with torch.no_grad():
        expected = model(**inputs).sample
        with memory_switches(model, guidance_in_turn=True, feed_forward_tokens=7):
            torch.testing.assert_close(model(**inputs).sample, expected, atol=1e-5, rtol=1e-5)
    with (
        pytest.raises(ValueError, match="PixArtTransformer2DModel has no offload_skips"),
        memory_switches(model, offload_skips=True, guidance_in_turn=True),
    ):
        pass
    assert active_switches(model) == []


def test_switches_of_a_pipeline_survive_an_error():
    pipe = tiny_models.sd_pipe()
    before = snapshot(pipe.unet)
    with pytest.raises(KeyError), memory_switches(pipe, vae_tiling=True, **ALL):
        assert active_switches(pipe) == ["vae_tiling", *ALL]
        raise KeyError
    assert snapshot(pipe.unet) == before and not pipe.vae.use_tiling
    pipe.vae.enable_tiling()
    with memory_switches(pipe, vae_tiling=True):
        pass
    assert pipe.vae.use_tiling
    with pytest.raises(ValueError, match="feed_forward_tokens is 0"), memory_switches(pipe, feed_forward_tokens=0):
        pass


def wide_unet():
    """Its largest maps are in blocks without attention, as SDXL's: there the skip connections weigh most."""
    model = tiny_models.unet(
        block_out_channels=(64, 64),
        norm_num_groups=32,
        layers_per_block=3,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    apply_gspn2(model)
    return model


# Share of the peak that is left, at most.
SAVED = [({"guidance_in_turn": True}, 0.6), ({"offload_skips": True}, 0.9)]


@pytest.mark.parametrize("switch, share", SAVED, ids=str)
def test_each_switch_lowers_the_planned_peak(switch, share):
    model = plan._on_meta(wide_unet(), torch.float32)

    def peak() -> int:
        return plan._peak(lambda: plan._call_unet(model, 2, (64, 64), torch.float32), torch.device("cuda"))

    plain = peak()
    with memory_switches(model, **switch):
        assert peak() < share * plain
    assert peak() == plain


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("switch, share", SAVED, ids=str)
def test_each_switch_saves_memory_on_the_gpu(switch, share):
    model = wide_unet().cuda()
    inputs = {name: value.cuda() for name, value in tiny_models.unet_inputs(256, 256).items()}

    def peak() -> int:
        model(**inputs)
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        model(**inputs)
        return torch.cuda.max_memory_allocated() - base

    plain = peak()
    with memory_switches(model, **switch):
        assert peak() < (share + 0.05) * plain
