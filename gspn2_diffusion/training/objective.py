"""What the denoiser is asked to predict: noise, velocity or flow, as its scheduler's config says."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr
from torch import Tensor

from .arguments import TrainingError


class Objective:
    """Noising and targets of one model.

    Args:
        scheduler: the pipeline's scheduler; only its config is read.
        timestep_scale: what the pipeline multiplies a timestep by before the denoiser gets it.
        weighting_scheme: density of timesteps (`"none"`: uniform, `"logit_normal"`, `"mode"`; Esser et al. 2024,
            section 3.1), over a line on which 0 is noise alone and 1 the picture.
        snr_gamma: Min-SNR gamma for the noise loss, or None.
        logit_mean, logit_std: of `"logit_normal"`; a mean below 0 prefers noisy samples.
        mode_scale: of `"mode"`.

    Raises:
        ValueError: the prediction type is not supported, or an option does not go with it.
    """

    def __init__(
        self,
        scheduler: Any,
        timestep_scale: float = 1.0,
        weighting_scheme: str = "none",
        snr_gamma: float | None = None,
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        mode_scale: float = 1.29,
    ) -> None:
        self.timestep_scale, self.weighting_scheme, self.snr_gamma = timestep_scale, weighting_scheme, snr_gamma
        self.density: dict[str, Any] = {"logit_mean": logit_mean, "logit_std": logit_std, "mode_scale": mode_scale}
        self.flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or "flow" in str(
            scheduler.config.get("prediction_type", "")
        )
        if self.flow:
            self.scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
            self.kind = "flow"
            if snr_gamma is not None:
                raise TrainingError("--snr_gamma has no meaning for flow matching; use --weighting_scheme.")
        else:
            self.scheduler = DDPMScheduler.from_config(scheduler.config)
            self.kind = self.scheduler.config.prediction_type
            if self.kind not in ("epsilon", "v_prediction"):
                raise TrainingError(
                    f"prediction_type {self.kind!r} is not supported; use epsilon, v_prediction or flow."
                )
        self.steps = self.scheduler.config.num_train_timesteps

    def draw(self, generator: torch.Generator) -> int:
        """One training timestep's index, from a generator on the CPU."""
        if not self.flow and self.weighting_scheme == "none":
            return int(torch.randint(self.steps, (1,), generator=generator))
        u = compute_density_for_timestep_sampling(self.weighting_scheme, 1, generator=generator, **self.density)
        index = min(int(u * self.steps), self.steps - 1)
        # Timesteps of flow matching are listed from noise to picture; a diffusion's are counted from the picture.
        return index if self.flow else self.steps - 1 - index

    def below(self, index: int, strength: float) -> int:
        """An index of all noise levels -> the one at the same share of those up to image-to-image's `strength`."""
        if self.flow:
            return self.steps - 1 - int((self.steps - 1 - index) * strength)
        return int(index * strength)

    def timesteps(self, indices: Tensor) -> Tensor:
        """(B,) timestep indices -> the denoiser's timesteps (B,)."""
        if self.flow:
            return self.scheduler.timesteps.to(indices.device)[indices] * self.timestep_scale
        return indices

    def noised(self, latents: Tensor, noise: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents and noise (B, ...), timestep indices (B,) -> noisy latents, the denoiser's timestep (B,), target."""
        timesteps = self.timesteps(indices.to(latents.device))
        if self.flow:
            sigmas = self.scheduler.sigmas.to(latents.device, latents.dtype)[indices.to(latents.device)]
            sigmas = sigmas.view(-1, *[1] * (latents.ndim - 1))
            return (1 - sigmas) * latents + sigmas * noise, timesteps, noise - latents
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        if self.kind == "epsilon":
            return noisy, timesteps, noise
        return noisy, timesteps, self.scheduler.get_velocity(latents, noise, timesteps)

    def schedule(self, count: int) -> list[int]:
        """Timestep indices of `count` denoising steps, from noise towards the picture, evenly spaced."""
        ends = [round(place * self.steps / count) for place in range(count)]
        return ends if self.flow else [self.steps - 1 - end for end in ends]

    def move(self, noisy: Tensor, output: Tensor, indices: Tensor, following: Tensor) -> Tensor:
        """Deterministic sampling from one noise level to another: DDIM (Song et al. 2021, eq. 12 with eta 0), or
        Euler's step along the flow.

        Args:
            noisy, output: (B, ...) float32, the state and the prediction in it.
            indices, following: (B,) timestep indices of the state and of the one to go to.
        """

        def levels(values: Tensor, at: Tensor) -> Tensor:
            return values.to(noisy.device, noisy.dtype)[at.to(noisy.device)].view(-1, *[1] * (noisy.ndim - 1))

        if self.flow:
            sigma, target = (levels(self.scheduler.sigmas, at) for at in (indices, following))
            return noisy + (target - sigma) * output
        signal, target = (levels(self.scheduler.alphas_cumprod, at).sqrt() for at in (indices, following))
        deviation = (1 - signal**2).sqrt()
        if self.kind == "epsilon":
            picture, noise = (noisy - deviation * output) / signal, output
        else:
            picture, noise = signal * noisy - deviation * output, deviation * noisy + signal * output
        return target * picture + (1 - target**2).sqrt() * noise

    def weights(self, indices: Tensor) -> Tensor | None:
        """(B,) weights of the noise loss, or None for equal ones."""
        if self.snr_gamma is None:
            return None
        snr = compute_snr(self.scheduler, indices)
        capped = snr.clamp(max=self.snr_gamma)
        return capped / (snr + 1) if self.kind == "v_prediction" else capped / snr
