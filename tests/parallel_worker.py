"""Runs on each rank of test_parallel.py: sharded scans, a sharded UNet and a step of DDP, results to a file each."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from gspn2_diffusion import GSPN2Config, apply_gspn2
from gspn2_diffusion.parallel import row_heights, shard_rows, sharded_gspn2_scan

from . import tiny_models

NAMES = ("x", "lam", "u", "logits")
# height, width, D, G, gate directions, options
SCANS = {
    "odd": (13, 6, 10, 1, 4, {}),
    "groups": (9, 7, 12, 6, 4, {"segment": 4, "normalizer": "softmax"}),
    "few_groups": (8, 5, 16, 2, 1, {"merge": "sum"}),
    "two_directions": (11, 4, 8, 8, 2, {"directions": ("up", "left")}),
    "decay": (7, 5, 8, 1, 4, {"decay": True}),
    "no_gates": (5, 3, 4, 1, None, {}),
    "bfloat16": (13, 6, 8, 1, 4, {}),
}
# ranks -> latent height and width
UNETS = {2: (8, 6), 4: (11, 5)}


def scan_inputs(name: str) -> tuple[dict[str, torch.Tensor | None], torch.Tensor, dict]:
    """Tensors of the whole map, the gradient of the result, and options: the same on every rank."""
    height, width, channels, groups, gates, options = SCANS[name]
    directions = len(options.get("directions", range(4)))
    generator = torch.Generator().manual_seed(7)
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(2, height, width, *shape, generator=generator).to(dtype)

    tensors = {
        "x": randn(channels),
        "lam": randn(gates, channels) if gates else None,
        "u": randn(gates, channels) if gates else None,
        "logits": randn(directions, groups, 3),
    }
    return tensors, randn(*([] if options.get("merge") == "sum" else [directions]), channels), options


def unet() -> torch.nn.Module:
    """A patched UNet whose layers are not neutral."""
    model = tiny_models.unet(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D")).requires_grad_(False)
    apply_gspn2(model, config=GSPN2Config(proxy_dim=8, init="random"))
    return model


def scan_shard(name: str, group: dist.ProcessGroup) -> dict[str, torch.Tensor]:
    tensors, grad, options = scan_inputs(name)
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    heights = row_heights(grad.shape[1], ranks)
    mine = {n: None if t is None else t.split(heights, 1)[rank].requires_grad_() for n, t in tensors.items()}
    y = sharded_gspn2_scan(*mine.values(), heights=heights, group=group, **options)
    y.backward(grad.split(heights, 1)[rank])
    return {"y": y.detach(), **{n: t.grad for n, t in mine.items() if t is not None}}


def gradients(model: torch.nn.Module, rank: int) -> dict[str, torch.Tensor]:
    """Of the new layers, in a training step; another aspect ratio on each rank."""
    height, width = UNETS[2]
    sides = (width, height) if rank else (height, width)
    model(**tiny_models.unet_inputs(*sides, seed=rank)).sample.square().mean().backward()
    return {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.grad is not None}


def run(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    groups = {4: dist.new_group(range(4)), 2: dist.new_group([0, 1])}
    results = {}
    for ranks, group in groups.items():
        if rank >= ranks:
            continue
        for name in SCANS:
            for key, value in scan_shard(name, group).items():
                results[f"{ranks}/{name}/{key}"] = value
        model = unet()
        inputs = tiny_models.unet_inputs(*UNETS[ranks])
        with torch.no_grad():
            with shard_rows(model, group):
                results[f"{ranks}/unet"] = model(**inputs).sample
            results[f"{ranks}/unet after"] = model(**inputs).sample
        if ranks == 2:
            averaged = gradients(DistributedDataParallel(model, process_group=group), rank)
            results |= {f"ddp/{name}": gradient for name, gradient in averaged.items()}
    save_file({key: value.contiguous() for key, value in results.items()}, folder / f"{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked, so that diffusers is imported once and not four times.
    torch.multiprocessing.start_processes(run, (Path(sys.argv[1]),), nprocs=4, start_method="fork")
