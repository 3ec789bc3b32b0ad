"""How a layer that is handed a sequence of tokens learns the sides of their map.

Nothing is derived from the number of tokens: 72 x 128 and 96 x 96 have the same. A hook on the *scope* (the module that
still sees the map) records the layout into a plain object, and the attentions below read it there. Gradient
checkpointing runs a block again in backward, when the last recorded layout may be another call's; a hook on the block
therefore tags the block's input with its layout in the first run and restores it in the second.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .families import Family, Layout

TAG = "_gspn2_layout"


class GridRecord:
    """The layout of the tokens that the scope was called with last. Shared by its hooks and the layers below."""

    def __init__(self, scope: str) -> None:
        self.scope = scope
        self.layout: Layout | None = None

    def read(self, tokens: int, layer: str, *, with_text: bool = False) -> Layout:
        """The recorded layout, checked against the number of tokens that arrived.

        Args:
            tokens: how many the layer got.
            layer: its name, for the message.
            with_text: whether text tokens stand before the image's in the same sequence.

        Raises:
            RuntimeError: nothing was recorded, or the tokens do not fill the recorded map.
        """
        layout = self.layout
        if layout is None:
            raise RuntimeError(
                f"{layer} was called without {self.scope or 'its model'}, from which it learns the map's sides; "
                "call the whole model, or remove_gspn2 first."
            )
        needed = sum(height * width for height, width in layout.segments) + (layout.text if with_text else 0)
        if needed != tokens:
            maps = " and ".join(f"{height} x {width}" for height, width in layout.segments)
            text = f" after {layout.text} text tokens" if with_text else ""
            raise RuntimeError(
                f"{layer} got {tokens} tokens for a map of {maps}{text} = {needed}; "
                "remove whatever merges or adds tokens (such as tomesd), or remove_gspn2."
            )
        return layout


class PatchHook:
    """A forward pre-hook that `apply_gspn2` registered. A class, so that patched models can be copied and pickled."""


class ScopeHook(PatchHook):
    """On a scope: records the layout of the tokens it is called with."""

    def __init__(self, record: GridRecord, family: Family, module: nn.Module) -> None:
        self.record, self.read_layout, self.guard = record, family.read_layout, family.guard
        self.names = forward_names(module)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = arguments_by_name(self.names, args, kwargs)
        self.record.layout = self.read_layout(module, arguments)
        if self.guard is None or not torch.compiler.is_compiling():
            return None
        return (), {**arguments, **self.guard(arguments, self.record.layout)}


class BlockHook(PatchHook):
    """On a block: makes a recomputation in backward see the layout of the first run.

    The tag lies on the storage, which a reentrant checkpoint's detached copy of the input shares with it.
    """

    def __init__(self, record: GridRecord) -> None:
        self.record = record

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = args[0] if args else kwargs.get("hidden_states")
        # A compiled graph recomputes by itself; without a gradient nothing does.
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not isinstance(tokens, Tensor):
            return
        storage = tokens.untyped_storage()
        if torch._C._current_graph_task_id() == -1:
            setattr(storage, TAG, self.record.layout)
        else:
            self.record.layout = getattr(storage, TAG, self.record.layout)


def forward_names(module: nn.Module) -> list[str]:
    """Names of the arguments of a module's call, in order."""
    return [name for name in inspect.signature(type(module).forward).parameters if name != "self"]


def arguments_by_name(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments under their names, `forward_names`, however they were passed."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def remove_hooks(model: nn.Module) -> None:
    """Takes every hook of ours off the model. Found by type, so copies and unpickled models are covered."""
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, PatchHook)]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
