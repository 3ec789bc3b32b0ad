"""IP-Adapters of SD3, Flux.1 and Chroma, which work inside the attentions that GSPN-2 replaces: loaded, scaled and
unloaded by the pipelines' own methods, on tiny real models."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

from gspn2_diffusion import GSPN2Config, apply_gspn2, fuse_gspn2, gspn2_disabled, remove_gspn2
from gspn2_diffusion.patching import ip_adapters, patched_modules
from gspn2_diffusion.patching.families import Layout

from .test_families import call, definition
from .test_patching import everything
from .tiny_families import BATCH, CASES, noise

RANDOM = GSPN2Config(init="random", proxy_dim=8)
SIDES = (3, 5)
WIDTH, TOKENS = 16, 4  # of an image's embedding; of the prompt made from it


def drawn(module, seed):
    generator = torch.Generator().manual_seed(seed)
    return {k: 0.3 * torch.randn(v.shape, generator=generator) for k, v in module.state_dict().items()}


def sd3_weights(model):
    inner, hidden = model.inner_dim, 64
    projection = IPAdapterTimeImageProjection(WIDTH, inner, hidden, heads=1, num_queries=TOKENS, timestep_in_dim=8)
    weights = {}
    for index, attention in enumerate(model.attn_processors):
        processor = SD3IPAdapterJointAttnProcessor2_0(inner, inner, model.config.attention_head_dim, hidden)
        weights |= {f"{index}.{key}": value for key, value in drawn(processor, index).items()}
        assert attention.startswith("transformer_blocks")
    return {"image_proj": drawn(projection, 99), "ip_adapter": weights}


def flux_weights(model, seed=0):
    inner, width = model.inner_dim, model.config.joint_attention_dim
    weights = {}
    for index in range(model.config.num_layers):
        processor = FluxIPAdapterAttnProcessor(inner, width)
        for key, value in drawn(processor, seed + index).items():
            weights[f"{index}.{key.replace('.0.', '.')}"] = value
    projection = {"proj.weight": noise(TOKENS * width, WIDTH, seed=seed), "proj.bias": noise(TOKENS * width)}
    norm = {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    return {"image_proj": {**projection, **norm}, "ip_adapter": weights}


@dataclass(frozen=True)
class Kind:
    """One of the two, with its pipeline."""

    case: str
    pipeline: str
    parts: tuple[str, ...]
    processor: type

    def pipe(self) -> Any:
        parts = {"transformer": CASES[self.case].build(), **dict.fromkeys(self.parts)}
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        return getattr(diffusers, self.pipeline)(scheduler=scheduler, **parts)

    def load(self, pipe, seed=0):
        if self.processor is SD3IPAdapterJointAttnProcessor2_0:
            pipe.load_ip_adapter(sd3_weights(pipe.transformer), image_encoder_folder=None)
        else:
            pipe.load_ip_adapter(
                flux_weights(pipe.transformer, seed), "", image_encoder_pretrained_model_name_or_path=None
            )

    def inputs(self, image=None) -> dict[str, Any]:
        """A call with an image prompt."""
        image = noise(BATCH, 1, WIDTH, seed=5) if image is None else image
        embeds = image if self.processor is SD3IPAdapterJointAttnProcessor2_0 else [image]
        return {**CASES[self.case].inputs(*SIDES), "joint_attention_kwargs": {"ip_adapter_image_embeds": embeds}}


SD3 = Kind(
    "SD3Transformer2DModel",
    "StableDiffusion3Pipeline",
    ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"),
    SD3IPAdapterJointAttnProcessor2_0,
)
FLUX = Kind(
    "FluxTransformer2DModel",
    "FluxPipeline",
    ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    FluxIPAdapterAttnProcessor,
)

CHROMA = Kind("ChromaTransformer2DModel", "ChromaPipeline", FLUX.parts[:3], FluxIPAdapterAttnProcessor)


@pytest.fixture(params=[SD3, FLUX, CHROMA], ids=["sd3", "flux", "chroma"])
def kind(request):
    return request.param


@pytest.fixture
def pipe(kind):
    return kind.pipe()


@pytest.fixture
def both(kind, pipe):
    """The adapter first, then GSPN-2."""
    kind.load(pipe)
    apply_gspn2(pipe, config=RANDOM)
    return pipe


def adapters(model, kind):
    return [processor for processor in model.attn_processors.values() if type(processor) is kind.processor]


def run(pipe, inputs):
    with torch.no_grad():
        return call(pipe.transformer, inputs)


def test_either_order(kind, both, caplog):
    other = kind.pipe()
    apply_gspn2(other, config=RANDOM)
    kind.load(other)
    assert torch.equal(run(other, kind.inputs()), run(both, kind.inputs()))
    assert "put back" not in caplog.text and "not expected" not in caplog.text
    # Each order, taken apart again, is the model with the adapter.
    alone = kind.pipe()
    kind.load(alone)
    expected = run(alone, kind.inputs())
    for patched in (both, other):
        with gspn2_disabled(patched):
            assert torch.equal(run(patched, kind.inputs()), expected)
        assert not torch.equal(run(patched, kind.inputs()), expected)
        remove_gspn2(patched)
        assert torch.equal(run(patched, kind.inputs()), expected)
        assert len(adapters(patched.transformer, kind)) == len(adapters(alone.transformer, kind)) > 0


def test_remove_is_exact(kind, pipe):
    kind.load(pipe)
    before = everything(pipe.transformer)
    apply_gspn2(pipe, config=RANDOM)
    run(pipe, kind.inputs())
    apply_gspn2(pipe, config=RANDOM)  # again
    with gspn2_disabled(pipe):
        assert [type(p) for p in pipe.transformer.attn_processors.values()].count(kind.processor)
    remove_gspn2(pipe)
    assert everything(pipe.transformer) == before


@pytest.mark.parametrize("forward", [False, True], ids=["at once", "after a forward"])
def test_loaded_later_and_removed(kind, pipe, forward):
    apply_gspn2(pipe, config=RANDOM)
    kind.load(pipe)
    loaded = adapters(pipe.transformer, kind)
    if forward:
        run(pipe, kind.inputs())
    remove_gspn2(pipe)
    assert [id(p) for p in adapters(pipe.transformer, kind)] == [id(p) for p in loaded] and loaded


@pytest.mark.parametrize("forward", [False, True], ids=["at once", "after a forward"])
def test_unloaded_while_patched(kind, both, forward, caplog):
    bare = kind.pipe()
    before = [(name, type(p)) for name, p in bare.transformer.attn_processors.items()]
    inputs = CASES[kind.case].inputs(*SIDES)
    teacher = run(bare, inputs)
    apply_gspn2(bare, config=RANDOM)
    both.unload_ip_adapter()
    if forward:
        assert torch.equal(run(both, inputs), run(bare, inputs))
    remove_gspn2(both)
    assert [(name, type(p)) for name, p in both.transformer.attn_processors.items()] == before
    assert torch.equal(run(both, inputs), teacher) and "put back" not in caplog.text


def test_loaded_and_unloaded_while_disabled(kind, pipe):
    apply_gspn2(pipe, config=RANDOM)
    with gspn2_disabled(pipe):
        kind.load(pipe)
    first = run(pipe, kind.inputs())
    with gspn2_disabled(pipe):
        pipe.unload_ip_adapter()
        kind.load(pipe)
    assert torch.equal(run(pipe, kind.inputs()), first)
    with gspn2_disabled(pipe):
        pipe.unload_ip_adapter()
    run(pipe, CASES[kind.case].inputs(*SIDES))
    remove_gspn2(pipe)
    assert not adapters(pipe.transformer, kind)


def test_scale_acts_at_the_next_forward(kind, both):
    plain = kind.pipe()
    apply_gspn2(plain, config=RANDOM)
    without = run(plain, CASES[kind.case].inputs(*SIDES))
    outputs = []
    for scale in (0.0, 0.5, 1.0, 0.0):
        both.set_ip_adapter_scale(scale)
        outputs.append(run(both, kind.inputs()))
    none, half, whole, none_again = outputs
    torch.testing.assert_close(none, without)
    assert torch.equal(none, none_again)
    assert not torch.equal(half, none) and not torch.equal(half, whole)
    if kind is SD3:
        assert not both.is_ip_adapter_active
        both.set_ip_adapter_scale(0.5)
        assert both.is_ip_adapter_active


def heads(module, x):
    return x.double().unflatten(-1, (module.heads, -1))


def softmax_read(query, key, value, weights):
    """In float64, each key counted as often as its weight says."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()) / math.sqrt(query.shape[-1])
    mass = scores.exp() * torch.as_tensor(weights, dtype=torch.float64)
    return torch.einsum("bhqk,bkhd->bqhd", mass / mass.sum(-1, keepdim=True), value.double()).flatten(2)


