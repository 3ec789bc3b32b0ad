"""Time and memory of one denoising call: attention, GSPN-2, and no self-attention at all (the floor).

    python benchmarks/families.py                                   # everything, on the first CUDA device
    python benchmarks/families.py --models sd15 sdxl --sizes 1024 --csv families.csv

Models have their published configurations and random weights; no file is downloaded. Each figure is the median over
`--repeats` calls after `--warmup` calls, by CUDA events, without gradients.
"""

from __future__ import annotations

import argparse
import csv
import gc
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gspn2_diffusion import apply_gspn2, remove_gspn2
from gspn2_diffusion.patching.families import FAMILIES

MODES = ("attention", "gspn2", "none")
COLUMNS = ("model", "size", "batch", "mode", "ms", "times_none", "peak_gib")


@dataclass(frozen=True)
class Model:
    """A published configuration and its call at a size in pixels."""

    name: str
    config: dict[str, Any]
    inputs: Callable[[int, int, Callable[..., torch.Tensor]], dict[str, Any]]


def unet_inputs(width: int, **conditions: tuple[int, ...]) -> Callable[..., dict[str, Any]]:
    def inputs(size: int, batch: int, noise: Callable[..., torch.Tensor]) -> dict[str, Any]:
        call: dict[str, Any] = {
            "sample": noise(batch, 4, size // 8, size // 8),
            "timestep": torch.tensor(500, device=noise(1).device),
            "encoder_hidden_states": noise(batch, 77, width),
        }
        if conditions:
            call["added_cond_kwargs"] = {key: noise(batch, *shape) for key, shape in conditions.items()}
        return call

    return inputs


def pixart_inputs(size: int, batch: int, noise: Callable[..., torch.Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 4, size // 8, size // 8),
        "encoder_hidden_states": noise(batch, 300, 4096),
        "timestep": torch.full((batch,), 500, device=noise(1).device),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def sd3_inputs(size: int, batch: int, noise: Callable[..., torch.Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 16, size // 8, size // 8),
        "encoder_hidden_states": noise(batch, 333, 4096),
        "pooled_projections": noise(batch, 2048),
        "timestep": torch.full((batch,), 500, device=noise(1).device),
    }


def flux_inputs(size: int, batch: int, noise: Callable[..., torch.Tensor]) -> dict[str, Any]:
    side, device = size // 16, noise(1).device
    ids = torch.zeros(side, side, 3, device=device)
    ids[..., 1] += torch.arange(side, device=device)[:, None]
    ids[..., 2] += torch.arange(side, device=device)[None]
    return {
        "hidden_states": noise(batch, side * side, 64),
        "encoder_hidden_states": noise(batch, 512, 4096),
        "pooled_projections": noise(batch, 768),
        "timestep": torch.full((batch,), 0.5, device=device, dtype=noise(1).dtype),
        "guidance": torch.full((batch,), 3.5, device=device, dtype=noise(1).dtype),
        "img_ids": ids.flatten(0, 1),
        "txt_ids": torch.zeros(512, 3, device=device),
    }


SD3 = dict(
    sample_size=128,
    patch_size=2,
    in_channels=16,
    out_channels=16,
    num_layers=24,
    attention_head_dim=64,
    num_attention_heads=24,
    joint_attention_dim=4096,
    caption_projection_dim=1536,
    pooled_projection_dim=2048,
)

MODELS = {
    "sd15": Model(
        "UNet2DConditionModel",
        dict(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            cross_attention_dim=768,
            attention_head_dim=8,
        ),
        unet_inputs(768),
    ),
    "sdxl": Model(
        "UNet2DConditionModel",
        dict(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        unet_inputs(2048, text_embeds=(1280,), time_ids=(6,)),
    ),
    "pixart-sigma": Model(
        "PixArtTransformer2DModel",
        dict(
            num_attention_heads=16,
            attention_head_dim=72,
            in_channels=4,
            out_channels=8,
            num_layers=28,
            cross_attention_dim=1152,
            sample_size=128,
            patch_size=2,
            caption_channels=4096,
            interpolation_scale=2,
            use_additional_conditions=False,
        ),
        pixart_inputs,
    ),
    # Published with 192 positions a side, which ends at 3072 px; the table of sines costs nothing.
    "sd3-medium": Model("SD3Transformer2DModel", dict(**SD3, pos_embed_max_size=256), sd3_inputs),
    "sd3.5-medium": Model(
        "SD3Transformer2DModel",
        dict(**SD3, pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))),
        sd3_inputs,
    ),
    "flux-dev": Model(
        "FluxTransformer2DModel",
        dict(
            in_channels=64,
            num_layers=19,
            num_single_layers=38,
            attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=4096,
            pooled_projection_dim=768,
            guidance_embeds=True,
        ),
        flux_inputs,
    ),
}


class Nothing:
    """No attention: every token keeps what it has."""

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        return hidden_states if encoder_hidden_states is None else (hidden_states, encoder_hidden_states)


def build(model: Model, depth: int | None, device: torch.device, dtype: torch.dtype) -> Any:
    """The model with random weights, made on the device in its type; `depth` limits the number of blocks."""
    config = dict(model.config)
    for key in ("num_layers", "num_single_layers"):
        if depth is not None and key in config:
            config[key] = min(depth, config[key])
    if "dual_attention_layers" in config:
        config["dual_attention_layers"] = tuple(i for i in config["dual_attention_layers"] if i < config["num_layers"])
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return getattr(diffusers, model.name)(**config).eval().requires_grad_(False).to(dtype)
    finally:
        torch.set_default_dtype(default)


def take_attention_out(model: Any) -> None:
    for site in FAMILIES[type(model).__name__].find_sites(model):
        model.get_submodule(site.name).set_processor(Nothing())


@torch.inference_mode()
def measure(model: Any, inputs: dict[str, Any], warmup: int, repeats: int) -> tuple[float, float]:
    """Median milliseconds and peak GiB of a call."""
    for _ in range(warmup):
        model(**inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        model(**inputs)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times), torch.cuda.max_memory_allocated() / 2**30


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[1024, 2048, 4096], help="side in pixels")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--depth", type=int, help="at most so many blocks of each kind, where memory asks")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--csv", type=Path, help="write the rows here, too")
    return parser.parse_args()


def main() -> None:
    arguments = parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/families.py needs a CUDA device and found none; run it on a machine with a GPU.")
    device, dtype = torch.device("cuda"), getattr(torch, arguments.dtype)
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    print(f"{torch.cuda.get_device_name()}, {arguments.dtype}, {versions}")
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    rows = []
    generator = torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    for name in arguments.models:
        model = build(MODELS[name], arguments.depth, device, dtype)
        for size in arguments.sizes:
            inputs = MODELS[name].inputs(size, arguments.batch, noise)
            floor = None
            # The floor first, so that the others can be given as multiples of it.
            for mode in sorted(arguments.modes, key=MODES.index, reverse=True):
                original = {site.name: model.get_submodule(site.name).processor for site in sites_of(model)}
                if mode == "gspn2":
                    apply_gspn2(model)
                elif mode == "none":
                    take_attention_out(model)
                try:
                    ms, gib = measure(model, inputs, arguments.warmup, arguments.repeats)
                except torch.OutOfMemoryError:
                    ms, gib = float("nan"), float("nan")
                remove_gspn2(model)
                for site, processor in original.items():
                    model.get_submodule(site).set_processor(processor)
                floor = ms if mode == "none" else floor
                ratio = f"{ms / floor:.2f}" if floor else ""
                rows.append((name, size, arguments.batch, mode, f"{ms:.2f}", ratio, f"{gib:.2f}"))
                print("| " + " | ".join(map(str, rows[-1])) + " |", flush=True)
                gc.collect()
                torch.cuda.empty_cache()
        del model
        gc.collect()
        torch.cuda.empty_cache()
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(rows)


def sites_of(model: Any) -> list[Any]:
    return list(FAMILIES[type(model).__name__].find_sites(model))


if __name__ == "__main__":
    main()
