"""Every family on a tiny real model: one test for each concern, run for each class of the table."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from benchmarks.family_calls import image_ids
from gspn2_diffusion import GSPN2Adapter, GSPN2Config, apply_gspn2, gspn2_disabled, remove_gspn2
from gspn2_diffusion.layers import canvas_sides
from gspn2_diffusion.patching import patched_modules
from gspn2_diffusion.patching.families import FAMILIES, Layout
from gspn2_diffusion.patching.families.base import packed_layout, segments_of
from gspn2_diffusion.patching.processors import QWEN_USES_MASK

from .test_layer import layer_in_loops
from .test_patching import everything
from .tiny_families import BATCH, CASES, TEXT, available, noise

RANDOM = GSPN2Config(init="random", proxy_dim=8)
JOINT = [name for name, case in CASES.items() if FAMILIES[name] and case.text and not case.levels]

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def pytest_generate_tests(metafunc: Any) -> None:
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", CASES)


@pytest.fixture
def case(family):
    if not available(family):
        pytest.skip(f"this diffusers has no {family}")
    return CASES[family]


@pytest.fixture
def model(case):
    return case.build()


def call(model, inputs) -> Tensor:
    """The model's output, flat. ControlNets return several maps."""
    output = model(**inputs)
    output = output if isinstance(output, tuple) else (output.sample,)
    parts = [part for item in output for part in (item if isinstance(item, list | tuple) else [item])]
    return torch.cat([part.flatten() for part in parts])


def test_every_class_of_the_table_has_a_case():
    assert set(CASES) == set(FAMILIES)


@torch.no_grad()
def test_right_grid(case, model):
    """Each layer is called with the map's true sides, which the model's own shapes tell."""
    adapter = apply_gspn2(model, config=RANDOM)
    seen = {}
    for name, module, _ in patched_modules(model):
        module.gspn2.register_forward_pre_hook(
            lambda layer, args, name=name: seen.update({name: (args[0].shape[1], *args[1:])})
        )
    for rows, columns in case.sides:
        call(model, case.inputs(rows, columns))
        assert len(seen) == len(adapter.layer_names)
        levels = [(rows, columns)]
        while case.levels and levels[-1] != (1, 1):
            levels.append((math.ceil(levels[-1][0] / 2), math.ceil(levels[-1][1] / 2)))
        for tokens, height, width in seen.values():
            assert (height, width) in levels and tokens == height * width
        assert (rows, columns) in {sides[1:] for sides in seen.values()}


def definition(module, kind, tokens: Tensor, context: Tensor | None, keywords: dict, rows, columns, text) -> Tensor:
    """Image tokens behind a replaced attention, in float64: the scan in plain loops, softmax over the text as a plain
    sum, the model's own output projection."""
    if kind.startswith("single"):
        context, tokens = tokens[:, :text], tokens[:, text:]
    scanned = torch.from_numpy(layer_in_loops(module.gspn2, tokens.double().numpy(), rows, columns))
    if kind != "self":
        assert context is not None
        query, key, value = queries_of_image_keys_of_text(module, kind, tokens, context, keywords)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
        mask = keywords.get("encoder_hidden_states_mask")
        if mask is not None and QWEN_USES_MASK:
            scores = scores.masked_fill(~mask.bool()[:, None, None], -math.inf)
        added = keywords.get("attention_mask")
        if added is not None:
            length = context.shape[1]
            scores = scores + (added[:, None, None, :] if added.ndim == 2 else added[..., length:, :length])
        read = torch.einsum("bhqk,bkhd->bqhd", scores.exp() / scores.exp().sum(-1, keepdim=True), value)
        share = 1 / (1 + (-module.gspn2.text_share.double()).exp())
        scanned = scanned + (read * share[:, None]).flatten(2)
    if kind == "single_fused":
        features = module.to_qkv_mlp_proj(tokens)[..., 3 * module.inner_dim :]
        scanned = torch.cat([scanned, module.mlp_act_fn(features).double()], dim=-1)
        return scanned @ module.to_out.weight.double().T
    to_out = getattr(module, "to_out", None)
    if to_out is None or isinstance(to_out, torch.nn.Identity):
        return scanned
    bias = 0 if to_out[0].bias is None else to_out[0].bias.double()
    return scanned @ to_out[0].weight.double().T + bias


