"""One denoising call of SDXL's UNet for one picture, on one device and with its rows spread over several.

    torchrun --standalone --nproc-per-node 2 benchmarks/shard.py --sizes 4096 8192

Rank 0 first runs the call alone, then all ranks run it together; the largest difference between the two results, beside
the largest value, says whether it is the same picture.
"""

from __future__ import annotations

import argparse
import os
import time

import sdxl
import torch
import torch.distributed as dist

from gspn2_diffusion.parallel import shard_rows


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny UNet of the same plan, to try the script")
    parser.add_argument("--unfused", action="store_true")
    return parser.parse_args()


def timed(call, args: argparse.Namespace) -> tuple[float, torch.Tensor]:
    """Median milliseconds and the last result."""
    taken = []
    result = call()
    for _ in range(args.iterations):
        if args.device == "cuda":
            torch.cuda.synchronize()
        before = time.perf_counter()
        result = call()
        if args.device == "cuda":
            torch.cuda.synchronize()
        taken.append((time.perf_counter() - before) * 1000)
    return sorted(taken)[len(taken) // 2], result


@torch.no_grad()
def main() -> None:
    args = parse_args()
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    unet = sdxl.build(args)
    for size in args.sizes:
        torch.manual_seed(0)
        arguments = sdxl.inputs(unet, size, 1, args)
        # The same on every rank, whatever the device's generator does.
        for tensor in (arguments["sample"], arguments["encoder_hidden_states"]):
            dist.broadcast(tensor, 0)
        for tensor in arguments["added_cond_kwargs"].values():
            dist.broadcast(tensor, 0)
        alone, expected = timed(lambda: unet(**arguments)[0], args) if rank == 0 else (0.0, torch.empty(0))  # noqa: B023
        dist.barrier()
        with shard_rows(unet):
            together, result = timed(lambda: unet(**arguments)[0], args)  # noqa: B023
        if rank == 0:
            error = (result - expected).abs().max().item()
            print(
                f"{size} px: one device {alone:.1f} ms, {ranks} devices {together:.1f} ms, {alone / together:.2f}x; "
                f"largest difference {error:.2e} of {expected.abs().max().item():.2e}",
                flush=True,
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
