"""The layer that stands where self-attention stood: one projection, the line scan, one projection back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import gspn2_scan, gspn2_scan_planes, scans_planes
from .config import GSPN2Config

# Attention's own share of the text is not known without data; it is learnt for each head from here.
TEXT_SHARE = 0.25
# Where the state decays, each line starts as this share of the state: a mean over about four lines.
FRESH_SHARE = 0.25


class GSPN2Layer(nn.Module):
    """GSPN-2 token mixer (arXiv 2512.07884): tokens -> x, gates and tap logits -> four line scans -> tokens.

    It replaces everything of a self-attention up to its output projection, which stays the model's own.

    Everything the scan needs comes out of one linear layer, `scan_in`, whose output features are, in this order:
    x (D), input gates lam (Kg * D), output gates u (Kg * D), tap logits (K * G * 3), padding up to a multiple of 8 that
    nothing reads (it keeps every row of the feature tensor aligned for wide loads). K is the number of directions, Kg
    is K with per-direction gates and 1 with shared ones. The scan reads that tensor in place.

    A scan over n lines gathers up to n lines' worth of input, because each row of its propagation matrix sums to 1.
    The layer divides each direction's output by the number of lines it runs over, so that the same weights give the
    same scale at every resolution; the division is folded into the weight of `scan_out`. With `decay` lam is a sigmoid
    of its features, a direction's output is a weighted mean already, and nothing is divided.

    In a joint attention over text and image (SD3, Flux) the scan mixes the image tokens, and what they read from the
    text by softmax over the text alone is added with a learnt share for each head, sigmoid(`text_share`).

    Args:
        channels: width C of the tokens.
        out_channels: width of the result, the input width of the attention's output projection.
        config: the operator's options.
        text_heads: heads of the text part of a joint attention, 0 where there is no text in the attention.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        config: GSPN2Config,
        text_heads: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.out_channels, self.config = channels, out_channels, config
        # Where only some of the map's rows are on this rank (gspn2_diffusion.parallel): how to scan the whole map.
        self.rows: Any = None
        self.full_prefix = ""
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
        self.text_share: nn.Parameter | None = None
        if text_heads:
            start = math.log(TEXT_SHARE / (1 - TEXT_SHARE))
            self.text_share = nn.Parameter(torch.full((text_heads,), start, device=device, dtype=dtype))

    def extra_repr(self) -> str:
        return f"channels={self.channels}, proxy_dim={self.width}, directions={'/'.join(self.config.directions)}"

    def forward(
        self,
        hidden_states: Tensor,
        height: int,
        width: int,
        *,
        segments: Sequence[tuple[int, int]] = (),
        text: Tensor | None = None,
        added: Tensor | None = None,
    ) -> Tensor:
        """Mixes the tokens of a map.

        Args:
            hidden_states: (B, N, C) tokens in row-major order, N = height * width where there is one map.
            height, width: the map's sides, in tokens.
            segments: sides of several maps whose tokens follow one another (an image and its references). They are
                scanned as one canvas of height x width, side by side and aligned at the top (`canvas_sides`), so that
                a reference reaches the image along their common rows. Empty places pass the state on and add nothing.
            text: (B, N, heads, head width), what each token read from the text, to be added with its share.
            added: (B, N, out_channels), added as it is (what an IP-Adapter read from its image).

        Returns:
            (B, N, out_channels), to be passed to the attention's output projection.
        """
        scanned = self.scan(hidden_states, height, width, segments)
        if _plain(self.scan_out):
            mixed = F.linear(scanned, self.scaled_out_weight(height, width))
        else:
            mixed = self.scan_out(scanned * self._scales(height, width, scanned))
        if text is not None and self.text_share is not None:
            mixed = mixed + (text * self.text_share.sigmoid()[:, None]).flatten(-2)
        return mixed if added is None else mixed + added

    def scan(self, hidden_states: Tensor, height: int, width: int, segments: Sequence[tuple[int, int]] = ()) -> Tensor:
        """(B, N, C) -> (B, N, K * D), or (B, N, D) with merge "sum": the part before `scan_out`."""
        config = self.config
        if self._scans_planes(hidden_states, height, width, segments):
            return self._scan_planes(hidden_states, height, width)
        scan = gspn2_scan if self.rows is None else self.rows.scan
        y = scan(
            *self.scan_inputs(hidden_states, height, width, segments),
            directions=config.directions,
            normalizer=config.normalizer,
            segment=config.segment,
            merge=config.merge,
            decay=config.decay,
        )
        if config.merge == "concat":
            y = y.flatten(3)
        return off_canvas(y, segments) if len(segments) > 1 else y.flatten(1, 2)

    def _scans_planes(
        self, hidden_states: Tensor, height: int, width: int, segments: Sequence[tuple[int, int]]
    ) -> bool:
        """Whether the features come first (`gspn2_scan_planes`): where that is faster."""
        config = self.config
        plain = self.rows is None and len(segments) <= 1 and not config.decay and config.segment is None
        if not (plain and _plain(self.scan_in)):
            return False
        device, like = hidden_states.device.type, hidden_states
        if device != "meta" and torch.is_autocast_enabled(device):  # of which torch has no autocast
            like = hidden_states.new_empty(0, dtype=torch.get_autocast_dtype(device))
        training = torch.is_grad_enabled()
        return scans_planes(like, height, width, self.width, config.groups, training=training)

    def _scan_planes(self, hidden_states: Tensor, height: int, width: int) -> Tensor:
        """`scan` with the projection's product the other way round, and its bias added by the scan."""
        config, (batch, count, _) = self.config, hidden_states.shape
        features = torch.mm(self.scan_in.weight, hidden_states.flatten(0, 1).t())
        y = gspn2_scan_planes(
            features.view(-1, batch, height, width),
            self.scan_in.bias.to(features.dtype),
            channels=self.width,
            groups=config.groups,
            shared_gates=self.gate_directions == 1,
            directions=config.directions,
            normalizer=config.normalizer,
            merge=config.merge,
        )
        return y.flatten(1).t().unflatten(0, (batch, count))

    def stays_out_of_parts(self, attention: str) -> None:
        """Leaves this layer out of the state dict of a *part* of the model in which it replaces `attention`.

        `ControlNetModel.from_unet` copies a UNet part by part and would stumble over our keys. The state dicts of the
        whole model, of the adapter and of the layer itself keep them.
        """
        self.full_prefix = f"{attention}.gspn2."
        if not self._state_dict_hooks:
            self._register_state_dict_hook(_drop_from_parts)

    def _lines(self, height: int, width: int) -> list[int]:
        """The number of lines that each direction gathers over: one where it takes a mean of them."""
        if self.config.decay:
            return [1] * len(self.config.directions)
        height = height if self.rows is None else self.rows.height
        lines = [width if direction in ("right", "left") else height for direction in self.config.directions]
        return lines if self.config.segment is None else [min(n, self.config.segment) for n in lines]

    def _scales(self, height: int, width: int, like: Tensor) -> Tensor:
        """(K * D,), or (1,) with merge "sum": what `scaled_out_weight` multiplies the columns with."""
        lines = self._lines(height, width)
        if self.config.merge == "sum":
            return like.new_full((1,), len(lines) / sum(lines))
        return torch.cat([like.new_full((self.width,), 1 / n) for n in lines])

    def scan_inputs(
        self, hidden_states: Tensor, height: int, width: int, segments: Sequence[tuple[int, int]] = ()
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The scan's x, lam, u and logits (see `gspn2_scan`), views of one tensor."""
        features = self.scan_in(hidden_states)
        if self.config.decay:
            x, lam, rest = features.tensor_split((self.sizes[0], sum(self.sizes[:2])), dim=-1)
            features = torch.cat((x, lam.sigmoid(), rest), dim=-1)
        if len(segments) > 1:
            features = on_canvas(features, segments, height)
        else:
            features = features.unflatten(1, (height, width))
        x, lam, u, logits, _ = features.split((*self.sizes, features.shape[-1] - sum(self.sizes)), dim=-1)
        gates = (self.gate_directions, self.width)
        taps = (len(self.config.directions), self.config.groups, 3)
        return x, lam.unflatten(-1, gates), u.unflatten(-1, gates), logits.unflatten(-1, taps)

    def scaled_out_weight(self, height: int, width: int) -> Tensor:
        """`scan_out`'s weight with each direction divided by the number of lines it runs over."""
        lines = self._lines(height, width)
        weight = self.scan_out.weight
        if self.config.merge == "sum" or all(n == lines[0] for n in lines):
            return weight * (len(lines) / sum(lines))
        return torch.cat([part / n for part, n in zip(weight.split(self.width, dim=1), lines, strict=True)], dim=1)


def _plain(linear: nn.Linear) -> bool:
    """Whether its weight may be read without calling the module. Offloading and layerwise casting act when a module is
    called, quantisation puts another type in the weight's place."""
    hooked = hasattr(linear, "_hf_hook") or hasattr(linear, "_diffusers_hook")
    hooked = hooked or bool(linear._forward_pre_hooks or linear._forward_hooks)
    return type(linear) is nn.Linear and type(linear.weight) in (nn.Parameter, Tensor) and not hooked


def _drop_from_parts(layer: GSPN2Layer, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    full = layer.full_prefix
    if prefix and len(prefix) < len(full) and full.endswith(prefix):
        for key in [key for key in state_dict if key.startswith(prefix)]:
            del state_dict[key]


def canvas_sides(segments: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Height and width of the map on which the segments stand side by side."""
    return max(height for height, _ in segments), sum(width for _, width in segments)


def on_canvas(tokens: Tensor, segments: Sequence[tuple[int, int]], height: int) -> Tensor:
    """(B, N, F) -> (B, height, sum of widths, F), the segments from left to right, zero below the shorter ones."""
    parts = tokens.split([rows * columns for rows, columns in segments], dim=1)
    maps = [part.unflatten(1, sides) for part, sides in zip(parts, segments, strict=True)]
    return torch.cat([F.pad(part, (0, 0, 0, 0, 0, height - part.shape[1])) for part in maps], dim=2)


def off_canvas(canvas: Tensor, segments: Sequence[tuple[int, int]]) -> Tensor:
    """The inverse of `on_canvas`."""
    parts = canvas.split([columns for _, columns in segments], dim=2)
    return torch.cat([part[:, :rows].flatten(1, 2) for part, (rows, _) in zip(parts, segments, strict=True)], dim=1)
