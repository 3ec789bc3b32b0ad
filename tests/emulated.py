"""Compile the CUDA sources for the host and run the launcher's launches in `emulation/emulation.h`."""

import ctypes
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from gspn2_diffusion.ops import cuda, planes, planes_backward
from gspn2_diffusion.ops.cuda import Box, Device, Launch, kernel_folder, kernel_source

HERE = Path(__file__).parent / "emulation"
DEVICES = {
    "a100": Device((8, 0), 108, 166912),
    "rtx3090": Device((8, 6), 82, 101376),
    "rtx4090": Device((8, 9), 128, 101376),
    "h100": Device((9, 0), 132, 232448, True),
    "b200": Device((10, 0), 148, 232448),
    "rtx5090": Device((12, 0), 170, 101376),
}

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def row_of_table(work: planes.Work, module: ModuleType = planes) -> planes.Row | planes_backward.Row:
    """Of a pass's table from planes, as an H100 takes it."""
    rows = module.rows_of(work.H, work.W, work.layout.D, work.layout.G, work.size)
    return next(row for row in rows if module.variant_of(row, work, DEVICES["h100"]))


def _cache_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"gspn2-emulation-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@cache
def library(defines: tuple[str, ...]) -> ctypes.CDLL:
    """The kernel of one set of choices as a shared library, built once for each state of the sources."""
    sources = kernel_source() + "".join((HERE / name).read_text() for name in ("emulation.h", "kernels.cpp"))
    key = hashlib.sha256((sources + " ".join(defines)).encode()).hexdigest()[:16]
    path = _cache_folder() / f"{key}.so"
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}")
        flags = [
            "-std=c++17",
            "-O1",
            "-shared",
            "-fPIC",
            "-fno-strict-aliasing",
            "-w",
            "-Wno-psabi",
            f"-I{HERE}",
            f"-I{kernel_folder()}",
        ]
        subprocess.run(["g++", *flags, *defines, str(HERE / "kernels.cpp"), "-o", str(partial)], check=True)
        partial.replace(path)
    return ctypes.CDLL(str(path))


def encode_box(box: Box) -> bytes:
    """The emulation's TensorMap, once the driver's rules are kept."""
    assert box.address % 16 == 0 and all(0 < stride < 2**40 and stride % 16 == 0 for stride in box.strides), box
    assert all(0 < extent <= 256 for extent in box.box) and box.box[0] * box.element % 16 == 0, box
    assert not box.swizzle or box.box[0] * box.element <= 16 << box.swizzle, box
    return struct.pack("5q12i", box.address, *box.strides, *box.sizes, *box.box, box.element, box.swizzle)


def emulate_driver(monkeypatch: pytest.MonkeyPatch, known: bool = True) -> list[Launch]:
    """Plans run here, too; the launches that they are made of. `known`: whether the driver's maps are understood; where
    they are not, each call encodes them again."""
    launches: list[Launch] = []

    def encode(box: Box) -> bytes:
        encoded = encode_box(box).ljust(cuda.MAP_BYTES, b"\0")
        return encoded if known else encoded[:-8] + encoded[:8]

    def function(launch: Launch, _index: int) -> None:
        launches.append(launch)

    class Starter(NamedTuple):
        function: None
        launch: Launch
        params: bytearray

        def __call__(self, _index: int) -> None:
            execute(self.launch, arguments=bytes(self.params))

    for name, value in dict(_encode=encode, _function=function, _templates={}, Starter=Starter).items():
        monkeypatch.setattr(cuda, name, value)
    return launches


def execute(launch: Launch, seed: int = 0, arguments: bytes | None = None) -> None:
    """`arguments`: the kernel's parameters, if not those of the launch."""
    message = ctypes.create_string_buffer(200)
    if arguments is None:
        arguments = bytes(launch.arguments(encode_box))
    buffer = ctypes.create_string_buffer(len(arguments) + 64)
    address = -(-ctypes.addressof(buffer) // 64) * 64
    ctypes.memmove(address, arguments, len(arguments))
    failed = library(launch.defines).run(
        ctypes.c_void_p(address),
        launch.grid,
        *launch.block,
        launch.cluster,
        launch.shared,
        seed,
        message,
        len(message),
    )
    assert not failed, f"{launch.kernel} {launch.defines}: {message.value.decode()}"
