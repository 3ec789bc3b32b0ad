"""The one table of supported models; a family is a file here and a row in it."""

from __future__ import annotations

from typing import Any

from torch import nn

from . import auraflow, cogview4, flux, qwenimage, sd3, transformers, unet
from .base import Family, Grid, Layout, Matrices, Site

FAMILIES: dict[str, Family] = {
    family.model_class: family
    for module in (unet, transformers, sd3, flux, auraflow, cogview4, qwenimage)
    for family in module.FAMILIES
}


def supported_models() -> dict[str, str]:
    """Model classes that `apply_gspn2` takes, each with the models that users know it by."""
    return {name: family.examples for name, family in FAMILIES.items()}


def family_of(model: nn.Module) -> Family | None:
    """The family of a model, also of a subclass of a supported class."""
    return next((FAMILIES[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in FAMILIES), None)


def find_model(pipe_or_model: Any) -> nn.Module:
    """The denoiser in a pipeline, or the model itself.

    Raises:
        TypeError: there is no supported model in it; the message lists the supported ones.
    """
    candidates = [pipe_or_model]
    if not isinstance(pipe_or_model, nn.Module):
        candidates = [getattr(pipe_or_model, name, None) for name in ("unet", "transformer")]
    for candidate in candidates:
        if isinstance(candidate, nn.Module) and family_of(candidate):
            return candidate
    found = " with ".join(
        [type(pipe_or_model).__name__, *(type(c).__name__ for c in candidates if c not in (None, pipe_or_model))]
    )
    raise TypeError(f"{found} is not supported; pass a pipeline or model of {', '.join(supported_models())}.")


__all__ = ["FAMILIES", "Family", "Grid", "Layout", "Matrices", "Site", "family_of", "find_model", "supported_models"]
