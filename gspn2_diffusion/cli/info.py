"""`gspn2 info`."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform

import torch

from ..loading import pick_device
from ..patching import supported_models
from ..version import __version__

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "peft", "gradio")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:N or mps (default: the best there is)")


def run(args: argparse.Namespace) -> int:
    device = pick_device(args.device)
    print(f"gspn2_diffusion {__version__}, Python {platform.python_version()} on {platform.system()}")
    for package in PACKAGES:
        print(f"  {package:<13} {version_of(package)}")
    print(f"  {'cupy':<13} {next((found for found in map(version_of, cupy_names()) if found[0].isdigit()), 'absent')}")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"Device: {device} ({name})")
    print(f"Scan:   {scan_path(device)}")
    print("Supported models:")
    for model, examples in supported_models().items():
        print(f"  {model:<28} {examples}")
    return 0


def scan_path(device: torch.device) -> str:
    """What runs `gspn2_scan` on the device."""
    if device.type != "cuda":
        return "plain PyTorch"
    if importlib.util.find_spec("cupy"):
        return "fused CUDA kernel, through CuPy"
    return "nothing yet: CuPy is missing; pip install 'gspn2-diffusion[cuda13]' (or [cuda12])"


def version_of(package: str) -> str:
    """The installed version, or "absent"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def cupy_names() -> tuple[str, ...]:
    """CuPy comes under a name for each CUDA version."""
    return ("cupy-cuda13x", "cupy-cuda12x", "cupy")
