"""Folding scan_out with to_out: same result, and never where it would be wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

from gspn2_diffusion import GSPN2Config, apply_gspn2, fuse_gspn2, gspn2_disabled, remove_gspn2, unfuse_gspn2
from gspn2_diffusion.layers import GSPN2Layer
from gspn2_diffusion.memory import memory_switches
from gspn2_diffusion.patching.fuse import FOLD

from . import tiny_models


@pytest.fixture
def model():
    unet = tiny_models.unet()
    apply_gspn2(unet, config=GSPN2Config(init="random", proxy_dim=8))
    return unet


def folds(model):
    return [vars(module)[FOLD] for module in model.modules() if FOLD in vars(module)]


@torch.no_grad()
def test_same_result_at_every_size(model):
    sizes = [(16, 16), (10, 18), (18, 10)]
    plain = [model(**tiny_models.unet_inputs(*size)).sample for size in sizes]
    with gspn2_disabled(model):
        teacher = model(**tiny_models.unet_inputs()).sample
    keys = list(model.state_dict())
    assert fuse_gspn2(model) == len(folds(model)) == 7
    for size, expected in zip(sizes, plain, strict=True):
        torch.testing.assert_close(model(**tiny_models.unet_inputs(*size)).sample, expected, atol=1e-5, rtol=1e-5)
    assert all(len(fold.weights) == 3 for fold in folds(model))
    with gspn2_disabled(model):
        assert torch.equal(model(**tiny_models.unet_inputs()).sample, teacher)
    assert list(model.state_dict()) == keys
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(**tiny_models.unet_inputs()).sample, plain[0], atol=1e-5, rtol=1e-5)
    unfuse_gspn2(model)
    assert folds(model) == [] and torch.equal(model(**tiny_models.unet_inputs()).sample, plain[0])
    assert not any("forward" in vars(module) for module in model.modules())


@torch.no_grad()
def test_changed_weights_are_folded_again(model):
    fuse_gspn2(model)
    inputs = tiny_models.unet_inputs()
    before = model(**inputs).sample
    for fold in folds(model):
        fold.linear.weight.mul_(3)
        fold.layer.scan_out.weight.data = fold.layer.scan_out.weight.data * -1
    fused = model(**inputs).sample
    assert not torch.allclose(fused, before, atol=1e-3)
    unfuse_gspn2(model)
    torch.testing.assert_close(fused, model(**inputs).sample, atol=1e-4, rtol=1e-4)


def test_gradients_reach_every_weight(model):
    fuse_gspn2(model)
    model(**tiny_models.unet_inputs()).sample.square().mean().backward()
    for fold in folds(model):
        assert fold.linear.weight.grad is not None and fold.layer.scan_out.weight.grad is not None
        assert fold.weights == {}


@torch.no_grad()
@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_on_to_out_stays_live(model, order):
    inputs = tiny_models.unet_inputs()
    if order == "after":
        fuse_gspn2(model)
        model(**inputs)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_out.0"], init_lora_weights="gaussian"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_()
    if order == "before":
        fuse_gspn2(model)
    with_lora = model(**inputs).sample
    model.disable_adapters()
    assert not torch.allclose(model(**inputs).sample, with_lora, atol=1e-3)
    model.enable_adapters()
    unfuse_gspn2(model)
    torch.testing.assert_close(with_lora, model(**inputs).sample, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_remove_undoes_it(model):
    fuse_gspn2(model)
    model(**tiny_models.unet_inputs())
    remove_gspn2(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(
        model(**tiny_models.unet_inputs()).sample, tiny_models.unet()(**tiny_models.unet_inputs()).sample
    )


class NoWaiting(TorchDispatchMode):
    """Raises where the host would ask the device for a value, or hand it one: both wait on a GPU."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "lift_fresh")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in self.WAITS, f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "hooked"])
@pytest.mark.parametrize("merge", ["concat", "sum"])
def test_a_step_asks_the_device_for_nothing(merge, hooked):
    model = tiny_models.sdxl_unet()
    apply_gspn2(model, config=GSPN2Config(init="random", merge=merge))
    if hooked:  # as an offloaded layer, whose weight may not be read in advance
        for module in model.modules():
            if isinstance(module, GSPN2Layer):
                module.scan_out.register_forward_pre_hook(lambda module, args: None)
    fuse_gspn2(model)
    inputs = tiny_models.unet_inputs(10, 18, dim=32)
    inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 16), "time_ids": torch.randn(2, 6)}
    with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
        torch.zeros(1).item()
    for switches in ({}, {"guidance_in_turn": True, "feed_forward_tokens": 40, "offload_skips": True}):
        with memory_switches(model, **switches), NoWaiting():
            assert model(**inputs).sample.shape == (2, 4, 10, 18)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("switches", [{}, {"guidance_in_turn": True, "feed_forward_tokens": 40, "offload_skips": True}])
def test_no_host_synchronisation_in_a_step(model, fused, switches):
    model = model.cuda()
    if fused:
        fuse_gspn2(model)
    inputs = {name: value.cuda() for name, value in tiny_models.unet_inputs().items()}
    with memory_switches(model, **switches):
        model(**inputs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(**inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_no_host_synchronisation_between_the_steps_of_a_pipeline():
    """From the end of the first step, which looks its place in the schedule up, to the end of the last."""
    pipe = tiny_models.sdxl_pipe().to("cuda")
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    apply_gspn2(pipe)
    fuse_gspn2(pipe)

    def watch(pipe, step, timestep, tensors):
        torch.cuda.set_sync_debug_mode("error" if step < 3 else "default")
        return {}

    try:
        pipe("a cat", num_inference_steps=4, height=64, width=32, output_type="latent", callback_on_step_end=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
