"""One training step's forward pass: teacher, student and losses, as one module.

Teacher and student are the same module; what is prepared by accelerate is this wrapper, so that DDP, FSDP and DeepSpeed
see one forward call with one loss.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..patching import gspn2_disabled
from ..patching.apply import patched_modules
from .encode import SAMPLE_NAMES, unflatten
from .objective import Objective
from .rollout import Rollout, with_rows


class _Recorder:
    """Forward hook of an attention: keeps the calls of one pass of the model.

    Gradient checkpointing runs a block again in backward; nothing records then, and what was recorded in the first run
    is part of the graph like any other output.
    """

    def __init__(self) -> None:
        self.recording = False
        self.calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any], Any]] = {}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.recording:
            self.calls[module] = (args, kwargs, output)

    def start(self) -> None:
        self.calls, self.recording = {}, True

    def stop(self) -> dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any], Any]]:
        self.recording = False
        calls, self.calls = self.calls, {}
        return calls


class StudentStep(nn.Module):
    """A patched denoiser with its losses.

    Args:
        denoiser: a model that `apply_gspn2` has patched.
        objective: noising and targets.
        noise_weight, output_weight, layer_weight: weights of the losses against the true noise, the teacher's output
            and the teacher's attention outputs (mean over layers). A loss of weight 0 costs nothing.
        rollouts: for each part of the run (size of pictures) states of the student's own sampling, which take the place
            of the first samples of a batch. There is no true noise for them, but the teacher's guided output.
        guided_weight: weight of the loss against that output, over the squared guidance scale.
    """

    def __init__(
        self,
        denoiser: Any,
        objective: Objective,
        noise_weight: float,
        output_weight: float,
        layer_weight: float,
        rollouts: Sequence[Rollout] = (),
        guided_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.rollouts, self.guided_weight = list(rollouts), guided_weight
        self.denoiser, self.objective = denoiser, objective
        self.noise_weight, self.output_weight, self.layer_weight = noise_weight, output_weight, layer_weight
        names = inspect.signature(type(denoiser).forward).parameters
        self.sample_name = next(name for name in SAMPLE_NAMES if name in names)
        self.attentions = {name: module for name, module, _ in patched_modules(denoiser)}
        self.recorder = _Recorder()
        for module in self.attentions.values():
            module.register_forward_hook(self.recorder, with_kwargs=True)

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        indices: Tensor,
        conditions: dict[str, Tensor],
        size: str = "",
        part: int = 0,
        layerwise: bool = False,
        measure: bool = False,
    ) -> Any:
        """Args:
            latents, noise: (B, ...) float32.
            indices: (B,) timestep indices.
            conditions: the denoiser's other arguments, nested names joined by dots.
            size: of the pictures, part: of the run; for a rollout.
            layerwise: the first stage, in which each layer learns from the teacher's own input of it.
            measure: return `distance` instead; here, because FSDP gathers weights for this call only.

        Returns:
            The loss (a scalar in float32) and its parts, detached.
        """
        if measure:
            return self.distance(latents, noise, indices, conditions)
        rollout = self.rollouts[part] if self.rollouts and not layerwise else None
        first = rollout.count if rollout is not None else 0
        kept = len(latents) - first
        noisy, timesteps, target = self.objective.noised(latents[first:], noise[first:], indices[first:])
        if rollout is not None:
            states, at, rows = rollout.states(size, latents, noise, conditions)
            noisy, timesteps = torch.cat((noisy, states)), torch.cat((timesteps, self.objective.timesteps(at)))
            conditions = with_rows(conditions, rows, first)
        call = self.arguments(noisy, timesteps, conditions)
        if layerwise:
            with torch.no_grad(), gspn2_disabled(self.denoiser):
                _, teacher = self._run(call, record=True)
            loss = self._layer_loss({m: (m(*args, **kwargs), output) for m, (args, kwargs, output) in teacher.items()})
            return loss, {"layers": loss.detach()}

        needs_layers = self.layer_weight > 0
        if needs_layers or self.output_weight or rollout is not None:
            with torch.no_grad(), gspn2_disabled(self.denoiser):
                teacher_output, teacher = self._run(call, record=needs_layers)
        output, student = self._run(call, record=needs_layers)
        parts, loss = {}, latents.new_zeros((), dtype=torch.float32)
        if self.noise_weight and len(target):
            each = F.mse_loss(output[:kept].float(), target.float(), reduction="none").flatten(1).mean(1)
            weights = self.objective.weights(indices[first:])
            parts["noise"] = (each if weights is None else each * weights.to(each)).mean()
            loss = loss + self.noise_weight * parts["noise"]
        if self.output_weight:
            parts["output"] = F.mse_loss(output.float(), teacher_output.float())
            loss = loss + self.output_weight * parts["output"]
        if rollout is not None:
            guided = rollout.guided(output[kept:])
            rollout.advance(size, guided.detach())
            parts["guided"] = F.mse_loss(guided, rollout.guided(teacher_output[kept:])) / rollout.guidance_scale**2
            loss = loss + self.guided_weight * parts["guided"]
        if needs_layers:
            parts["layers"] = self._layer_loss({m: (student[m][2], teacher[m][2]) for m in teacher})
            loss = loss + self.layer_weight * parts["layers"]
        return loss, {name: part.detach() for name, part in parts.items()}

    @torch.no_grad()
    def distance(
        self, latents: Tensor, noise: Tensor, indices: Tensor, conditions: dict[str, Tensor]
    ) -> tuple[float, float]:
        """Squared distance to the teacher over the teacher's squared size: of the model's output, and the mean over
        the layers of their outputs. 0 is the teacher itself, 1 as far as an output of zeros."""
        noisy, timesteps, _ = self.objective.noised(latents, noise, indices)
        call = self.arguments(noisy, timesteps, conditions)
        with gspn2_disabled(self.denoiser):
            teacher_output, teacher = self._run(call, record=True)
        output, student = self._run(call, record=True)
        layers = [relative(_first(student[m][2]), _first(teacher[m][2])) for m in teacher]
        return relative(output, teacher_output), sum(layers) / len(layers)

    def arguments(self, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> dict[str, Any]:
        """The denoiser's keyword arguments, floats in its own type."""
        dtype = next(self.denoiser.parameters()).dtype
        floats = {k: v.to(dtype) if v.is_floating_point() and "ids" not in k else v for k, v in conditions.items()}
        return {self.sample_name: noisy.to(dtype), "timestep": timesteps, "return_dict": False, **unflatten(floats)}

    def _run(self, call: dict[str, Any], record: bool) -> tuple[Tensor, dict[nn.Module, Any]]:
        if record:
            self.recorder.start()
        output = self.denoiser(**call)[0]
        calls = self.recorder.stop() if record else {}
        channels = call[self.sample_name].shape[1]
        # Models with a learned variance (DiT, PixArt) return it in a second half of the channels.
        if output.ndim == 4 and output.shape[1] == 2 * channels:
            output = output[:, :channels]
        return output, calls

    def _layer_loss(self, pairs: dict[nn.Module, tuple[Any, Any]]) -> Tensor:
        losses = []
        for module, both in pairs.items():
            outputs = list(zip(*map(_tensors, both), strict=True))
            # The last joint attention's text is read by nothing, and GSPN-2 leaves it as it came.
            read = outputs[:1] if getattr(module, "context_pre_only", None) else outputs
            losses += [F.mse_loss(student.float(), teacher.float()) for student, teacher in read]
        return torch.stack(losses).mean()


def _tensors(output: Any) -> tuple[Tensor, ...]:
    """An attention's outputs: joint ones return image and text."""
    return output if isinstance(output, tuple) else (output,)


def _first(output: Any) -> Tensor:
    return _tensors(output)[0]


def relative(student: Tensor, teacher: Tensor) -> float:
    """Squared difference over the teacher's squared size."""
    return float((student.float() - teacher.float()).square().sum() / teacher.float().square().sum())