def queries_of_image_keys_of_text(module, kind, image, text, keywords):
    """(B, N, heads, d) in float64."""

    def heads(x):
        return x.unflatten(-1, (module.heads, -1))

    def normed(norm, x):
        return x if norm is None else norm(x)

    if kind == "single_fused":
        inner = module.inner_dim
        query = module.to_qkv_mlp_proj(image)[..., :inner]
        key, value = (
            module.to_qkv_mlp_proj(text)[..., inner : 2 * inner],
            module.to_qkv_mlp_proj(text)[..., 2 * inner :],
        )
        value, norm_key = value[..., :inner], module.norm_k
    elif kind in ("single", "joint_shared"):
        query, key, value, norm_key = module.to_q(image), module.to_k(text), module.to_v(text), module.norm_k
    else:
        query, key, value = module.to_q(image), module.add_k_proj(text), module.add_v_proj(text)
        norm_key = module.norm_added_k
    query, key, value = normed(module.norm_q, heads(query)), normed(norm_key, heads(key)), heads(value)
    rotary, length = keywords.get("image_rotary_emb"), text.shape[1]
    if kind == "joint_complex":
        query, key = complex_rotation(query, rotary[0]), complex_rotation(key, rotary[1])
    elif kind == "joint_shared":
        query = apply_rotary_emb(query, rotary, use_real_unbind_dim=-2, sequence_dim=1)
    elif rotary is not None:
        cos, sin = rotary
        query = apply_rotary_emb(query, (cos[length:], sin[length:]), sequence_dim=1)
        key = apply_rotary_emb(key, (cos[:length], sin[:length]), sequence_dim=1)
    return query.double(), key.double(), value.double()


def complex_rotation(x, frequencies):
    even, odd = x[..., ::2], x[..., 1::2]
    real, imaginary = frequencies.real[:, None], frequencies.imag[:, None]
    return torch.stack([even * real - odd * imaginary, even * imaginary + odd * real], dim=-1).flatten(-2)


@torch.no_grad()
def test_equals_the_definition(case, model):
    """Every replaced attention gives the image what the definition says, and the text what attention gave it."""
    apply_gspn2(model, config=RANDOM)
    calls, grids = [], {}
    for name, module, state in patched_modules(model):
        module.register_forward_hook(
            lambda module, args, kwargs, output, state=state: calls.append((module, state, args, kwargs, output)),
            with_kwargs=True,
        )
        module.gspn2.register_forward_pre_hook(lambda layer, args, name=name: grids.update({name: args[1:3]}))
    call(model, case.inputs(*case.sides[0]))
    assert len(calls) == len(patched_modules(model))
    for module, state, args, kwargs, output in list(calls):
        keywords = {**dict(zip(("hidden_states", "encoder_hidden_states"), args, strict=False)), **kwargs}
        tokens = keywords["hidden_states"]
        text = state.record.layout.text if state.kind.startswith("single") else 0
        if tokens.ndim == 4:
            expected = unet2d_definition(module, tokens)
        else:
            context = keywords.get("encoder_hidden_states")
            expected = definition(module, state.kind, tokens, context, keywords, *grids[state.name], text)
        if state.kind.startswith("single"):
            got = output[:, text:]
        else:
            got = output[0] if isinstance(output, tuple) else output
        torch.testing.assert_close(got.double().reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)
        if state.kind != "self" and not getattr(module, "context_pre_only", None):
            with gspn2_disabled(model):
                attention = module(*args, **kwargs)
            before, after = (o[:, :text] if text else o[1] for o in (attention, output))
            torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def unet2d_definition(module, maps):
    height, width = maps.shape[-2:]
    tokens = module.group_norm(maps.flatten(2)).transpose(1, 2)
    mixed = torch.from_numpy(layer_in_loops(module.gspn2, tokens.double().numpy(), height, width))
    mixed = mixed @ module.to_out[0].weight.double().T + module.to_out[0].bias.double()
    mixed = mixed.transpose(1, 2).reshape(maps.shape) + maps.double()
    return mixed / module.rescale_output_factor


