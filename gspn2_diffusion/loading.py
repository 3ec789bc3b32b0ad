"""Opening a pipeline and its adapter by name: what the command line, the demo and the evaluation share."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import try_to_load_from_cache
from packaging.version import Version

from .adapter import GSPN2Adapter
from .layers import GSPN2Config
from .patching import apply_gspn2

SHIPPED = "tiny-scenes"
ATTENTION = "none"
GUIDANCE_SCALE = 4.0
"""Classifier-free guidance that the shipped model is scored with, and its student trained with."""
# diffusers renamed the argument; the old name warns in the new version, the new one is unknown to the old.
DTYPE_KEY = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class UserError(Exception):
    """A mistake that the user can mend; the message states the fact and the remedy."""


@contextmanager
def ending_in_a_sentence(program: str | None = None) -> Iterator[None]:
    """A `UserError` in the block ends the program with its message and status 1; other exceptions keep their traceback.

    Args:
        program: what the message begins with; None is the script's name.
    """
    try:
        yield
    except UserError as error:
        raise SystemExit(f"{program or Path(sys.argv[0]).name}: {error}") from None


def pick_device(name: str | None = None) -> torch.device:
    """`name`, checked; None is CUDA where there is one, else Apple's GPU, else the CPU.

    Raises:
        UserError: the device does not exist here.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"Device {name!r} is not one that PyTorch knows; use cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("CUDA was asked for but PyTorch sees no CUDA device; use --device cpu or install a CUDA build.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"{name} was asked for but there are {torch.cuda.device_count()} CUDA devices, from cuda:0.")
    return device


def load_pipeline(
    model: str | os.PathLike[str] = SHIPPED,
    adapter: str | os.PathLike[str] | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    config: GSPN2Config | None = None,
) -> tuple[Any, GSPN2Adapter | None]:
    """Loads a diffusers pipeline and patches it.

    Args:
        model: `"tiny-scenes"` for the shipped model, a folder or a hub id.
        adapter: a folder or hub id; `"none"` leaves attention in place; None takes the shipped adapter for the shipped
            model and starts untrained layers (with a warning) for any other.
        device: where to; None picks by `pick_device`.
        dtype: None is float32 on the CPU and float16 elsewhere.

    Returns:
        The pipeline, and the adapter or None.

    Raises:
        UserError: the model or the adapter is not there or cannot be read.
    """
    from .assets import tiny_adapter_path, tiny_scenes_path

    device = device if isinstance(device, torch.device) else pick_device(device)
    shipped = str(model) == SHIPPED
    path = tiny_scenes_path() if shipped else model
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.float16
    pipe = open_pipeline(path, dtype)
    if isinstance(adapter, str) and adapter == ATTENTION:
        return pipe.to(device), None
    if adapter is None and shipped and config is None:
        adapter = tiny_adapter_path()
    return pipe.to(device), start_layers(pipe, adapter, config)


def start_layers(target: Any, adapter: Any, config: GSPN2Config | None = None) -> GSPN2Adapter:
    """`apply_gspn2`, whose errors are told as a user's mistakes.

    Raises:
        UserError: the adapter is not there, cannot be read or is not for this model.
    """
    try:
        return apply_gspn2(target, adapter, config=config)
    except (OSError, ValueError, TypeError) as error:
        what = "new layers" if adapter is None else "adapter"
        why = _first_sentence(error)
        if isinstance(error, OSError) and isinstance(adapter, str | os.PathLike):
            why = _why_not_found(adapter, "config.json") or why
        raise UserError(f"The {what} could not be applied: {why}") from error


def open_pipeline(path: str | os.PathLike[str], dtype: torch.dtype, **options: Any) -> Any:
    """diffusers' `from_pretrained`, also for a pipeline that was saved without some of its parts (SD3 without T5):
    diffusers refuses to open it unless each of them is named.

    Args:
        path: a folder or a hub id.
        dtype: of the weights.
        options: `revision`, `variant`.

    Raises:
        UserError: the pipeline is not there or cannot be read.
    """
    revision = {"revision": options.get("revision")} if "revision" in options else {}
    path = os.path.expanduser(path)
    try:
        parts = DiffusionPipeline.load_config(path, **revision)
        absent = {name: None for name, value in parts.items() if isinstance(value, list) and value[:1] == [None]}
        return DiffusionPipeline.from_pretrained(path, use_safetensors=True, **{DTYPE_KEY: dtype}, **absent, **options)
    except (OSError, ValueError) as error:
        why = _why_not_found(path, "model_index.json") or _first_sentence(error)
        raise UserError(f"The model {path} could not be loaded: {why}") from error


def check_size(pipe: Any, height: int | None, width: int | None) -> None:
    """Raises UserError unless the sides are positive multiples of the pipeline's step."""
    step = getattr(pipe, "vae_scale_factor", 8)
    # Transformers also cut the latent into patches.
    patch = getattr(getattr(getattr(pipe, "transformer", None), "config", None), "patch_size", None)
    # Flux packs 2 x 2 latents into a token and says nothing of it in its config.
    packed = 2 if hasattr(pipe, "_pack_latents") else 1
    step *= max(patch if isinstance(patch, int) else 1, packed)
    for name, side in (("height", height), ("width", width)):
        if side is not None and (side < 1 or side % step):
            near = max(step, round(side / step) * step)
            raise UserError(f"{name} is {side}; this model needs a multiple of {step}, such as {near}.")


def default_size(pipe: Any) -> tuple[int, int]:
    """(height, width) in pixels that the pipeline makes when not told otherwise."""
    model = getattr(pipe, "unet", None) or pipe.transformer
    sample = model.config.get("sample_size") or pipe.default_sample_size
    height, width = (sample, sample) if isinstance(sample, int) else sample
    return height * pipe.vae_scale_factor, width * pipe.vae_scale_factor


def exact_size(pipe: Any) -> dict[str, bool]:
    """The argument that keeps PixArt's and Sana's pipelines from taking another size than they are asked for."""
    known = "use_resolution_binning" in inspect.signature(pipe.__call__).parameters
    return {"use_resolution_binning": False} if known else {}


def writable_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder, made if need be and tried with a file.

    Raises:
        UserError: it cannot be written to.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"The folder {path} cannot be written to ({error.strerror}); choose another.") from error
    return path


def _why_not_found(name: str | os.PathLike[str], file: str) -> str | None:
    """What is wrong with a name that is no folder, when the hub's own message would send the user looking at their
    connection; None if there is another reason."""
    text = os.fspath(name)
    if os.path.isdir(text):
        return None
    if os.path.isfile(text):
        return "it is a file; pass a folder that save_pretrained wrote."
    if isinstance(name, os.PathLike) or text.count("/") > 1 or text.startswith(("/", ".", "~")) or "\\" in text:
        return "there is no such folder; check the path, or pass a hub id such as NAME/MODEL."
    if isinstance(try_to_load_from_cache(text, file), str):
        return None
    return "there is no such folder and no such download; check the name and, for a hub id, the connection to the hub."


def _first_sentence(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
