"""A call with random inputs for every supported model class, made from the model's own config.

Shared by `benchmarks/families.py` (published configurations) and `tests/tiny_families.py` (tiny ones).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from packaging.version import Version
from torch import Tensor


class Draw:
    """Random tensors of one call: rows x columns tokens of image and `text` tokens of prompt for each of `batch`."""

    def __init__(
        self, rows: int, columns: int, batch: int, text: int, device: torch.device | str, dtype: torch.dtype, seed: int
    ) -> None:
        self.rows, self.columns, self.batch, self.text = rows, columns, batch, text
        self.device, self.dtype = torch.device(device), dtype
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        """Normal (batch, *shape)."""
        return self.shared(self.batch, *shape)

    def shared(self, *shape: int) -> Tensor:
        """Normal, one for the whole batch."""
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=self.dtype)

    def full(self, value: float, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.full((self.batch, *shape), value, device=self.device, dtype=dtype or self.dtype)

    def map(self, channels: int, patch: int = 1) -> Tensor:
        """Latents that the model cuts into rows x columns patches."""
        return self(channels, self.rows * patch, self.columns * patch)

    def prompt(self, width: int) -> Tensor:
        return self(self.text, width)

    def image_ids(self, width: int = 3, time: int = 0) -> Tensor:
        return image_ids(self.rows, self.columns, time, width, self.device)


def image_ids(
    rows: int, columns: int, time: int = 0, width: int = 3, device: torch.device | str | None = None
) -> Tensor:
    """Flux' position ids (rows * columns, width): time, row, column."""
    ids = torch.zeros(rows, columns, width, device=device)
    ids[..., 0] = time
    ids[..., 1] += torch.arange(rows, device=device)[:, None]
    ids[..., 2] += torch.arange(columns, device=device)[None]
    return ids.flatten(0, 1)


def _unet2d(config: Any, draw: Draw) -> dict[str, Any]:
    return {"sample": draw.map(config.in_channels), "timestep": torch.tensor(500, device=draw.device)}


def _unet(config: Any, draw: Draw) -> dict[str, Any]:
    call = {**_unet2d(config, draw), "encoder_hidden_states": draw.prompt(config.cross_attention_dim)}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        call["added_cond_kwargs"] = {"text_embeds": draw(pooled), "time_ids": draw(6)}
    return call


def _controlnet(config: Any, draw: Draw) -> dict[str, Any]:
    # The embedding of the condition halves its sides at each step but the last.
    condition = draw.map(config.conditioning_channels, 2 ** (len(config.conditioning_embedding_out_channels) - 1))
    return {**_unet(config, draw), "controlnet_cond": condition, "return_dict": False}


def _dit(config: Any, draw: Draw) -> dict[str, Any]:
    labels = {"timestep": draw.full(3, dtype=torch.long), "class_labels": draw.full(1, dtype=torch.long)}
    return {"hidden_states": draw.map(config.in_channels, config.patch_size), **labels}


def _with_text(width: str, **more: Any) -> Callable[[Any, Draw], dict[str, Any]]:
    """A map, a prompt of the width that the config gives under `width`, and a timestep."""

    def make(config: Any, draw: Draw) -> dict[str, Any]:
        return {
            "hidden_states": draw.map(config.in_channels, config.patch_size or 1),
            "encoder_hidden_states": draw.prompt(config[width]),
            "timestep": draw.full(500.0),
            **more,
        }

    return make


