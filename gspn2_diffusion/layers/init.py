"""Where a new layer starts: from the attention it replaces, or at random."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .scan_layer import FRESH_SHARE, TEXT_SHARE, GSPN2Layer


@torch.no_grad()
def teacher_init(layer: GSPN2Layer, value_weight: Tensor, out_weight: Tensor, value_bias: Tensor | None = None) -> None:
    """Starts `layer` as the best low-rank mixer that the attention's own value and output matrices allow.

    Softmax attention computes W_o A W_v x for a mixing matrix A. Among maps of rank D, "project down, mix, project up"
    comes closest to W_o W_v with its truncated SVD U S V^T (Eckart and Young), so x = S^1/2 V^T and the way back, seen
    through the model's own W_o, is U S^1/2. The gates start neutral: equal taps, lam = u = 1. With the layer's division
    by the number of lines, the directions then add up to a mean along the row and the column of each pixel; where the
    state decays, lam = 1/4 makes it a mean of the lines nearby.

    Args:
        layer: filled in place.
        value_weight: (inner, C), the attention's W_v.
        out_weight: (C_out, inner), the attention's W_o, or the identity where the model has none.
        value_bias: (inner,), added to the mean through the best rank-D fit, or None.
    """
    value, out = value_weight.float(), out_weight.float()
    # torch.svd_lowrank would be faster, but it draws from the global generator and so would move users' seeds.
    left, singular, right = torch.linalg.svd(out @ value, full_matrices=False)
    rank = min(layer.width, singular.numel())
    root = singular[:rank].sqrt()
    down = torch.zeros(layer.width, layer.channels, device=value.device)
    down[:rank] = root[:, None] * right[:rank]
    up = torch.zeros(layer.out_channels, layer.width, device=value.device)
    up[:, :rank] = torch.linalg.pinv(out) @ (left[:, :rank] * root)

    directions = len(layer.config.directions)
    x, lam, u, _ = layer.sizes
    layer.scan_in.weight.zero_()
    layer.scan_in.weight[:x] = down.to(layer.scan_in.weight)
    layer.scan_in.bias.zero_()
    layer.scan_in.bias[x : x + lam + u] = 1.0
    if value_bias is not None:
        shift = left[:, :rank].T @ (out @ value_bias.float()) / root
        # A direction that W_o W_v maps to (numerically) nothing cannot carry a bias either.
        shift[singular[:rank] <= singular[0] * 1e-6] = 0
        layer.scan_in.bias[:rank] = shift.to(layer.scan_in.bias)
    if layer.config.decay:
        layer.scan_in.bias[x : x + lam] = math.log(FRESH_SHARE / (1 - FRESH_SHARE))
    # Each direction alone carries half a mean on average (a line sees the lines before it), hence 2 / K. Where the scan
    # restarts every s lines it is (s + 1) / 2 lines of s.
    # A decaying state holds a whole mean but for the first lines.
    segment = layer.config.segment
    lines = 1 if layer.config.decay else 2 if segment is None else 2 * segment / (segment + 1)
    up = up * (lines / directions)
    if layer.text_share is not None:
        # Softmax over text and image gave the image what the text did not take.
        layer.text_share.fill_(math.log(TEXT_SHARE / (1 - TEXT_SHARE)))
        up = up * (1 - TEXT_SHARE)
    copies = directions if layer.config.merge == "concat" else 1
    layer.scan_out.weight.copy_(up.repeat(1, copies))


@torch.no_grad()
def random_init(layer: GSPN2Layer, seed: int) -> None:
    """PyTorch's default for linear layers (uniform in +-1/sqrt(fan_in)), from a generator of its own."""
    if layer.text_share is not None:
        layer.text_share.fill_(math.log(TEXT_SHARE / (1 - TEXT_SHARE)))
    generator = torch.Generator().manual_seed(seed)
    for linear in (layer.scan_in, layer.scan_out):
        bound = 1 / math.sqrt(linear.in_features)
        for parameter in (linear.weight, linear.bias):
            if parameter is not None:
                drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                parameter.copy_(drawn.to(parameter))


def dense_weight(linear: Any) -> Tensor:
    """The (out, in) weight under a linear layer, looking through a LoRA wrapper and a quantised tensor."""
    weight = getattr(linear, "base_layer", linear).weight
    quantised = type(weight) not in (torch.nn.Parameter, Tensor) or not weight.is_floating_point()
    return weight.dequantize() if quantised and hasattr(weight, "dequantize") else weight
