"""How much memory and time a large picture will take, before it is made.

The model is run once on the meta device, where tensors have shapes but no data: that gives every operation with its
shapes, and the bytes that are alive at each moment. Time is not guessed from peak rates: each different operation is
run on the device at a size that is quick, and scaled to the wanted size by its work (floating-point operations where
it has them, bytes moved otherwise).
"""

from __future__ import annotations

import copy
import hashlib
import io
import math
import os
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from .adapter import GSPN2Adapter
from .layers import GSPN2Config
from .memory import active_switches, available_switches, denoiser, memory_switches, skip_buffers
from .ops import eager
from .patching import apply_gspn2
from .patching.fuse import folded_weights
from .pipelines.gspn2_upscale import PNG_LEVEL, STRENGTHS, VAE_TILING_ABOVE, for_stages, stage_sizes

# What the plan assumes; everything else is counted or timed.
FEED_FORWARD_TOKENS = 65536  # at a time when the feed-forward is chunked: enough to fill a GPU
USABLE = 0.9  # of a device's memory; the rest is the allocator's and the libraries'
CALIBRATE_AT = {"cuda": 4096, "cpu": 512}  # side of the square at which operations are timed
# What the host needs to start an operation inside a model, times what it needs for the bare operation: the modules,
# hooks and views around it. A call is never shorter than this on a GPU, however fast the device is. From SDXL at 1024
# pixels on an H100's host (docs/large_images.md).
HOST_FACTOR = 1.15
PIXELS_AT = 4096  # largest side with which the host's work on pixels is timed; beyond, a pixel takes as long
QUEUE_CYCLES = 2_000_000  # for which the device sleeps, about 1 ms, while the operations to be timed are queued


@dataclass(frozen=True)
class StagePlan:
    """One stage of the upscaling.

    Args:
        height, width: pixels.
        steps: denoising calls.
        device_seconds, host_seconds: one denoising call's operations on the device, and what the host needs to start
            them (0 on a CPU); the call takes the longer of the two.
        vae_seconds: decoding, and encoding where the stage starts from a picture.
        denoiser_bytes, vae_bytes: peak memory while each works, weights included.
        switches: arguments for `memory_switches`.
        pixel_seconds: what the host does with pixels: enlarging and reading the picture before, and making a PNG.
    """

    height: int
    width: int
    steps: int
    device_seconds: float
    host_seconds: float
    vae_seconds: float
    denoiser_bytes: int
    vae_bytes: int
    switches: dict[str, Any]
    pixel_seconds: float = 0.0

    @property
    def call_seconds(self) -> float:
        """One denoising call."""
        return max(self.device_seconds, self.host_seconds)

    @property
    def seconds(self) -> float:
        return self.steps * self.call_seconds + self.vae_seconds + self.pixel_seconds

    @property
    def bytes(self) -> int:
        return max(self.denoiser_bytes, self.vae_bytes)


