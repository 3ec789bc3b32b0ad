"""GSPN-2 for diffusers: replace quadratic self-attention with a linear-cost two-dimensional line scan."""

from .version import __version__

__all__ = ["__version__"]
