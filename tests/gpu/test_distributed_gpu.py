"""Two GPUs give what one gives: training under accelerate's launcher, one picture by rows.

One command: pytest -m gpu tests/gpu/test_distributed_gpu.py
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .. import tiny_models
from ..training_runs import SIZE, free_port, image_folder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]
ROOT = Path(__file__).parents[2]
# One step with a learning rate of 1 and a large epsilon: what the weights move by is nearly the gradient.
OPTIONS = (
    f"--resolution {SIZE} --max_train_steps 1 --learning_rate 1 --adam_epsilon 1 --max_grad_norm 1e9 --use_ema "
    "--holdout_samples 2 --proportion_empty_prompts 0.5 --distance_steps 0 --mixed_precision no"
).split()


def run(*arguments: object) -> str:
    # In float32 as it is written, not in TF32: other batch sizes choose other convolutions.
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "NVIDIA_TF32_OVERRIDE": "0", "PYTHONPATH": path}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("two-gpus")
    tiny_models.sd_pipe().save_pretrained(root / "pipe")
    image_folder(root / "data")
    return root


def distil(folder: Path, name: str, batch: int) -> list[object]:
    flags = ["--pretrained_model_name_or_path", folder / "pipe", "--train_data_dir", folder / "data"]
    flags += ["--cache_dir", folder / "cache", "--output_dir", folder / name, "--train_batch_size", batch]
    return [ROOT / "examples" / "distill.py", *flags, *OPTIONS]


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, torch.Tensor]:
    run(*distil(folder, "alone", 4))
    return load_file(folder / "alone" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "deepspeed_zero2"])
def test_two_gpus_train_what_one_does(folder, alone, backend):
    if backend.startswith("deepspeed"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    launch = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "examples" / "accelerate" / f"{backend}.yaml"]
    launch += ["--mixed_precision", "no", "--main_process_port", free_port()]
    run(*launch, *distil(folder, backend, 2))
    together = load_file(folder / backend / "diffusion_pytorch_model.safetensors")
    assert together.keys() == alone.keys()
    for name, expected in alone.items():
        torch.testing.assert_close(together[name], expected, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_two_gpus_draw_the_same_picture():
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    printed = run(*launch, "benchmarks/shard.py", "--tiny", "--sizes", 520, "--iterations", 1, "--dtype", "float32")
    difference, largest = map(float, re.search(r"largest difference (\S+) of (\S+)", printed).groups())
    assert difference < 1e-4 * largest