@torch.no_grad()
@pytest.mark.parametrize("layer", ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"])
def test_masks_over_all_pairs(layer):
    """Chroma hands over a mask for every pair of tokens: its parts go where the pairs went."""
    model = CASES["ChromaTransformer2DModel"].build()
    apply_gspn2(model, config=RANDOM)
    module = model.get_submodule(layer)
    state = module._gspn2
    state.record.layout = Layout(((2, 3),), TEXT)
    text, image = noise(1, TEXT, 16), noise(1, 6, 16, seed=1)
    keywords: dict[str, Any] = {"attention_mask": noise(1, 1, TEXT + 6, TEXT + 6, seed=2)}
    if state.kind == "joint":
        keywords |= {"hidden_states": image, "encoder_hidden_states": text}
        got, after = module(**keywords)
        with gspn2_disabled(model):
            before = module(**keywords)[1]
    else:
        keywords |= {"hidden_states": torch.cat([text, image], dim=1)}
        output = module(**keywords)
        got, after = output[:, TEXT:], output[:, :TEXT]
        with gspn2_disabled(model):
            before = module(**keywords)[:, :TEXT]
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    context = keywords.get("encoder_hidden_states")
    expected = definition(module, state.kind, keywords["hidden_states"], context, keywords, 2, 3, TEXT)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_text_conditions_the_image(case, model):
    """Gradient from the image's output to the prompt is non-zero in each replaced joint attention and in the model."""
    if case.text is None:
        pytest.skip("a model without text")
    apply_gspn2(model)
    inputs = case.inputs(*case.sides[0])
    # Pixels far from the text in any scan order, too: the gradient reaches the text from each single token.
    prompt = inputs[case.text].requires_grad_()
    output = call(model, inputs)
    (gradient,) = torch.autograd.grad(output.square().mean(), prompt)
    assert gradient.abs().max() > 0
    for _, module, state in patched_modules(model):
        if not state.kind.startswith("joint"):
            continue
        state.record.layout = state.record.layout._replace(segments=((2, 3),))
        width = module.to_q.in_features
        context = noise(1, TEXT, width).requires_grad_()
        image = module(hidden_states=noise(1, 6, width, seed=1), encoder_hidden_states=context)[0]
        for token in range(6):
            (gradient,) = torch.autograd.grad(image[:, token].sum(), context, retain_graph=True)
            assert (gradient.abs().amax(-1) > 0).all()


@torch.no_grad()
def test_remove_is_exact(case, model):
    before, inputs = everything(model), case.inputs(*case.sides[0])
    teacher = call(model, inputs)
    apply_gspn2(model)
    student = call(model, inputs)
    assert not torch.equal(student, teacher)
    with gspn2_disabled(model):
        assert torch.equal(call(model, inputs), teacher)
    assert torch.equal(call(model, inputs), student)
    remove_gspn2(model)
    assert torch.equal(call(model, inputs), teacher)
    assert everything(model) == before


@torch.no_grad()
def test_save_and_load(case, model, tmp_path):
    inputs = case.inputs(*case.sides[0])
    apply_gspn2(model, config=RANDOM).save_pretrained(tmp_path)
    student = call(model, inputs)
    again = case.build()
    adapter = apply_gspn2(again, tmp_path)
    assert torch.equal(call(again, inputs), student)
    assert set(adapter.state_dict()) == {key for key in model.state_dict() if ".gspn2." in key}
    assert isinstance(adapter, GSPN2Adapter)


@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpoint", "reentrant"])
def test_checkpointed_step(case, model, family, reentrant):
    """The gradients of a training step with checkpointing are those of one without, although another size ran between
    forward and backward."""
    if not getattr(model, "_supports_gradient_checkpointing", False):
        pytest.skip("the model has no gradient checkpointing")
    adapter = apply_gspn2(model, config=RANDOM)
    model.train()
    (rows, columns), inputs = case.sides[0], case.inputs(*case.sides[0])
    # A reentrant checkpoint has a gradient only where an input of the block has one.
    inputs["sample" if "sample" in inputs else "hidden_states"].requires_grad_()

    def gradients():
        adapter.zero_grad()
        loss = call(model, inputs).square().mean()
        with torch.no_grad():
            call(model, case.inputs(columns, rows))
        loss.backward()
        return [torch.zeros(()) if p.grad is None else p.grad.clone() for p in adapter.parameters()]

    plain = gradients()
    assert sum(bool(gradient.any()) for gradient in plain) > len(plain) / 2
    model.enable_gradient_checkpointing(
        lambda block, *args: torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=reentrant)
    )
    for expected, again in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name, attentions",
    {"sd15": 16, "sdxl": 70, "pixart-sigma": 28, "sd3-medium": 24, "sd3.5-medium": 37, "flux-dev": 57}.items(),
    ids=str,
)
def test_published_configurations(name, attentions):
    """The models of benchmarks/families.py, without memory for their weights: every self-attention is found."""
    from benchmarks.families import MODELS, build, sites_of

    model = build(MODELS[name], None, torch.device("meta"), torch.bfloat16)
    assert len(sites_of(model)) == attentions


