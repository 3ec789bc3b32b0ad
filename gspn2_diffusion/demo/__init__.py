"""The demo in the browser: `gspn2 demo`. Gradio is imported when `build_demo` or `launch` is first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..loading import UserError
from .painting import Limits

if TYPE_CHECKING:
    from .app import build_demo, launch

__all__ = ["Limits", "build_demo", "launch"]


def __getattr__(name: str) -> Any:
    if name not in ("build_demo", "launch"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from . import app
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError('The demo needs Gradio; install it with pip install "gspn2-diffusion[demo]".') from error
    return getattr(app, name)