def sd3_term(processor, module, tokens, prompt, temb, sides, cells):
    """What SD3's adapter adds before the output projection: softmax over image and prompt, the image in means over
    `cells` along each side where it has more tokens."""
    shift, scale = (
        torch.nn.functional.silu(temb)
        .double()
        .matmul(processor.norm_ip.linear.weight.double().T)
        .add(processor.norm_ip.linear.bias.double())
        .chunk(2, dim=1)
    )
    centred = prompt.double() - prompt.double().mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    prompt = normed * (1 + scale[:, None]) + shift[:, None]
    maps, (height, width) = tokens.double().unflatten(1, sides), sides
    rows, columns = min(height, cells), min(width, cells)
    means = [
        maps[
            :,
            i * height // rows : math.ceil((i + 1) * height / rows),
            j * width // columns : math.ceil((j + 1) * width / columns),
        ].mean((1, 2))
        for i in range(rows)
        for j in range(columns)
    ]
    image = torch.stack(means, dim=1)

    def linear(layer, x):
        return x @ layer.weight.double().T + (0 if layer.bias is None else layer.bias.double())

    def normed_heads(norm, x):
        x = heads(module, x)
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()

    query = normed_heads(processor.norm_q, linear(module.to_q, tokens.double()))
    key = normed_heads(processor.norm_k, linear(module.to_k, image))
    key = torch.cat([key, normed_heads(processor.norm_ip_k, linear(processor.to_k_ip, prompt))], dim=1)
    value = heads(module, torch.cat([linear(module.to_v, image), linear(processor.to_v_ip, prompt)], dim=1))
    weights = [height * width / (rows * columns)] * (rows * columns) + [1] * prompt.shape[1]
    return processor.scale * softmax_read(query, key, value, weights)


