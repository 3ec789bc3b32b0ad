"""The layer against an independent float64 implementation of operator definition and projections, in plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gspn2_diffusion import GSPN2Config
from gspn2_diffusion.layers import GSPN2Layer, random_init, teacher_init

TAPS = (-1, 0, 1)


def layer_in_loops(layer: GSPN2Layer, tokens: np.ndarray, height: int, width: int) -> np.ndarray:
    """GSPN2Layer in float64, one pixel at a time, with nothing of the package's operator in it."""
    config, d = layer.config, layer.width
    groups, directions = config.groups, config.directions
    gates = len(directions) if config.gates == "per_direction" else 1
    w_in, b_in = layer.scan_in.weight.double().numpy(force=True), layer.scan_in.bias.double().numpy(force=True)
    w_out = layer.scan_out.weight.double().numpy(force=True)
    features = (tokens @ w_in.T + b_in).reshape(-1, height, width, w_in.shape[0])
    merged = []
    for batch in features:
        x = batch[..., :d]
        lam = batch[..., d : d + gates * d].reshape(height, width, gates, d)
        u = batch[..., d + gates * d : d + 2 * gates * d].reshape(height, width, gates, d)
        logits = batch[..., d + 2 * gates * d :][..., : len(directions) * groups * 3]
        logits = logits.reshape(height, width, len(directions), groups, 3)
        outputs = []
        for k, direction in enumerate(directions):
            y = scan_in_loops(
                x,
                lam[:, :, k % gates],
                u[:, :, k % gates],
                logits[:, :, k],
                direction,
                config.normalizer,
                config.segment,
                config.decay,
            )
            n = width if direction in ("right", "left") else height
            gathered = n if config.segment is None else min(n, config.segment)
            outputs.append((y, 1 if config.decay else gathered))
        if config.merge == "concat":
            merged.append(np.concatenate([y / n for y, n in outputs], axis=-1))
        else:
            merged.append(sum(y for y, _ in outputs) * len(outputs) / sum(n for _, n in outputs))
    return (np.stack(merged) @ w_out.T).reshape(len(features), height * width, -1)


