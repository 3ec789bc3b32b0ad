"""What the benchmark of the scan times is what users run; its times need a GPU."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import scan


@pytest.mark.parametrize(
    "shape",
    [scan.Shape(2, 5, 7, 3), scan.Shape(1, 6, 4, 4, 4, ("left",), output_gate=False)],
    ids=["gates", "each channel"],
)
def test_the_backward_that_is_timed_gives_autograds_gradients(shape):
    torch.manual_seed(0)
    features, bias = scan.make_features(shape, torch.float64, torch.device("cpu"))
    given = scan.backward_operands(features, bias, shape)
    timed = torch.ops.gspn2.scan_planes_backward(*given)
    y = scan.scan_features(features.requires_grad_(), bias, shape)
    assert y.shape == given[0].shape
    (expected,) = torch.autograd.grad(y, features, given[0])
    torch.testing.assert_close(timed, expected)


def test_a_bar_for_each_pass_of_each_shape(tmp_path):
    passes = [("forward", "bf16"), ("backward", "bf16"), ("forward", "fp32")]
    rows = [dict(shape=s, work=w, dtype=d, fraction=0.5) for s in ("one", "other") for w, d in passes]
    scan.plot(rows, [dict(channels=8, side=256, us=1.0), dict(channels=8, side=512, us=4.0)], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"fraction.png", "scaling.png"}
