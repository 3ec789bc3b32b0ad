"""One tiny real model of every supported class, with random weights and inputs of any size, for the test matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import diffusers
import torch
from torch import Tensor

from benchmarks.family_calls import random_call

from . import tiny_models

BATCH, TEXT = 2, 5


@dataclass(frozen=True)
class Case:
    """A model to test.

    Args:
        build: makes the model.
        text: the argument that holds the prompt, or None for a model without text.
        levels: whether attentions see the map at several scales, so that their sides differ from (rows, columns).
        sides: maps to try, in tokens. DiT itself takes square ones only, UNet2DModel even ones.
    """

    build: Callable[[], Any]
    text: str | None = "encoder_hidden_states"
    levels: bool = False
    sides: tuple[tuple[int, int], ...] = ((3, 5), (7, 2))

    def inputs(self, rows: int, columns: int) -> dict[str, Any]:
        """Arguments of a call on a map of rows x columns tokens."""
        return random_call(_model(self.build), rows, columns, batch=BATCH, text=TEXT)


@cache
def _model(build: Callable[[], Any]) -> Any:
    """A model of which only the config is read."""
    return build()


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
    "UNet2DConditionModel": Case(tiny_models.unet, levels=True, sides=((6, 10), (16, 3))),
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
        text=None,
        levels=True,
        sides=((6, 10), (16, 2)),
    ),
    "DiTTransformer2DModel": Case(
        made("DiTTransformer2DModel", **DIT, num_embeds_ada_norm=10),
        text=None,
        sides=((3, 3), (5, 5)),
    ),
    "Transformer2DModel": Case(
        made("Transformer2DModel", **HEADS, in_channels=16, num_layers=2, norm_num_groups=8, cross_attention_dim=16),
    ),
    "PixArtTransformer2DModel": Case(
        made("PixArtTransformer2DModel", **DIT, cross_attention_dim=16, caption_channels=16, interpolation_scale=1),
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
    ),
    "SD3Transformer2DModel": Case(made("SD3Transformer2DModel", **SD3)),
    "SD3ControlNetModel": Case(made("SD3ControlNetModel", **SD3)),
    "FluxTransformer2DModel": Case(
        made("FluxTransformer2DModel", **FLUX, pooled_projection_dim=16),
    ),
    "FluxControlNetModel": Case(made("FluxControlNetModel", **FLUX, pooled_projection_dim=16)),
    "ChromaTransformer2DModel": Case(
        made(
            "ChromaTransformer2DModel",
            **FLUX,
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
    ),
    "Flux2Transformer2DModel": Case(
        made(
            "Flux2Transformer2DModel",
            **{**FLUX, "axes_dims_rope": (2, 2, 2, 2)},
            timestep_guidance_channels=16,
            guidance_embeds=False,
        ),
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
    ),
}


def available(name: str) -> bool:
    """Whether the installed diffusers has the class."""
    return hasattr(diffusers, name)
