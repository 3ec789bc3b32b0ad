"""IP-Adapters that work inside the attentions that GSPN-2 replaces: SD3's and that of Flux.1 and Chroma. UNets have
theirs in the cross-attentions, which stay.

An adapter of this kind is a processor with weights. While patched it stays where diffusers put it, as the attention's
registered child, so that it moves, casts, saves and changes its scale as ever and `unload_ip_adapter` knows it; only
its class becomes a subclass that runs GSPN-2 and adds what the adapter reads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import Tensor
from torch.nn import functional as F

from .families import Layout
from .processors import (
    PROCESSORS,
    STATE,
    GSPN2JointAttnProcessor,
    GSPN2SelfAttnProcessor,
    PatchState,
    softmax_attention,
)

# SD3's adapter reads the image, too; beyond this many tokens along a side it reads means, to stay linear in the image.
CELLS = 32


class GSPN2FluxIPAdapterAttnProcessor(GSPN2JointAttnProcessor, FluxIPAdapterAttnProcessor):
    """Adds softmax over each adapter's image prompt, which the block takes as a third output (Flux.1, Chroma). The
    queries are the image's, before the rotary embedding."""

    def __call__(  # type: ignore[override]
        self, attn: Any, hidden_states: Tensor, *args: Any, ip_hidden_states: list[Tensor] | None = None, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        if ip_hidden_states is None:
            raise ValueError(
                "An IP-Adapter is loaded and no image prompt reached the attention; pass ip_adapter_image, or "
                "unload_ip_adapter()."
            )
        outputs = super().__call__(attn, hidden_states, *args, **kwargs)
        query = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)))
        read = torch.zeros_like(outputs[0])
        for prompt, scale, to_k, to_v in zip(ip_hidden_states, self.scale, self.to_k_ip, self.to_v_ip, strict=True):
            # (B, images, tokens, width): all images of an adapter are read as one.
            key, value = (part(prompt.flatten(1, -2)).unflatten(-1, (attn.heads, -1)) for part in (to_k, to_v))
            read = read + scale * softmax_attention(query, key, value).flatten(2)
        return *outputs, read


class _SD3IPAdapter:
    """Adds softmax over the image and the image prompt together, before the output projection."""

    def __call__(
        self: Any,
        attn: Any,
        hidden_states: Tensor,
        *args: Any,
        ip_hidden_states: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        added = None
        if self.scale != 0 and ip_hidden_states is not None:
            added = self.scale * self.read(attn, hidden_states, self.norm_ip(ip_hidden_states, temb=temb))
        return super().__call__(attn, hidden_states, *args, added=added, **kwargs)  # type: ignore[misc]

    def read(self: Any, attn: Any, image: Tensor, prompt: Tensor) -> Tensor:
        """(B, N, C), (B, P, C) -> (B, N, C)."""
        state: PatchState = getattr(attn, STATE)
        cells = _cells(image, state.record.read(image.shape[1], state.name))

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1))

        query, image_key = self.norm_q(heads(attn.to_q(image))), self.norm_k(heads(attn.to_k(cells)))
        key = torch.cat([image_key, self.norm_ip_k(heads(self.to_k_ip(prompt)))], dim=1)
        value = heads(torch.cat([attn.to_v(cells), self.to_v_ip(prompt)], dim=1))
        mask = None
        if cells.shape[1] < image.shape[1]:
            # A cell stands for several tokens; the image keeps its weight against the prompt.
            mask = query.new_zeros(1, 1, 1, key.shape[1])
            mask[..., : cells.shape[1]] = math.log(image.shape[1] / cells.shape[1])
        return softmax_attention(query, key, value, mask).flatten(2)


class GSPN2SD3IPAdapterJointAttnProcessor(  # type: ignore[misc]
    _SD3IPAdapter, GSPN2JointAttnProcessor, SD3IPAdapterJointAttnProcessor2_0
):
    """In SD3's joint attentions."""


class GSPN2SD3IPAdapterSelfAttnProcessor(  # type: ignore[misc]
    _SD3IPAdapter, GSPN2SelfAttnProcessor, SD3IPAdapterJointAttnProcessor2_0
):
    """In `attn2` of SD3.5-medium."""


def _cells(tokens: Tensor, layout: Layout) -> Tensor:
    """(B, N, C) -> (B, M, C): means over the cells of a grid of at most CELLS x CELLS; the tokens of smaller maps."""
    ((height, width),) = layout.segments
    if max(height, width) <= CELLS:
        return tokens
    maps = tokens.transpose(1, 2).unflatten(2, (height, width))
    return F.adaptive_avg_pool2d(maps, (min(height, CELLS), min(width, CELLS))).flatten(2).transpose(1, 2)


COMBINED: dict[tuple[str, type], type] = {
    ("joint", FluxIPAdapterAttnProcessor): GSPN2FluxIPAdapterAttnProcessor,
    ("joint", SD3IPAdapterJointAttnProcessor2_0): GSPN2SD3IPAdapterJointAttnProcessor,
    ("self", SD3IPAdapterJointAttnProcessor2_0): GSPN2SD3IPAdapterSelfAttnProcessor,
}
"""(kind of site, an IP-Adapter's class) -> its class while patched."""
PLAIN = {combined: adapter for (_, adapter), combined in COMBINED.items()}


def runs_gspn2(attention: Any, state: PatchState) -> bool:
    """Whether ours is the attention's processor."""
    processor = attention.processor
    return type(processor) is PROCESSORS[state.kind] or (processor is state.original[0] and type(processor) in PLAIN)


def put_on(attention: Any, state: PatchState) -> bool:
    """Lets an attention run as GSPN-2, with the IP-Adapter that is on it now. Returns whether one came or went."""
    changed = _follow(attention, state)
    processor = state.original[0]
    combined = COMBINED.get((state.kind, type(processor)))
    if combined is None:
        attention.set_processor(PROCESSORS[state.kind]())
    else:
        attention.set_processor(processor)
        processor.__class__ = combined
    return changed


def take_off(attention: Any, state: PatchState) -> None:
    """Lets an attention run as what it was, with the IP-Adapter that is on it now."""
    _follow(attention, state)
    attention.set_processor(_plain(state.original[0]))


def refuse_ip_adapter(kind: str, processor: Any) -> None:
    """
    Raises:
        ValueError: the processor adds an image prompt inside a joint attention in a way that is not known.
    """
    known = type(processor) in PLAIN or (kind, type(processor)) in COMBINED
    if kind != "self" and "IPAdapter" in type(processor).__name__ and not known:
        raise ValueError(
            f"{type(processor).__name__} works inside the joint attentions that GSPN-2 replaces, and only the "
            "IP-Adapters of SD3, Flux.1 and Chroma are known there; unload_ip_adapter() or remove_gspn2."
        )


def _follow(attention: Any, state: PatchState) -> bool:
    """Loading an IP-Adapter and unloading it replace processors. What came is what will be put back."""
    found, before = attention.processor, state.original[0]
    if found is before or type(found) is PROCESSORS[state.kind]:
        return False
    found, before = _plain(found), _plain(before)
    if not any((state.kind, type(processor)) in COMBINED for processor in (found, before)):
        return False
    state.original = (found,)
    return True


def _plain(processor: Any) -> Any:
    """An IP-Adapter's processor with its own class again; any other as it is."""
    if type(processor) in PLAIN:
        processor.__class__ = PLAIN[type(processor)]
    return processor
