"""A patched model among the other tools that touch it: LoRA, IP-Adapter, offloading, casting, caches, compilers ..."""

from __future__ import annotations

import copy
import pickle

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from packaging.version import Version
from peft import LoraConfig

from gspn2_diffusion import GSPN2Config, apply_gspn2, gspn2_disabled, remove_gspn2
from gspn2_diffusion.patching import patched_modules
from gspn2_diffusion.patching.processors import GSPN2SelfAttnProcessor

from . import tiny_models
from .test_families import call
from .test_patching import everything, run
from .tiny_families import CASES

RANDOM = GSPN2Config(init="random", proxy_dim=8)
LORA = LoraConfig(r=2, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)


@pytest.fixture
def unet():
    return tiny_models.unet()


@pytest.fixture
def patched(unet):
    apply_gspn2(unet, config=RANDOM)
    return unet


def in_place(model) -> bool:
    return all(type(module.processor) is GSPN2SelfAttnProcessor for _, module, _ in patched_modules(model))


class TestReplacedProcessors:
    @pytest.mark.parametrize(
        "replace",
        [
            lambda unet: unet.set_attn_processor(AttnProcessor()),
            lambda unet: unet.set_attention_slice("max"),
            lambda unet: unet.fuse_qkv_projections(),
            lambda unet: patched_modules(unet)[2][1].set_processor(AttnProcessor2_0()),
        ],
        ids=["set_attn_processor", "attention_slicing", "fuse_qkv", "a single one"],
    )
    def test_are_noticed_and_put_back(self, patched, replace, caplog):
        student = run(patched)
        replace(patched)
        assert not in_place(patched)
        torch.testing.assert_close(run(patched), student, rtol=1e-4, atol=1e-5)
        assert in_place(patched) and "put back" in caplog.text
        caplog.clear()
        run(patched)
        assert not caplog.text

    def test_perturbed_attention_guidance_keeps_its_own(self, patched, caplog):
        from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0

        module = patched_modules(patched)[0][1]
        module.set_processor(PAGIdentitySelfAttnProcessor2_0())
        run(patched)
        assert not in_place(patched) and "put back" not in caplog.text

    def test_pag_pipeline(self, caplog):
        from diffusers import StableDiffusionPAGPipeline

        pipe = StableDiffusionPAGPipeline(**tiny_models.sd_components(), pag_applied_layers="mid")
        pipe.set_progress_bar_config(disable=True)
        apply_gspn2(pipe)
        pipe("a", height=32, width=48, num_inference_steps=2, pag_scale=3.0, output_type="np")
        assert in_place(pipe.unet) and "put back" not in caplog.text

    def test_disabled_may_use_any_processor(self, patched, caplog):
        with gspn2_disabled(patched):
            patched.set_attn_processor(AttnProcessor())
            run(patched)
        assert "put back" not in caplog.text and in_place(patched)


