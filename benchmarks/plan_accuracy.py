"""What `gspn2_diffusion.plan` says about one denoising call, against what is then measured.

On a CPU the time is this process's own CPU time on one thread, so that other programs do not count, and the memory is
the growth of the peak resident set. On a GPU both are CUDA's.

    python benchmarks/plan_accuracy.py --sizes 256 512
"""

from __future__ import annotations

import argparse
import ctypes
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from gspn2_diffusion import apply_gspn2
from gspn2_diffusion.plan import plan


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="sides of the picture in pixels")
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 128], help="widths of the UNet's levels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--calibrate_at", type=int, default=None, help="side at which operations are timed")
    return parser.parse_args()


def models(args: argparse.Namespace) -> SimpleNamespace:
    """A UNet of the Stable Diffusion kind with random weights, its layers replaced, and a small VAE."""
    levels = len(args.channels)
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=tuple(args.channels),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        cross_attention_dim=128,
        attention_head_dim=8,
    )
    widths = (32, 32, 32, 32)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(block_out_channels=widths, latent_channels=4, **blocks)
    unet, vae = (model.to(args.device, getattr(torch, args.dtype)).eval() for model in (unet, vae))
    apply_gspn2(unet)
    return SimpleNamespace(unet=unet, vae=vae, components={"unet": unet, "vae": vae})


def resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(field))) * 1024


@torch.no_grad()
def measure(unet: UNet2DConditionModel, size: int, device: str) -> tuple[float, int]:
    """Seconds and bytes (without weights) of one call with guidance."""
    weight = next(unet.parameters())
    sample = torch.randn(2, 4, size // 8, size // 8).to(weight)
    prompt = torch.randn(2, 77, unet.config.cross_attention_dim).to(weight)
    unet(sample, 1, prompt)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        unet(sample, 1, prompt)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000, torch.cuda.max_memory_allocated() - base
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    base = resident("VmRSS")
    taken = []
    for _ in range(3):
        before = time.process_time()
        unet(sample, 1, prompt)
        taken.append(time.process_time() - before)
    return sorted(taken)[1], resident("VmHWM") - base


def main() -> None:
    args = parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
        # Tensors go back to the system when they are freed (M_MMAP_THRESHOLD), or the peak would not grow again.
        ctypes.CDLL(None).mallopt(-3, 65536)
    torch.manual_seed(0)
    pipe = models(args)
    weights = sum(p.numel() * p.element_size() for m in (pipe.unet, pipe.vae) for p in m.parameters())
    print("size  planned s  measured s  ratio   planned MiB  measured MiB  ratio")
    for size in args.sizes:
        stage = plan(pipe, size, size, base_size=size, calibrate_at=args.calibrate_at, clock=time.process_time).stages[
            0
        ]
        seconds, memory = measure(pipe.unet, size, args.device)
        planned = stage.denoiser_bytes - weights
        print(
            f"{size:4d}  {stage.call_seconds:9.3f}  {seconds:10.3f}  {stage.call_seconds / seconds:5.2f}  "
            f"{planned / 2**20:12.1f}  {memory / 2**20:12.1f}  {planned / memory:5.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
