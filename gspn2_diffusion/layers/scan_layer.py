"""The layer that stands where self-attention stood: one projection, the line scan, one projection back."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import gspn2_scan
from .config import GSPN2Config


class GSPN2Layer(nn.Module):
    """GSPN-2 token mixer (arXiv 2512.07884): tokens -> x, gates and tap logits -> four line scans -> tokens.

    It replaces everything of a self-attention up to its output projection, which stays the model's own.

    Everything the scan needs comes out of one linear layer, `scan_in`, whose output features are, in this order:
    x (D), input gates lam (Kg * D), output gates u (Kg * D), tap logits (K * G * 3), padding up to a multiple of 8 that
    nothing reads (it keeps every row of the feature tensor aligned for wide loads). K is the number of directions, Kg
    is K with per-direction gates and 1 with shared ones. The scan reads that tensor in place.

    A scan over n lines gathers up to n lines' worth of input, because each row of its propagation matrix sums to 1.
    The layer divides each direction's output by the number of lines it runs over, so that the same weights give the
    same scale at every resolution; the division is folded into the weight of `scan_out`.

    Args:
        channels: width C of the tokens.
        out_channels: width of the result, the input width of the attention's output projection.
        config: the operator's options.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        config: GSPN2Config,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.out_channels, self.config = channels, out_channels, config
        # Where only some of the map's rows are on this rank (gspn2_diffusion.parallel): how to scan the whole map.
        self.rows: Any = None
        self.width = config.width(channels)
        if self.width % config.groups:
            raise ValueError(f"proxy width {self.width} is not divisible by groups {config.groups}; change either.")
        directions = len(config.directions)
        self.gate_directions = directions if config.gates == "per_direction" else 1
        gate = self.gate_directions * self.width
        self.sizes = (self.width, gate, gate, directions * config.groups * 3)
        features = math.ceil(sum(self.sizes) / 8) * 8
        merged = self.width * (directions if config.merge == "concat" else 1)
        self.scan_in = nn.Linear(channels, features, device=device, dtype=dtype)
        self.scan_out = nn.Linear(merged, out_channels, bias=False, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, proxy_dim={self.width}, directions={'/'.join(self.config.directions)}"

    def forward(self, hidden_states: Tensor, height: int, width: int) -> Tensor:
        """Mixes the tokens of a map.

        Args:
            hidden_states: (B, H * W, C) tokens in row-major order.
            height, width: the map's sides, in tokens.

        Returns:
            (B, H * W, out_channels), to be passed to the attention's output projection.
        """
        scanned = self.scan(hidden_states, height, width)
        return F.linear(scanned, self.scaled_out_weight(height, width))

    def scan(self, hidden_states: Tensor, height: int, width: int) -> Tensor:
        """(B, H * W, C) -> (B, H * W, K * D), or (B, H * W, D) with merge "sum": the part before `scan_out`."""
        config = self.config
        scan = gspn2_scan if self.rows is None else self.rows.scan
        y = scan(
            *self.scan_inputs(hidden_states, height, width),
            directions=config.directions,
            normalizer=config.normalizer,
            segment=config.segment,
            merge=config.merge,
        )
        return y.flatten(3).flatten(1, 2) if config.merge == "concat" else y.flatten(1, 2)

    def scan_inputs(self, hidden_states: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The scan's x, lam, u and logits (see `gspn2_scan`), views of one tensor."""
        features = self.scan_in(hidden_states).unflatten(1, (height, width))
        x, lam, u, logits, _ = features.split((*self.sizes, features.shape[-1] - sum(self.sizes)), dim=-1)
        gates = (self.gate_directions, self.width)
        taps = (len(self.config.directions), self.config.groups, 3)
        return x, lam.unflatten(-1, gates), u.unflatten(-1, gates), logits.unflatten(-1, taps)

    def scaled_out_weight(self, height: int, width: int) -> Tensor:
        """`scan_out`'s weight with each direction divided by the number of lines it runs over."""
        height = height if self.rows is None else self.rows.height
        lines = [width if direction in ("right", "left") else height for direction in self.config.directions]
        if self.config.segment is not None:
            lines = [min(n, self.config.segment) for n in lines]
        weight = self.scan_out.weight
        if self.config.merge == "sum" or all(n == lines[0] for n in lines):
            return weight * (len(lines) / sum(lines))
        return torch.cat([part / n for part, n in zip(weight.split(self.width, dim=1), lines, strict=True)], dim=1)