def _hunyuan(config: Any, draw: Draw) -> dict[str, Any]:
    angles = draw.shared(draw.rows * draw.columns, config.attention_head_dim)
    return {
        **_with_text("cross_attention_dim")(config, draw),
        "text_embedding_mask": draw.full(1, draw.text),
        "encoder_hidden_states_t5": draw.prompt(config.cross_attention_dim_t5),
        "text_embedding_mask_t5": draw.full(1, draw.text),
        "image_meta_size": draw.full(1, 6),
        "style": draw.full(0, dtype=torch.long),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _lumina(config: Any, draw: Draw) -> dict[str, Any]:
    side, pairs = max(64, draw.rows, draw.columns), config.hidden_size // config.num_attention_heads // 2
    angles = draw.shared(side, side, pairs).float()
    return {
        **_with_text("cross_attention_dim")(config, draw),
        "timestep": draw.full(0.5),
        "encoder_mask": draw.full(1, draw.text),
        "image_rotary_emb": torch.polar(torch.ones_like(angles), angles),
        "cross_attention_kwargs": {},
    }


def _sd3(config: Any, draw: Draw) -> dict[str, Any]:
    return {
        **_with_text("joint_attention_dim")(config, draw),
        "pooled_projections": draw(config.pooled_projection_dim),
    }


def _sd3_controlnet(config: Any, draw: Draw) -> dict[str, Any]:
    call = _sd3(config, draw)
    return {**call, "controlnet_cond": draw.map(config.in_channels, config.patch_size), "return_dict": False}


def _packed(config: Any, draw: Draw) -> dict[str, Any]:
    """Tokens in one row, with ids of as many numbers as there are axes."""
    axes = len(config.axes_dims_rope)
    return {
        "hidden_states": draw(draw.rows * draw.columns, config.in_channels),
        "encoder_hidden_states": draw.prompt(config.joint_attention_dim),
        "timestep": draw.full(0.5),
        "img_ids": draw.image_ids(axes),
        "txt_ids": torch.zeros(draw.text, axes, device=draw.device),
    }


def _flux(config: Any, draw: Draw) -> dict[str, Any]:
    guidance = {"guidance": draw.full(3.5)} if config.guidance_embeds else {}
    return {**_packed(config, draw), "pooled_projections": draw(config.pooled_projection_dim), **guidance}


def _flux_controlnet(config: Any, draw: Draw) -> dict[str, Any]:
    condition = draw(draw.rows * draw.columns, config.in_channels)
    return {**_flux(config, draw), "controlnet_cond": condition, "return_dict": False}


def _cogview4(config: Any, draw: Draw) -> dict[str, Any]:
    mask = draw.full(1, draw.text)
    mask[-1, draw.text // 2 + 1 :] = 0
    sides = {name: draw.full(1, 2) for name in ("original_size", "target_size", "crop_coords")}
    return {**_with_text("text_embed_dim")(config, draw), **sides, "attention_mask": mask}


def _qwen(config: Any, draw: Draw) -> dict[str, Any]:
    call = _packed(config, draw)
    del call["img_ids"], call["txt_ids"]
    mask = draw.full(1, draw.text, dtype=torch.bool)
    mask[-1, draw.text // 2 + 1 :] = False
    if Version(diffusers.__version__) < Version("0.37"):
        call["txt_seq_lens"] = [draw.text] * draw.batch
    shapes = [[(1, draw.rows, draw.columns)]] * draw.batch
    return {**call, "encoder_hidden_states_mask": mask, "img_shapes": shapes}


CALLS: dict[str, Callable[[Any, Draw], dict[str, Any]]] = {
    "UNet2DConditionModel": _unet,
    "ControlNetModel": _controlnet,
    "UNet2DModel": _unet2d,
    "DiTTransformer2DModel": _dit,
    "Transformer2DModel": _with_text("cross_attention_dim"),
    "PixArtTransformer2DModel": _with_text(
        "caption_channels", added_cond_kwargs={"resolution": None, "aspect_ratio": None}
    ),
    "SanaTransformer2DModel": _with_text("caption_channels"),
    "HunyuanDiT2DModel": _hunyuan,
    "LuminaNextDiT2DModel": _lumina,
    "SD3Transformer2DModel": _sd3,
    "SD3ControlNetModel": _sd3_controlnet,
    "FluxTransformer2DModel": _flux,
    "FluxControlNetModel": _flux_controlnet,
    "ChromaTransformer2DModel": _packed,
    "Flux2Transformer2DModel": _packed,
    "AuraFlowTransformer2DModel": _with_text("joint_attention_dim"),
    "CogView4Transformer2DModel": _cogview4,
    "QwenImageTransformer2DModel": _qwen,
}
"""Model class -> (its config, a `Draw`) -> the arguments of a call."""


def random_call(
    model: Any,
    rows: int,
    columns: int,
    *,
    batch: int = 2,
    text: int = 5,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of a call of `model` on an image of rows x columns tokens (of its finest map) and `text` tokens."""
    return CALLS[type(model).__name__](model.config, Draw(rows, columns, batch, text, device, dtype, seed))
