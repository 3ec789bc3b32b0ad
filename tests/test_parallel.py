"""Four gloo processes, and two of them, against one process: the reference scan, the whole UNet, a step of DDP."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gspn2_diffusion import apply_gspn2
from gspn2_diffusion.ops import gspn2_scan_reference
from gspn2_diffusion.parallel import row_heights, shard_rows
from gspn2_diffusion.parallel.scan import channel_slices

from . import tiny_models
from .parallel_worker import SCANS, UNETS, gradients, scan_inputs, unet


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    """What each of four ranks computed."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel_worker", str(folder)],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [load_file(folder / f"{rank}.safetensors") for rank in range(4)]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", SCANS)
def test_scan_and_every_gradient(ranks, name, count):
    tensors, grad, options = scan_inputs(name)
    # Independent: the reference, by autograd, in float64.
    leaves = {n: t.double().requires_grad_() for n, t in tensors.items() if t is not None}
    y = gspn2_scan_reference(*[leaves.get(n) for n in tensors], **options)
    y.backward(grad.double())
    tolerance = 3e-2 if name == "bfloat16" else 1e-5
    for key, expected in {"y": y.detach(), **{n: t.grad for n, t in leaves.items()}}.items():
        got = torch.cat([ranks[rank][f"{count}/{name}/{key}"] for rank in range(count)], dim=1).double()
        error = (got - expected).abs().max() / expected.abs().max()
        assert error < tolerance, f"{key}: {error:.1e}"


@torch.no_grad()
@pytest.mark.parametrize("count", UNETS)
def test_unet_equals_one_process(ranks, count):
    expected = unet()(**tiny_models.unet_inputs(*UNETS[count])).sample
    for rank in range(count):
        torch.testing.assert_close(ranks[rank][f"{count}/unet"], expected, atol=2e-5, rtol=1e-4)
        assert torch.equal(ranks[rank][f"{count}/unet"], ranks[0][f"{count}/unet"])
        assert torch.equal(ranks[rank][f"{count}/unet after"], expected)


def test_ddp_averages_the_gradients(ranks):
    """Two processes with pictures of different aspect ratios against the mean of the two by themselves."""
    alone = [gradients(unet(), rank) for rank in range(2)]
    for name, first in alone[0].items():
        for rank in range(2):
            got = ranks[rank][f"ddp/{name}"]
            torch.testing.assert_close(got, (first + alone[1][name]) / 2, rtol=1e-4, atol=1e-7)


def test_row_heights():
    assert row_heights(13, 4) == [4, 3, 3, 3]
    assert row_heights(19, 2, unit=4) == [12, 7]
    assert row_heights(32, 3, unit=8) == [16, 8, 8]
    with pytest.raises(ValueError, match="9 rows do not give each of 4 ranks 4 rows; use at most 3 ranks"):
        row_heights(9, 4, unit=4)


@pytest.mark.parametrize("channels, groups, count", [(10, 1, 4), (12, 6, 4), (16, 2, 4), (8, 8, 3)])
def test_every_channel_has_one_rank(channels, groups, count):
    within = channels // groups
    held = [g * within + c for part in channel_slices(channels, groups, count) for g in part[0] for c in part[1]]
    assert sorted(held) == list(range(channels))


def test_too_many_ranks_for_the_channels():
    with pytest.raises(ValueError, match="4 channels in 2 groups cannot be shared out to 3 ranks; use at most 2 ranks"):
        channel_slices(4, 2, 3)


@pytest.fixture
def alone(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_one_rank_and_its_errors(alone):
    model = tiny_models.unet()
    with (
        pytest.raises(ValueError, match=r"still softmax attention.*apply_gspn2 to all layers first"),
        shard_rows(model),
    ):
        pass
    apply_gspn2(model)
    inputs = tiny_models.unet_inputs(10, 8)
    with torch.no_grad():
        expected = model(**inputs).sample
        with shard_rows(model):
            torch.testing.assert_close(model(**inputs).sample, expected, atol=2e-5, rtol=1e-4)
            assert isinstance(model(**inputs, return_dict=False), tuple)
            with pytest.raises(ValueError, match="ControlNet"):
                model(**inputs, down_block_additional_residuals=())
    with shard_rows(model), pytest.raises(RuntimeError, match="no gradients"):
        model(**inputs)


def test_not_initialised():
    with pytest.raises(RuntimeError, match="start with torchrun"), shard_rows(tiny_models.unet()):
        pass
