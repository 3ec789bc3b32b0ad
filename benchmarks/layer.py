"""Time the whole layer, projections included, against the layers of softmax and of linear attention at the same width.

    python benchmarks/layer.py --out outputs/benchmarks/layer

Softmax is diffusers' Attention (SDPA); linear attention replaces its product by elu(x) + 1 features (arXiv 2006.16236).
Forward, no gradient, CUDA-graph replays. Random weights: the time does not depend on them.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from scan import DTYPES, MOST_TOKENS, Timer, attempt, write

from gspn2_diffusion import GSPN2Config
from gspn2_diffusion.layers import GSPN2Layer

# (B, side, C): SDXL at 1024 pixels, at 4096, and at 16384.
SHAPES = {
    "sdxl-64": (2, 64, 640),
    "sdxl-32": (2, 32, 1280),
    "4k-256": (2, 256, 640),
    "16k-1024": (1, 1024, 640),
    "tiny": (1, 8, 64),
}


def linear_attention(attention: Attention, hidden_states: torch.Tensor) -> torch.Tensor:
    shape = (*hidden_states.shape[:2], attention.heads, -1)
    q, k, v = (p(hidden_states).view(shape) for p in (attention.to_q, attention.to_k, attention.to_v))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    context = torch.einsum("bnhd,bnhe->bhde", k, v)
    scale = torch.einsum("bnhd,bhd->bnh", q, k.sum(1)).reciprocal()
    mixed = torch.einsum("bnhd,bhde,bnh->bnhe", q, context, scale)
    return attention.to_out[0](mixed.flatten(2))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/layer"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[name for name in SHAPES if name != "tiny"])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--longest", action="store_true", help=f"softmax attention beyond {MOST_TOKENS} tokens too")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    timer = Timer(device, args.repeats)
    rows: list[dict] = []
    for name in args.shapes:
        B, side, C = SHAPES[name]
        hidden_states = torch.randn(B, side * side, C, device=device, dtype=dtype)
        attention = Attention(C, heads=max(1, C // 64), dim_head=64).to(device, dtype)
        layer = GSPN2Layer(C, C, GSPN2Config()).to(device, dtype)

        def gspn2(_: int, layer=layer, attention=attention, hidden_states=hidden_states, side=side) -> torch.Tensor:
            return attention.to_out[0](layer(hidden_states, side, side))

        def linear(_: int, attention=attention, hidden_states=hidden_states) -> torch.Tensor:
            return linear_attention(attention, hidden_states)

        def softmax(_: int, attention=attention, hidden_states=hidden_states) -> torch.Tensor:
            return attention(hidden_states)

        row = dict(shape=name, dtype=args.dtype, gspn2_us=timer(gspn2) * 1e6)
        row["linear_us"] = attempt("linear attention", lambda work=linear: timer(work) * 1e6)
        if side * side <= MOST_TOKENS or args.longest:
            row["softmax_us"] = attempt("softmax attention", lambda work=softmax: timer(work) * 1e6)
            if row["softmax_us"]:
                row["times_faster"] = row["softmax_us"] / row["gspn2_us"]
        rows.append(row)
        print(" ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
    write(rows, args.out / "layer.csv")
    print(f"Wrote {args.out}/layer.csv")


if __name__ == "__main__":
    main()
