"""The plan's arithmetic; its accuracy is measured by benchmarks/plan_accuracy.py."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import pytest
import torch

from gspn2_diffusion import apply_gspn2
from gspn2_diffusion import plan as plan_module
from gspn2_diffusion.plan import (
    HOST_FACTOR,
    StagePlan,
    _Clocks,
    _decode,
    _encode,
    _Operation,
    _peak,
    _tile_sides,
    _vae_cost,
    _walk,
    plan,
)

from . import tiny_models

CPU, F32 = torch.device("cpu"), torch.float32


def test_peak_counts_what_is_alive():
    def run():
        a = torch.empty(1000, device="meta")
        b = a + 1
        del a
        c = b[:500].view(5, 100)  # no memory of its own
        return c + c

    assert _peak(run, CPU) == 8000  # a and b, then b and 500 of the sum


def test_a_parameters_view_is_no_new_memory():
    linear = torch.nn.Linear(100, 10, device="meta")
    assert _peak(lambda: linear(torch.empty(4, 100, device="meta")), CPU) == 4 * (4 * 100 + 4 * 10)


def test_half_precision_convolutions_work_on_copies_on_a_gpu():
    convolution = torch.nn.Conv2d(4, 8, 3, padding=1, device="meta")
    x, y = 4 * 5 * 6, 8 * 5 * 6  # elements

    def peak(device: str, dtype: torch.dtype) -> int:
        model = convolution.to(dtype)
        return _peak(lambda: model(torch.empty(1, 4, 5, 6, device="meta", dtype=dtype)), torch.device(device))

    assert peak("cuda", torch.bfloat16) == 2 * 2 * (x + y)
    assert peak("cpu", torch.bfloat16) == 2 * (x + y) and peak("cuda", F32) == 4 * (x + y)


def test_work_is_flops_or_bytes():
    walk = _walk(lambda: torch.empty(8, 16, device="meta") @ torch.empty(16, 4, device="meta"), CPU)
    (product,) = [op for op in walk.operations if "mm" in str(op.function)]
    assert product.work == 2 * 8 * 16 * 4
    (added,) = _walk(lambda: torch.empty(8, device="meta").exp(), CPU).operations
    assert isinstance(added, _Operation) and added.work == 64


def test_attention_is_one_operation_of_quadratic_work():
    def attend(tokens):
        q = torch.empty(1, 2, tokens, 4, device="meta")
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)

    small, large = (_walk(lambda: attend(n), CPU) for n in (32, 64))  # noqa: B023
    assert len(small.operations) == 1 and large.operations[0].work == 4 * small.operations[0].work
    assert large.peak < 3 * 64 * 2 * 4 * 4


@pytest.mark.parametrize("latent", [(40, 24), (16, 52), (48, 48)])
def test_tiles_cost_what_diffusers_tiled_run_costs(latent):
    """Against a walk of the tiled run itself, every blended row of it, which at 16K has a million operations."""
    vae = tiny_models.vae().to("meta")
    decoded = []
    vae.decoder.register_forward_pre_hook(lambda module, args: decoded.append(tuple(args[0].shape[2:])))
    vae.enable_tiling()
    walks = [_walk(run, CPU) for run in (lambda: _decode(vae, latent, F32), lambda: _encode(vae, latent, 2, F32))]
    assert decoded == _tile_sides(vae, latent)
    ticks = iter(range(10**9))
    clocks = _Clocks(CPU, lambda: float(next(ticks)))  # every operation takes one second
    vae.use_tiling = False
    _, peak = _vae_cost(vae, latent, 2, F32, clocks, latent, tiled=True, encode=False)
    assert peak == pytest.approx(walks[0].peak, rel=0.1)
    _, peak = _vae_cost(vae, latent, 2, F32, clocks, latent, tiled=True, encode=True)
    assert peak == pytest.approx(max(walk.peak for walk in walks), rel=0.1)


def test_a_call_takes_the_longer_of_device_and_host():
    walk = _walk(lambda: torch.empty(8, 8, device="meta").exp().add(1), CPU)
    clocks = _Clocks(CPU, float)
    clocks.times = {operation.signature: (2.0, 0.5) for operation in walk.operations}
    assert clocks.seconds(walk, walk) == (4.0, HOST_FACTOR)
    stage = StagePlan(8, 8, 1, 4.0, 5.0, 1.0, 0, 0, {}, 0.5)
    assert (stage.call_seconds, stage.seconds) == (5.0, 6.5)


def test_the_largest_stages_share_the_timing_of_pixels(monkeypatch):
    timed = []

    def record(clock, side, reads):
        timed.append((side, reads))
        return 0.5

    monkeypatch.setattr(plan_module, "PIXELS_AT", 40)
    monkeypatch.setattr(plan_module, "_pixel_time", record)
    made = plan(tiny_models.sd_pipe(), 128, 96, calibrate_at=16, clock=lambda: 0.0)
    assert timed == [(27, False), (40, True)]
    assert [stage.pixel_seconds for stage in made.stages] == [0.5 * 32 * 24, 0.5 * 64 * 48, 0.5 * 128 * 96]


def test_plan_of_a_pipeline_and_of_its_folder(tmp_path):
    pipe = tiny_models.sd_pipe()
    apply_gspn2(pipe)
    ticks = iter(range(10**9))
    made = plan(pipe, 64, 48, calibrate_at=16, num_inference_steps=10, clock=lambda: next(ticks))
    assert [(s.height, s.width, s.steps) for s in made.stages] == [(32, 24, 10), (64, 48, 3)]
    assert made.fits and made.switches == {} and "7 GSPN-2 layers on cpu" in str(made)
    assert made.stages[1].call_seconds > made.stages[0].call_seconds
    assert made.seconds == pytest.approx(sum(s.seconds for s in made.stages))
    assert next(pipe.unet.parameters()).device.type == "cpu"

    tight = plan(pipe, 24, 16, calibrate_at=16, memory_limit=1, clock=lambda: next(ticks))
    assert not tight.fits and "guidance_in_turn" in tight.switches and "DOES NOT FIT" in str(tight)

    pipe.save_pretrained(tmp_path)
    from_folder = plan(str(tmp_path), 24, 16, calibrate_at=16, device="cpu", clock=lambda: next(ticks))
    assert "0 GSPN-2 layers" in from_folder.model
    with pytest.raises(TypeError, match="holds no diffusers pipeline"):
        plan(tmp_path / "nowhere", 24, 16)
    with pytest.raises(ValueError, match="height is 21"):
        plan(pipe, 21, 16)


def test_sdxl_benchmark_runs(tmp_path, capsys):
    path = Path(__file__).parent.parent / "benchmarks" / "sdxl.py"
    spec = importlib.util.spec_from_file_location("sdxl_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    table = tmp_path / "sdxl.csv"
    options = "--tiny --device cpu --dtype float32 --sizes 64 --iterations 1 --warmup 0 --batch 1"
    chunks = "--feed_forward_tokens 8"
    files = ["--csv", str(table), "--plot", str(tmp_path / "sdxl.png")]
    module.main([*options.split(), *chunks.split(), *files])
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["mixer"] for row in rows] == ["attention", "linear", "gspn2", "none"]
    assert all(float(row["ms"]) > 0 and not row["error"] for row in rows)
    assert "1.000" in capsys.readouterr().out
    assert (tmp_path / "sdxl.png").stat().st_size > 1000
