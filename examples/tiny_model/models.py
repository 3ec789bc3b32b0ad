"""The tiny model's parts, untrained: sizes, tokenizer, schedule."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from gspn2_diffusion.evaluation.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    PATTERNS,
    PLURALS,
    RELATIONS,
    SHAPES,
    SIZES,
    SPELLINGS,
)

MAX_TOKENS = 32
CONNECTIVES = "a an the of to on in at with and picture image photo background side next is are there showing"
WORDS = sorted(
    {
        *COLOURS,
        *BACKGROUNDS,
        *PATTERNS,
        *SHAPES,
        *PLURALS,
        *SIZES,
        *COUNTS,
        *RELATIONS,
        *SPELLINGS,
        *CONNECTIVES.split(),
    }
)


def make_vae() -> AutoencoderKL:
    """8 x fewer rows and columns, 4 channels: 128 x 128 pixels -> 16 x 16 latents. Convolutions only."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=128,
        scaling_factor=1.0,
    )


def make_unet() -> UNet2DConditionModel:
    """Self-attention at 16 x 16 and at 8 x 8 tokens."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(64, 96),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=(4, 6),  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )


def byte_pair_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges that make each word one token. Ties go by the alphabet (those of `tokenizers`' trainer vary from run to
    run, and with them the numbers of the tokens)."""
    spelt = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for symbols in spelt for pair in pairwise(symbols)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for symbols in spelt:
            for i in range(len(symbols) - 1, 0, -1):
                if tuple(symbols[i - 1 : i + 1]) == best:
                    symbols[i - 1 : i + 1] = ["".join(best)]
    return merges


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer for which every word of the scenes is one token; other words are spelt."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.-'"
    merges = byte_pair_merges(WORDS)
    tokens = [*letters, *(f"{c}</w>" for c in letters), *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=MAX_TOKENS, pad_token="<|endoftext|>"
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            projection_dim=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_scheduler() -> DDIMScheduler:
    """Cosine schedule and v-prediction down to pure noise, so that flat backgrounds come out in their colour."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # unused by "trailing"; diffusers asks for it
    )


def make_transformer(text_width: int) -> SD3Transformer2DModel:
    """Stable Diffusion 3's: joint attention over text and 16 x 16 image tokens, no cross-attention. Blocks start as the
    identity (adaLN-Zero, Peebles and Xie 2023)."""
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        num_attention_heads=6,
        attention_head_dim=32,
        joint_attention_dim=2 * text_width,
        caption_projection_dim=192,
        pooled_projection_dim=2 * text_width,
        pos_embed_max_size=32,
        qk_norm="rms_norm",
    )
    for name, module in model.named_modules():
        if name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear")) or name == "proj_out":
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return model


def with_projection(encoder: CLIPTextModel) -> CLIPTextModelWithProjection:
    """The same text encoder in the class that Stable Diffusion 3 takes.

    Its pipeline reads the last layer but one, so a layer that changes nothing is put behind the trained ones; the
    pooled embedding is the end of the text behind the final norm, projected by the identity.
    """
    layers = encoder.config.num_hidden_layers
    config = CLIPTextConfig.from_dict({**encoder.config.to_dict(), "num_hidden_layers": layers + 1})
    projected = CLIPTextModelWithProjection(config).eval()
    # transformers 4 names the parts of CLIPTextModel under text_model, transformers 5 does not.
    trained = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in encoder.state_dict().items()}
    missing, unexpected = projected.load_state_dict(trained, strict=False)
    assert not [name for name in unexpected if "position_ids" not in name]
    assert all(f"layers.{layers}." in name or name == "text_projection.weight" for name in missing), missing
    weights = projected.state_dict()
    for name in missing:
        if "out_proj" in name or "fc2" in name:
            weights[name].zero_()
    weights["text_projection.weight"].copy_(torch.eye(config.hidden_size))
    return projected


def make_joint_pipeline(base: Path) -> StableDiffusion3Pipeline:
    """An untrained Stable Diffusion 3 around the VAE and the text encoder of the tiny Stable Diffusion at `base`."""
    vae = AutoencoderKL.from_pretrained(base / "vae")
    vae.register_to_config(shift_factor=0.0)  # Stable Diffusion 3 knows one
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    encoder = with_projection(CLIPTextModel.from_pretrained(base / "text_encoder"))
    return StableDiffusion3Pipeline(
        transformer=make_transformer(encoder.config.hidden_size),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
