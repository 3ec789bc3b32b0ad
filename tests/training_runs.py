"""Small training runs for tests: a pipeline and an image folder on disk, and children that can be killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate import DistributedType, PartialState
from PIL import Image

from gspn2_diffusion.training import TrainingArguments, train

SIZE = 16
"""Side of the pictures in pixels; 8 x 8 latents with the tiny VAE."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.training_runs"])


def image_folder(folder: Path, count: int = 12, sizes: tuple[tuple[int, int], ...] = ((SIZE, SIZE),)) -> Path:
    """Random pictures (width, height) with captions."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    lines = []
    for index in range(count):
        width, height = sizes[index % len(sizes)]
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"picture {chr(97 + index)}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def arguments(pipeline: Path, data: Path, out: Path, **options: Any) -> TrainingArguments:
    """Options of a run of three steps that shares the cache beside the data."""
    return TrainingArguments(
        **{  # type: ignore[arg-type]
            "pretrained_model_name_or_path": str(pipeline),
            "train_data_dir": str(data),
            "cache_dir": str(data.with_name(data.name + "-cache")),
            "output_dir": str(out),
            "resolution": SIZE,
            "train_batch_size": 2,
            "max_train_steps": 3,
            "logging_steps": 1,
            "holdout_samples": 2,
            **options,
        }
    )


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def start_child(args: TrainingArguments, rank: int = 0, world: int = 1, port: int = 0, backend: str = "ddp") -> Any:
    """Runs a training in a process of its own; several ranks make one, by "ddp", "fsdp2" or "deepspeed_zero2"."""
    child = _context.Process(target=_train, args=(args, rank, world, port, backend))
    child.start()
    return child


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _join(rank: int, world: int, port: int) -> None:
    """What `accelerate launch --cpu` puts into the environment."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }


def _train(args: TrainingArguments, rank: int, world: int, port: int, backend: str) -> None:
    if world > 1:
        _join(rank, world, port)
    if backend != "ddp":
        config = yaml.safe_load((Path(__file__).parents[1] / "examples" / "accelerate" / f"{backend}.yaml").read_text())
        _shard(config) if backend == "fsdp2" else _zero(config)
    train(args)


def _shard(config: dict[str, Any]) -> None:
    """examples/accelerate/fsdp2.yaml as `accelerate launch` puts it into the environment, in float32."""
    names = {"FSDP_TRANSFORMER_LAYER_CLS_TO_WRAP": "FSDP_TRANSFORMER_CLS_TO_WRAP"}
    for key, value in config["fsdp_config"].items():
        name = key.upper()
        os.environ[names.get(name, name)] = str(value).lower() if isinstance(value, bool) else str(value)
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    # accelerate offers FSDP on devices only; torch shards on the CPU as well.
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def _zero(config: dict[str, Any]) -> None:
    """examples/accelerate/deepspeed_zero2.yaml likewise."""
    os.environ |= {f"ACCELERATE_DEEPSPEED_{key.upper()}": str(v) for key, v in config["deepspeed_config"].items()}
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
    # accelerate starts DeepSpeed on devices only; DeepSpeed takes the processes as they are.
    PartialState(cpu=True)
    del os.environ["ACCELERATE_USE_CPU"]


def start_command(argv: list[str], rank: int, world: int, port: int) -> Any:
    """`gspn2 ARGV` as one of several processes that a launcher starts."""
    child = _context.Process(target=_command, args=(argv, rank, world, port))
    child.start()
    return child


def _command(argv: list[str], rank: int, world: int, port: int) -> None:
    from gspn2_diffusion.cli import main

    _join(rank, world, port)
    raise SystemExit(main(argv))