class TestPackedTokens:
    """Reading the sides of images from the ids that Flux gets."""

    def layout(self, ids):
        return packed_layout(torch.nn.Identity(), {"img_ids": ids, "encoder_hidden_states": noise(1, TEXT, 4)})

    @pytest.mark.parametrize("sides", [(1, 1), (1, 5), (5, 1), (3, 7), (7, 3)], ids=str)
    def test_sides(self, sides):
        assert self.layout(image_ids(*sides)) == ((sides,), TEXT)
        assert self.layout(image_ids(*sides)[None]).segments == (sides,)

    def test_reference_images_are_segments(self):
        ids = torch.cat([image_ids(3, 5), image_ids(4, 2, time=1), image_ids(4, 2, time=2)])
        assert segments_of(ids) == ((3, 5), (4, 2), (4, 2))

    def test_ids_rounded_to_bfloat16(self):
        assert segments_of(image_ids(300, 520).bfloat16()) == ((300, 520),)

    def test_ids_are_read_once_and_again_after_a_change(self):
        ids = image_ids(3, 4)
        assert self.layout(ids).segments == ((3, 4),)
        ids.copy_(image_ids(4, 3))
        assert self.layout(ids).segments == ((4, 3),)

    def test_cached_keys_are_refused(self):
        with pytest.raises(ValueError, match="kv_cache_mode"):
            packed_layout(torch.nn.Identity(), {"kv_cache_mode": "extract"})

    @pytest.mark.parametrize("ids", [image_ids(3, 5)[:-1], image_ids(3, 5).flip(0), image_ids(4, 4)[:, [0, 2, 1]]])
    def test_other_orders_are_refused(self, ids):
        with pytest.raises(ValueError, match="whole grid"):
            segments_of(ids)


@torch.no_grad()
def test_a_reference_image_reaches_the_image():
    """Kontext: image and reference are scanned as one canvas, and changing the reference changes the image."""
    case = CASES["FluxTransformer2DModel"]
    model = case.build()
    apply_gspn2(model, config=RANDOM)
    inputs = case.inputs(3, 5)
    inputs["hidden_states"] = noise(BATCH, 15 + 8, 4)
    inputs["img_ids"] = torch.cat([image_ids(3, 5), image_ids(4, 2, time=1)])
    model.single_transformer_blocks = torch.nn.ModuleList()
    image = call(model, inputs).view(BATCH, 23, -1)[:, :15]
    calls = []
    module = patched_modules(model)[0][1]
    module.gspn2.register_forward_hook(
        lambda layer, args, kwargs, output: calls.append((args, kwargs, output)), with_kwargs=True
    )
    inputs["hidden_states"][:, 15:] += 1
    changed = call(model, inputs).view(BATCH, 23, -1)[:, :15]
    assert ((changed - image).abs().amax(-1) > 0).all()

    (tokens, height, width), keywords, output = calls[0]
    assert (height, width) == canvas_sides(keywords["segments"]) == (4, 7)
    weight, bias = module.gspn2.scan_in.weight, module.gspn2.scan_in.bias
    # The empty row below the image must add nothing: project tokens by hand, zero features there, scan by loops.
    canvas = torch.zeros(BATCH, 4, 7, weight.shape[0])
    features = tokens @ weight.T + bias
    canvas[:, :3, :5] = features[:, :15].unflatten(1, (3, 5))
    canvas[:, :, 5:] = features[:, 15:].unflatten(1, (4, 2))
    bare = type(module.gspn2)(weight.shape[0], module.gspn2.out_channels, RANDOM)
    bare.scan_in.weight.copy_(torch.eye(weight.shape[0]))
    bare.scan_in.bias.zero_()
    bare.scan_out.weight.copy_(module.gspn2.scan_out.weight)
    mixed = torch.from_numpy(layer_in_loops(bare, canvas.flatten(1, 2).double().numpy(), 4, 7)).unflatten(1, (4, 7))
    mixed = torch.cat([mixed[:, :3, :5].flatten(1, 2), mixed[:, :, 5:].flatten(1, 2)], dim=1)
    mixed = mixed + (keywords["text"] * module.gspn2.text_share.sigmoid()[:, None]).flatten(2)
    torch.testing.assert_close(output.double(), mixed, rtol=1e-4, atol=1e-5)


def test_qwen_batches_of_several_shapes_are_refused():
    case = CASES["QwenImageTransformer2DModel"]
    model = case.build()
    apply_gspn2(model)
    inputs = case.inputs(3, 5)
    inputs["img_shapes"] = [[(1, 3, 5)], [(1, 5, 3)]]
    with pytest.raises(ValueError, match="one shape"):
        model(**inputs)
