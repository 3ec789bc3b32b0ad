"""Putting GSPN-2 layers into diffusers models and taking them out again."""

from .apply import apply_gspn2, gspn2_disabled, patched_modules, remove_gspn2
from .families import supported_models

__all__ = ["apply_gspn2", "gspn2_disabled", "patched_modules", "remove_gspn2", "supported_models"]
