"""apply, remove and disabled on tiny real UNets."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from gspn2_diffusion import GSPN2Adapter, GSPN2Config, apply_gspn2, gspn2_disabled, remove_gspn2, supported_models
from gspn2_diffusion.patching import patched_modules
from gspn2_diffusion.patching.families import FAMILIES, find_model

from . import tiny_models
from .test_layer import layer_in_loops


def everything(model):
    """Identity of all that apply could touch: modules, processors, parameters, hooks, attributes, keys."""
    return (
        [(name, id(module)) for name, module in model.named_modules()],
        [id(module.processor) for module in model.modules() if hasattr(module, "processor")],
        [(name, id(parameter)) for name, parameter in model.named_parameters()],
        [(name, sorted(vars(module)), len(module._forward_pre_hooks)) for name, module in model.named_modules()],
        [len(module._forward_pre_hooks_with_kwargs) for module in model.modules()],
        list(model.state_dict()),
        [parameter.requires_grad for parameter in model.parameters()],
    )


@torch.no_grad()
def run(model, height=16, width=16):
    return model(**tiny_models.unet_inputs(height, width)).sample


@pytest.fixture
def unet():
    return tiny_models.unet()


def test_remove_leaves_no_trace(unet):
    before, picture = everything(unet), run(unet)
    apply_gspn2(unet)
    assert not torch.equal(run(unet), picture)
    remove_gspn2(unet)
    assert everything(unet) == before
    assert torch.equal(run(unet), picture)
    remove_gspn2(unet)


def test_applying_twice_is_applying_once(unet):
    apply_gspn2(unet)
    once, shape = run(unet), [sorted(vars(module)) for module in unet.modules()]
    apply_gspn2(unet)
    assert torch.equal(run(unet), once)
    assert [sorted(vars(module)) for module in unet.modules()] == shape
    hooks = sum(len(module._forward_pre_hooks) for module in unet.modules())
    # This model has one block in each Transformer2DModel; one hook more guards the processors.
    assert hooks == 2 * len(patched_modules(unet)) + 1


def test_disabled_is_the_teacher_and_nests(unet):
    teacher = run(unet)
    apply_gspn2(unet)
    student = run(unet)
    with gspn2_disabled(unet):
        assert torch.equal(run(unet), teacher)
        with gspn2_disabled(unet):
            assert torch.equal(run(unet), teacher)
        assert torch.equal(run(unet), teacher)
    assert torch.equal(run(unet), student)
    with pytest.raises(KeyError), gspn2_disabled(unet):
        raise KeyError
    assert torch.equal(run(unet), student)


@pytest.mark.parametrize("size", [(16, 16), (9, 16), (19, 33), (32, 8), (1, 4), (18, 32)], ids=str)
def test_every_layer_sees_its_own_map_and_computes_the_definition(unet, size):
    """Each replaced attention's output equals the definition applied to its input, at the map's true sides."""
    adapter = apply_gspn2(unet, config=GSPN2Config(init="random"))
    calls, sides = [], {}
    for name, module, _ in patched_modules(unet):
        module.register_forward_hook(
            lambda module, args, output, name=name: calls.append((name, module, args[0], output))
        )
        unet.get_submodule(name.split(".transformer_blocks")[0]).register_forward_hook(
            lambda module, args, output, name=name: sides.update({name: args[0].shape[-2:]})
        )
    run(unet, *size)
    assert len(calls) == len(adapter.layer_names) == len(sides)
    for name, module, tokens, output in calls:
        mixed = torch.from_numpy(layer_in_loops(module.gspn2, tokens.double().numpy(), *sides[name]))
        to_out = module.to_out[0]
        expected = mixed @ to_out.weight.double().T + to_out.bias.double()
        torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_transposed_map_is_not_the_same(unet):
    """72 x 128 and 128 x 72 have the same number of tokens; the layer must not confuse them."""
    apply_gspn2(unet)
    wide, tall = run(unet, 9, 16), run(unet, 16, 9)
    assert torch.equal(run(unet, 9, 16), wide)
    assert torch.equal(run(unet, 16, 9), tall)


def test_two_models_at_two_sizes_do_not_disturb_each_other():
    first, second = tiny_models.unet(0), tiny_models.unet(1)
    apply_gspn2(first)
    apply_gspn2(second)
    alone = run(first, 9, 16), run(second, 16, 9)
    first.mid_block.register_forward_hook(lambda module, args, output: (run(second, 16, 9), None)[1])
    assert torch.equal(run(first, 9, 16), alone[0]) and torch.equal(run(second, 16, 9), alone[1])


def test_checkpointed_gradients_equal_plain_ones_even_when_another_size_ran_in_between(unet):
    adapter = apply_gspn2(unet)
    unet.train()

    def gradients():
        adapter.zero_grad()
        loss = unet(**tiny_models.unet_inputs(9, 16)).sample.square().mean()
        run(unet, 16, 9)  # same number of tokens, other sides
        loss.backward()
        return [parameter.grad.clone() for parameter in adapter.parameters()]

    plain = gradients()
    unet.enable_gradient_checkpointing()
    for expected, again in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-7)


def test_every_layer_of_the_adapter_learns(unet):
    adapter = apply_gspn2(unet)
    unet(**tiny_models.unet_inputs()).sample.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapter.parameters())


def test_layer_choice(unet):
    names = apply_gspn2(unet).layer_names
    chosen = apply_gspn2(unet, config=GSPN2Config(layers="up_blocks*")).layer_names
    assert chosen == [name for name in names if name.startswith("up_blocks")] != names
    assert apply_gspn2(unet, config=GSPN2Config(layers=(names[1],))).layer_names == [names[1]]
    large = apply_gspn2(unet, config=GSPN2Config(min_side=16)).layer_names
    assert large and all(name.startswith(("down_blocks.0", "up_blocks.1")) for name in large)
    with pytest.raises(ValueError, match="nowhere"):
        apply_gspn2(unet, config=GSPN2Config(layers=("nowhere",)))
    with pytest.raises(ValueError, match="selects none"):
        apply_gspn2(unet, config=GSPN2Config(min_side=17))


def test_cross_attention_in_the_place_of_self_attention_is_left_alone():
    model = tiny_models.unet(only_cross_attention=(True, False))
    names = apply_gspn2(model).layer_names
    assert names and all(not name.startswith("down_blocks.0") for name in names)
    run(model)


def test_copies_and_pickles_are_patched_and_independent(unet):
    apply_gspn2(unet)
    student = run(unet, 9, 16)
    for clone in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert torch.equal(run(clone, 9, 16), student)
        remove_gspn2(clone)
        assert not patched_modules(clone) and torch.equal(run(unet, 9, 16), student)


def test_a_wrong_number_of_tokens_is_refused(unet):
    apply_gspn2(unet)
    _, module, _ = patched_modules(unet)[0]
    tokens = torch.randn(1, 9, module.to_q.in_features)
    with pytest.raises(RuntimeError, match="without"):
        module(tokens)
    run(unet)
    with pytest.raises(RuntimeError, match=r"9 tokens.*256"):
        module(tokens)


def test_unsupported_models_are_refused_with_the_list():
    with pytest.raises(TypeError, match=r"Linear is not supported.*UNet2DConditionModel"):
        apply_gspn2(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="AutoencoderKL"):
        apply_gspn2(tiny_models.vae())
    with pytest.raises(TypeError):
        remove_gspn2(None)
    assert set(supported_models()) == set(FAMILIES)


def test_start_from_the_teacher_is_closer_than_a_random_start(unet):
    teacher = run(unet)
    apply_gspn2(unet)
    started = (run(unet) - teacher).norm()
    apply_gspn2(unet, config=GSPN2Config(init="random"))
    assert started < (run(unet) - teacher).norm()


def test_the_global_generator_is_left_alone(unet):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    apply_gspn2(unet, config=GSPN2Config(init="random"))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_models(unet, dtype):
    apply_gspn2(unet)
    exact = run(unet)
    remove_gspn2(unet)
    unet.to(dtype)
    adapter = apply_gspn2(unet)
    assert {parameter.dtype for parameter in adapter.parameters()} == {dtype}
    inputs = tiny_models.unet_inputs()
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    with torch.no_grad():
        half = unet(**inputs).sample
    assert (half.float() - exact).norm() / exact.norm() < 5e-2


def test_pipelines_share_the_patched_unet():
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe = tiny_models.sd_pipe()
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    apply_gspn2(pipe)
    assert find_model(other) is pipe.unet and patched_modules(other.unet)
    remove_gspn2(other)
    assert not patched_modules(pipe.unet)


@pytest.mark.parametrize("build", [tiny_models.sd_pipe, tiny_models.sdxl_pipe], ids=["sd", "sdxl"])
def test_pipelines_make_pictures_of_any_aspect_ratio(build):
    pipe = build()
    apply_gspn2(pipe)
    picture = pipe("a", height=40, width=72, num_inference_steps=2, output_type="np").images[0]
    assert picture.shape == (40, 72, 3)
    with pytest.raises(ValueError, match="divisible by 8"):
        pipe("a", height=37, width=64, num_inference_steps=1)


def test_controlnet_beside_and_patched():
    unet, controlnet = tiny_models.unet(), tiny_models.controlnet()
    apply_gspn2(unet)
    inputs = tiny_models.unet_inputs(8, 16)
    condition = torch.rand(2, 3, 64, 128)
    with torch.no_grad():
        plain = controlnet(**inputs, controlnet_cond=condition, return_dict=False)[0]
        assert apply_gspn2(controlnet).config.base_class == "ControlNetModel"
        down, mid = controlnet(**inputs, controlnet_cond=condition, return_dict=False)
        unet(**inputs, down_block_additional_residuals=down, mid_block_additional_residual=mid)
        remove_gspn2(controlnet)
        again = controlnet(**inputs, controlnet_cond=condition, return_dict=False)[0]
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


class TestAdapterFiles:
    @pytest.fixture
    def saved(self, unet, tmp_path):
        adapter = apply_gspn2(unet, config=GSPN2Config(init="random", segment=5))
        adapter.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", run(unet)

    def test_round_trip(self, saved):
        folder, picture = saved
        model = tiny_models.unet()
        adapter = apply_gspn2(model, folder)
        assert torch.equal(run(model), picture)
        assert adapter.operator_config.segment == 5
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]

    def test_an_adapter_object_can_be_applied_to_several_models(self, saved):
        folder, picture = saved
        adapter = GSPN2Adapter.from_pretrained(folder)
        models = tiny_models.unet(), tiny_models.unet()
        for model in models:
            apply_gspn2(model, adapter)
        for model in models:
            assert torch.equal(run(model), picture)
        with gspn2_disabled(models[0]):
            assert torch.equal(run(models[1]), picture)

    def test_keys_are_the_models_own(self, unet, saved):
        adapter = GSPN2Adapter.from_pretrained(saved[0])
        assert set(adapter.state_dict()) == {key for key in unet.state_dict() if ".gspn2." in key}

    @pytest.mark.parametrize(
        "build, message",
        [
            (lambda: tiny_models.unet(block_out_channels=(16, 64)), "channels, the model needs"),
            (lambda: tiny_models.unet(only_cross_attention=True), "no self-attention"),
            (tiny_models.controlnet, "is for UNet2DConditionModel"),
        ],
        ids=["widths", "names", "class"],
    )
    def test_an_adapter_for_another_model_changes_nothing(self, saved, build, message):
        model = build()
        before = everything(model)
        with pytest.raises(ValueError, match=message):
            apply_gspn2(model, saved[0])
        assert everything(model) == before

    def test_damaged_files_change_nothing(self, saved):
        folder, _ = saved
        model = tiny_models.unet()
        before = everything(model)
        weights = folder / "diffusion_pytorch_model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(OSError, match="damaged"):
            apply_gspn2(model, folder)
        weights.unlink()
        with pytest.raises(OSError, match=weights.name):
            apply_gspn2(model, folder)
        with pytest.raises(OSError, match=r"config\.json"):
            apply_gspn2(model, folder.parent)
        assert everything(model) == before

    def test_missing_and_misshapen_weights_are_named(self, saved):
        folder, _ = saved
        path = folder / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        name = next(iter(tensors))
        lost = tensors.pop(name)
        save_file(tensors, path)
        with pytest.raises(ValueError, match=f"missing keys: {name}"):
            GSPN2Adapter.from_pretrained(folder)
        save_file({**tensors, name: lost[:-1].contiguous()}, path)
        with pytest.raises(ValueError, match=name):
            GSPN2Adapter.from_pretrained(folder)

    def test_nan_weights_are_warned_about(self, saved, caplog):
        folder, _ = saved
        path = folder / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        name = next(iter(tensors))
        tensors[name].view(-1)[0] = float("nan")
        save_file(tensors, path)
        GSPN2Adapter.from_pretrained(folder)
        assert "NaN" in caplog.text and name in caplog.text

    def test_config_beside_an_adapter_is_refused(self, saved):
        with pytest.raises(ValueError, match="config"):
            apply_gspn2(tiny_models.unet(), saved[0], config=GSPN2Config())

    def test_a_newer_version_loads_with_a_warning(self, saved, caplog):
        folder, picture = saved
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config["gspn2_version"] = "99.0"
        config["operator"]["new_option"] = True
        config["new_key"] = 1
        path.write_text(json.dumps(config))
        model = tiny_models.unet()
        apply_gspn2(model, folder)
        assert torch.equal(run(model), picture)
        assert "new_option" in caplog.text
