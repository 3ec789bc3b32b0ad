"""One tiny real model of every supported class, with random weights and inputs of any size, for the test matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from . import tiny_models

BATCH, TEXT = 2, 5


@dataclass(frozen=True)
class Case:
    """A model to test.

    Args:
        build: makes the model.
        inputs: (rows, columns in tokens) -> the call's arguments.
        text: the argument that holds the prompt, or None for a model without text.
        levels: whether attentions see the map at several scales, so that their sides differ from (rows, columns).
        sides: maps to try, in tokens. DiT itself takes square ones only, UNet2DModel even ones.
    """

    build: Callable[[], Any]
    inputs: Callable[[int, int], dict[str, Any]]
    text: str | None = "encoder_hidden_states"
    levels: bool = False
    sides: tuple[tuple[int, int], ...] = ((3, 5), (7, 2))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(name: str, **config: Any) -> Callable[[], Any]:
    """Builds `diffusers.<name>` with every parameter drawn: zero-initialised gates would hide the attentions."""

    def build() -> Any:
        torch.manual_seed(0)
        model = getattr(diffusers, name)(**config).eval()
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.3, generator=generator)
        return model

    return build


def latents(rows: int, columns: int, channels: int = 4, patch: int = 2) -> Tensor:
    return noise(BATCH, channels, rows * patch, columns * patch)


def with_text(rows: int, columns: int, channels: int = 4, patch: int = 2, dim: int = 16, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": latents(rows, columns, channels, patch),
        "encoder_hidden_states": noise(BATCH, TEXT, dim, seed=1),
        "timestep": torch.tensor([10.0] * BATCH),
        **more,
    }


def image_ids(rows: int, columns: int, time: int = 0, width: int = 3) -> Tensor:
    """Flux' position ids: time, row, column."""
    ids = torch.zeros(rows, columns, width)
    ids[..., 0] = time
    ids[..., 1] += torch.arange(rows)[:, None]
    ids[..., 2] += torch.arange(columns)[None]
    return ids.flatten(0, 1)


def packed(rows: int, columns: int, ids: int = 3, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, rows * columns, 4),
        "encoder_hidden_states": noise(BATCH, TEXT, 16, seed=1),
        "timestep": torch.tensor([0.5] * BATCH),
        "img_ids": image_ids(rows, columns, width=ids),
        "txt_ids": torch.zeros(TEXT, ids),
        **more,
    }


def unet_call(rows: int, columns: int) -> dict[str, Any]:
    return tiny_models.unet_inputs(rows, columns)


def controlnet_call(rows: int, columns: int) -> dict[str, Any]:
    return {**unet_call(rows, columns), "controlnet_cond": noise(2, 3, rows * 8, columns * 8), "return_dict": False}


