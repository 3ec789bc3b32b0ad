"""One denoising call of SDXL's UNet (published configuration, random weights) with four token mixers in the place of
self-attention: softmax attention, linear attention, GSPN-2, and none, which is the floor.

One UNet is made on the device and its mixers are swapped in place, so every mixer runs beside the same weights, and the
memory of each row counts them all (about 1 GiB more than a mixer alone needs). Rows are appended to the CSV, and the
plot is drawn from it.

    python benchmarks/sdxl.py --sizes 1024 2048 4096 8192 16384 --plot sdxl.png
    python benchmarks/sdxl.py --sizes 16384 --mixers attention --baselines_up_to 16384 --iterations 1
    python benchmarks/sdxl.py --sizes --plot sdxl.png
"""

from __future__ import annotations

import argparse
import csv
import platform
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F

from gspn2_diffusion import GSPN2Config, apply_gspn2, fuse_gspn2, gspn2_disabled
from gspn2_diffusion.memory import memory_switches

# stabilityai/stable-diffusion-xl-base-1.0, unet/config.json.
SDXL: dict[str, Any] = dict(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=2,
    transformer_layers_per_block=[1, 2, 10],
    attention_head_dim=[5, 10, 20],
    cross_attention_dim=2048,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
    use_linear_projection=True,
)
# The same plan at a width that a CPU can run, to try the script.
TINY: dict[str, Any] = {
    **SDXL,
    "block_out_channels": (8, 16, 32),
    "transformer_layers_per_block": [1, 1, 1],
    "attention_head_dim": [1, 2, 4],
    "cross_attention_dim": 16,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
    "norm_num_groups": 8,
}
FIELDS = ("device", "torch", "date", "mixer", "pixels", "batch", "dtype", "graph", "switches", "ms", "gib", "error")


class NoMixer(nn.Module):
    """Stands for a self-attention and does nothing."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


class LinearAttention(nn.Module):
    """Linear attention in LinFusion's form (arXiv 2409.02097), written from the paper.

    Feature map elu + 1 of queries and keys that a small non-linear branch adds to, normalised over the tokens:
    y = q (k^T v) / (q sum(k)), for each head.
    """

    def __init__(self, attention: Any, rank: int = 4) -> None:
        super().__init__()
        self.attention, self.heads = attention, attention.heads
        width = attention.inner_dim

        def branch() -> nn.Module:
            small = width // rank
            return nn.Sequential(
                nn.Linear(width, small), nn.LayerNorm(small), nn.LeakyReLU(0.01), nn.Linear(small, width)
            )

        self.for_q, self.for_k = branch(), branch()

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        attention = self.attention
        query = attention.to_q(hidden_states + self.for_q(hidden_states))
        key = attention.to_k(hidden_states + self.for_k(hidden_states))
        value = attention.to_v(hidden_states)
        query, key, value = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, value))
        query, key = F.elu(query) + 1, F.elu(key) + 1
        # Divided first: a sum over a million tokens leaves the half types' range.
        key = key / key.shape[2]
        normaliser = query @ key.sum(2, keepdim=True).transpose(-2, -1)
        mixed = query @ (key.transpose(-2, -1) @ value) / (normaliser + 1e-6)
        hidden_states = mixed.transpose(1, 2).flatten(2)
        for module in attention.to_out:
            hidden_states = module(hidden_states)
        return hidden_states


@contextmanager
def made_in(device: str, dtype: torch.dtype) -> Iterator[None]:
    """New modules are made on the device and in the type at once: 2.6 billion float32 numbers on a CPU take minutes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def build(args: argparse.Namespace) -> UNet2DConditionModel:
    """The UNet with its self-attentions replaced by GSPN-2."""
    torch.manual_seed(0)
    with made_in(args.device, getattr(torch, args.dtype)):
        unet = UNet2DConditionModel(**(TINY if args.tiny else SDXL)).eval().requires_grad_(False)
    apply_gspn2(unet, config=GSPN2Config(init="random")).requires_grad_(False)
    if not args.unfused:
        fuse_gspn2(unet)
    return unet


@contextmanager
def mixing(unet: UNet2DConditionModel, mixer: str) -> Iterator[None]:
    """Inside the block `mixer` stands in the place of every self-attention of what `build` made."""
    if mixer == "gspn2":
        yield
        return
    blocks: list[Any] = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
    originals = [block.attn1 for block in blocks]
    weight = next(unet.parameters())
    try:
        with gspn2_disabled(unet):
            if mixer != "attention":
                with made_in(str(weight.device), weight.dtype):
                    for block, original in zip(blocks, originals, strict=True):
                        block.attn1 = LinearAttention(original) if mixer == "linear" else NoMixer()
            yield
    finally:
        for block, original in zip(blocks, originals, strict=True):
            block.attn1 = original


