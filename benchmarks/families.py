"""Time and memory of one denoising call: attention, GSPN-2, and no self-attention at all (the floor).

    python benchmarks/families.py --minutes 3 --csv families.csv    # everything, on the first CUDA device
    python benchmarks/families.py --models sd15 sdxl --sizes 1024

Models have their published configurations and random weights, drawn on the device; no file is downloaded. A time is the
median over calls by CUDA events, without gradients, up to `--graph_up_to` pixels as a CUDA graph where the model's call
can be one; memory is the peak of an eager call, weights included. Rows go to the CSV as they come. `--device cpu
--depth 1 --sizes 64 128` tries the script without a GPU.
"""

from __future__ import annotations

import argparse
import csv
import gc
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.family_calls import random_call
from benchmarks.sdxl import SDXL, capture, made_in
from gspn2_diffusion import GSPN2Config, apply_gspn2, fuse_gspn2, remove_gspn2
from gspn2_diffusion.patching.families import FAMILIES

# The slow one last, so that a run that is out of time has the others.
MODES = ("gspn2", "none", "attention")
COLUMNS = ("device", "torch", "date", "model", "pixels", "batch", "mode", "ms", "gib", "calls", "graph", "error")


@dataclass(frozen=True)
class Model:
    """A published configuration.

    Args:
        name: the diffusers class.
        config: its arguments.
        text: tokens of a prompt, as the pipeline pads it.
        pixels_per_token: pixels along a side for each token of the finest map.
    """

    name: str
    config: dict[str, Any]
    text: int = 77
    pixels_per_token: int = 8


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
    ),
    "sdxl": Model("UNet2DConditionModel", SDXL),
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
        text=300,
        pixels_per_token=16,
    ),
    # Published with 192 positions a side, which ends at 3072 px; the table of sines costs nothing.
    "sd3-medium": Model("SD3Transformer2DModel", dict(**SD3, pos_embed_max_size=256), text=333, pixels_per_token=16),
    "sd3.5-medium": Model(
        "SD3Transformer2DModel",
        dict(**SD3, pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))),
        text=333,
        pixels_per_token=16,
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
        text=512,
        pixels_per_token=16,
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
    if depth is not None:
        for key in ("num_layers", "num_single_layers"):
            if key in config:
                config[key] = min(depth, config[key])
        if "transformer_layers_per_block" in config:
            config["transformer_layers_per_block"] = [min(depth, n) for n in config["transformer_layers_per_block"]]
    if "dual_attention_layers" in config:
        config["dual_attention_layers"] = tuple(i for i in config["dual_attention_layers"] if i < config["num_layers"])
    torch.manual_seed(0)
    with made_in(str(device), dtype):
        return getattr(diffusers, model.name)(**config).eval().requires_grad_(False).to(dtype)


def sites_of(model: Any) -> list[Any]:
    return list(FAMILIES[type(model).__name__].find_sites(model))


