"""What the scan sees: which pixels each layer of a real generation reads for one pixel, in each direction, beside the
row of the attention matrix that the layer replaces."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from PIL import Image
from torch import Tensor, nn

from ..layers import GSPN2Layer
from ..loading import UserError, check_size
from ..ops import gspn2_scan
from ..patching import patched_modules
from ..patching.families import find_model
from .library import Library
from .painting import Request, after_each_step, paint_or_explain, turn


@dataclass
class Layer:
    """One patched self-attention, what went into it at one denoising step, and the sides of its map in tokens."""

    name: str
    attention: Any
    mixer: GSPN2Layer
    tokens: Tensor  # (1, H * W, C)
    grid: tuple[int, int]


@dataclass
class Recording:
    """A generation whose layers were listened to at one step."""

    image: Image.Image
    layers: list[Layer]
    step: int
    steps: int


def record(library: Library, request: Request, step: int, cancel: threading.Event) -> Recording:
    """Paints the request's first picture and keeps what enters each GSPN-2 layer at denoising step `step` (from 1).

    With classifier-free guidance the prompt's half of the batch is kept, not the empty prompt's.

    Raises:
        UserError: no adapter is chosen, or the request does not fit the model.
        Cancelled: `cancel` was set.
    """
    with turn(library, cancel):
        pipe, adapter = library.pipeline(request.model, request.adapter)
        if adapter is None:
            raise UserError("There is no scan to look into without an adapter; choose one.")
        check_size(pipe, request.height, request.width)
        modules = [(name, module) for name, module, _ in patched_modules(find_model(pipe))]
        layers: list[Layer] = []
        now = 1

        def listen(name: str, attention: Any) -> Any:
            def hook(mixer: GSPN2Layer, args: tuple[Tensor, int, int]) -> None:
                tokens, height, width = args
                # Several maps on one canvas (an image and its references) have no one picture to be shown on.
                if now == step and tokens.shape[1] == height * width:
                    layers.append(Layer(name, attention, mixer, tokens[-1:].detach().clone(), (height, width)))

            return attention.gspn2.register_forward_pre_hook(hook)

        def next_step(number: int) -> None:
            nonlocal now
            now = number + 2

        handles = [listen(name, module) for name, module in modules]
        try:
            parameters = request.parameters(0, request.adapter)
            image = paint_or_explain(pipe, parameters, callback_on_step_end=after_each_step(cancel, next_step))
        finally:
            for handle in handles:
                handle.remove()
    if not layers:
        raise UserError(f"No layer was seen at step {step}; choose an earlier one.")
    return Recording(image, layers, step, request.steps)


def scan_reach(layer: Layer, row: int, column: int) -> Tensor:
    """How much the layer's result at one token depends on each token of the map, for each direction.

    The scan is linear in x and its channels are independent, so the gradient of the scan's output at (row, column) with
    respect to x is exactly the weight with which the gates carry each token there. Channels are weighed by the length
    of their columns in the projections before and after the scan.

    Returns:
        (K, H, W), at least 0, in the order of the layer's directions.
    """
    mixer, (height, width) = layer.mixer, layer.grid
    config, directions = mixer.config, len(mixer.config.directions)
    with torch.enable_grad():
        x, lam, u, logits = (t.detach() for t in mixer.scan_inputs(layer.tokens, height, width))
        x.requires_grad_()
        y = gspn2_scan(
            x,
            lam,
            u,
            logits,
            directions=config.directions,
            normalizer=config.normalizer,
            segment=config.segment,
            decay=config.decay,
        )
        at_token = y[0, row, column].float().sum(-1)
        carried = [torch.autograd.grad(part, x, retain_graph=True)[0][0].float().abs() for part in at_token]
    out = mixer.scaled_out_weight(height, width).detach().float().norm(dim=0)  # (K * D), or (D) with merge "sum"
    out = out.view(-1, mixer.width).expand(directions, -1)
    into = mixer.scan_in.weight.detach()[: mixer.width].float().norm(dim=1)
    return torch.stack([part @ (into * out[k]) for k, part in enumerate(carried)])


def attention_row(layer: Layer, row: int, column: int) -> Tensor | None:
    """The mean over heads of softmax attention's weights for one token, from the model's own W_q and W_k: (H, W).

    None where the attention is not of the plain kind (joint attention has the text in its rows too).
    """
    attention = layer.attention
    if not isinstance(attention, Attention) or getattr(attention, "add_k_proj", None) is not None:
        return None
    height, width = layer.grid
    with torch.no_grad():
        query = attention.to_q(layer.tokens[:, row * width + column, None]).unflatten(-1, (attention.heads, -1))
        key = attention.to_k(layer.tokens).unflatten(-1, (attention.heads, -1))
        query, key = _normed(attention.norm_q, query), _normed(attention.norm_k, key)
        scores = torch.einsum("bqhd,bkhd->bhqk", query.float(), key.float()) * attention.scale
        return scores.softmax(-1).mean(dim=(0, 1, 2)).view(height, width)


def _normed(norm: nn.Module | None, tensor: Tensor) -> Tensor:
    return tensor if norm is None else norm(tensor)


def reach_in_tokens(seen: Tensor, direction: str, row: int, column: int, share: float = 0.9) -> int:
    """The smallest distance, along the direction of the scan, within which `share` of what a token sees lies."""
    along = seen.sum(0) if direction in ("right", "left") else seen.sum(1)
    place = column if direction in ("right", "left") else row
    # "right" carries from left to right: the token sees what lies before it.
    nearest_first = along[: place + 1].flip(0) if direction in ("right", "down") else along[place:]
    cumulative = nearest_first.cumsum(0)
    return int((cumulative < share * cumulative[-1]).sum())
