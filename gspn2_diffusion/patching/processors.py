"""What runs in an attention module's place. Processors are stateless and take no arguments, because diffusers rebuilds
them with `processor.__class__()` (IP-Adapter does); weights are the attention's child module `gspn2`, the rest is in
its plain attribute `_gspn2`. Their parameters are named, because diffusers drops arguments that a processor's signature
does not name."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers import transformer_qwenimage
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import canvas_sides
from .families import Layout
from .grid import GridRecord

# Older diffusers pass Qwen-Image's mask of the text along and ignore it.
QWEN_USES_MASK = hasattr(transformer_qwenimage, "compute_text_seq_len_from_mask")

LAYER = "gspn2"
STATE = "_gspn2"

QKV = tuple[Tensor, Tensor, Tensor]  # each (B, N, heads, head width)
Rotary = tuple[Tensor, Tensor]
Masks = tuple[Tensor | None, Tensor | None]


@dataclass
class PatchState:
    """What a patched attention module remembers. Plain, so that nothing in it is registered with the module."""

    name: str
    original: tuple[Any]
    record: GridRecord
    kind: str = "self"
    enabled: bool = True


class GSPN2SelfAttnProcessor:
    """Runs a self-attention as a GSPN-2 layer, with everything else that diffusers' own processor does around it."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        image_rotary_emb: Any = None,
        query_rotary_emb: Any = None,
        key_rotary_emb: Any = None,
        base_sequence_length: int | None = None,
        *args: Any,
        added: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        residual = hidden_states
        if getattr(attn, "spatial_norm", None) is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        map_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if map_shape:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        state: PatchState = getattr(attn, STATE)
        if map_shape:
            layout = Layout(((map_shape[2], map_shape[3]),))
        else:
            layout = state.record.read(hidden_states.shape[1], state.name)
        hidden_states = _scan(attn, hidden_states, layout, added=added)
        if isinstance(attn.to_out, nn.Identity):  # Lumina-Next projects the heads later
            return hidden_states.unflatten(-1, (attn.heads, -1))
        for module in attn.to_out:
            hidden_states = module(hidden_states)

        if map_shape:
            hidden_states = hidden_states.transpose(1, 2).reshape(map_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        # Almost always 1, and dividing by it would read and write the whole map.
        return hidden_states if attn.rescale_output_factor == 1 else hidden_states / attn.rescale_output_factor


class GSPN2JointAttnProcessor:
    """Runs a joint attention over text and image at a cost linear in the image.

    Image tokens: the scan over the image, plus softmax over the text tokens alone. Text tokens: softmax over
    everything, as before. Queries, keys and values are the model's own, with its norms and rotary embeddings, and both
    results go through its own output projections. In this class the text has its own projections (SD3, Flux, AuraFlow).
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        encoder_hidden_states_mask: Tensor | None = None,
        *args: Any,
        added: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        state: PatchState = getattr(attn, STATE)
        layout = state.record.read(hidden_states.shape[1], state.name)
        text, image = self.project(attn, encoder_hidden_states, hidden_states, image_rotary_emb)
        for_text, for_image = self.masks(attention_mask, encoder_hidden_states_mask, text[0], image[0])
        image_out = _scan(attn, hidden_states, layout, _read_text(text, image, for_image), added)
        # Nothing reads the text behind the last block.
        pre_only = getattr(attn, "context_pre_only", None)
        text_out = encoder_hidden_states if pre_only else _text_rows(text, image, for_text)
        return self.output(attn, image_out, text_out, pre_only)

    def project(self, attn: Any, text: Tensor, image: Tensor, rotary: Any) -> tuple[QKV, QKV]:
        """Queries, keys and values of the text and of the image."""
        text_qkv = _heads(attn, attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text), "norm_added_")
        image_qkv = _heads(attn, attn.to_q(image), attn.to_k(image), attn.to_v(image), "norm_")
        return self.rotate(text_qkv, image_qkv, rotary)

    def rotate(self, text: QKV, image: QKV, rotary: Rotary | None) -> tuple[QKV, QKV]:
        """`rotary` is cos and sin for the sequence of text and image."""
        if rotary is None:
            return text, image
        length = text[0].shape[1]
        cos, sin = rotary
        return _rotated(text, (cos[:length], sin[:length])), _rotated(image, (cos[length:], sin[length:]))

    def masks(self, mask: Tensor | None, text_mask: Tensor | None, text: Tensor, image: Tensor) -> Masks:
        """The mask of the text's queries over text and image, and of the image's queries over the text. Never one over
        all pairs of image tokens; `mask` broadcasts to (B, heads, text + image, text + image), text first."""
        return _split_mask(mask, text.shape[1])

    def output(self, attn: Any, image: Tensor, text: Tensor, pre_only: bool | None) -> tuple[Tensor, Tensor]:
        for module in attn.to_out:
            image = module(image)
        return image, text if pre_only else attn.to_add_out(text)


class GSPN2SharedJointAttnProcessor(GSPN2JointAttnProcessor):
    """Joint attention whose projections serve text and image alike, with rotary embeddings on the image (CogView4)."""

    def project(self, attn: Any, text: Tensor, image: Tensor, rotary: Any) -> tuple[QKV, QKV]:
        text_qkv, image_qkv = (_heads(attn, attn.to_q(x), attn.to_k(x), attn.to_v(x), "norm_") for x in (text, image))
        if rotary is not None:
            image_qkv = _rotated(image_qkv, rotary, use_real_unbind_dim=-2)
        return text_qkv, image_qkv

    def masks(self, mask: Tensor | None, text_mask: Tensor | None, text: Tensor, image: Tensor) -> Masks:
        if mask is None:
            return None, None
        # As in CogView4AttnProcessor, the (B, text) mask becomes a number added to the scores, not a boolean.
        valid = mask.to(text.device) > 0
        keys = F.pad(valid, (0, image.shape[1]), value=True)
        for_text = valid[:, None, :, None] & keys[:, None, None, :]
        return for_text.to(text.dtype), valid[:, None, None, :].to(text.dtype)

    def output(self, attn: Any, image: Tensor, text: Tensor, pre_only: bool | None) -> tuple[Tensor, Tensor]:
        for module in attn.to_out:
            image, text = module(image), module(text)
        return image, text


class GSPN2ComplexJointAttnProcessor(GSPN2JointAttnProcessor):
    """Joint attention with complex rotary embeddings for image and text and a mask of the text (Qwen-Image)."""

    def rotate(self, text: QKV, image: QKV, rotary: Rotary | None) -> tuple[QKV, QKV]:
        if rotary is None:
            return text, image
        for_image, for_text = rotary
        return _rotated_complex(text, for_text), _rotated_complex(image, for_image)

    def masks(self, mask: Tensor | None, text_mask: Tensor | None, text: Tensor, image: Tensor) -> Masks:
        if text_mask is not None and QWEN_USES_MASK:
            mask = F.pad(text_mask.bool(), (0, image.shape[1]), value=True)[:, None, None, :]
        return _split_mask(mask, text.shape[1])


class GSPN2SingleAttnProcessor:
    """Joint attention over one sequence of text and then image (Flux' and AuraFlow's single-stream blocks)."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        qkv = _heads(attn, attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states), "norm_")
        hidden_states = _one_sequence(attn, hidden_states, qkv, image_rotary_emb, attention_mask)
        for module in getattr(attn, "to_out", ()):
            hidden_states = module(hidden_states)
        return hidden_states


class GSPN2FusedSingleAttnProcessor:
    """The same where one projection makes queries, keys, values and the feed-forward's features (Flux.2)."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        fused = attn.to_qkv_mlp_proj(hidden_states)
        query, key, value, features = fused.split([attn.inner_dim] * 3 + [fused.shape[-1] - 3 * attn.inner_dim], dim=-1)
        qkv = _heads(attn, query, key, value, "norm_")
        hidden_states = _one_sequence(attn, hidden_states, qkv, image_rotary_emb, attention_mask)
        return attn.to_out(torch.cat([hidden_states, attn.mlp_act_fn(features)], dim=-1))


def _scan(attn: Any, tokens: Tensor, layout: Layout, text: Tensor | None = None, added: Tensor | None = None) -> Tensor:
    """The attention's GSPN-2 layer on image tokens (B, N, C), with what they read from the text and elsewhere."""
    height, width = canvas_sides(layout.segments)
    return getattr(attn, LAYER)(tokens, height, width, segments=layout.segments, text=text, added=added)


def _one_sequence(attn: Any, tokens: Tensor, qkv: QKV, rotary: Rotary | None, mask: Tensor | None) -> Tensor:
    """(B, text + image, C) -> (B, text + image, heads * head width)."""
    state: PatchState = getattr(attn, STATE)
    layout = state.record.read(tokens.shape[1], state.name, with_text=True)
    if rotary is not None:
        qkv = _rotated(qkv, rotary)
    text: Any = tuple(part[:, : layout.text] for part in qkv)
    image: Any = tuple(part[:, layout.text :] for part in qkv)
    for_text, for_image = _split_mask(mask, layout.text)
    scanned = _scan(attn, tokens[:, layout.text :], layout, _read_text(text, image, for_image))
    return torch.cat([_text_rows(text, image, for_text), scanned], dim=1)


def _split_mask(mask: Tensor | None, length: int) -> Masks:
    """Of a mask over text and image: the rows of the text, and the image's rows over the text alone."""
    if mask is None:
        return None, None
    if mask.shape[-2] == 1:
        return mask, mask[..., :length]
    return mask[..., :length, :], mask[..., length:, :length]


def _heads(attn: Any, query: Tensor, key: Tensor, value: Tensor, norms: str) -> QKV:
    """(B, N, heads * head width) each -> (B, N, heads, head width); queries and keys normalised by `<norms>q` and k."""
    query, key, value = (part.unflatten(-1, (attn.heads, -1)) for part in (query, key, value))
    norm_q, norm_k = getattr(attn, norms + "q", None), getattr(attn, norms + "k", None)
    if norm_q is not None:
        query = norm_q(query).to(value.dtype)
    if norm_k is not None:
        key = norm_k(key).to(value.dtype)
    return query, key, value


def _rotated(qkv: QKV, rotary: Rotary, **options: Any) -> QKV:
    query, key, value = qkv
    rotate: Any = apply_rotary_emb
    return rotate(query, rotary, sequence_dim=1, **options), rotate(key, rotary, sequence_dim=1, **options), value


def _rotated_complex(qkv: QKV, frequencies: Tensor) -> QKV:
    """Rotates neighbouring pairs of channels by `frequencies` (N, head width / 2), complex."""

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * frequencies[:, None]).flatten(-2).to(x.dtype)

    return rotate(qkv[0]), rotate(qkv[1]), qkv[2]


