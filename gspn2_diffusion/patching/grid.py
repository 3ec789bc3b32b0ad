"""How a layer that is handed a sequence of tokens learns the sides of their map.

Nothing is derived from the number of tokens: 72 x 128 and 96 x 96 have the same. A hook on the *scope* (the module that
still sees the map) records the sides into a plain object, and the attentions below read it there. Gradient
checkpointing runs a block again in backward, when the last recorded sides may be another call's; a hook on the block
therefore tags the block's input tensor with its sides in the first run and restores them in the second.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .families import Grid

TAG = "_gspn2_grid"


class GridRecord:
    """The sides of the map that the scope was called with last. Shared by the scope's hooks and the layers below."""

    def __init__(self, scope: str) -> None:
        self.scope = scope
        self.grid: Grid | None = None

    def sides(self, tokens: int, layer: str) -> Grid:
        """The recorded (height, width), checked against the number of tokens that arrived.

        Raises:
            RuntimeError: nothing was recorded, or the tokens do not fill the recorded map.
        """
        if self.grid is None:
            raise RuntimeError(
                f"{layer} was called without {self.scope or 'its model'}, from which it learns the map's sides; "
                "call the whole model, or remove_gspn2 first."
            )
        height, width = self.grid
        if height * width != tokens:
            raise RuntimeError(
                f"{layer} got {tokens} tokens for a map of {height} x {width} = {height * width}; "
                "remove whatever merges or adds tokens (such as tomesd), or remove_gspn2."
            )
        return height, width


class ScopeHook:
    """Forward pre-hook of a scope: records the sides of the map it is called with."""

    def __init__(self, record: GridRecord, read_grid: Callable[[nn.Module, dict[str, Any]], Grid]) -> None:
        self.record, self.read_grid = record, read_grid

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.record.grid = self.read_grid(module, arguments_by_name(module, args, kwargs))


class BlockHook:
    """Forward pre-hook of a block: makes a recomputation in backward see the sides of the first run."""

    def __init__(self, record: GridRecord) -> None:
        self.record = record

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Checkpointing needs gradients, and a compiled graph recomputes by itself.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        tokens = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(tokens, Tensor):
            return
        tagged = getattr(tokens, TAG, None)
        if tagged is not None:
            self.record.grid = tagged
        elif self.record.grid is not None:
            setattr(tokens, TAG, self.record.grid)


HOOKS = (ScopeHook, BlockHook)


def arguments_by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments under their names, however they were passed."""
    names = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def remove_hooks(model: nn.Module) -> None:
    """Takes every grid hook off the model and its parts. Found by type, so copies and unpickled models are covered."""
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, HOOKS)]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
