"""What to replace and with which operator: one dataclass, saved with every adapter."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

from ..ops.validation import DIRECTIONS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GSPN2Config:
    """Options of the GSPN-2 layers that `apply_gspn2` puts in.

    The first three matter most; the others are for study.

    Args:
        proxy_dim: width D in which the scan propagates. A float is a ratio of the layer's width, rounded up to a
            multiple of 8 (and of `groups`); an int is used as it is. GSPN-2 calls it the proxy dimension, D << C.
        gates: `"per_direction"` gives each direction its own input and output gate (8 D features), `"shared"` one pair
            for all directions (2 D features).
        layers: which self-attentions to replace: None for all, a shell pattern (`"*up_blocks*"`), or a list of names.
        min_side: replace only self-attentions whose map's smaller side, at the model's own `sample_size`, has at least
            so many tokens. Small maps cost softmax attention next to nothing.
        groups: number G of weight groups; group g owns D / G channels. 1 is GSPN-2's, D is GSPN-1's.
        directions: scan directions, some of "right", "left", "down", "up", each at most once.
        normalizer: `"sigmoid"` or `"softmax"`, how the three taps' logits become weights that sum to 1.
        segment: None for the global scan, or the number of lines after which the local scan restarts.
        decay: the state decays by 1 - lam, with lam a sigmoid: each direction is then a weighted mean of what it has
            passed, and never beyond its largest value, however long the lines are.
        merge: `"concat"` projects the directions' outputs side by side back to the layer's width, `"sum"` adds them
            first.
        init: `"teacher"` starts from the truncated SVD of the attention's own W_o W_v with neutral gates, `"random"`
            from PyTorch's default for linear layers (for comparison).

    Raises:
        ValueError: an option is out of its range; the message names it.
        TypeError: an option has the wrong type.
    """

    proxy_dim: int | float = 0.125
    gates: str = "per_direction"
    layers: str | tuple[str, ...] | None = None
    min_side: int = 0
    groups: int = 1
    directions: tuple[str, ...] = DIRECTIONS
    normalizer: str = "sigmoid"
    segment: int | None = None
    decay: bool = False
    merge: str = "concat"
    init: str = "teacher"

    def __post_init__(self) -> None:
        if isinstance(self.proxy_dim, bool) or not isinstance(self.proxy_dim, int | float):
            raise TypeError(f"proxy_dim is {self.proxy_dim!r}; pass an int (channels) or a float (ratio of the width).")
        if isinstance(self.proxy_dim, float) and not (0 < self.proxy_dim <= 1 and math.isfinite(self.proxy_dim)):
            raise ValueError(f"proxy_dim is {self.proxy_dim}; a ratio must be above 0 and at most 1.")
        if isinstance(self.proxy_dim, int) and self.proxy_dim < 1:
            raise ValueError(f"proxy_dim is {self.proxy_dim}; pass at least 1 channel.")
        if isinstance(self.groups, bool) or not isinstance(self.groups, int) or self.groups < 1:
            raise ValueError(f"groups is {self.groups!r}; pass an integer of at least 1.")
        if isinstance(self.proxy_dim, int) and self.proxy_dim % self.groups:
            raise ValueError(f"proxy_dim {self.proxy_dim} is not divisible by groups {self.groups}; change either.")
        _one_of("gates", self.gates, ("per_direction", "shared"))
        _one_of("normalizer", self.normalizer, ("sigmoid", "softmax"))
        if not isinstance(self.decay, bool):
            raise TypeError(f"decay is {self.decay!r}; pass True or False.")
        _one_of("merge", self.merge, ("concat", "sum"))
        _one_of("init", self.init, ("teacher", "random"))
        if isinstance(self.directions, str):
            raise TypeError(f"directions is {self.directions!r}; pass a tuple such as ({self.directions!r},).")
        object.__setattr__(self, "directions", tuple(self.directions))
        if not self.directions or len(set(self.directions)) != len(self.directions):
            raise ValueError(f"directions is {self.directions}; name one to four of {DIRECTIONS}, each once.")
        for direction in self.directions:
            _one_of("directions", direction, DIRECTIONS)
        if self.segment is not None and (
            isinstance(self.segment, bool) or not isinstance(self.segment, int) or self.segment < 1
        ):
            raise ValueError(f"segment is {self.segment!r}; pass None or an integer of at least 1.")
        if isinstance(self.min_side, bool) or not isinstance(self.min_side, int) or self.min_side < 0:
            raise ValueError(f"min_side is {self.min_side!r}; pass an integer of at least 0.")
        if self.layers is not None and not isinstance(self.layers, str):
            object.__setattr__(self, "layers", tuple(self.layers))

    def width(self, channels: int) -> int:
        """The proxy width D for a layer of `channels` channels."""
        if isinstance(self.proxy_dim, int):
            return self.proxy_dim
        multiple = math.lcm(8, self.groups)
        return max(multiple, math.ceil(channels * self.proxy_dim / multiple) * multiple)

    def selects(self, name: str) -> bool:
        """Whether `layers` names the attention module `name`."""
        if self.layers is None:
            return True
        if isinstance(self.layers, str):
            return fnmatchcase(name, self.layers)
        return name in self.layers

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        values = asdict(self)
        values["directions"] = list(self.directions)
        if isinstance(self.layers, tuple):
            values["layers"] = list(self.layers)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GSPN2Config:
        """The inverse of `to_dict`. Keys of a newer version are ignored with a warning."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            logger.warning(
                "GSPN2Config ignores %s, which this version does not know; upgrade gspn2_diffusion to use them.",
                ", ".join(unknown),
            )
        return cls(**{key: value for key, value in values.items() if key in known})


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} got {value!r}; use one of {', '.join(repr(option) for option in allowed)}.")
