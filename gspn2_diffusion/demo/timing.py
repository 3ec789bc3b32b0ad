"""Time of a denoising step against resolution, on this machine, with this model."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..loading import UserError, check_size, default_size
from ..patching import gspn2_disabled, patched_modules
from ..patching.families import find_model
from .library import Library
from .painting import after_each_step, paint_or_explain, turn


@dataclass(frozen=True)
class Timing:
    """Seconds of one denoising step (median), and of its self-attentions alone."""

    side: int
    mixer: str
    step: float
    mixers: float


def sides_for(pipe: Any, limit: int) -> list[int]:
    """Half, once, one and a half times ... the model's own side, up to `limit` pixels."""
    native = max(default_size(pipe))
    unit = 8 * pipe.vae_scale_factor
    sides = [round(native * factor / unit) * unit for factor in (0.5, 1, 1.5, 2, 3, 4, 6, 8)]
    return sorted({side for side in sides if unit <= side <= limit})


def time_against_resolution(
    library: Library,
    model: str,
    adapter: str,
    cancel: threading.Event,
    *,
    limit: int = 1024,
    repeats: int = 3,
    budget: float = 60.0,
) -> Iterator[Timing]:
    """Measures GSPN-2 and attention at growing sizes, square, with guidance; larger sizes than fit in `budget` seconds
    (judged by the last one) are left out (never the first two).

    Raises:
        UserError: no adapter is chosen, or the pictures do not fit in memory.
        Cancelled: `cancel` was set.
    """
    started = time.perf_counter()
    with turn(library, cancel):
        pipe, chosen = library.pipeline(model, adapter)
        if chosen is None:
            raise UserError("There is nothing to compare attention with; choose an adapter.")
        sides = sides_for(pipe, limit)
    last_cost, last_side = 0.0, 1
    for side in sides:
        # Attention grows with the fourth power of the side, everything else with the second. One point is no curve.
        expected = last_cost * (side / last_side) ** 3
        if side not in sides[:2] and time.perf_counter() - started + expected > budget:
            return
        begun = time.perf_counter()
        for mixer in ("GSPN-2", "attention"):
            with turn(library, cancel):
                pipe, _ = library.pipeline(model, adapter)
                check_size(pipe, side, side)
                with gspn2_disabled(pipe) if mixer == "attention" else nullcontext():
                    step, mixers = _measure(pipe, side, repeats, library.device, cancel)
            yield Timing(side, mixer, step, mixers)
        last_cost, last_side = time.perf_counter() - begun, side


def _measure(pipe: Any, side: int, repeats: int, device: torch.device, cancel: threading.Event) -> tuple[float, float]:
    """Median seconds of a step and of its self-attentions, after one step to warm up."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    steps: list[float] = []
    mixers: list[float] = [0.0]
    begun = [0.0]

    def on_step(number: int) -> None:
        steps.append(now())
        mixers.append(0.0)

    def enter(module: Any, args: Any) -> None:
        begun[0] = now()

    def leave(module: Any, args: Any, output: Any) -> None:
        mixers[-1] += now() - begun[0]

    handles = []
    for _, module, _ in patched_modules(find_model(pipe)):
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    parameters = {
        "prompt": "a red circle",
        "negative_prompt": None,
        "seed": 0,
        "steps": repeats + 1,
        "guidance_scale": 5.0,
        "height": side,
        "width": side,
    }
    try:
        paint_or_explain(pipe, parameters, callback_on_step_end=after_each_step(cancel, on_step), output_type="latent")
    finally:
        for handle in handles:
            handle.remove()
    # The first step warms up.
    durations = [after - before for before, after in itertools.pairwise(steps)]
    return statistics.median(durations), statistics.median(mixers[1 : len(steps)])
