"""What `gspn2_scan` accepts, and the one-sentence errors for everything else."""

from typing import NamedTuple

import torch

DIRECTIONS = ("right", "left", "down", "up")
NORMALIZERS = ("sigmoid", "softmax")
MERGES = ("concat", "sum")
STORAGE_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class ScanOptions(NamedTuple):
    directions: tuple[str, ...]
    normalizer: str
    segment: int | None
    merge: str
    decay: bool = False


def check_options(options: ScanOptions) -> None:
    directions, normalizer, segment, merge, decay = options
    if isinstance(directions, str) or not isinstance(directions, (tuple, list)):
        raise TypeError(f"`directions` is {directions!r}; pass a tuple of names out of {DIRECTIONS}.")
    if not directions or len(set(directions)) != len(directions) or not set(directions) <= set(DIRECTIONS):
        raise ValueError(
            f"`directions` is {tuple(directions)!r}; pass one to four different names out of {DIRECTIONS}."
        )
    if normalizer not in NORMALIZERS:
        raise ValueError(f"`normalizer` is {normalizer!r}; pass one of {NORMALIZERS}.")
    if merge not in MERGES:
        raise ValueError(f"`merge` is {merge!r}; pass one of {MERGES}.")
    if not isinstance(decay, bool):
        raise TypeError(f"`decay` is {decay!r}; pass True or False.")
    if segment is not None and (isinstance(segment, bool) or not isinstance(segment, int)):
        raise TypeError(f"`segment` is a {type(segment).__name__}; pass a number of lines (int) or None.")
    if segment is not None and segment < 1:
        raise ValueError(f"`segment` is {segment}; pass at least 1 line, or None for the global scan.")


def _check_tensor(name: str, t: object, x: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"`{name}` is a {type(t).__name__}; pass a tensor.")
    if t.dtype not in dtypes:
        allowed = " or ".join(dict.fromkeys(str(d) for d in dtypes))
        because = "" if t is x else f", as `x` is {x.dtype}"
        raise TypeError(f"`{name}` is {t.dtype}; convert it to {allowed}{because}.")
    if t.device != x.device:
        raise ValueError(f"`{name}` is on {t.device} and `x` on {x.device}; move it to {x.device}.")
    if t.is_cuda and t.numel() and t.shape[-1] > 1 and t.stride(-1) != 1:
        raise ValueError(
            f"`{name}` has stride {t.stride(-1)} in its last dimension; pass it with that dimension contiguous."
        )


def check_inputs(
    x: torch.Tensor, lam: torch.Tensor | None, u: torch.Tensor | None, logits: torch.Tensor, options: ScanOptions
) -> None:
    """Raise a ValueError or TypeError that names the argument, what it got and what it needs."""
    check_options(options)
    _check_tensor("x", x, x, STORAGE_TYPES)
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"`x` has shape {tuple(x.shape)}; pass (B, H, W, D) with H, W and D at least 1.")
    if options.decay and lam is None:
        raise ValueError("`decay` is True and `lam` None, a state that keeps nothing; pass `lam`, from 0 to 1.")
    B, H, W, D = x.shape
    K = len(options.directions)
    for name, gate in (("lam", lam), ("u", u)):
        if gate is None:
            continue
        _check_tensor(name, gate, x, (x.dtype,))
        if gate.shape not in ((B, H, W, K, D), (B, H, W, 1, D)):
            raise ValueError(
                f"`{name}` has shape {tuple(gate.shape)}; pass {(B, H, W, K, D)}, one gate for each direction, "
                f"{(B, H, W, 1, D)}, shared by them, or None for 1."
            )
    _check_tensor("logits", logits, x, (x.dtype, torch.float32))
    if logits.dim() != 6 or logits.shape[:4] != (B, H, W, K) or logits.shape[5] != 3 or logits.shape[4] < 1:
        raise ValueError(
            f"`logits` has shape {tuple(logits.shape)}; pass {(B, H, W, K)} + (G, 3), three taps for each "
            "direction and group."
        )
    if D % logits.shape[4]:
        raise ValueError(
            f"`logits` has G = {logits.shape[4]} groups, which does not divide the D = {D} channels of `x`; "
            "choose a G that divides D."
        )


def check_features(
    features: torch.Tensor, bias: torch.Tensor | None, channels: int, groups: int, options: ScanOptions
) -> None:
    """Raise a ValueError or TypeError that names the argument, what it got and what it needs."""
    check_options(options)
    if not isinstance(features, torch.Tensor):
        raise TypeError(f"`features` is a {type(features).__name__}; pass a tensor.")
    if features.dtype not in STORAGE_TYPES:
        raise TypeError(f"`features` is {features.dtype}; convert it to {' or '.join(map(str, STORAGE_TYPES))}.")
    if features.dim() != 4 or 0 in features.shape:
        raise ValueError(f"`features` has shape {tuple(features.shape)}; pass (F, B, H, W), each at least 1.")
    for name, value in (("channels", channels), ("groups", groups)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` is {value!r}; pass a number of at least 1.")
    if channels % groups:
        raise ValueError(f"`groups` is {groups}, which does not divide the {channels} channels; choose one that does.")
    if bias is not None:
        if not isinstance(bias, torch.Tensor) or bias.dtype != features.dtype or bias.device != features.device:
            raise TypeError(
                f"`bias` is {getattr(bias, 'dtype', type(bias).__name__)} on {getattr(bias, 'device', 'no device')}; "
                f"pass {features.dtype} on {features.device}, as `features` is."
            )
        if bias.shape != features.shape[:1] or not bias.is_contiguous():
            raise ValueError(f"`bias` has shape {tuple(bias.shape)}; pass {tuple(features.shape[:1])}, contiguous.")