def _read_text(text: QKV, image: QKV, mask: Tensor | None) -> Tensor | None:
    """(B, image, heads, head width): softmax of the image's queries over the text alone. N_image x N_text."""
    if text[0].shape[1] == 0:
        return None
    return softmax_attention(image[0], text[1], text[2], mask)


def _text_rows(text: QKV, image: QKV, mask: Tensor | None) -> Tensor:
    """(B, text, heads * head width): softmax of the text's queries over text and image, as before the patch."""
    keys, values = torch.cat([text[1], image[1]], dim=1), torch.cat([text[2], image[2]], dim=1)
    return softmax_attention(text[0], keys, values, mask).flatten(-2)


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).to(value.dtype)


PROCESSORS: dict[str, type] = {
    "self": GSPN2SelfAttnProcessor,
    "joint": GSPN2JointAttnProcessor,
    "joint_shared": GSPN2SharedJointAttnProcessor,
    "joint_complex": GSPN2ComplexJointAttnProcessor,
    "single": GSPN2SingleAttnProcessor,
    "single_fused": GSPN2FusedSingleAttnProcessor,
}

for _processor in PROCESSORS.values():
    # diffusers asks for it in every call, and making it takes as long as a launch of the scan.
    _call: Any = _processor.__call__
    _call.__signature__ = inspect.signature(_call)
