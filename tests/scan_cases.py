"""Shapes, inputs and tolerances shared by the CPU, emulated and GPU suites of the scan."""

import os
import random
from typing import NamedTuple

import torch

# Relative to the largest value of the expected tensor: float32 state, storage rounding on top for the half types.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-2}
NAMES = ("x", "lam", "u", "logits")


class Case(NamedTuple):
    B: int
    H: int
    W: int
    D: int
    G: int = 1
    directions: tuple[str, ...] = ("right", "left", "down", "up")
    normalizer: str = "sigmoid"
    segment: int | None = None
    merge: str = "concat"
    gates: str = "each"  # each direction its own, "shared" by the directions, "lam" only, or "none"
    decay: bool = False
    fused: bool = False  # all inputs are strided views of one tensor, as they come out of the layer's projection

    @property
    def options(self) -> dict:
        return dict(
            directions=self.directions,
            normalizer=self.normalizer,
            segment=self.segment,
            merge=self.merge,
            decay=self.decay,
        )

    def __str__(self) -> str:
        parts = [
            f"B{self.B}-{self.H}x{self.W}-D{self.D}-G{self.G}",
            "".join(d[0] for d in self.directions),
            self.normalizer,
        ]
        parts += [f"seg{self.segment}"] * (self.segment is not None) + [self.merge, self.gates] + ["decay"] * self.decay
        parts += ["fused"] * self.fused
        return "-".join(parts)


CASES = [
    Case(1, 1, 1, 1),
    Case(2, 1, 7, 3, 3, normalizer="softmax"),
    Case(2, 7, 1, 3, segment=3),
    Case(1, 2, 3, 8, 2, directions=("up",)),
    Case(2, 3, 2, 8, 8, directions=("left", "down"), merge="sum"),
    Case(1, 7, 16, 40, 2, segment=5, gates="shared"),
    Case(2, 16, 16, 40, fused=True),
    Case(1, 16, 7, 8, gates="none", directions=("down", "right", "up")),
    Case(1, 33, 33, 8, 8, normalizer="softmax", gates="lam", fused=True),
    Case(1, 33, 16, 160, 2, merge="sum", gates="shared", fused=True),
    Case(1, 57, 31, 3, segment=4, merge="sum", normalizer="softmax"),
    Case(1, 31, 57, 40, 40, directions=("right",), gates="lam"),
    Case(1, 72, 128, 8, gates="lam", segment=50),
    Case(1, 5, 9, 160, fused=True, merge="sum", segment=1),
    Case(2, 7, 9, 40, 2, fused=True, decay=True),
    Case(1, 9, 5, 8, 8, gates="lam", segment=4, normalizer="softmax", decay=True),
    Case(2, 5, 6, 12, gates="shared", merge="sum", decay=True),
]


def make_inputs(
    case: Case, dtype: torch.dtype, seed: int = 0, device: str | torch.device = "cpu"
) -> tuple[torch.Tensor | None, ...]:
    """x, lam, u, logits: leaves, or views of one leaf if `case.fused`; lam in [0, 1], others normal."""
    generator = torch.Generator().manual_seed(seed)
    B, H, W, D, G = case[:5]
    K = len(case.directions)
    gate = (1 if case.gates == "shared" else K) * D
    widths = [D, 0 if case.gates == "none" else gate, 0 if case.gates in ("none", "lam") else gate, K * G * 3]
    widths.append(-sum(widths) % 8 if D % 8 == 0 else 0)  # as the layer's projection
    fused = torch.randn(B, H, W, sum(widths), generator=generator, dtype=torch.float64)
    fused[..., D : D + widths[1]] = torch.rand(B, H, W, widths[1], generator=generator, dtype=torch.float64)
    fused = fused.to(device, dtype).requires_grad_()
    parts: list[torch.Tensor | None] = []
    for part, shape in zip(fused.split(widths, -1)[:4], [(D,), (-1, D), (-1, D), (K, G, 3)], strict=True):
        view = part.unflatten(-1, shape) if part.shape[-1] and len(shape) > 1 else part
        if not part.shape[-1]:
            parts.append(None)
        else:
            parts.append(
                view if case.fused else view.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
            )
    return tuple(parts)


def gradients(
    y: torch.Tensor, inputs: tuple[torch.Tensor | None, ...] | list, grad_y: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Gradients of y by name: d_x, d_lam, d_u, d_logits, without the inputs that are None."""
    named = {f"d_{name}": t for name, t in zip(NAMES, inputs, strict=True) if t is not None}
    return dict(
        zip(
            named,
            torch.autograd.grad(y, list(named.values()), torch.ones_like(y) if grad_y is None else grad_y),
            strict=True,
        )
    )


def assert_close(name: str, got: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> None:
    """Every element within the type's tolerance of the float64 result, relative to its largest; NaN never passes."""
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    tolerance = TOLERANCE[got.dtype] if tolerance is None else tolerance
    error = (got.double().cpu() - expected.double().cpu()).abs().max().item() if got.numel() else 0.0
    scale = expected.double().abs().max().item() if got.numel() else 1.0
    assert error <= tolerance * max(scale, 0.1), f"{name}: error {error:.3g} on values up to {scale:.3g}"


def make_features(
    case: Case, dtype: torch.dtype, seed: int = 0, device: str | torch.device = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(F, B, H, W) and (F,): what `gspn2_scan_planes` takes; lam with its bias in [0, 1], others normal."""
    generator = torch.Generator().manual_seed(seed)
    B, H, W, D, G = case[:5]
    K = len(case.directions)
    gate = (1 if case.gates == "shared" else K) * D
    lam = 0 if case.gates == "none" else gate
    count = D + lam + (gate if case.gates in ("each", "shared") else 0) + K * G * 3
    count += -count % 8
    features = torch.randn(count, B, H, W, generator=generator, dtype=torch.float64)
    bias = torch.randn(count, generator=generator, dtype=torch.float64)
    features[D : D + lam] = torch.rand(lam, B, H, W, generator=generator, dtype=torch.float64) / 2
    bias[D : D + lam] = torch.rand(lam, generator=generator, dtype=torch.float64) / 2
    return features.to(device, dtype), bias.to(device, dtype)


def planes_options(case: Case) -> dict:
    return case.options | dict(
        channels=case.D,
        groups=case.G,
        shared_gates=case.gates == "shared",
        input_gate=case.gates != "none",
        output_gate=case.gates in ("each", "shared"),
    )


def seeded(part: int) -> tuple[int, random.Random]:
    """A seed, printed, and its generator; GSPN2_TEST_SEED in the environment repeats the one of part 0."""
    seed = int(os.environ.get("GSPN2_TEST_SEED", random.SystemRandom().randrange(10**6))) + part
    print(f"part {part}: seed {seed}")
    return seed, random.Random(seed)
