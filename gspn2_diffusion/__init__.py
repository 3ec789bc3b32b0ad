"""GSPN-2 for diffusers: replace quadratic self-attention with a linear-cost two-dimensional line scan."""

from .adapter import GSPN2Adapter
from .layers import GSPN2Config
from .patching import apply_gspn2, fuse_gspn2, gspn2_disabled, remove_gspn2, supported_models, unfuse_gspn2
from .version import __version__

__all__ = [
    "GSPN2Adapter",
    "GSPN2Config",
    "__version__",
    "apply_gspn2",
    "fuse_gspn2",
    "gspn2_disabled",
    "remove_gspn2",
    "supported_models",
    "unfuse_gspn2",
]
