"""A large picture from prompt to PNG with an SDXL of the published sizes with random weights, GSPN-2 in the place of
every self-attention: what each stage of `GSPN2UpscalePipeline` takes, beside what `gspn2_diffusion.plan` said before.

    python benchmarks/large_pipeline.py --sizes 4096 16384 --limits_gib 24 72 --out out

Each size runs with the switches that the plan turns on, in a process that cannot take more than its limit. The table
goes to `large_pipeline.json` in the output folder, with a small copy of each picture; the PNGs of the stages, up to a
gigabyte, to `--stages`. The VAE runs in the denoiser's type, as the fixed SDXL VAEs do (`force_upcast` off).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sdxl
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline
from gspn2_diffusion.pipelines.gspn2_upscale import GSPN2UpscalePipeline
from PIL import Image, PngImagePlugin
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from gspn2_diffusion.assets import tiny_scenes_path
from gspn2_diffusion.memory import memory_switches
from gspn2_diffusion.plan import StagePlan, plan

# stabilityai/stable-diffusion-xl-base-1.0, without its vocabulary's words.
ENCODERS: tuple[dict[str, Any], dict[str, Any]] = (
    dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768),
    dict(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        projection_dim=1280,
        hidden_act="gelu",
    ),
)
VAE: dict[str, Any] = dict(
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    sample_size=1024,
    latent_channels=4,
    scaling_factor=0.13025,
    force_upcast=False,
)
# The same plan at widths that a CPU can run, to try the script.
TINY_ENCODERS: tuple[dict[str, Any], dict[str, Any]] = (
    dict(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, projection_dim=8),
    dict(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, projection_dim=16),
)
TINY_VAE: dict[str, Any] = {
    **VAE,
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "sample_size": 64,
    "norm_num_groups": 4,
}


def pipeline(args: argparse.Namespace) -> StableDiffusionXLPipeline:
    """The pipeline with random weights, its UNet patched and fused."""
    unet = sdxl.build(args)
    tokenizer = CLIPTokenizer.from_pretrained(tiny_scenes_path() / "tokenizer", model_max_length=77)
    ids = dict(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    first, second = TINY_ENCODERS if args.tiny else ENCODERS
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with sdxl.made_in(args.device, getattr(torch, args.dtype)):
        vae = AutoencoderKL(**blocks, **(TINY_VAE if args.tiny else VAE)).eval()
        text_encoder = CLIPTextModel(CLIPTextConfig(**first, **ids)).eval()
        text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**second, **ids)).eval()
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        add_watermarker=False,
    )


class Watch:
    """Seconds and peak memory of the parts of each stage: encoding, each step, decoding, and all the rest."""

    def __init__(self, pipe: StableDiffusionXLPipeline) -> None:
        self.cuda = pipe.device.type == "cuda"
        self.rows: list[dict[str, Any]] = []
        self.vae: Any = pipe.vae
        self.vae.encode, self.vae.decode = (self.timed(name, getattr(pipe.vae, name)) for name in ("encode", "decode"))
        self.handle = pipe.unet.register_forward_pre_hook(self.on_call)
        self.start()

    def close(self) -> None:
        del self.vae.encode, self.vae.decode
        self.handle.remove()

    def start(self) -> None:
        self.row: dict[str, Any] = {"encode": 0.0, "vae_gib": 0.0}
        self.steps: list[float] = []
        self.peak()
        self.started = self.now()

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak(self) -> float:
        """GiB since the last call of this."""
        if not self.cuda:
            return 0.0
        highest = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return highest

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before, peak = self.now(), self.peak()
            if name == "decode":
                self.row["denoiser_gib"] = peak
            result = function(*args, **kwargs)
            self.row[name] = self.now() - before
            self.row["vae_gib"] = max(self.row["vae_gib"], self.peak())
            return result

        return call

    def on_call(self, *_: Any) -> None:
        if not self.steps:
            self.steps.append(self.now())
            self.peak()

    def on_step(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self.steps.append(self.now())
        return tensors

    def on_stage(self, stage: int, count: int, image: Image.Image) -> None:
        total = self.now() - self.started
        each = [after - before for before, after in zip(self.steps, self.steps[1:], strict=False)]
        # The first step of a stage also meets new shapes: kernels are chosen, or compiled.
        self.row["first_step"], later = each[0], sorted(each[1:] or each)
        self.row |= {"pixels": image.width, "steps": len(each), "step": later[len(later) // 2], "seconds": total}
        self.row["rest"] = total - sum(each) - self.row["encode"] - self.row["decode"]
        print(f"stage {stage + 1}/{count}: {json.dumps({k: round(v, 3) for k, v in self.row.items()})}", flush=True)
        self.rows.append(self.row)
        self.start()


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Measured, and in brackets measured over planned."""
    head = ("pixels", "steps", "s a step", "VAE s", "rest s", "stage s", "denoiser GiB", "VAE GiB")
    lines = [head]
    for row in rows:
        planned = row.get("planned", {})

        def beside(value: float, name: str, planned: dict[str, float] = planned) -> str:
            ratio = f" ({value / planned[name]:.2f})" if value and planned.get(name) else ""
            return f"{value:.3g}{ratio}"

        vae = row["encode"] + row["decode"]
        lines.append(
            (
                str(row["pixels"]),
                str(row["steps"]),
                beside(row["step"], "step"),
                beside(vae, "vae"),
                beside(row["rest"], "rest"),
                beside(row["seconds"], "seconds"),
                beside(row["denoiser_gib"], "denoiser_gib"),
                beside(row["vae_gib"], "vae_gib"),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]


def planned_for(pipe: Any, size: int, limit: int | None, args: argparse.Namespace) -> dict[int, StagePlan]:
    """The plan of each stage, by its side: those of a smaller picture are the first of a larger one's."""
    before = time.perf_counter()
    try:
        made = plan(
            pipe,
            size,
            size,
            base_size=args.base_size,
            num_inference_steps=args.steps,
            memory_limit=None if limit is None else int(0.95 * limit),
            calibrate_at=args.calibrate_at,
        )
    except RuntimeError:  # the picture is still worth having
        traceback.print_exc()
        return {}
    print(made)
    print(f"planned in {time.perf_counter() - before:.1f} s", flush=True)
    return {stage.width: stage for stage in made.stages}


def run(pipe: Any, size: int, planned: dict[int, StagePlan], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Makes one picture and returns the row of each stage."""
    large = GSPN2UpscalePipeline.from_pipe(pipe)
    large.set_progress_bar_config(disable=True)
    switches = {
        name: value for side, stage in planned.items() if side <= size for name, value in stage.switches.items()
    }
    if not planned:
        switches = {"guidance_in_turn": size > 8192}
    switches.pop("vae_tiling", None)  # the pipeline's own decision, stage by stage
    if args.stages:
        Path(args.stages).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"large_{size}_", dir=args.stages))
    watch = Watch(pipe)
    try:
        with memory_switches(large, **switches):
            image = large(
                "a harbour at dawn",
                size,
                size,
                num_inference_steps=args.steps,
                base_size=args.base_size,
                generator=torch.Generator().manual_seed(0),
                folder=folder,
                callback_on_stage_end=watch.on_stage,
                callback_on_step_end=watch.on_step,
            ).images[0]
        file = max(folder.glob("*.png"), key=lambda path: path.stat().st_size)
        with PngImagePlugin.PngImageFile(file) as png:
            print(f"{png.width} x {png.height} PNG of {file.stat().st_size / 2**20:.0f} MiB; switches {switches}")
        image.reduce(max(1, size // 1024)).save(args.out / f"preview_{size}.jpg")
    finally:
        watch.close()
        shutil.rmtree(folder)
    for row in watch.rows:
        if stage := planned.get(row["pixels"]):
            row["planned"] = {
                "step": stage.call_seconds,
                "device": stage.device_seconds,
                "host": stage.host_seconds,
                "vae": stage.vae_seconds,
                "rest": stage.pixel_seconds,
                "seconds": stage.seconds,
                "denoiser_gib": stage.denoiser_bytes / 2**30,
                "vae_gib": stage.vae_bytes / 2**30,
            }
    return watch.rows


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096], help="sides of the pictures in pixels")
    parser.add_argument("--limits_gib", type=float, nargs="*", default=[], help="memory that each may take")
    parser.add_argument("--steps", type=int, default=25, help="of a full denoising")
    parser.add_argument("--base_size", type=int, default=None, help="side of the first stage (default: the model's)")
    parser.add_argument("--calibrate_at", type=int, default=None, help="side at which the plan times operations")
    parser.add_argument("--no_plan", action="store_true", help="only make the pictures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--unfused", action="store_true", help="without fuse_gspn2")
    parser.add_argument("--tiny", action="store_true", help="a tiny model of the same plan, to try the script")
    parser.add_argument("--out", type=Path, default=Path("large_pipeline"))
    parser.add_argument("--stages", default=None, help="folder for the stages' PNGs (default: the system's temporary)")
    args = parser.parse_args()
    if args.limits_gib and len(args.limits_gib) != len(args.sizes):
        parser.error("--limits_gib needs one number for each of --sizes")
    return args


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    before = time.perf_counter()
    pipe = pipeline(args)
    pipe.set_progress_bar_config(disable=True)
    print(f"made in {time.perf_counter() - before:.1f} s on {os.cpu_count()} cores", flush=True)
    limits = [int(gib * 2**30) for gib in args.limits_gib] or [None] * len(args.sizes)
    largest = max(args.sizes)
    planned = {} if args.no_plan else planned_for(pipe, largest, limits[args.sizes.index(largest)], args)
    rows: list[dict[str, Any]] = []
    for size, limit in zip(args.sizes, limits, strict=True):
        if args.device == "cuda":
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, (limit or total) / total))
        try:
            rows += [{"picture": size, **row} for row in run(pipe, size, planned, args)]
        except RuntimeError:  # out of memory too: the other size is still worth having
            traceback.print_exc()
        device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
        about = {"device": device, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "rows": rows}
        (args.out / "large_pipeline.json").write_text(json.dumps(about, indent=1) + "\n")
    print("measured (and over what was planned)")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
