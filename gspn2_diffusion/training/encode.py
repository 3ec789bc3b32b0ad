"""Pre-encoding: pictures to latents and captions to what the denoiser is given, once, into safetensors shards.

What a denoiser is given besides the noisy latents differs from family to family (pooled embeddings, masks, size
conditions, position ids). Nothing of that is rebuilt here: the pipeline itself is called, and stopped at its first call
of the denoiser, whose arguments are kept.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..loading import check_size, default_size, exact_size
from ..patching.families import find_model
from ..patching.grid import arguments_by_name, forward_names
from .arguments import Part, TrainingArguments, TrainingError
from .data import Row, Rows, Size, bucket_sizes, fit, fitting_size, open_picture

logger = logging.getLogger(__name__)

SAMPLE_NAMES = ("sample", "hidden_states")
TRAINABLE = ("UNet2DConditionModel", "SD3Transformer2DModel", "PixArtTransformer2DModel", "FluxTransformer2DModel")
DROPPED = (*SAMPLE_NAMES, "timestep", "return_dict")
POSITIONS = ("img_ids", "txt_ids")
READERS = 8
"""Threads that decode and resize pictures."""
CACHE_FORMAT = 2
"""Of the files; a cache of another one is refused."""


class _Stop(Exception):
    """Ends a pipeline's call once the denoiser's arguments are known."""


class Conditioner:
    """The arguments that a text-to-image pipeline gives its denoiser for a caption and a size.

    Args:
        pipe: a diffusers text-to-image pipeline of a supported model.

    Raises:
        ValueError: its model is not one of `TRAINABLE`; others may count time or sign the flow another way.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.denoiser = pipe, find_model(pipe)
        if not set(TRAINABLE) & {cls.__name__ for cls in type(self.denoiser).__mro__}:
            raise TrainingError(
                f"Training of {type(self.denoiser).__name__} is not tested yet; it is for {', '.join(TRAINABLE)}."
            )
        pipe.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(self, captions: list[str], size: Size) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        """Args:
            captions: B captions.
            size: (height, width) in pixels.

        Returns:
            Tensors of one row for each caption; tensors the batch shares (position ids); facts about the call:
            `timestep_scale` (what the pipeline multiplies the scheduler's timestep by) and `packed` (whether latents
            go in as tokens). Names of nested arguments are joined by dots.
        """
        seen: dict[str, Any] = {}

        def stop(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.update(arguments_by_name(forward_names(module), args, kwargs))
            raise _Stop

        hook = self.denoiser.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
        # Guidance off: one row for each caption. Models distilled for guidance take theirs as an input, so keep it.
        options = {} if getattr(self.denoiser.config, "guidance_embeds", False) else {"guidance_scale": 1.0}
        try:
            self.pipe(
                prompt=captions,
                height=size[0],
                width=size[1],
                num_inference_steps=1,
                output_type="latent",
                generator=torch.Generator().manual_seed(0),
                **options,
                **exact_size(self.pipe),
            )
        except _Stop:
            pass
        finally:
            hook.remove()
        sample = next(seen[name] for name in SAMPLE_NAMES if name in seen)
        scheduled = float(self.pipe.scheduler.timesteps[0])
        given = float(torch.as_tensor(seen["timestep"]).flatten()[0])
        facts = {"timestep_scale": given / scheduled if scheduled else 1.0, "packed": sample.ndim == 3}
        own: dict[str, Any] = {}
        shared: dict[str, Any] = {}
        for name, value in _flatten({k: v for k, v in seen.items() if k not in DROPPED}).items():
            by_caption = name not in POSITIONS and value.ndim and value.shape[0] == len(captions)
            (own if by_caption else shared)[name] = value
        return own, shared, facts


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            flat[prefix + name] = value
        elif value is not None:
            raise TrainingError(
                f"The pipeline gives its denoiser {prefix}{name}={value!r}, which pre-encoding cannot store; "
                "this model is not supported for training yet."
            )
    return flat


def unflatten(values: dict[str, Tensor]) -> dict[str, Any]:
    """The inverse of joining nested names by dots."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *parents, last = name.split(".")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return nested


def pixels_of(image: Image.Image, size: Size) -> torch.Tensor:
    """The image as `fit` cuts it, float32 (3, height, width) in [-1, 1]."""
    return torch.from_numpy(np.array(fit(image, size))).permute(2, 0, 1).float() / 127.5 - 1


@torch.no_grad()
def encode_pictures(pipe: Any, pixels: Tensor, packed: bool) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] -> latents as the denoiser is given them (the mode of the encoder's output)."""
    vae = pipe.vae
    encoded = vae.encode(pixels.to(vae.device, vae.dtype))
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    latents = (latents - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor
    return pipe._pack_latents(latents, *latents.shape) if packed else latents


def target_sizes(args: TrainingArguments, pipe: Any, resolution: int | None) -> list[Size]:
    """The picture sizes of one resolution, None for the model's own.

    Raises:
        UserError: a side is not a multiple of what the model needs.
    """
    sizes = [(resolution, resolution) if resolution else default_size(pipe)]
    if args.aspect_ratio_buckets:
        area = sizes[0][0] * sizes[0][1]
        sizes = bucket_sizes(round(area**0.5), args.bucket_step, args.max_aspect_ratio)
    for size in sizes:
        check_size(pipe, *size)
    return sizes


def encode_datasets(args: TrainingArguments, pipe: Any, accelerator: Accelerator) -> list[Path]:
    """Writes what is missing of each part's cache and returns their folders: the run's cache, or of several
    resolutions one in it for each.

    Raises:
        ValueError: a folder holds the cache of other data or options.
    """
    root, parts = Path(args.cache_dir or Path(args.output_dir, "cache")), args.parts()
    one = len({part.resolution for part in parts}) == 1
    folders = [root if one else root / str(part.resolution) for part in parts]
    for folder, part in dict(zip(folders, parts, strict=True)).items():
        encode_dataset(args, part, pipe, accelerator, folder)
    return folders


def encode_dataset(args: TrainingArguments, part: Part, pipe: Any, accelerator: Accelerator, folder: Path) -> None:
    """Writes what is missing of the cache of one resolution, shared out over the processes.

    A shard appears under its name only when it is whole, so that a stopped run goes on where it was.

    Raises:
        ValueError: the folder holds the cache of other data or options.
    """
    rows = Rows(args, part.samples)
    sizes = target_sizes(args, pipe, part.resolution)
    starts = range(0, len(rows), args.cache_shard_size)
    if accelerator.is_main_process:
        _claim(folder, args, rows, sizes)
    accelerator.wait_for_everyone()

    mine = list(starts)[accelerator.process_index :: accelerator.num_processes]
    missing = [start for start in mine if not _shard(folder, start).is_file()]
    conditioner = Conditioner(pipe)
    facts = conditioner([""], sizes[0])[2]
    if accelerator.is_main_process:
        _write_empty(folder, conditioner, sizes, args)
        write_atomically(folder / "facts.json", json.dumps(facts).encode())
    bar = tqdm(total=len(rows), desc="encoding", disable=not accelerator.is_local_main_process or not missing)
    bar.update(sum(min(args.cache_shard_size, len(rows) - start) for start in starts if start not in missing))
    for start in missing:
        _encode_shard(args, part, rows, start, sizes, conditioner, facts["packed"], _shard(folder, start), bar)
    bar.close()
    accelerator.wait_for_everyone()


def _claim(folder: Path, args: TrainingArguments, rows: Rows, sizes: list[Size]) -> None:
    """Makes the folder, or checks that it was made for the same data and options."""
    identity = {
        "model": args.pretrained_model_name_or_path,
        "revision": args.revision,
        "data": args.train_data_dir
        or [args.dataset_name, args.dataset_config_name, args.dataset_split, args.data_files],
        "columns": [args.image_column, args.caption_column],
        "samples": len(rows),
        "sizes": [list(size) for size in sizes],
        "dtype": args.cache_dtype,
        "shard_size": args.cache_shard_size,
        "format": CACHE_FORMAT,
    }
    path = folder / "cache.json"
    if path.is_file():
        found = json.loads(path.read_text())
        differing = [
            f"{key} {found.get(key)!r}, now {value!r}" for key, value in identity.items() if found.get(key) != value
        ]
        if differing:
            raise TrainingError(
                f"{folder} is the cache of another run ({'; '.join(differing)}); delete it or pass another --cache_dir."
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(identity, indent=2).encode())


def _encode_shard(
    args: TrainingArguments,
    part: Part,
    rows: Rows,
    start: int,
    sizes: list[Size],
    conditioner: Conditioner,
    packed: bool,
    path: Path,
    bar: Any,
) -> None:
    waiting: dict[Size, list[tuple[Tensor, str]]] = {}
    encoded: dict[str, list[Tensor]] = {}
    numbers: dict[str, list[int]] = {}
    broken: list[str] = []

    def flush(size: Size) -> None:
        samples = waiting.pop(size, [])
        if not samples:
            return
        pixels = torch.stack([pixels for pixels, _ in samples])
        own, shared, _ = conditioner([caption for _, caption in samples], size)
        own["latents"] = encode_pictures(conditioner.pipe, pixels, packed)
        for name, value in own.items():
            encoded.setdefault(f"{size[0]}x{size[1]}/own/{name}", []).append(_stored(value, args, name))
        for name, value in shared.items():
            encoded[f"{size[0]}x{size[1]}/shared/{name}"] = [_stored(value, args, name)]

    def read(row: Row) -> tuple[Size, Tensor] | Exception:
        try:
            image = open_picture(row.picture)
        except (OSError, ValueError, SyntaxError) as error:
            return error
        size = fitting_size(image, sizes)
        return size, pixels_of(image, size)

    todo = enumerate(rows.read(start, start + args.cache_shard_size), start=start)
    with ThreadPoolExecutor(READERS) as pool:
        while chunk := list(itertools.islice(todo, part.encode_batch)):
            for (number, row), found in zip(chunk, pool.map(read, [row for _, row in chunk]), strict=True):
                if isinstance(found, Exception):
                    broken.append(row.name)
                    logger.warning("Skipped %s, which cannot be read: %s", row.name, found)
                else:
                    size, pixels = found
                    numbers.setdefault(f"{size[0]}x{size[1]}", []).append(number)
                    waiting.setdefault(size, []).append((pixels, row.caption))
                    if len(waiting[size]) == part.encode_batch:
                        flush(size)
                bar.update()
    for size in list(waiting):
        flush(size)
    tensors = {name: torch.cat(parts).contiguous() for name, parts in encoded.items()}
    # Under one name: safetensors writes several in any order, and the same shard is to be the same bytes.
    save_atomically(tensors, path, {"about": json.dumps({"broken": broken, "rows": numbers})})


def _write_empty(folder: Path, conditioner: Conditioner, sizes: list[Size], args: TrainingArguments) -> None:
    """The empty caption's conditions at each size, for caption dropout."""
    tensors: dict[str, Any] = {}
    for size in sizes:
        own, _, _ = conditioner([""], size)
        tensors |= {f"{size[0]}x{size[1]}/own/{name}": _stored(value, args, name)[0] for name, value in own.items()}
    save_atomically({name: value.contiguous() for name, value in tensors.items()}, folder / "empty.safetensors", {})


def _stored(value: Tensor, args: TrainingArguments, name: str) -> Tensor:
    """On the CPU, floats in the cache's type. Sizes, masks and ids keep theirs: half types cannot count to 4096."""
    value = value.detach().cpu()
    if not value.is_floating_point() or "ids" in name or "mask" in name:
        return value
    stored = value.to(getattr(torch, args.cache_dtype))
    if not torch.isfinite(stored).all():
        raise TrainingError(
            f"{name} is NaN or beyond {args.cache_dtype} after encoding; "
            "use --cache_dtype bfloat16, or float32, or a VAE that works in half precision."
        )
    return stored


def _shard(folder: Path, start: int) -> Path:
    return folder / f"shard-{start:09d}.safetensors"


def save_atomically(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """safetensors under a temporary name, then renamed."""
    with _whole(path) as partial:
        save_file(tensors, partial, metadata)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A temporary name, of this process's own (runs that share a cache may write the same shard at once); the file gets
    its own name when the block ends, and is removed if it fails.

    Raises:
        TrainingError: the file could not be written.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise TrainingError(
            f"{path} could not be written ({error}); free some space or pass another --cache_dir, and run again: what "
            "is encoded stays."
        ) from error


def write_atomically(path: Path, content: bytes) -> None:
    with _whole(path) as partial:
        partial.write_bytes(content)


class EncodedDataset(torch.utils.data.Dataset):
    """The samples of a cache. Index -> tensors by name: `latents` and the denoiser's arguments.

    Attributes:
        sizes: the picture size of each sample.
        rows: the place of each sample in the data (counted where an earlier version's cache does not say).
        broken: names of the samples that could not be read.
    """

    def __init__(self, folder: Path) -> None:
        self.sizes: list[str] = []
        self.rows: list[int] = []
        self.broken: list[str] = []
        self.places: list[tuple[Path, str, int]] = []
        self.names: list[str] = []
        self.facts: dict[str, Any] = json.loads((folder / "facts.json").read_text())
        self.shared: dict[str, dict[str, Tensor]] = {}
        self.empty: dict[str, dict[str, Tensor]] = {}
        self._open: dict[Path, Any] = {}
        for path in sorted(folder.glob("shard-*.safetensors")):
            with safe_open(path, framework="pt") as shard:
                about = json.loads(shard.metadata()["about"])
                self.broken += about["broken"]
                for key in shard.keys():  # noqa: SIM118 (not a dict)
                    size, kind, name = key.split("/")
                    if kind == "shared":
                        self.shared.setdefault(size, {})[name] = shard.get_tensor(key)
                    elif name == "latents":
                        count = shard.get_slice(key).get_shape()[0]
                        self.places += [(path, size, row) for row in range(count)]
                        self.sizes += [size] * count
                        self.rows += about["rows"][size]
                    elif name not in self.names:
                        self.names.append(name)
        with safe_open(folder / "empty.safetensors", framework="pt") as empty:
            for key in empty.keys():  # noqa: SIM118
                size, _, name = key.split("/")
                self.empty.setdefault(size, {})[name] = empty.get_tensor(key)
        if not self.places:
            raise TrainingError(f"None of the {len(self.broken)} images of the data set could be read.")

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        path, size, row = self.places[index]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        shard = self._open[path]
        return {name: shard.get_slice(f"{size}/own/{name}")[row] for name in ("latents", *self.names)}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}
