"""Time and memory of one distillation step, with random weights: nothing is downloaded.

    python benchmarks/training.py --model sdxl --out outputs/benchmarks/training.json
    accelerate launch --config_file examples/accelerate/ddp.yaml benchmarks/training.py --model sdxl --students gspn2 \
        --out outputs/benchmarks/training-2.json

Students: `gspn2` (the teacher is the same model, patch disabled), `gspn2-two-copies` (the teacher is a second copy),
`attention` (the same step, but the student is the attention itself and its weights train). With several processes the
samples per second are those of all of them; `--gradients FILE` writes the gradient of a fixed global batch and, if
FILE exists, compares with it (run it once with one process, once with two).
"""

import argparse
import copy
import gc
import json
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from gspn2_diffusion import GSPN2Config, apply_gspn2, gspn2_disabled
from gspn2_diffusion.patching.apply import patched_modules
from gspn2_diffusion.training.objective import Objective
from gspn2_diffusion.training.student import StudentStep

SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TINY: dict[str, Any] = {
    **SDXL,
    "sample_size": 16,
    "block_out_channels": (32, 64, 64),
    "transformer_layers_per_block": (1, 1, 1),
    "attention_head_dim": (2, 2, 4),
    "cross_attention_dim": 64,
}
STUDENTS = ("gspn2", "gspn2-two-copies", "attention")


class TwoCopies(StudentStep):
    """The usual way: a teacher of its own."""

    teacher: list[Any]

    def _run(self, call: dict[str, Any], record: bool) -> tuple[Tensor, dict[Any, Any]]:
        if torch.is_grad_enabled():
            return super()._run(call, record)
        step: StudentStep = self.teacher[0]
        output, calls = StudentStep._run(step, call, record)
        own = dict(zip(step.attentions.values(), self.attentions.values(), strict=True))
        return output, {own[module]: value for module, value in calls.items()}


def build(kind: str, config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> tuple[StudentStep, list[Any]]:
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(**config).to(dtype).eval()
    # The teacher's start would cost a minute of singular values and change no time.
    adapter = apply_gspn2(unet, config=GSPN2Config(init="random"))
    unet.requires_grad_(False)
    objective = Objective(DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012))
    cls = TwoCopies if kind == "gspn2-two-copies" else StudentStep
    step = cls(unet, objective, 1.0, 0.5, 0.5)
    if kind == "attention":
        trained = [p for name, m, _ in patched_modules(unet) for n, p in m.named_parameters() if "gspn2" not in n]
    else:
        trained = list(adapter.to(torch.float32).parameters())
    if isinstance(step, TwoCopies):
        twin = copy.deepcopy(unet)
        # A list, so that the twin's parameters are not the step's.
        step.teacher = [StudentStep(twin, objective, 1.0, 0.5, 0.5)]
    for parameter in trained:
        parameter.requires_grad_(True)
    unet.enable_gradient_checkpointing()
    return step, trained


def batch_of(samples: int, config: dict[str, Any], device: torch.device) -> dict[str, Any]:
    side, generator = config["sample_size"], torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    return {
        "latents": draw(samples, 4, side, side),
        "noise": draw(samples, 4, side, side),
        "indices": torch.arange(samples) * 97 % 1000,
        "conditions": {
            "encoder_hidden_states": draw(samples, 77, config["cross_attention_dim"]),
            "added_cond_kwargs.text_embeds": draw(samples, 1280),
            "added_cond_kwargs.time_ids": torch.tensor([[8 * side, 8 * side, 0, 0, 8 * side, 8 * side]] * samples).to(
                device
            ),
        },
    }


def part_of(batch: dict[str, Any], rank: int, world: int) -> dict[str, Any]:
    return {k: part_of(v, rank, world) if isinstance(v, dict) else v.chunk(world)[rank] for k, v in batch.items()}


def measure(kind: str, args: argparse.Namespace, accelerator: Accelerator) -> dict[str, Any]:
    config = SDXL if args.model == "sdxl" else TINY
    if args.pixels:
        config = {**config, "sample_size": args.pixels // 8}
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    device = accelerator.device
    step, trained = build(kind, config, device, dtype)
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    module, optimizer = accelerator.prepare(step, optimizer)
    world = accelerator.num_processes
    batch = part_of(batch_of(args.batch * world, config, device), accelerator.process_index, world)
    seconds = []
    for repeat in range(args.repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
            if repeat == 2:
                torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        # Backward too: gradient checkpointing runs the blocks again in it.
        with gspn2_disabled(step.denoiser) if kind == "attention" else nullcontext():
            loss, _ = module(**batch)
            accelerator.backward(loss)
        if args.gradients and kind != "attention" and repeat == 0:
            compare_gradients(trained, args.gradients, accelerator)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    typical = median(seconds[2:])
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return {
        "student": kind,
        "model": args.model,
        "pixels": 8 * config["sample_size"],
        "processes": world,
        "samples_per_step": args.batch * world,
        "dtype": args.dtype,
        "seconds": typical,
        "samples_per_second": args.batch * world / typical,
        "peak_memory_gib": memory,
        "trained_parameters": sum(p.numel() for p in trained),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }


def compare_gradients(trained: list[Any], path: Path, accelerator: Accelerator) -> None:
    if not accelerator.is_main_process:
        return
    now = {str(index): p.grad.float().cpu().contiguous() for index, p in enumerate(trained)}
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(now, path)
        return
    before = load_file(path)
    apart = sum(float((now[key] - before[key]).square().sum()) for key in now)
    size = sum(float(before[key].square().sum()) for key in now)
    print(f"relative distance of the gradient to that in {path}: {(apart / size) ** 0.5:.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["sdxl", "tiny"], default="sdxl")
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--pixels", type=int, help="side of the pictures, a multiple of 32; default: 1024 (tiny: 128)")
    parser.add_argument("--batch", type=int, default=4, help="samples of one process")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--gradients", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    accelerator = Accelerator(mixed_precision="bf16" if args.dtype == "bf16" else "no")
    rows = []
    for kind in args.students:
        rows.append(measure(kind, args, accelerator))
        accelerator.free_memory()
        # Hooks refer to their models: without this the last student would count in the next one's memory.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if accelerator.is_main_process:
            row = rows[-1]
            memory = f"{row['peak_memory_gib']:.2f} GiB" if row["peak_memory_gib"] is not None else "-"
            print(f"{kind:18} {row['seconds']:.3f} s  {row['samples_per_second']:.2f} samples/s  {memory}", flush=True)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