def hunyuan_call(rows: int, columns: int) -> dict[str, Any]:
    angles = noise(rows * columns, 8, seed=3)
    return {
        **with_text(rows, columns, timestep=torch.tensor([10.0] * BATCH)),
        "text_embedding_mask": torch.ones(BATCH, TEXT),
        "encoder_hidden_states_t5": noise(BATCH, TEXT, 16, seed=2),
        "text_embedding_mask_t5": torch.ones(BATCH, TEXT),
        "image_meta_size": torch.ones(BATCH, 6),
        "style": torch.zeros(BATCH, dtype=torch.long),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def lumina_call(rows: int, columns: int) -> dict[str, Any]:
    return {
        "hidden_states": latents(rows, columns),
        "timestep": torch.tensor([0.5] * BATCH),
        "encoder_hidden_states": noise(BATCH, TEXT, 16, seed=1),
        "encoder_mask": torch.ones(BATCH, TEXT),
        "image_rotary_emb": torch.polar(torch.ones(64, 64, 4), noise(64, 64, 4, seed=3)),
        "cross_attention_kwargs": {},
    }


def flux_control_call(rows: int, columns: int) -> dict[str, Any]:
    call = packed(rows, columns, pooled_projections=noise(BATCH, 16, seed=2), return_dict=False)
    return {**call, "controlnet_cond": noise(BATCH, rows * columns, 4, seed=4)}


def sd3_control_call(rows: int, columns: int) -> dict[str, Any]:
    call = with_text(rows, columns, pooled_projections=noise(BATCH, 16, seed=2), return_dict=False)
    return {**call, "controlnet_cond": latents(rows, columns)}


def sd3_call(rows: int, columns: int) -> dict[str, Any]:
    return with_text(rows, columns, pooled_projections=noise(BATCH, 16, seed=2))


def cogview_call(rows: int, columns: int) -> dict[str, Any]:
    sides = {name: torch.ones(BATCH, 2) for name in ("original_size", "target_size", "crop_coords")}
    mask = torch.ones(BATCH, TEXT)
    mask[1, 3:] = 0
    return with_text(rows, columns, **sides, attention_mask=mask)


def qwen_call(rows: int, columns: int) -> dict[str, Any]:
    mask = torch.ones(BATCH, TEXT, dtype=torch.bool)
    mask[1, 3:] = False
    call = packed(rows, columns)
    del call["img_ids"], call["txt_ids"]
    shapes = [[(1, rows, columns)]] * BATCH
    extra = {"txt_seq_lens": [TEXT] * BATCH} if diffusers.__version__ < "0.37" else {}
    return {**call, "encoder_hidden_states_mask": mask, "img_shapes": shapes, **extra}


HEADS = dict(num_attention_heads=2, attention_head_dim=8)
DIT = dict(**HEADS, in_channels=4, out_channels=4, num_layers=2, sample_size=8, patch_size=2)
SD3 = dict(
    **DIT,
    joint_attention_dim=16,
    caption_projection_dim=16,
    pooled_projection_dim=16,
    pos_embed_max_size=32,
    qk_norm="rms_norm",
    dual_attention_layers=(0,),
)
FLUX = dict(**HEADS, in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=16, axes_dims_rope=(2, 2, 4))

CASES: dict[str, Case] = {
    "UNet2DConditionModel": Case(tiny_models.unet, unet_call, levels=True, sides=((6, 10), (16, 3))),
    "ControlNetModel": Case(
        made(
            "ControlNetModel",
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            conditioning_embedding_out_channels=(8, 8, 8, 8),
        ),
        controlnet_call,
        levels=True,
        sides=((6, 10), (16, 3)),
    ),
    "UNet2DModel": Case(
        made(
            "UNet2DModel",
            sample_size=16,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(16, 32),
            norm_num_groups=8,
            attention_head_dim=8,
            down_block_types=("AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D"),
        ),
        lambda rows, columns: {"sample": latents(rows, columns, patch=1), "timestep": torch.tensor(10)},
        text=None,
        levels=True,
        sides=((6, 10), (16, 2)),
    ),
    "DiTTransformer2DModel": Case(
        made("DiTTransformer2DModel", **DIT, num_embeds_ada_norm=10),
        lambda rows, columns: {
            "hidden_states": latents(rows, columns),
            "timestep": torch.tensor([3] * BATCH),
            "class_labels": torch.tensor([1] * BATCH),
        },
        text=None,
        sides=((3, 3), (5, 5)),
    ),
    "Transformer2DModel": Case(
        made("Transformer2DModel", **HEADS, in_channels=16, num_layers=2, norm_num_groups=8, cross_attention_dim=16),
        lambda rows, columns: with_text(rows, columns, channels=16, patch=1),
    ),
    "PixArtTransformer2DModel": Case(
        made("PixArtTransformer2DModel", **DIT, cross_attention_dim=16, caption_channels=16, interpolation_scale=1),
        lambda rows, columns: with_text(rows, columns, added_cond_kwargs={"resolution": None, "aspect_ratio": None}),
    ),
    "SanaTransformer2DModel": Case(
        made(
            "SanaTransformer2DModel",
            **DIT,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
        ),
        with_text,
    ),
    "HunyuanDiT2DModel": Case(
        made(
            "HunyuanDiT2DModel",
            **HEADS,
            in_channels=4,
            patch_size=2,
            sample_size=8,
            hidden_size=16,
            num_layers=2,
            mlp_ratio=2.0,
            cross_attention_dim=16,
            cross_attention_dim_t5=16,
            pooled_projection_dim=16,
            text_len=TEXT,
            text_len_t5=TEXT,
        ),
        hunyuan_call,
    ),
    "LuminaNextDiT2DModel": Case(
        made(
            "LuminaNextDiT2DModel",
            sample_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=32,
            num_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=16,
            cross_attention_dim=16,
            learn_sigma=False,
        ),
        lumina_call,
    ),
    "SD3Transformer2DModel": Case(made("SD3Transformer2DModel", **SD3), sd3_call),
    "SD3ControlNetModel": Case(made("SD3ControlNetModel", **SD3), sd3_control_call),
    "FluxTransformer2DModel": Case(
        made("FluxTransformer2DModel", **FLUX, pooled_projection_dim=16),
        lambda rows, columns: packed(rows, columns, pooled_projections=noise(BATCH, 16, seed=2)),
    ),
    "FluxControlNetModel": Case(made("FluxControlNetModel", **FLUX, pooled_projection_dim=16), flux_control_call),
    "ChromaTransformer2DModel": Case(
        made(
            "ChromaTransformer2DModel",
            **FLUX,
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
        packed,
    ),
    "Flux2Transformer2DModel": Case(
        made(
            "Flux2Transformer2DModel",
            **{**FLUX, "axes_dims_rope": (2, 2, 2, 2)},
            timestep_guidance_channels=16,
            guidance_embeds=False,
        ),
        lambda rows, columns: packed(rows, columns, ids=4),
    ),
    "AuraFlowTransformer2DModel": Case(
        made(
            "AuraFlowTransformer2DModel",
            **HEADS,
            sample_size=8,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pos_embed_max_size=1024,
        ),
        with_text,
    ),
    "CogView4Transformer2DModel": Case(
        made(
            "CogView4Transformer2DModel",
            **HEADS,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            text_embed_dim=16,
            time_embed_dim=16,
            condition_dim=8,
            sample_size=8,
            rope_axes_dim=(16, 16),
        ),
        cogview_call,
    ),
    "QwenImageTransformer2DModel": Case(
        made(
            "QwenImageTransformer2DModel",
            **HEADS,
            in_channels=4,
            out_channels=1,
            num_layers=2,
            joint_attention_dim=16,
            axes_dims_rope=(2, 2, 4),
        ),
        qwen_call,
    ),
}


def available(name: str) -> bool:
    """Whether the installed diffusers has the class."""
    return hasattr(diffusers, name)