@dataclass(frozen=True)
class Plan:
    """What `plan` found out. `print(plan)` shows it as a table.

    Args:
        model: name of the model's class and how many of its attentions are replaced.
        device: where it will run.
        stages: in order.
        limit: bytes that may be used.
    """

    model: str
    device: str
    stages: list[StagePlan]
    limit: int

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def bytes(self) -> int:
        return max(stage.bytes for stage in self.stages)

    @property
    def fits(self) -> bool:
        return self.bytes <= self.limit

    @property
    def switches(self) -> dict[str, Any]:
        """What `memory_switches` needs for all stages together."""
        return {name: value for stage in self.stages for name, value in stage.switches.items()}

    def __str__(self) -> str:
        head = ("stage", "pixels", "steps", "s a call", "seconds", "GiB", "switches")
        rows = [
            (
                str(number),
                f"{stage.width} x {stage.height}",
                str(stage.steps),
                f"{stage.call_seconds:.3g}",
                f"{stage.seconds:.3g}",
                f"{stage.bytes / 2**30:.2f}",
                ", ".join(stage.switches) or "-",
            )
            for number, stage in enumerate(self.stages, 1)
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
        verdict = "fits" if self.fits else "DOES NOT FIT: make a smaller picture or use a larger device"
        return "\n".join(
            [
                f"{self.model} on {self.device}",
                *(line.rstrip() for line in lines),
                f"about {self.seconds:.3g} s; {self.bytes / 2**30:.2f} of {self.limit / 2**30:.2f} GiB: {verdict}",
            ]
        )


@torch.no_grad()
def plan(
    pipe_or_path: Any,
    height: int,
    width: int,
    *,
    adapter: GSPN2Adapter | str | os.PathLike[str] | None = None,
    config: GSPN2Config | None = None,
    num_inference_steps: int = 50,
    strengths: Sequence[float] = STRENGTHS,
    base_size: int | None = None,
    guidance: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    memory_limit: int | None = None,
    calibrate_at: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Plan:
    """Memory, time and memory switches of `GSPN2UpscalePipeline` for a picture, found without making it.

    Takes UNet pipelines (Stable Diffusion, SDXL). Text encoders' and schedulers' time is not in it.

    Args:
        pipe_or_path: a pipeline, patched or not, or the folder of one, whose weights are then not loaded.
        height, width: pixels of the final picture.
        adapter, config: what will be applied, for a folder; a pipeline is planned as it is.
        num_inference_steps, strengths, base_size: as in the pipeline's call.
        guidance: whether classifier-free guidance doubles the batch.
        device, dtype: where it will run; the pipeline's own, or CUDA in bfloat16 where there is one.
        memory_limit: bytes that may be used; nine tenths of the device's by default.
        calibrate_at: side of the square at which operations are timed.
        clock: seconds, for devices whose operations are finished when they return.

    Raises:
        TypeError: no UNet pipeline.
        ValueError: a size that the model cannot make.
    """
    unet, vae, device, dtype, other_bytes = _load(pipe_or_path, adapter, config, device, dtype)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    native = unet.config.sample_size if isinstance(unet.config.sample_size, int) else max(unet.config.sample_size)
    sizes = stage_sizes(height, width, base_size or native * factor, math.lcm(8, factor))
    batch = 2 if guidance else 1
    limit = memory_limit if memory_limit is not None else int(USABLE * _memory_of(device))
    weights = _bytes_of(unet) + _bytes_of(vae) + other_bytes
    side = max(factor, (calibrate_at or CALIBRATE_AT.get(device.type, 512)) // factor * factor)

    clocks = _Clocks(device, clock)
    room = limit - weights
    pixel_time = cache(partial(_pixel_time, clock))  # the largest stages share one
    walks: dict[tuple[int, ...], _Walk] = {}

    def walk(latent: tuple[int, int]) -> _Walk:
        if latent not in walks:
            walks[latent] = _walk(lambda: _call_unet(unet, batch, latent, dtype), device)
        return walks[latent]

    stages = []
    stage_strengths = [1.0, *for_stages(strengths, len(sizes) - 1)]
    for index, ((rows, columns), strength) in enumerate(zip(sizes, stage_strengths, strict=True)):
        latent = (rows // factor, columns // factor)
        # Whole multiples of what the UNet halves, so that the quick run does the same operations.
        unit = 2 ** (len(unet.config.down_block_types) - 1)
        small = _shrunk(latent, side / math.sqrt(rows * columns), unit)
        tiled = rows * columns > VAE_TILING_ABOVE
        switches, denoiser_bytes = _choose_switches(unet, batch, latent, dtype, room, device, walk(latent).peak)
        vae_seconds, vae_bytes = _vae_cost(vae, latent, factor, dtype, clocks, small, tiled=tiled, encode=index > 0)
        stages.append(
            StagePlan(
                rows,
                columns,
                max(1, int(num_inference_steps * strength)),
                *clocks.seconds(walk(small), walk(latent)),
                vae_seconds,
                weights + denoiser_bytes,
                weights + vae_bytes,
                {**({"vae_tiling": True} if tiled else {}), **switches},
                rows * columns * pixel_time(min(math.isqrt(rows * columns), PIXELS_AT), index > 0),
            )
        )
    replaced = sum(hasattr(module, "_gspn2") for module in unet.modules())
    return Plan(f"{type(unet).__name__}, {replaced} GSPN-2 layers", _device_name(device), stages, limit)


@dataclass(frozen=True)
class Rescue:
    """What would make a denoising call fit.

    Args:
        switches: those to turn on beside the ones that are, cheapest first; none where it should fit as it is.
        before, after: peak bytes without and with them, weights included.
        limit: bytes that may be used.
    """

    switches: dict[str, Any]
    before: int
    after: int
    limit: int


@torch.no_grad()
def rescue(pipe: Any, height: int, width: int, *, guidance: bool = True) -> Rescue:
    """The switches that a denoising call of a pipeline at (height, width) pixels needs, on top of those that are on.

    Raises:
        TypeError: no UNet pipeline.
    """
    unet, vae, device, dtype, other_bytes = _load(pipe, None, None, None, None)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    latent, batch = (height // factor, width // factor), 2 if guidance else 1
    weights, limit = _bytes_of(unet) + _bytes_of(vae) + other_bytes, int(USABLE * _memory_of(device))
    on = active_switches(pipe)
    # The only one that a copy of the model loses.
    with memory_switches(unet, guidance_in_turn="guidance_in_turn" in on):
        before = _peak(lambda: _call_unet(unet, batch, latent, dtype), device)
        switches, after = _choose_switches(unet, batch, latent, dtype, limit - weights, device, before, skip=on)
    return Rescue(switches, weights + before, weights + after, limit)


def _shrunk(latent: tuple[int, int], scale: float, unit: int) -> tuple[int, int]:
    """`latent` times `scale`, if that is below 1, in whole multiples of `unit`."""
    if scale >= 1:
        return latent
    height, width = (max(unit, round(side * scale / unit) * unit) for side in latent)
    return height, width


def _load(
    pipe_or_path: Any, adapter: Any, config: GSPN2Config | None, device: Any, dtype: torch.dtype | None
) -> tuple[Any, Any, torch.device, torch.dtype, int]:
    """UNet and VAE on the meta device, where and in which type they will run, and bytes of all other models."""
    if isinstance(pipe_or_path, str | os.PathLike):
        path = Path(pipe_or_path)
        if not (path / "model_index.json").is_file():
            raise TypeError(f"{path} holds no diffusers pipeline; pass a folder with model_index.json, or a pipeline.")
        if not (path / "unet").is_dir():
            raise TypeError(f"{path} has no unet; plan knows pipelines with a UNet (Stable Diffusion, SDXL).")
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        parts = {name: _from_config(path, name, dtype) for name in ("unet", "vae")}
        if adapter is not None or config is not None:
            _apply_on_meta(parts["unet"], adapter, config)
        # Files hold the other weights in their own type; sizes on disk are close enough.
        others = path.glob("text_encoder*/*.safetensors")
        return parts["unet"], parts["vae"], device, dtype, sum(f.stat().st_size for f in others)
    unet = denoiser(pipe_or_path)
    if not hasattr(unet, "down_blocks") or not hasattr(getattr(pipe_or_path, "vae", None), "config"):
        raise TypeError(f"{type(pipe_or_path).__name__} has no UNet and VAE; plan knows Stable Diffusion and SDXL.")
    if adapter is not None or config is not None:
        raise ValueError("A pipeline is planned as it is; apply_gspn2 to it, or pass the folder with the adapter.")
    vae = pipe_or_path.vae
    weight = next(unet.parameters())
    device, dtype = torch.device(device or weight.device), dtype or weight.dtype
    components = [m for m in pipe_or_path.components.values() if isinstance(m, nn.Module) and m not in (unet, vae)]
    return _on_meta(unet, dtype), _on_meta(vae, dtype), device, dtype, sum(map(_bytes_of, components))


def _from_config(path: Path, name: str, dtype: torch.dtype) -> Any:
    model_class = getattr(diffusers, diffusers.DiffusionPipeline.load_config(path)[name][1])
    with torch.device("meta"):
        return model_class.from_config(model_class.load_config(path, subfolder=name)).to(dtype).eval()


def _apply_on_meta(unet: Any, adapter: Any, config: GSPN2Config | None) -> None:
    if adapter is None:
        # The start does not matter, and there are no weights to start from.
        apply_gspn2(unet, config=replace(config or GSPN2Config(), init="random"))
    else:
        apply_gspn2(unet, adapter)
    unet.to("meta")


def _on_meta(model: nn.Module, dtype: torch.dtype) -> Any:
    """A copy of a model, with its hooks, whose tensors have no data."""
    memo: dict[int, Any] = {}
    for tensor in [*folded_weights(model), *skip_buffers(model)]:
        memo[id(tensor)] = torch.empty_like(tensor, device="meta")
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta", dtype=dtype if tensor.is_floating_point() else None)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def _bytes_of(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def _memory_of(device: torch.device) -> int:
    if device.type == "cuda":
        # What `set_per_process_memory_fraction` leaves, where this PyTorch can tell.
        allowed = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device.index)
        return int(allowed * torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _call_unet(unet: Any, batch: int, latent: tuple[int, int], dtype: torch.dtype) -> Any:
    """A denoising call on the meta device."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(batch, *shape, device="meta", dtype=dtype)

    config = unet.config
    conditions = None
    if config.addition_embed_type == "text_time":
        ids = 6
        text = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
        conditions = {"text_embeds": empty(text), "time_ids": empty(ids)}
    prompt = empty(77, config.cross_attention_dim)
    # With the timestep as a number, nothing asks the meta tensor for its value.
    return unet(empty(config.in_channels, *latent), 1, prompt, added_cond_kwargs=conditions, return_dict=False)[0]


def _decode(vae: Any, latent: tuple[int, int], dtype: torch.dtype) -> Any:
    z = torch.empty(1, vae.config.latent_channels, *latent, device="meta", dtype=dtype)
    return vae.decode(z, return_dict=False)[0]


def _encode(vae: Any, latent: tuple[int, int], factor: int, dtype: torch.dtype) -> Any:
    picture = torch.empty(1, 3, latent[0] * factor, latent[1] * factor, device="meta", dtype=dtype)
    return vae.encode(picture, return_dict=False)


def _vae_cost(
    vae: Any,
    latent: tuple[int, int],
    factor: int,
    dtype: torch.dtype,
    clocks: _Clocks,
    small: tuple[int, int],
    *,
    tiled: bool,
    encode: bool,
) -> tuple[float, int]:
    """Seconds and peak bytes of decoding a picture, and of encoding the one that its stage starts from."""
    directions: list[tuple[Callable[[Any], Any], int]] = [(lambda at: _decode(vae, at, dtype), 3)]
    if encode:
        directions.append((lambda at: _encode(vae, at, factor, dtype), 2 * vae.config.latent_channels))
    picture = 3 * math.prod(latent) * factor**2 * dtype.itemsize
    tile = getattr(vae, "tile_latent_min_size", None)
    seconds, peak = 0.0, 0
    for number, (run, channels) in enumerate(directions):
        if not tiled or tile is None or max(latent) <= tile:
            wanted = _walk(lambda: run(latent), clocks.device)  # noqa: B023
            timed = wanted if small == latent else _walk(lambda: run(small), clocks.device)  # noqa: B023
            seconds, peak = seconds + max(clocks.seconds(timed, wanted)), max(peak, wanted.peak)
            continue
        one, sides = _walk(lambda: run((tile, tile)), clocks.device), _tile_sides(vae, latent)  # noqa: B023
        # Every tile's result waits for the others; then the blended rows are joined twice.
        scale = 1 if number else factor
        kept = sum(map(math.prod, sides)) * scale**2 * channels * dtype.itemsize
        whole = math.prod(latent) * scale**2 * channels * dtype.itemsize
        peak = max(peak, (picture if number else 0) + kept + max(one.peak, 2 * whole))
        seconds += max(clocks.seconds(one, one)) * sum(map(math.prod, sides)) / tile**2
        extent = int(tile * scale * vae.tile_overlap_factor)
        seconds += 2 * len(sides) * clocks.blend(vae, (1, channels, tile * scale, tile * scale), extent, dtype)
    return seconds, peak


def _pixel_time(clock: Callable[[], float], side: int, reads: bool) -> float:
    """Seconds a pixel that the host needs to make a stage's result a PNG with its checksum and, where it `reads`, to
    enlarge and read the picture that the stage begins with."""
    processor = VaeImageProcessor()
    # Noise takes a PNG longest, and a picture of a large model is nearer to it than to an even one.
    result = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before = processor.postprocess(result[..., ::2, ::2])[0]

    def run() -> None:
        if reads:
            processor.preprocess(before.resize((side, side), Image.Resampling.LANCZOS))
        file = io.BytesIO()
        processor.postprocess(result)[0].save(file, format="PNG", compress_level=PNG_LEVEL)
        hashlib.sha256(file.getbuffer()).digest()

    return _seconds(run, clock, 3 if side <= 1024 else 1) / side**2


def _seconds(run: Callable[[], Any], clock: Callable[[], float], runs: int = 3) -> float:
    """The median of so many runs."""
    taken = []
    for _ in range(runs):
        before = clock()
        run()
        taken.append(clock() - before)
    return sorted(taken)[runs // 2]


def _tile_sides(vae: Any, latent: tuple[int, int]) -> list[tuple[int, int]]:
    """Sides, in latents, of the tiles into which diffusers' AutoencoderKL cuts a map."""
    size = vae.tile_latent_min_size
    step = int(size * (1 - vae.tile_overlap_factor))
    rows, columns = ([min(size, side - start) for start in range(0, side, step)] for side in latent)
    return [(row, column) for row in rows for column in columns]


def _choose_switches(
    unet: Any,
    batch: int,
    latent: tuple[int, int],
    dtype: torch.dtype,
    room: int,
    device: torch.device,
    peak: int,
    skip: Sequence[str] = (),
) -> tuple[dict[str, Any], int]:
    """The fewest switches, cheapest first, with which a denoising call fits into `room`, and its peak; `peak` is that
    without switches, `skip` names those that are not to be tried."""
    candidates: dict[str, Any] = {"guidance_in_turn": True} if batch > 1 else {}
    candidates |= {"feed_forward_tokens": FEED_FORWARD_TOKENS, "offload_skips": True}
    chosen: dict[str, Any] = {}
    for name, value in candidates.items():
        if peak <= room:
            break
        if name in skip or name not in available_switches(unet) or (name == "offload_skips" and device.type != "cuda"):
            continue
        with memory_switches(unet, **chosen, **{name: value}):
            lower = _peak(lambda: _call_unet(unet, batch, latent, dtype), device)
        if lower < peak:
            chosen[name], peak = value, lower
    return chosen, peak


@dataclass
class _Operation:
    """One operation of a walk: what to call to do it again, and its work."""

    function: Any
    args: Any
    kwargs: Any
    work: float

    @property
    def signature(self) -> str:
        return f"{self.function} {tree_map(_spec, self.args)} {tree_map(_spec, self.kwargs)}"


@dataclass(frozen=True)
class _Spec:
    """A tensor's shape, strides and type."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def _spec(value: Any) -> Any:
    return _Spec(tuple(value.shape), value.stride(), value.dtype) if isinstance(value, Tensor) else value


# These only reserve memory.
_NO_WORK = {
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
# Signature of a scan -> peak bytes inside it.
_INSIDE: dict[str, int] = {}


@dataclass
class _Walk(TorchDispatchMode):
    """Records operations on meta tensors, and how many bytes are alive on a device of this type."""

    device: str
    operations: list[_Operation] = field(default_factory=list)
    alive: int = 0
    peak: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self.known: dict[int, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        self.record(function, args, kwargs, output)
        return output

    def record(self, function: Any, args: Any, kwargs: Any, output: Any) -> None:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        # A view of a parameter (a linear layer's transposed weight) is not new memory.
        given = {t.untyped_storage()._cdata for t in tensors}
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self.track(tensor)
        if getattr(function, "is_view", False) or not tensors or function in _NO_WORK:
            return
        moved = [t for t in (*tensors, *tree_leaves(output)) if isinstance(t, Tensor)]
        work = float(sum(t.numel() * t.element_size() for t in moved))
        counter = flop_registry.get(getattr(function, "overloadpacket", function))
        if counter is not None:
            work = float(counter(*args, **kwargs, out_val=output))
        operation = _Operation(function, tree_map(_spec, args), tree_map(_spec, kwargs), work)
        if self.device == "cpu" and function is torch.ops.gspn2.scan.default:
            self.peak = max(self.peak, self.alive + self._inside_scan(operation.signature, args))
        if self.device == "cuda" and function is torch.ops.aten.convolution.default and output.element_size() == 2:
            # cuDNN's half-precision convolutions want channels last and work on copies of input and output.
            copies = (args[0].numel() + output.numel()) * output.element_size()
            self.peak = max(self.peak, self.alive + copies)
        self.operations.append(operation)

    def track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        self.known[key] = weakref.ref(storage, lambda _: self._free(key, size))

    def _free(self, key: int, size: int) -> None:
        del self.known[key]
        self.alive -= size

    def _inside_scan(self, signature: str, args: Any) -> int:
        """Peak inside the plain-torch scan, which works on copies of its inputs in float32."""
        if signature not in _INSIDE:
            inner = _Walk(device="meta")
            with inner:
                eager.scan_forward(*args)
            _INSIDE[signature] = inner.peak
        return _INSIDE[signature]


class _WholeAttention(TorchFunctionMode):
    """Keeps softmax attention one operation: on the meta device torch would take its quadratic fallback."""

    def __init__(self, walk: _Walk) -> None:
        super().__init__()
        self.walk = walk

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not torch.nn.functional.scaled_dot_product_attention:
            return function(*args, **kwargs)
        query, key = args[0], args[1]
        output = torch.empty_like(query)
        self.walk.record(function, args, kwargs, output)
        self.walk.operations[-1].work = 4.0 * query.numel() * key.shape[-2]
        return output


def _walk(run: Callable[[], Any], device: torch.device) -> _Walk:
    walk = _Walk(device=device.type)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(walk)
        stack.enter_context(_WholeAttention(walk))
        run()
    return walk


def _peak(run: Callable[[], Any], device: torch.device) -> int:
    return _walk(run, device).peak


class _Clocks:
    """Times operations on the device, each different one once."""

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        self.device, self.clock = device, clock
        self.times: dict[str, tuple[float, float]] = {}

    def seconds(self, timed: _Walk, wanted: _Walk) -> tuple[float, float]:
        """Seconds of the walk `wanted` on the device and on the host, its operations timed as they are in `timed`."""
        if [op.function for op in timed.operations] != [op.function for op in wanted.operations]:
            raise RuntimeError("The model does other operations at a small size; calibrate at another one.")
        device, host = 0.0, 0.0
        for quick, operation in zip(timed.operations, wanted.operations, strict=True):
            on_device, on_host = self.time(quick)
            device += on_device * (operation.work / quick.work if quick.work else 1.0)
            host += on_host
        return device, HOST_FACTOR * host

    def time(self, operation: _Operation) -> tuple[float, float]:
        signature = operation.signature
        if signature not in self.times:
            args, kwargs = tree_map(self._fill, operation.args), tree_map(self._fill, operation.kwargs)
            self.times[signature] = self._measure(lambda: operation.function(*args, **kwargs))
        return self.times[signature]

    def blend(self, vae: Any, shape: tuple[int, ...], extent: int, dtype: torch.dtype) -> float:
        """Seconds in which diffusers blends the edges of two tiles, row by row."""
        above, below = (torch.zeros(shape, device=self.device, dtype=dtype) for _ in range(2))
        return max(self._measure(lambda: vae.blend_v(above, below, extent), repeats=1))

    def _measure(self, run: Callable[[], Any], repeats: int = 5) -> tuple[float, float]:
        """Seconds on the device, and on the host until it is queued (0 where the host does the work)."""
        run()
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            # While the device sleeps the queue fills: gaps between launches are the host's, not the operation's.
            torch.cuda._sleep(QUEUE_CYCLES)
            start.record()
            before = time.perf_counter()
            for _ in range(repeats):
                run()
            host = time.perf_counter() - before
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1000 / repeats, host / repeats
        return _seconds(run, self.clock), 0.0

    def _fill(self, value: Any) -> Any:
        if isinstance(value, _Spec):
            # Broadcast tensors have fewer elements than places.
            count = (
                1 + sum((n - 1) * step for n, step in zip(value.size, value.stride, strict=True)) if value.size else 1
            )
            flat = torch.zeros(max(count, 0), dtype=value.dtype, device=self.device)
            flat = flat.normal_() if value.dtype.is_floating_point else flat
            return flat.as_strided(value.size, value.stride)
        return self.device if isinstance(value, torch.device) and value.type == "meta" else value
