"""One request of a visitor: checked as a whole, then painted picture by picture, with word of every step."""

from __future__ import annotations

import ctypes
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from PIL import Image

from ..cli.generate import paint as paint_one
from ..loading import UserError, check_size
from ..patching import gspn2_disabled
from .library import Library

MAX_SEED = 2**53 - 1  # the largest whole number that a browser keeps exactly


class Cancelled(Exception):
    """The visitor asked to stop."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    side: int = 1024
    steps: int = 100
    images: int = 8
    prompt: int = 1000
    guidance: float = 30.0


@dataclass(frozen=True)
class Request:
    """What to paint. The picture i of `num_images` has the seed `seed + i`."""

    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    guidance_scale: float
    height: int
    width: int
    num_images: int
    model: str
    adapter: str
    compare: bool = False

    @classmethod
    def checked(cls, limits: Limits, **values: Any) -> Request:
        """A request out of whatever a browser or a script sent.

        Raises:
            UserError: a value has the wrong type or is out of its range; the message says what it may be.
        """
        for name, label in (("prompt", "The prompt"), ("negative_prompt", "The negative prompt")):
            text = values[name] = "" if values[name] is None else values[name]
            if not isinstance(text, str):
                raise UserError(f"{label} is {_shown(text)}; type words.")
            if len(text) > limits.prompt:
                raise UserError(f"{label} has {len(text)} characters; use at most {limits.prompt}.")
        if not values["prompt"].strip():
            raise UserError("The prompt is empty; say what to paint.")
        last = MAX_SEED - limits.images
        ranges = {
            "seed": ("Seed", 0, last),
            "steps": ("Steps", 1, limits.steps),
            "height": ("Height", 8, limits.side),
            "width": ("Width", 8, limits.side),
            "num_images": ("Number of pictures", 1, limits.images),
        }
        for name, (label, low, high) in ranges.items():
            values[name] = _whole(label, values[name], low, high)
        guidance = values["guidance_scale"]
        if not _is_number(guidance) or not 0 <= guidance <= limits.guidance:
            raise UserError(f"Guidance is {_shown(guidance)}; use a number from 0 to {limits.guidance:g}.")
        if not isinstance(values.get("compare", False), bool):
            raise UserError(f"Compare is {_shown(values['compare'])}; use true or false.")
        return cls(**values)

    def parameters(self, index: int, adapter: str | None) -> dict[str, Any]:
        """What goes into the PNG of picture `index`."""
        values = asdict(self)
        for name in ("num_images", "compare"):
            del values[name]
        return {
            **values,
            "seed": self.seed + index,
            "negative_prompt": self.negative_prompt or None,
            "adapter": adapter,
        }


@dataclass(frozen=True)
class Step:
    """Word of progress: step `done` of `total` (over all pictures), seconds so far, memory in use in bytes."""

    done: int
    total: int
    seconds: float
    memory: int


@dataclass(frozen=True)
class Picture:
    """A finished picture, its parameters (see `save_png`), the seconds it took, and "GSPN-2" or "attention"."""

    image: Image.Image
    parameters: dict[str, Any]
    seconds: float
    mixer: str


def paint(
    library: Library, request: Request, cancel: threading.Event, on_step: Callable[[Step], None] = lambda step: None
) -> Iterator[Picture]:
    """Paints a request, waiting for its turn. With `compare`, each picture comes twice: attention, then GSPN-2.

    Raises:
        UserError: the model, adapter or size does not fit, or the pictures did not fit in memory.
        Cancelled: `cancel` was set; noticed at the next denoising step.
    """
    started, done = time.perf_counter(), 0

    def report(number: int) -> None:
        at = min(done + number + 1, total)  # some schedulers take a step more than asked for
        on_step(Step(at, total, time.perf_counter() - started, memory_in_use(library.device)))

    total = request.steps * request.num_images * (2 if request.compare else 1)
    for index in range(request.num_images):
        for mixer in ("attention", "GSPN-2") if request.compare else (None,):
            # The lock is let go between pictures, so a long request does not starve the other visitors.
            with turn(library, cancel):
                pipe, adapter = library.pipeline(request.model, request.adapter)
                check_size(pipe, request.height, request.width)
                if request.compare and adapter is None:
                    raise UserError("Compare needs an adapter to set against attention; choose one.")

                scans = adapter is not None and mixer != "attention"
                parameters = request.parameters(index, request.adapter if scans else None)
                begun = time.perf_counter()
                with gspn2_disabled(pipe) if mixer == "attention" else nullcontext():
                    image = paint_or_explain(pipe, parameters, callback_on_step_end=after_each_step(cancel, report))
            done += request.steps
            seconds = time.perf_counter() - begun
            yield Picture(image, parameters, seconds, "GSPN-2" if scans else "attention")


def after_each_step(cancel: threading.Event, action: Callable[[int], None]) -> Callable[..., dict[str, Any]]:
    """diffusers' `callback_on_step_end`: raises Cancelled when the visitor said so, else calls `action(number)`."""

    def callback(pipe: Any, number: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if cancel.is_set():
            raise Cancelled
        action(number)
        return tensors

    return callback


def paint_or_explain(pipe: Any, parameters: dict[str, Any], **more: Any) -> Any:
    """The command line's `paint`; what the pipeline refuses, and memory that runs out, is a UserError."""
    try:
        return paint_one(pipe, parameters, **more)
    except (torch.OutOfMemoryError, MemoryError) as error:
        size = f"{parameters['width']} x {parameters['height']}"
        raise UserError(f"{size} pixels do not fit in memory; choose a smaller size.") from error
    except ValueError as error:
        raise UserError(f"The pipeline refused this request: {error}") from error


@contextmanager
def turn(library: Library, cancel: threading.Event) -> Iterator[None]:
    """Holds the library's lock, and returns the memory of the work done; gives up waiting when the visitor cancels.

    Raises:
        Cancelled: while waiting.
    """
    while not library.lock.acquire(timeout=0.2):
        if cancel.is_set():
            raise Cancelled
    try:
        yield
    finally:
        give_memory_back()
        library.lock.release()


# glibc keeps what its threads have freed; nobody else (macOS, musl, Windows) needs to be told.
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def give_memory_back() -> None:
    """Returns freed memory to the system: each request may run in another thread, and each thread has a heap."""
    if trim := getattr(LIBC, "malloc_trim", None):
        trim(0)


def memory_in_use(device: torch.device) -> int:
    """Bytes: what tensors hold on a GPU, else the whole process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(label: str, value: Any, low: int, high: int) -> int:
    if not _is_number(value) or value != int(value) or not low <= value <= high:
        raise UserError(f"{label} is {_shown(value)}; use a whole number from {low} to {high}.")
    return int(value)


def _shown(value: Any) -> str:
    return "missing" if value is None else repr(value)[:60]
