"""One option for faster steps: the denoiser through `torch.compile`, as one graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

from .memory import denoiser


class CompileError(RuntimeError):
    """The model cannot be compiled here."""


@contextmanager
def compiled(pipe_or_model: Any, *, fullgraph: bool = True, **options: Any) -> Iterator[None]:
    """Inside the block the UNet or transformer runs through `torch.compile`; afterwards it is as it was.

    The scan is one operator in the graph. The first call of each size and batch compiles, which takes from half a
    minute to minutes; layers that `fuse_gspn2` folded run unfolded. `memory_switches` go inside the block, not around.

    Args:
        pipe_or_model: a diffusers pipeline, patched or not, or its UNet or transformer.
        fullgraph: refuse a model that breaks into several graphs, as hooks of other tools make it do.
        **options: `torch.compile`'s own, such as `mode` or `backend`.

    Raises:
        ValueError: the model is compiled already, or runs its guidance in turn.
        CompileError: at a call, when the compiler is missing or the model does not compile. The message says which.
    """
    model = denoiser(pipe_or_model)
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError(
            f"{type(model).__name__} is compiled already or runs under guidance_in_turn; compile it once, outside of "
            "memory_switches."
        )
    # Sizes are constants: a picture has few, and symbolic ones would make the scan's launch a guess.
    call = torch.compile(model._call_impl, fullgraph=fullgraph, dynamic=False, **options)
    model._compiled_call_impl = _Explained(call, type(model).__name__)
    try:
        yield
    finally:
        vars(model).pop("_compiled_call_impl", None)


class _Explained:
    """A compiled call whose compiler's errors say what to do."""

    def __init__(self, call: Callable[..., Any], name: str) -> None:
        self.call, self.name = call, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.call(*args, **kwargs)
        except TorchDynamoException as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise CompileError(
                f"{self.name} does not compile here ({' '.join(lines[:2]) or type(error).__name__}); install what "
                "torch.compile needs (a C++ compiler on the CPU, Triton on a GPU), or run without compiling."
            ) from error