def in_modes(model: Any, modes: list[str]) -> Iterator[str]:
    """Puts the model into each of the modes in turn. The layers of GSPN-2 are gone when the others are measured."""
    originals = {site.name: model.get_submodule(site.name).processor for site in sites_of(model)}
    for mode in (mode for mode in MODES if mode in modes):
        if mode == "gspn2":
            # Random: the start from the teacher decomposes a matrix for each layer, which takes minutes here.
            apply_gspn2(model, config=GSPN2Config(init="random"))
            fuse_gspn2(model)
        for name in originals if mode == "none" else ():
            model.get_submodule(name).set_processor(Nothing())
        yield mode
        remove_gspn2(model)
        for name, processor in originals.items():
            model.get_submodule(name).set_processor(processor)


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """One call."""
    if device.type != "cuda":
        before = time.perf_counter()
        call()
        return (time.perf_counter() - before) * 1000
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def never_waits(call: Callable[[], Any]) -> bool:
    """Whether the call leaves the device alone until its end, as a CUDA graph has to."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


@torch.inference_mode()
def measure(
    call: Callable[[], Any], device: torch.device, args: argparse.Namespace, graph: bool, warm: bool
) -> dict[str, Any]:
    """Columns of one row: ms, gib, calls, graph."""
    cuda = device.type == "cuda"
    if warm:
        # Compiles kernels, chooses algorithms.
        call()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    first = milliseconds(call, device)
    row: dict[str, Any] = {"gib": f"{torch.cuda.max_memory_allocated() / 2**30:.2f}" if cuda else ""}
    graph = graph and cuda and never_waits(call)
    replay = call
    if graph:
        try:
            replay = capture(call)
        except RuntimeError:
            graph = False
    taken, started = [] if graph else [first], time.monotonic()
    while not taken or (len(taken) < args.repeats and time.monotonic() - started + taken[-1] / 1000 < args.seconds):
        taken.append(milliseconds(replay, device))
    return {**row, "ms": f"{statistics.median(taken):.2f}", "calls": len(taken), "graph": int(graph)}


def table(rows: list[dict[str, Any]], sizes: list[int]) -> list[str]:
    """Lines of Markdown: times (and how many times the floor's), memory."""
    lines = [
        "| model | pixels | none, ms | attention, ms | GSPN-2, ms | attention / GSPN-2 "
        "| none, GiB | attention, GiB | GSPN-2, GiB |",
        "|" + "---|" * 9,
    ]
    found = {(row["model"], row["pixels"], row["mode"]): row for row in rows}
    for name in dict.fromkeys(row["model"] for row in rows):
        for size in sizes:
            of = {mode: found.get((name, size, mode), {}) for mode in MODES}
            ms = {mode: float(row["ms"]) for mode, row in of.items() if row.get("ms")}
            times = {
                mode: (f"{ms[mode]:.1f}" + (f" ({ms[mode] / ms['none']:.2f} x)" if "none" in ms else ""))
                if mode in ms
                else of[mode].get("error", "-")
                for mode in MODES
            }
            gain = f"{ms['attention'] / ms['gspn2']:.2f}" if {"attention", "gspn2"} <= set(ms) else "-"
            memory = [of[mode].get("gib") or "-" for mode in ("none", "attention", "gspn2")]
            floor = f"{ms['none']:.1f}" if "none" in ms else times["none"]
            cells = [name, str(size), floor, times["attention"], times["gspn2"], gain, *memory]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[1024, 2048, 4096], help="side in pixels")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--depth", type=int, help="at most so many blocks of each kind; named in the table")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--repeats", type=int, default=10, help="timed calls")
    parser.add_argument("--seconds", type=float, default=1.0, help="fewer calls where they would take longer")
    parser.add_argument("--graph_up_to", type=int, default=2048, help="largest side that runs as a CUDA graph")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no measurement after so long")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--csv", type=Path, default=Path("families.csv"))
    return parser.parse_args()


def rows_of(name: str, args: argparse.Namespace, device: torch.device, deadline: float) -> Iterator[dict[str, Any]]:
    """A row for each mode and size of a model; without a time where there was none left."""
    dtype, published = getattr(torch, args.dtype), MODELS[name]
    model = build(published, args.depth, device, dtype)
    for mode in in_modes(model, args.modes):
        last = 0.0
        for size in args.sizes:
            row: dict[str, Any] = {"model": name if args.depth is None else f"{name}, {args.depth} deep"}
            row |= {"pixels": size, "mode": mode}
            if time.monotonic() > deadline:
                yield {**row, "error": "no time left"}
                continue
            try:
                sides = (size // published.pixels_per_token,) * 2
                inputs = random_call(model, *sides, batch=args.batch, text=published.text, device=device, dtype=dtype)
                # Attention has nothing to compile; where it takes seconds, one call has to do.
                warm = mode != "attention" or last < 500
                row |= measure(partial(model, **inputs), device, args, size <= args.graph_up_to, warm)
                last = float(row["ms"])
            except torch.OutOfMemoryError:
                row["error"] = "out of memory"
            except (RuntimeError, ValueError) as error:
                # One that fails must not take the others' figures with it.
                traceback.print_exc()
                row["error"] = str(error).partition("\n")[0]
            inputs = {}
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            yield row


def main() -> None:
    args = parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks/families.py found no CUDA device; run it on a machine with a GPU or --device cpu.")
    deadline, device = time.monotonic() + 60 * args.minutes, torch.device(args.device)
    where = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine() + " CPU"
    facts = {"device": where, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "batch": args.batch}
    rows = []
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    with args.csv.open("w", newline="", buffering=1) as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for name in args.models:
            if time.monotonic() > deadline:
                print(f"{name} is left out: {args.minutes:g} minutes are over.")
                continue
            for row in rows_of(name, args, device, deadline):
                rows.append(row)
                writer.writerow({**facts, **row})
                print(*(row[key] for key in ("model", "pixels", "mode")), row.get("ms", row.get("error")), flush=True)
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
    print(f"{where}, {args.dtype}, batch {args.batch}, torch {torch.__version__}, diffusers {diffusers.__version__}")
    print("\n".join(table(rows, args.sizes)))


if __name__ == "__main__":
    main()
