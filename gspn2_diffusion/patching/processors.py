"""What runs in an attention module's place. Processors are stateless and take no arguments, because diffusers rebuilds
them with `processor.__class__()` (IP-Adapter does); weights are the attention's child module `gspn2`, the rest is in
its plain attribute `_gspn2`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .grid import GridRecord

LAYER = "gspn2"
STATE = "_gspn2"


@dataclass
class PatchState:
    """What a patched attention module remembers. Plain, so that nothing in it is registered with the module."""

    name: str
    original: tuple[Any]
    record: GridRecord
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
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        state: PatchState = getattr(attn, STATE)
        if not state.enabled:
            return state.original[0](attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        map_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if map_shape:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        height, width = map_shape[2:] if map_shape else state.record.sides(hidden_states.shape[1], state.name)
        hidden_states = getattr(attn, LAYER)(hidden_states, height, width)
        for module in attn.to_out:
            hidden_states = module(hidden_states)

        if map_shape:
            hidden_states = hidden_states.transpose(1, 2).reshape(map_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor


PROCESSORS: dict[str, type] = {"self": GSPN2SelfAttnProcessor}