@pytest.mark.parametrize("task", ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"])
def test_other_tasks_from_pipe(task):
    """The pipeline made from a patched one draws with the patch, and without it once that is removed."""
    pipe = tiny_models.sd_pipe()
    other = getattr(diffusers, task).from_pipe(pipe, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    inputs = {"image": image, "num_inference_steps": 2, "output_type": "np", "height": 24, "width": 40}
    if "Inpaint" in task:
        inputs["mask_image"] = (image[:, :1] > 0.5).float()
    else:
        del inputs["height"], inputs["width"]

    def draw():
        return torch.from_numpy(other("a", generator=torch.Generator().manual_seed(1), **inputs).images)

    teacher = draw()
    apply_gspn2(pipe, config=RANDOM)
    student = draw()
    assert student.shape == (1, 24, 40, 3) and not torch.equal(student, teacher)
    remove_gspn2(other)
    assert torch.equal(draw(), teacher)


class TestSaving:
    def test_a_patched_pipeline_reloads_as_the_base_model(self, tmp_path, caplog):
        pipe = tiny_models.sd_pipe()
        teacher = run(pipe.unet)
        adapter = apply_gspn2(pipe, config=RANDOM)
        student = run(pipe.unet)
        pipe.save_pretrained(tmp_path)
        assert "without its 7 GSPN-2 layers" in caplog.text
        assert torch.equal(run(pipe.unet), student) and set(adapter.state_dict()) <= set(pipe.unet.state_dict())
        _, report = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet", output_loading_info=True)
        assert not report["unexpected_keys"] and not report["missing_keys"]
        assert torch.equal(run(type(pipe).from_pretrained(tmp_path, safety_checker=None).unet), teacher)

    def test_controlnet_from_a_patched_unet_is_the_base_models(self, unet):
        expected = ControlNetModel.from_unet(unet).state_dict()
        apply_gspn2(unet)
        got = ControlNetModel.from_unet(unet).state_dict()
        shared = [key for key in expected if key.startswith(("down_blocks", "mid_block"))]
        assert set(got) == set(expected) and all(torch.equal(got[key], expected[key]) for key in shared)


class TestLora:
    @pytest.mark.parametrize("order", ["lora first", "patch first"])
    def test_either_order(self, unet, order, caplog):
        if order == "lora first":
            unet.add_adapter(LORA)
        teacher = run(unet)
        apply_gspn2(unet, config=RANDOM)
        plain = run(unet)
        if order == "patch first":
            unet.add_adapter(copy.deepcopy(LORA))
            assert not torch.equal(run(unet), plain)
        run(unet)
        assert "have no effect while GSPN-2 is applied" in caplog.text
        # to_out stays live: its LoRA changes the picture.
        student = run(unet)
        name = patched_modules(unet)[0][0]
        unet.get_submodule(name).to_out[0].lora_B["default"].weight.data.zero_()
        assert not torch.equal(run(unet), student)
        unet.get_submodule(name).to_q.lora_B["default"].weight.data.zero_()
        with gspn2_disabled(unet):
            assert not torch.equal(run(unet), teacher)
        unet.delete_adapters("default")
        remove_gspn2(unet)
        assert torch.equal(run(unet), run(tiny_models.unet()))

    @pytest.mark.parametrize("name", ["SD3Transformer2DModel", "FluxTransformer2DModel"])
    @torch.no_grad()
    def test_in_joint_attention_all_stay_live(self, name):
        """Text is still read by softmax, so queries, keys and values keep their LoRA."""
        case = CASES[name]
        model, inputs = case.build(), case.inputs(3, 5)
        apply_gspn2(model, config=RANDOM)
        student = call(model, inputs)
        for part in ("to_q", "add_k_proj", "add_v_proj"):
            model.add_adapter(LoraConfig(r=2, target_modules=[part], init_lora_weights=False))
            assert not torch.equal(call(model, inputs), student)
            model.delete_adapters("default")
            model.unload_lora()
        torch.testing.assert_close(call(model, inputs), student)

    def test_none_of_our_layers_gets_one(self, patched):
        patched.add_adapter(LORA)
        assert not any("gspn2" in name for name in patched.state_dict() if "lora" in name)


def ip_adapter_weights(unet):
    """The state of an IP-Adapter for the tiny UNet, with random weights."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    torch.manual_seed(3)
    weights, index = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            width = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            processor = IPAdapterAttnProcessor2_0(width, 16, num_tokens=(4,))
            for key, value in processor.state_dict().items():
                weights[f"{index}.{key.replace('.0.weight', '.weight')}"] = value
            index += 2
    projection = {"proj.weight": torch.randn(64, 16), "proj.bias": torch.randn(64), "norm.weight": torch.ones(16)}
    return {"image_proj": {**projection, "norm.bias": torch.zeros(16)}, "ip_adapter": weights}


def test_ip_adapter_in_either_order(unet):
    inputs = tiny_models.unet_inputs()
    prompt = {
        "added_cond_kwargs": {"image_embeds": [torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0))]}
    }
    other = tiny_models.unet()
    weights = ip_adapter_weights(unet)
    unet._load_ip_adapter_weights(weights)
    apply_gspn2(unet, config=RANDOM)
    apply_gspn2(other, config=RANDOM)
    other._load_ip_adapter_weights(weights)
    with torch.no_grad():
        first, second = (model(**inputs, **prompt).sample for model in (unet, other))
    assert torch.equal(first, second) and in_place(unet) and in_place(other)


def sequential(model):
    cpu_offload(model, torch.device("cpu"))


def grouped(model):
    device = torch.device("cpu")
    if Version(diffusers.__version__) < Version("0.36") and torch.accelerator.current_accelerator() is None:
        pytest.skip("this diffusers offloads groups only where there is an accelerator")
    apply_group_offloading(model, onload_device=device, offload_device=device, offload_type="leaf_level")


class TestOffloading:
    @pytest.mark.parametrize("offload", [sequential, grouped])
    @pytest.mark.parametrize("name", ["UNet2DConditionModel", "SD3Transformer2DModel"])
    def test_either_order(self, name, offload, tmp_path):
        case = CASES[name]
        model, inputs = case.build(), case.inputs(*case.sides[0])
        with torch.no_grad():
            teacher = call(model, inputs)
            apply_gspn2(model, config=RANDOM).save_pretrained(tmp_path)
            student = call(model, inputs)
            offload(model)
            torch.testing.assert_close(call(model, inputs), student, rtol=1e-5, atol=1e-5)
            remove_gspn2(model)
            assert torch.equal(call(model, inputs), teacher)

            model = case.build()
            offload(model)
            apply_gspn2(model, tmp_path)
            torch.testing.assert_close(call(model, inputs), student, rtol=1e-5, atol=1e-5)
            apply_gspn2(model)  # from the teacher, whose weights lie on no device while they are offloaded
            call(model, inputs)
            remove_gspn2(model)
            assert torch.equal(call(model, inputs), teacher)

    def test_weights_are_still_offloaded_afterwards(self, unet):
        sequential(unet)
        apply_gspn2(unet, config=RANDOM)
        assert unet.conv_in.weight.is_meta and patched_modules(unet)[0][1].gspn2.scan_out.weight.is_meta


class TestCasting:
    @pytest.mark.parametrize("order", ["cast first", "patch first"])
    def test_layerwise(self, unet, order, tmp_path):
        inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in tiny_models.unet_inputs().items()}
        unet.bfloat16()
        apply_gspn2(unet, config=RANDOM).save_pretrained(tmp_path)
        with torch.no_grad():
            exact = unet(**inputs).sample
        remove_gspn2(unet)
        if order == "patch first":
            apply_gspn2(unet, tmp_path)
        unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
        if order == "cast first":
            apply_gspn2(unet, tmp_path)
        with torch.no_grad():
            cast = unet(**inputs).sample
        # float8 has three bits of mantissa.
        assert cast.dtype == torch.bfloat16 and (cast - exact).norm() / exact.norm() < 0.3

    def test_quantised_base(self, unet):
        torchao = pytest.importorskip("torchao.quantization")
        exact_start = apply_gspn2(unet).state_dict()
        exact = run(unet)
        remove_gspn2(unet)
        torchao.quantize_(unet, torchao.Int8WeightOnlyConfig(), lambda module, _: isinstance(module, torch.nn.Linear))
        start = apply_gspn2(unet).state_dict()
        assert all(value.dtype == torch.float32 for value in start.values()) and start.keys() == exact_start.keys()
        assert (run(unet) - exact).norm() / exact.norm() < 0.1
        # The layers themselves may be quantised too.
        torchao.quantize_(unet, torchao.Int8WeightOnlyConfig(), lambda _, name: name.endswith(("scan_in", "scan_out")))
        assert (run(unet) - exact).norm() / exact.norm() < 0.1


def test_first_block_cache():
    from diffusers import FirstBlockCacheConfig

    case = CASES["FluxTransformer2DModel"]
    model = case.build()
    apply_gspn2(model, config=RANDOM)
    inputs = case.inputs(3, 5)
    with torch.no_grad():
        expected = call(model, inputs)
        model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
        with model.cache_context("cond"):
            assert torch.equal(call(model, inputs), expected)
        model.disable_cache()
        assert torch.equal(call(model, inputs), expected)


class TestCompile:
    @pytest.mark.slow
    def test_unet_in_one_graph(self, patched):
        torch._dynamo.reset()
        student = run(patched, 9, 16)
        compiled = torch.compile(patched, fullgraph=True, backend="eager", dynamic=False)
        torch.testing.assert_close(run(compiled, 9, 16), student, rtol=1e-4, atol=1e-5)

    def test_flux_in_one_graph(self):
        """The map's sides are constants of the graph, which is compiled anew for another number of tokens; other sides
        of the same number are noticed, so that nothing is scrambled."""
        torch._dynamo.reset()
        case = CASES["FluxTransformer2DModel"]
        model = case.build()
        apply_gspn2(model, config=RANDOM)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad():
            for sides in ((3, 4), (2, 5)):
                inputs = case.inputs(*sides)
                got = call(compiled, inputs)
                # Read once: the next steps' ids are the same tensor, and reading waits for the device.
                assert inputs["img_ids"]._gspn2_segments[1] == (sides,)
                torch.testing.assert_close(got, call(model, inputs), rtol=1e-4, atol=1e-5)
            with pytest.raises(RuntimeError, match=r"sides \[2, 5\] in tokens and img_ids now say \[5, 2\]"):
                call(compiled, case.inputs(5, 2))

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_scope_in_one_graph(self, patched, backend):
        """The module that records the grid, its blocks and the layers below, at two sizes with as many tokens."""
        torch._dynamo.reset()
        scope = patched.mid_block.attentions[0]
        compiled = torch.compile(scope, fullgraph=True, backend=backend, dynamic=False)
        for height, width in ((3, 8), (8, 3)):
            maps, context = torch.randn(1, 32, height, width), torch.randn(1, 5, 16)
            with torch.no_grad():
                expected, got = (module(maps, context, return_dict=False)[0] for module in (scope, compiled))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("name", ["SD3Transformer2DModel", "FluxTransformer2DModel"])
    def test_repeated_blocks(self, name):
        """Flux reads its grid from img_ids, which waits for the device, outside the compiled blocks."""
        torch._dynamo.reset()
        case = CASES[name]
        model = case.build()
        apply_gspn2(model, config=RANDOM)
        inputs = case.inputs(3, 5)
        with torch.no_grad():
            student = call(model, inputs)
            for block in model.transformer_blocks:
                block.compile(fullgraph=True, backend="eager")
            torch.testing.assert_close(call(model, inputs), student, rtol=1e-4, atol=1e-5)


class TestParallel:
    def test_context_parallelism_is_refused(self):
        diffusers = pytest.importorskip("diffusers", minversion="0.36")
        model = CASES["FluxTransformer2DModel"].build()
        config = diffusers.ParallelConfig(context_parallel_config=diffusers.ContextParallelConfig(ring_degree=2))
        model._parallel_config = config
        with pytest.raises(ValueError, match="Context parallelism"):
            apply_gspn2(model)
        model._parallel_config = None
        apply_gspn2(model)
        model._parallel_config = config
        with pytest.raises(ValueError, match="Context parallelism"):
            call(model, CASES["FluxTransformer2DModel"].inputs(3, 5))

    def test_ddp_gives_the_same_gradients(self, unet, tmp_path):
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        unet.requires_grad_(False)
        adapter = apply_gspn2(unet, config=RANDOM)
        inputs = tiny_models.unet_inputs(9, 16)

        def gradients(model):
            adapter.zero_grad()
            model(**inputs).sample.square().mean().backward()
            return [parameter.grad.clone() for parameter in adapter.parameters()]

        alone = gradients(unet)
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            wrapped = DistributedDataParallel(unet)
            for expected, got in zip(alone, gradients(wrapped), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
            assert all(f"module.{key}" in wrapped.state_dict() for key in adapter.state_dict())
        finally:
            dist.destroy_process_group()


def test_averages_of_the_layers(unet):
    from diffusers.training_utils import EMAModel

    adapter = apply_gspn2(unet, config=RANDOM)
    before = [parameter.clone() for parameter in adapter.parameters()]
    average = EMAModel(adapter.parameters(), decay=0.5, min_decay=0.5)
    average.step(adapter.parameters())  # the first step copies
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 1
    average.step(adapter.parameters())
    average.store(adapter.parameters())
    average.copy_to(adapter.parameters())
    for start, parameter in zip(before, adapter.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach(), start + 0.5)
    averaged = run(unet)
    average.restore(adapter.parameters())
    assert not torch.equal(run(unet), averaged)


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "FluxTransformer2DModel"])
@torch.no_grad()
def test_copies_and_pickles_of_joint_models(name):
    case = CASES[name]
    model = case.build()
    before = everything(model)[3]
    apply_gspn2(model, config=RANDOM)
    inputs = case.inputs(3, 5)
    student = call(model, inputs)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(call(clone, inputs), student)
        assert clone.save_pretrained.model is clone
        remove_gspn2(clone)
        assert everything(clone)[3] == before
    assert torch.equal(call(model, inputs), student)