def inputs(unet: UNet2DConditionModel, size: int, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of a call at `size` x `size` pixels."""
    dtype = getattr(torch, args.dtype)

    def randn(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, device=args.device, dtype=dtype)

    config: Any = unet.config
    text = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return {
        "sample": randn(4, size // 8, size // 8),
        "timestep": torch.tensor(500, device=args.device),
        "encoder_hidden_states": randn(77, config.cross_attention_dim),
        "added_cond_kwargs": {"text_embeds": randn(text), "time_ids": randn(6)},
        "return_dict": False,
    }


def capture(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def milliseconds(call: Callable[[], Any], args: argparse.Namespace) -> float:
    """Median over the iterations, as many of them as fit into `seconds` after the first call."""
    taken: list[float] = []
    while len(taken) < args.warmup + args.iterations and (len(taken) < 2 or sum(taken[1:]) < args.seconds * 1000):
        if args.device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end))
        else:
            before = time.perf_counter()
            call()
            taken.append((time.perf_counter() - before) * 1000)
    measured = taken[min(args.warmup, len(taken) // 2) :]
    return sorted(measured)[len(measured) // 2]


@torch.no_grad()
def measure(unet: UNet2DConditionModel, mixer: str, size: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the CSV."""
    batch = args.batch or (2 if size <= 2048 else 1)
    graph = args.device == "cuda" and size <= args.graph_up_to
    switches = {"guidance_in_turn": args.guidance_in_turn, "offload_skips": args.offload_skips}
    switches = {name: on for name, on in switches.items() if on}
    if args.feed_forward_tokens:
        switches["feed_forward_tokens"] = args.feed_forward_tokens
    row: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine() + " CPU",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "mixer": mixer,
        "pixels": size,
        "batch": batch,
        "dtype": args.dtype,
        "graph": int(graph),
        "switches": " ".join(switches),
    }
    output = torch.zeros(0)

    def call() -> None:
        nonlocal output
        output = unet(**arguments)[0]

    try:
        arguments = inputs(unet, size, batch, args)
        with mixing(unet, mixer), memory_switches(unet, **switches):
            if args.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            row["ms"] = round(milliseconds(capture(call) if graph else call, args), 3)
        if args.device == "cuda":
            row["gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        if not output.isfinite().all():
            row["error"] = "the result is not finite"
    except torch.OutOfMemoryError as error:
        row["error"] = str(error).split(".")[0]
    except RuntimeError as error:  # the other rows are still worth having
        traceback.print_exc()
        row["error"] = str(error).splitlines()[0]
    return row


def ratios(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a table: each mixer's time beside the floor's, same size, batch and graph."""
    key = ("device", "pixels", "batch", "dtype", "graph", "switches")
    floor = {tuple(str(r[k]) for k in key): float(r["ms"]) for r in rows if r["mixer"] == "none" and r.get("ms")}
    lines = [f"{'pixels':>6} {'batch':>5} {'graph':>5} {'mixer':>9} {'ms':>10} {'GiB':>6} {'x none':>7}"]
    for row in rows:
        base = floor.get(tuple(str(row[k]) for k in key))
        ratio = f"{float(row['ms']) / base:7.3f}" if base and row.get("ms") else f"{'-':>7}"
        time_or_error = row.get("ms") or row.get("error", "")
        lines.append(
            f"{row['pixels']:>6} {row['batch']:>5} {row['graph']:>5} {row['mixer']:>9} {time_or_error!s:>10} "
            f"{row.get('gib') or '-'!s:>6} {ratio}"
        )
    return lines


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time of a call for one picture against the picture's side, one line for each mixer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for mixer in ("attention", "linear", "gspn2", "none"):
        points = sorted(
            {
                int(r["pixels"]): float(r["ms"]) / int(r["batch"]) for r in rows if r["mixer"] == mixer and r["ms"]
            }.items()
        )
        if points:
            axes.loglog(*zip(*points, strict=True), marker="o", base=2, label=mixer)
    axes.set(xlabel="side of the picture (pixels)", ylabel="ms for one picture", title="SDXL's UNet, one call")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1024], help="sides in pixels; none only tabulates")
    parser.add_argument("--mixers", nargs="+", default=["attention", "linear", "gspn2", "none"])
    parser.add_argument("--batch", type=int, default=None, help="default: 2 up to 2048 pixels, 1 above")
    parser.add_argument("--iterations", type=int, default=5, help="calls that count")
    parser.add_argument("--warmup", type=int, default=2, help="calls before them")
    parser.add_argument("--seconds", type=float, default=8, help="no further call after so many seconds for a row")
    parser.add_argument("--baselines_up_to", type=int, default=8192, help="largest side for attention and linear")
    parser.add_argument("--graph_up_to", type=int, default=2048, help="largest side that runs as a CUDA graph")
    parser.add_argument("--unfused", action="store_true", help="GSPN-2 without fuse_gspn2")
    parser.add_argument("--guidance_in_turn", action="store_true")
    parser.add_argument("--feed_forward_tokens", type=int, default=None)
    parser.add_argument("--offload_skips", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--tiny", action="store_true", help="a tiny UNet of the same plan, to try the script")
    parser.add_argument("--csv", type=Path, default=Path("sdxl.csv"))
    parser.add_argument("--plot", type=Path, default=None)
    args = parser.parse_args(argv)
    if wrong := [mixer for mixer in args.mixers if mixer not in ("attention", "linear", "gspn2", "none")]:
        parser.error(f"unknown mixer {', '.join(wrong)}; choose from attention, linear, gspn2, none")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    started = time.perf_counter()
    unet = build(args) if args.sizes else None
    for size in args.sizes:
        for mixer in args.mixers:
            if mixer in ("attention", "linear") and size > args.baselines_up_to:
                continue
            row = measure(unet, mixer, size, args)
            new = not args.csv.exists()
            with args.csv.open("a", newline="") as file:
                writer = csv.DictWriter(file, FIELDS)
                if new:
                    writer.writeheader()
                writer.writerow(row)
            at = time.perf_counter() - started
            print(f"{at:5.0f} s  {mixer} {size}: {row.get('ms')} ms {row.get('error', '')}", flush=True)
    with args.csv.open(newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    print("\n".join(ratios(rows)))
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
