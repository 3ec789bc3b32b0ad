"""States of the student's own sampling, to learn in (on-policy distillation).

Trained on noised pictures alone, a student meets other states when it samples: what guidance makes of noise, and what
its own errors lead to (Ross et al. 2011, arXiv 1011.0686). Here some pictures are always being sampled by the student,
one denoising step for each training step; in each state it learns what its teacher would have answered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .objective import Objective


class Rollout:
    """Trajectories from noise towards pictures, deterministic (DDIM or Euler) and guided.

    They begin with the captions and the noise of training samples, below full strength with the noised samples. A
    step's predictions, which training makes anyway, move them on. At first they stop after different numbers of steps,
    so that later each training step meets all noise levels.

    Args:
        objective: of the model.
        empty: for each size of pictures the conditions of the empty caption, without the dimension of the batch.
        count: trajectories.
        guidance_scale: w in "without + w (with - without caption)"; 1 asks for no prediction without caption.
        steps: denoising steps of a whole sampling.
        stop: share of them, from noise, after which a trajectory begins anew.
        strength: below 1 trajectories begin where image-to-image of that strength does, and go on to the last step.
    """

    def __init__(
        self,
        objective: Objective,
        empty: dict[str, dict[str, Tensor]],
        count: int,
        guidance_scale: float = 5.0,
        steps: int = 25,
        stop: float = 1.0,
        strength: float = 1.0,
    ) -> None:
        self.objective, self.empty, self.count, self.guidance_scale = objective, dict(empty), count, guidance_scale
        self.indices = torch.tensor(objective.schedule(steps))
        self.first = steps - max(1, int(strength * steps))
        self.followed = steps - self.first if self.first else max(1, round(stop * steps))
        self.sizes: dict[str, dict[str, Tensor]] = {}

    @property
    def predictions(self) -> int:
        """Of each state: with the caption, and without it."""
        return 1 if self.guidance_scale == 1 else 2

    def states(
        self, size: str, latents: Tensor, noise: Tensor, conditions: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What the denoiser is to be asked, after trajectories that have ended began anew.

        Args:
            size: of the pictures; each has trajectories of its own.
            latents, noise: (count or more, ...), conditions: the same many rows: of the samples to begin with.

        Returns:
            Noisy latents, timestep indices and conditions of predictions * count rows, those with captions first.
        """
        # Moved once: they stay where the states are.
        empty = self.empty[size] = {name: value.to(noise.device) for name, value in self.empty[size].items()}
        place = torch.full((self.count,), self.first, device=noise.device)
        begun = noise
        if self.first:
            at = torch.full_like(place, int(self.indices[self.first]))
            begun = self.objective.noised(latents[: self.count], noise[: self.count], at)[0]
        fresh = {"state": begun.float(), **{f"conditions.{name}": conditions[name] for name in empty}}
        fresh = {name: value[: self.count].clone() for name, value in fresh.items()}
        if size not in self.sizes:
            left = torch.arange(self.count, device=noise.device) % self.followed + 1
            self.sizes[size] = {**fresh, "place": place, "left": left}
        kept = self.sizes[size]
        ended = kept["left"] == 0
        for name, value in {**fresh, "place": place, "left": torch.full_like(place, self.followed)}.items():
            kept[name] = torch.where(ended.view(-1, *[1] * (value.ndim - 1)), value, kept[name])
        rows = {name: kept[f"conditions.{name}"] for name in empty}
        if self.predictions == 2:
            rows = {name: torch.cat((value, empty[name].to(value).expand_as(value))) for name, value in rows.items()}
        indices = self.indices.to(noise.device)[kept["place"]]
        return torch.cat([kept["state"]] * self.predictions), torch.cat([indices] * self.predictions), rows

    def guided(self, outputs: Tensor) -> Tensor:
        """(predictions * count, ...) -> (count, ...) float32."""
        if self.predictions == 1:
            return outputs.float()
        given, empty = outputs.float().chunk(2)
        return empty + self.guidance_scale * (given - empty)

    @torch.no_grad()
    def advance(self, size: str, guided: Tensor) -> None:
        """Moves the trajectories of a size one denoising step along a prediction (count, ...)."""
        kept, indices = self.sizes[size], self.indices.to(guided.device)
        place = kept["place"]
        following = (place + 1).clamp(max=len(indices) - 1)  # the last step is not taken: its state would be a picture
        kept["state"] = self.objective.move(kept["state"], guided, indices[place], indices[following])
        kept["place"], kept["left"] = place + 1, kept["left"] - 1

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{size}/{name}": t.cpu() for size, kept in self.sizes.items() for name, t in kept.items()}

    def load_state_dict(self, values: dict[str, Tensor], device: torch.device) -> None:
        self.sizes = {}
        for key, value in values.items():
            size, name = key.split("/")
            self.sizes.setdefault(size, {})[name] = value.to(device)


def with_rows(own: dict[str, Tensor], rows: dict[str, Tensor], first: int) -> dict[str, Tensor]:
    """Conditions of samples `first` and later, followed by `rows`; what the batch shares stays."""
    return {
        name: torch.cat((value[first:], rows[name].to(value))) if name in rows else value for name, value in own.items()
    }
