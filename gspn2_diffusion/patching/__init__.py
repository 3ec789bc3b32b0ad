"""Putting GSPN-2 layers into diffusers models and taking them out again."""

from .apply import apply_gspn2, gspn2_disabled, patched_modules, remove_gspn2
from .families import supported_models
from .fuse import fuse_gspn2, unfuse_gspn2

__all__ = [
    "apply_gspn2",
    "fuse_gspn2",
    "gspn2_disabled",
    "patched_modules",
    "remove_gspn2",
    "supported_models",
    "unfuse_gspn2",
]