def scan_in_loops(x, lam, u, logits, direction, normalizer, segment, decay):
    """One direction of one picture: x, lam, u (H, W, D), logits (H, W, G, 3)."""
    height, width, d = x.shape
    groups = logits.shape[2]
    positive = {"sigmoid": lambda v: 1 / (1 + math.exp(-v)), "softmax": math.exp}[normalizer]
    horizontal = direction in ("right", "left")
    lines, places = (width, height) if horizontal else (height, width)
    order = range(lines) if direction in ("right", "down") else range(lines - 1, -1, -1)
    y, previous = np.zeros_like(x), None
    for step, line in enumerate(order):
        if segment and step % segment == 0:
            previous = None
        current = {}
        for place in range(places):
            at = (place, line) if horizontal else (line, place)
            share = 1 / (1 + np.exp(-lam[at])) if decay else lam[at]
            kept = 1 - share if decay else np.ones_like(share)
            state = share * x[at]
            taps = [t for t in TAPS if 0 <= place + t < places]
            for channel in range(d) if previous is not None else ():
                weights = [positive(logits[at][channel * groups // d, t + 1]) for t in taps]
                for t, weight in zip(taps, weights, strict=True):
                    state[channel] += kept[channel] * weight / sum(weights) * previous[place + t][channel]
            current[place] = state
            y[at] = u[at] * state
        previous = current
    return y


CONFIGS = {
    "default": {},
    "shared": {"gates": "shared"},
    "sum": {"merge": "sum"},
    "softmax": {"normalizer": "softmax"},
    "segment": {"segment": 3},
    "groups": {"groups": 4},
    "two-directions": {"directions": ("up", "left")},
    "decay": {"decay": True, "gates": "shared"},
    "odd-width": {"proxy_dim": 5, "groups": 5},
}


@pytest.mark.parametrize("height, width", [(1, 1), (1, 5), (7, 3), (4, 9)], ids=str)
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_layer_equals_its_definition(options, height, width):
    layer = GSPN2Layer(16, 12, GSPN2Config(**options), dtype=torch.float64)
    random_init(layer, seed=height * 10 + width)
    tokens = torch.randn(2, height * width, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = layer_in_loops(layer, tokens.numpy(), height, width)
    np.testing.assert_allclose(layer(tokens, height, width).numpy(force=True), expected, rtol=1e-10, atol=1e-12)


def test_teacher_start_of_full_rank_is_the_attention_matrices_applied_to_a_cross_mean():
    torch.manual_seed(0)
    channels, height, width = 8, 5, 7
    value, out, bias = torch.randn(8, 8).double(), torch.randn(8, 8).double(), torch.randn(8).double()
    layer = GSPN2Layer(channels, channels, GSPN2Config(proxy_dim=8), dtype=torch.float64)
    teacher_init(layer, value, out, bias)
    # On a constant map, a direction at its i-th line holds (i + 1) / n of the constant.
    token = torch.randn(channels).double()
    mixed = layer(token.expand(1, height * width, channels), height, width) @ out.T
    mass = ((width + 1) / width + (height + 1) / height) / 2
    expected = (out @ (value @ token + bias)) * mass
    torch.testing.assert_close(mixed[0], expected.expand(height * width, -1), rtol=1e-4, atol=1e-4)


def test_teacher_start_keeps_the_best_rank():
    """Eckart-Young: no other rank-D map is closer; the error is the tail of the singular values."""
    torch.manual_seed(0)
    value, out = torch.randn(16, 16), torch.randn(16, 16)
    layer = GSPN2Layer(16, 16, GSPN2Config(proxy_dim=6, directions=("right", "left")))
    teacher_init(layer, value, out)
    low_rank = out @ layer.scan_out.weight[:, :6] @ layer.scan_in.weight[:6]
    tail = torch.linalg.svdvals(out @ value)[6:].square().sum().sqrt()
    torch.testing.assert_close((low_rank - out @ value).norm(), tail, rtol=1e-4, atol=1e-4)


def test_the_same_weights_keep_their_scale_at_another_resolution():
    layer = GSPN2Layer(8, 8, GSPN2Config(proxy_dim=8))
    teacher_init(layer, torch.eye(8), torch.eye(8))
    ones = torch.ones(1, 64 * 64, 8)
    small, large = layer(ones[:, :64], 8, 8), layer(ones, 64, 64)
    assert small.mean().item() == pytest.approx(1.125, abs=1e-3)
    assert large.mean().item() == pytest.approx(1 + 1 / 64, abs=1e-3)


def test_a_decaying_state_starts_as_a_mean_of_the_lines_nearby():
    layer = GSPN2Layer(8, 8, GSPN2Config(proxy_dim=8, decay=True))
    teacher_init(layer, torch.eye(8), torch.eye(8))
    middle = lambda side: layer(torch.ones(1, side * side, 8), side, side)[0, side * side // 2 + side // 2]  # noqa: E731
    torch.testing.assert_close(middle(64), torch.ones(8), rtol=0, atol=1e-3)
    far = torch.zeros(1, 64, 64, 8)
    far[:, 32, 0] = 1
    mixed = layer(far.flatten(1, 2), 64, 64).view(64, 64, 8)
    assert mixed[32, 1].min() > 1e3 * mixed[32, 40].max()


def test_init_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    layer = GSPN2Layer(8, 8, GSPN2Config(), device="meta").to_empty(device="cpu")
    random_init(layer, seed=0)
    teacher_init(layer, torch.eye(8), torch.eye(8))
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    "options, error",
    [
        ({"proxy_dim": 0.0}, ValueError),
        ({"proxy_dim": 0}, ValueError),
        ({"proxy_dim": "8"}, TypeError),
        ({"proxy_dim": 10, "groups": 4}, ValueError),
        ({"groups": 0}, ValueError),
        ({"directions": "right"}, TypeError),
        ({"directions": ()}, ValueError),
        ({"directions": ("right", "right")}, ValueError),
        ({"directions": ("diagonal",)}, ValueError),
        ({"segment": 0}, ValueError),
        ({"decay": 0.5}, TypeError),
        ({"merge": "mean"}, ValueError),
        ({"normalizer": "relu"}, ValueError),
        ({"gates": "none"}, ValueError),
        ({"init": "zeros"}, ValueError),
        ({"min_side": -1}, ValueError),
    ],
    ids=str,
)
def test_config_names_what_is_wrong(options, error):
    with pytest.raises(error, match=next(iter(options))):
        GSPN2Config(**options)


def test_config_round_trip_and_newer_keys(caplog):
    config = GSPN2Config(layers=("a", "b"), segment=8, directions=("up", "down"))
    assert GSPN2Config.from_dict(config.to_dict()) == config
    with caplog.at_level("WARNING"):
        assert GSPN2Config.from_dict({**config.to_dict(), "from_the_future": 1}) == config
    assert "from_the_future" in caplog.text
