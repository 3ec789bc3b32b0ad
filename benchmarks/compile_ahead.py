"""Compile what some work will launch, in several processes, before it is timed or checked; CuPy keeps the binaries."""

import multiprocessing
import os
from collections.abc import Callable
from unittest import mock

import torch

from gspn2_diffusion.ops import cuda

MOST_PROCESSES = 16  # each takes half a gigabyte of the GPU's memory


def launches_of(work: Callable[[], object]) -> list[cuda.Launch]:
    """One for each kernel that `work` would launch. Nothing is launched: what its tensors hold means nothing."""
    kernels: dict[tuple[str, ...], cuda.Launch] = {}

    def function(launch: cuda.Launch, _index: int) -> None:
        kernels.setdefault(launch.defines, launch)

    with (
        mock.patch.object(cuda, "_function", function),
        mock.patch.object(cuda, "Starter"),
        mock.patch.object(cuda, "_plans", {}),
    ):
        work()
    return list(kernels.values())


def compile_ahead(work: Callable[[], object]) -> None:
    if not torch.cuda.is_available():
        return
    launches = launches_of(work)
    print(f"compiling {len(launches)} kernels, or finding them where CuPy keeps them", flush=True)
    processes = min(MOST_PROCESSES, os.cpu_count() or 1, len(launches) or 1)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(_compile, launches, chunksize=1)


def _compile(launch: cuda.Launch) -> None:
    cuda._function(launch, torch.cuda.current_device())
