"""Folding scan_out with to_out: same result, and never where it would be wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig

from gspn2_diffusion import GSPN2Config, apply_gspn2, fuse_gspn2, gspn2_disabled, remove_gspn2, unfuse_gspn2
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


@pytest.mark.gpu
@torch.no_grad()
def test_no_host_synchronisation_in_a_step(model):
    model = model.cuda()
    fuse_gspn2(model)
    inputs = {name: value.cuda() for name, value in tiny_models.unet_inputs().items()}
    model(**inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