def flux_term(processor, module, tokens, prompts):
    """What Flux' adapters add behind the feed-forward: softmax over each one's prompt."""
    total = 0
    query = module.norm_q(module.to_q(tokens).unflatten(-1, (module.heads, -1)))
    for prompt, scale, to_k, to_v in zip(prompts, processor.scale, processor.to_k_ip, processor.to_v_ip, strict=True):
        prompt = prompt.flatten(1, 2).double()
        key, value = (heads(module, prompt @ p.weight.double().T + p.bias.double()) for p in (to_k, to_v))
        total = total + scale * softmax_read(query, key, value, 1)
    return total


def calls_of(pipe, inputs):
    """(module, state, keywords, output) of each replaced attention in a call."""
    calls, hooks = [], []
    for _, module, state in patched_modules(pipe.transformer):
        hooks.append(
            module.register_forward_hook(
                lambda module, args, kwargs, output, state=state: calls.append((module, state, kwargs, output)),
                with_kwargs=True,
            )
        )
    run(pipe, inputs)
    for hook in hooks:
        hook.remove()
    return calls


@pytest.mark.parametrize("cells", [32, 2])
@torch.no_grad()
def test_equals_the_definition(kind, both, cells, monkeypatch):
    """Every attention gives what it gave without the adapter, and the adapter's term. `cells` of 32 is SD3's own
    definition for such a map."""
    monkeypatch.setattr(ip_adapters, "CELLS", cells)
    both.set_ip_adapter_scale(0.7)
    seen = 0
    for module, state, keywords, output in calls_of(both, kind.inputs()):
        if state.kind == "single":
            continue
        tokens, processor = keywords["hidden_states"], module.processor
        expected = definition(module, state.kind, tokens, keywords.get("encoder_hidden_states"), keywords, *SIDES, 0)
        prompt = keywords["ip_hidden_states"]
        if kind is SD3:
            term = sd3_term(processor, module, tokens, prompt, keywords["temb"], SIDES, cells)
            expected = expected + term @ module.to_out[0].weight.double().T
        else:
            term = flux_term(processor, module, tokens, prompt)
            torch.testing.assert_close(output[2].double(), term, rtol=1e-4, atol=1e-5)
        got = output[0] if isinstance(output, tuple) else output
        assert term.abs().max() > 0.01
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
        if cells > max(SIDES):
            # The term is that of diffusers' own processor.
            with gspn2_disabled(both):
                own = [module(**keywords)]
                both.set_ip_adapter_scale(0.0)
                own.append(module(**keywords))
            both.set_ip_adapter_scale(0.7)
            if kind is SD3:
                first, second = (o[0] if isinstance(o, tuple) else o for o in own)
                theirs, ours = first - second, (term @ module.to_out[0].weight.double().T)
            else:
                theirs, ours = own[0][2], term
            torch.testing.assert_close(theirs.double(), ours, rtol=1e-4, atol=1e-5)
        seen += 1
    assert seen == len(patched_modules(both.transformer)) - (kind is not SD3)


