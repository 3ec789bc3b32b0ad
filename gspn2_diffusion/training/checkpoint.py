"""Checkpoints: written whole or not at all, resumed exactly."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..adapter import GSPN2Adapter
from ..loading import UserError
from .rollout import Rollout

logger = logging.getLogger(__name__)

PREFIX = "checkpoint-"
PARTIAL = ".partial"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's."""
DEEPSPEED_COPY = "_hp_mapping"
"""The attribute by which DeepSpeed (ZeRO 1 and 2) finds the float32 copy of a parameter."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint could not be written or read."""


def is_full(error: Exception) -> bool:
    """Whether a disk, quota or limit on a file's size was reached; safetensors only says so in its message."""
    return any(getattr(error, "errno", None) == code or f"os error {code}" in str(error) for code in FULL)


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [p for p in folder.glob(PREFIX + "*") if p.name[len(PREFIX) :].isdigit()]
    return sorted(found, key=lambda p: int(p.name[len(PREFIX) :]))


class Checkpoints:
    """Saves and restores what a run needs to go on exactly: layers, optimizer, average and step.

    The order of samples and all draws follow from the step (see `sampling`), the learning rate too.

    Args:
        folder: of the run.
        accelerator: of the run.
        adapter: owner of the trained layers.
        optimizer: prepared.
        ema: average of the adapter's parameters, or None.
        limit: how many checkpoints to keep, None for all.
        rollouts: each process saves its own trajectories.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        adapter: GSPN2Adapter,
        optimizer: Any,
        ema: EMAModel | None,
        limit: int | None,
        rollouts: Sequence[Rollout] = (),
    ) -> None:
        self.folder, self.accelerator, self.limit, self.rollouts = folder, accelerator, limit, list(rollouts)
        self.adapter, self.optimizer, self.ema = adapter, optimizer, ema

    def save(self, step: int) -> None:
        """Writes `checkpoint-STEP` under another name, then renames it; a kill at any moment leaves the older ones.

        Raises:
            CheckpointError: it could not be written, say because the disk is full. Older checkpoints are untouched.
        """
        tensors, state = self._state(step)
        adapter = full_copy(self.adapter, trained_values(self.adapter))
        final = self.folder / f"{PREFIX}{step}"
        partial = final.with_name(final.name + PARTIAL)
        if self.rollouts:
            with self._writing(step, partial):
                for part, rollout in enumerate(self.rollouts):
                    save_file(rollout.state_dict(), partial / self._rollout_name(part))
            self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            with self._writing(step, partial):
                adapter.save_pretrained(partial / "adapter")
                save_file(tensors, partial / "optimizer.safetensors")
                (partial / "state.json").write_text(json.dumps(state, indent=2))
                _sync(partial)
                if final.exists():
                    shutil.rmtree(final)
                os.rename(partial, final)
                _sync_folder(self.folder)
            if self.limit is not None:
                for old in checkpoints(self.folder)[: -self.limit]:
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _writing(self, step: int, partial: Path) -> Iterator[None]:
        try:
            partial.mkdir(parents=True, exist_ok=True)
            yield
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise self._unwritten(f"Checkpoint {step}", error) from error

    def _unwritten(self, what: str, error: Exception) -> CheckpointError:
        older = checkpoints(self.folder)
        kept = f"{older[-1].name} is intact" if older else "no earlier checkpoint exists"
        return CheckpointError(
            f"{what} could not be written to {self.folder} ({error}); {kept}. "
            "Free some space and run again with --resume_from_checkpoint latest."
        )

    @contextmanager
    def on_a_full_disk(self) -> Iterator[None]:
        """Around whatever else a run writes: its log, pictures, report and adapter.

        Raises:
            CheckpointError: the disk is full; it names the newest whole checkpoint.
        """
        try:
            yield
        except (OSError, SafetensorError) as error:
            if not is_full(error):
                raise
            raise self._unwritten("The run's files", error) from error

    def _rollout_name(self, part: int) -> str:
        return f"rollout-{self.accelerator.process_index}{f'-{part}' if part else ''}.safetensors"

    def _state(self, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        state: dict[str, Any] = {"step": step}
        tensors: dict[str, Tensor] = {}
        for index, moments in self._moments().items():
            tensors |= {f"optimizer.{index}.{name}": whole(value) for name, value in moments.items()}
        if self.ema is not None:
            average = self.ema.state_dict()
            for index, value in enumerate(average.pop("shadow_params")):
                tensors[f"ema.{index}"] = whole(value)
            state["ema"] = average
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        return tensors, state

    def _moments(self) -> dict[int, dict[str, Tensor]]:
        """The optimizer's state, by the index of the adapter's parameter."""
        if not self._deepspeed:
            return self.optimizer.state_dict()["state"]
        from deepspeed.utils import safe_get_full_optimizer_state

        # One flat tensor for all parameters of a group, each process holding its part; the count of steps is common.
        steps = next(iter(self.optimizer.optimizer.optimizer.state.values()))["step"]
        return {
            index: {"step": steps.clone()} | {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
            for index, parameter in enumerate(self.adapter.parameters())
        }

    def _set_moments(self, moments: dict[int, dict[str, Tensor]]) -> None:
        if not self._deepspeed:
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        zero = self.optimizer.optimizer
        for flat in zero.single_partition_of_fp32_groups:
            # As AdamW's first step makes it.
            zero.optimizer.state[flat] = {"step": moments[0]["step"].clone()}
            zero.optimizer.state[flat] |= {name: torch.zeros_like(flat) for name in MOMENTS}
        zero._lazy_init_hp_params_optimizer_state()
        for index, parameter in enumerate(self.adapter.parameters()):
            for name in MOMENTS:
                safe_set_full_optimizer_state(parameter, moments[index][name].to(parameter.device), name)

    @property
    def _deepspeed(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    def load(self, which: str) -> int:
        """Restores `"latest"` or a checkpoint's folder and returns its step; 0 if there is no latest one.

        Raises:
            CheckpointError: there is no such checkpoint, or it is not one of this model.
        """
        if which == "latest":
            found = checkpoints(self.folder)
            if not found:
                logger.warning("There is no checkpoint in %s; starting from the beginning.", self.folder)
                return 0
            path = found[-1]
        else:
            path = Path(which) if Path(which).is_dir() else self.folder / which
        try:
            state = json.loads((path / "state.json").read_text())
            tensors = load_file(path / "optimizer.safetensors")
            saved = GSPN2Adapter.from_pretrained(path / "adapter")
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{path} is not a whole checkpoint ({error}); resume from another one.") from error
        if (
            saved.config["layers"] != self.adapter.config["layers"]
            or saved.operator_config != self.adapter.operator_config
        ):
            raise CheckpointError(f"{path} has other layers than this run; pass the options it was started with.")
        if (self.ema is None) != ("ema" not in state):
            raise CheckpointError(
                f"{path} was made {'with' if 'ema' in state else 'without'} --use_ema; do the same now."
            )
        load_whole(self.adapter, saved.state_dict())
        average = {int(key[4:]): tensors.pop(key) for key in list(tensors) if key.startswith("ema.")}
        if self.ema is not None:
            self.ema.load_state_dict({**state["ema"], "shadow_params": [average[i] for i in range(len(average))]})
            self.ema.to(self.accelerator.device)
        moments: dict[int, dict[str, Tensor]] = {}
        parameters = list(self.adapter.parameters())
        for key, value in tensors.items():
            _, index, name = key.split(".")
            moments.setdefault(int(index), {})[name] = sharded_like(parameters[int(index)], value)
        self._set_moments(moments)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for part, rollout in enumerate(self.rollouts):
            if (path / self._rollout_name(part)).is_file():
                rollout.load_state_dict(load_file(path / self._rollout_name(part)), self.accelerator.device)
            else:
                logger.warning("%s has no sampled states for this process; new ones are begun.", path)
        return state["step"]


def whole(value: Tensor) -> Tensor:
    """A tensor on the CPU, gathered if FSDP has sharded it."""
    full = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full.detach().cpu().contiguous()


def full_copy(adapter: GSPN2Adapter, values: Sequence[Tensor] | None = None) -> GSPN2Adapter:
    """The adapter on the CPU, with other values for its parameters if given (an average's).

    Every process calls it: what FSDP has sharded is gathered from all.
    """
    copy = GSPN2Adapter(**{key: adapter.config[key] for key in ("base_class", "layers", "operator")})
    names = [name for name, _ in adapter.named_parameters()]
    copy.load_state_dict(dict(zip(names, map(whole, values or adapter.parameters()), strict=True)), strict=True)
    return copy


def trained_values(adapter: GSPN2Adapter) -> list[nn.Parameter]:
    """The adapter's parameters, or what DeepSpeed trains instead of them: float32 copies, sharded over the processes,
    of which the parameters are the rounded values. Every process calls it."""
    parameters = list(adapter.parameters())
    if not hasattr(parameters[0], DEEPSPEED_COPY):
        return parameters
    from deepspeed.utils import safe_get_full_fp32_param

    return [nn.Parameter(safe_get_full_fp32_param(parameter)) for parameter in parameters]


@torch.no_grad()
def load_whole(adapter: GSPN2Adapter, values: dict[str, Tensor]) -> None:
    """Puts full tensors into the adapter's parameters, sharded or not."""
    for name, parameter in adapter.named_parameters():
        if hasattr(parameter, DEEPSPEED_COPY):
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(parameter, values[name].to(parameter.device))
        parameter.copy_(sharded_like(parameter, values[name].to(parameter.device, parameter.dtype)))


def sharded_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A full tensor of a parameter's shape, sharded as FSDP has sharded the parameter."""
    if value.shape != parameter.shape or not hasattr(parameter, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]


def _sync(folder: Path) -> None:
    """Files reach the disk before the name that vouches for them does."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