def test_the_image_prompt_reaches_each_token(kind, both):
    image = noise(BATCH, 1, WIDTH, seed=5)
    rows = [run(both, kind.inputs(x)).view(BATCH, -1) for x in (image, image + 1)]
    assert (rows[0] - rows[1]).abs().amax(1).gt(0).all()
    for module, state, keywords, _ in calls_of(both, kind.inputs()):
        if state.kind == "single":
            continue
        prompt = keywords["ip_hidden_states"]
        leaf = (prompt if kind is SD3 else prompt[0]).clone().requires_grad_()
        output = module(**{**keywords, "ip_hidden_states": leaf if kind is SD3 else [leaf]})
        read = output[2] if kind is not SD3 else output[0] if isinstance(output, tuple) else output
        for token in range(read.shape[1]):
            (gradient,) = torch.autograd.grad(read[:, token].sum(), leaf, retain_graph=True)
            assert gradient.abs().max() > 0


def test_the_image_is_read_at_a_bounded_cost():
    """SD3's adapter reads the image by softmax, which would be quadratic."""
    for sides in ((64, 96), (256, 33), (1, 1000)):
        cells = ip_adapters._cells(noise(1, math.prod(sides), 4), Layout((sides,)))
        assert cells.shape == (1, math.prod(min(side, ip_adapters.CELLS) for side in sides), 4)
    tokens = noise(1, 32 * 20, 4)
    assert ip_adapters._cells(tokens, Layout(((32, 20),))) is tokens


def test_two_adapters_with_their_own_scales():
    """Flux takes several."""
    pipes = [FLUX.pipe(), FLUX.pipe()]
    apply_gspn2(pipes[0], config=RANDOM)
    for pipe in pipes:
        states = [flux_weights(pipe.transformer, seed) for seed in (0, 7)]
        pipe.load_ip_adapter(states, ["", ""], ["", ""], image_encoder_pretrained_model_name_or_path=None)
        pipe.set_ip_adapter_scale([0.4, 0.9])
    apply_gspn2(pipes[1], config=RANDOM)
    images = [noise(BATCH, 1, WIDTH, seed=5), noise(BATCH, 2, WIDTH, seed=6)]
    outputs = []
    for pipe in pipes:
        inputs = {**CASES[FLUX.case].inputs(*SIDES), "joint_attention_kwargs": {"ip_adapter_image_embeds": images}}
        for module, state, keywords, output in calls_of(pipe, inputs):
            if state.kind == "joint":
                with torch.no_grad():
                    term = flux_term(module.processor, module, keywords["hidden_states"], keywords["ip_hidden_states"])
                torch.testing.assert_close(output[2].double(), term, rtol=1e-4, atol=1e-5)
                outputs.append(output[2])
    assert torch.equal(*outputs)


def test_only_some_attentions_patched(kind, pipe):
    """The others keep diffusers' own processor."""
    kind.load(pipe)
    before = everything(pipe.transformer)
    teacher = run(pipe, kind.inputs())
    apply_gspn2(pipe, config=GSPN2Config(init="random", proxy_dim=8, layers=("transformer_blocks.0.attn",)))
    assert not torch.equal(run(pipe, kind.inputs()), teacher)
    remove_gspn2(pipe)
    assert everything(pipe.transformer) == before and torch.equal(run(pipe, kind.inputs()), teacher)


def test_moves_copies_pickles_and_fuses(kind, both):
    expected = run(both, kind.inputs())
    for clone in (copy.deepcopy(both.transformer), pickle.loads(pickle.dumps(both.transformer))):
        with torch.no_grad():
            assert torch.equal(call(clone, kind.inputs()), expected)
        remove_gspn2(clone)
        assert adapters(clone, kind)
    assert fuse_gspn2(both)
    torch.testing.assert_close(run(both, kind.inputs()), expected, rtol=1e-4, atol=1e-5)
    both.transformer.double()
    assert {p.dtype for p in both.transformer.parameters()} == {torch.float64}
    remove_gspn2(both)
    assert {p.dtype for p in both.transformer.parameters()} == {torch.float64}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpointed_step(kind, both):
    model = both.transformer
    model.train()
    parameters = [p for name, p in model.named_parameters() if ".gspn2." in name or "_ip" in name]

    def gradients():
        model.zero_grad()
        call(model, kind.inputs()).square().mean().backward()
        return [p.grad.clone() for p in parameters if p.grad is not None]

    plain = gradients()
    model.enable_gradient_checkpointing()
    if kind is CHROMA:  # which hands its blocks no keywords then; diffusers' own processor fails, too
        with pytest.raises(ValueError, match="no image prompt"):
            gradients()
        return
    again = gradients()
    assert len(plain) == len(again) > len(parameters) / 2
    for expected, got in zip(plain, again, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_compiled_blocks(kind, both):
    torch._dynamo.reset()
    expected = run(both, kind.inputs())
    for block in both.transformer.transformer_blocks:
        block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(run(both, kind.inputs()), expected, rtol=1e-4, atol=1e-5)


def test_a_call_without_image_prompt(kind, both):
    """SD3's adapter rests then, as in diffusers; the others' cannot."""
    inputs = CASES[kind.case].inputs(*SIDES)
    if kind is SD3:
        rest = run(both, inputs)
        both.set_ip_adapter_scale(0.0)
        assert torch.equal(run(both, kind.inputs()), rest)
    else:
        with pytest.raises(ValueError, match="no image prompt"):
            run(both, inputs)


def test_an_unknown_ip_adapter_is_refused(kind, pipe):
    class OtherIPAdapterProcessor(kind.processor):
        pass

    kind.load(pipe)
    attention = pipe.transformer.transformer_blocks[-1].attn
    processor = attention.processor
    processor.__class__ = OtherIPAdapterProcessor
    with pytest.raises(ValueError, match=r"OtherIPAdapterProcessor .* unload_ip_adapter"):
        apply_gspn2(pipe)
    assert not patched_modules(pipe.transformer)
    pipe.unload_ip_adapter()
    apply_gspn2(pipe)
    attention.set_processor(processor)
    with pytest.raises(ValueError, match=r"OtherIPAdapterProcessor .* unload_ip_adapter"):
        run(pipe, CASES[kind.case].inputs(*SIDES))
