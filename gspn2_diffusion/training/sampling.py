"""The order of samples and every random draw as functions of (seed, place in the run).

Nothing is drawn from a generator that lives through the run. So a resumed run needs no saved random state, and the
draws do not depend on how a step is split over processes and accumulation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from .arguments import TrainingError
from .encode import EncodedDataset
from .objective import Objective


def _generator(*key: int) -> torch.Generator:
    mixed = 0
    for part in key:
        mixed = (mixed * 6364136223846793005 + part + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(mixed)


class BatchOrder:
    """Which samples make up each optimizer step: epochs in random order, every step of one picture size.

    Args:
        sizes: the picture size of each sample.
        samples: indices of the samples to train on.
        total: samples of an optimizer step, over all processes and accumulation. The last step of a size in an epoch
            is filled up from that size's own samples.
        seed: of the order.
    """

    def __init__(self, sizes: list[str], samples: list[int], total: int, seed: int) -> None:
        self.groups: dict[str, list[int]] = {}
        for index in samples:
            self.groups.setdefault(sizes[index], []).append(index)
        self.samples, self.total, self.seed = len(samples), total, seed
        self.steps_per_epoch = sum(-(-len(group) // total) for group in self.groups.values())
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def step(self, number: int) -> list[int]:
        """The samples of step `number`, counted from 0."""
        epoch, place = divmod(number, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._make(epoch))
        return self._epoch[1][place]

    def _make(self, epoch: int) -> list[list[int]]:
        generator, steps = _generator(self.seed, epoch), []
        for group in self.groups.values():
            order = [group[i] for i in torch.randperm(len(group), generator=generator)]
            for start in range(0, len(order), self.total):
                chunk = order[start : start + self.total]
                while len(chunk) < self.total:
                    chunk += order[: self.total - len(chunk)]
                steps.append(chunk)
        return [steps[i] for i in torch.randperm(len(steps), generator=generator)]


def turns(shares: list[float], steps: int) -> list[tuple[int, int]]:
    """For each step of a run the part whose turn it is, and how many turns that part had before.

    It is the part that is furthest behind its share, so that the shares hold all the time as nearly as they can.
    """
    had, order = [0] * len(shares), []
    for step in range(steps):
        part = max(range(len(shares)), key=lambda p: shares[p] / sum(shares) * (step + 1) - had[p])
        order.append((part, had[part]))
        had[part] += 1
    return order


class StepSampler(Sampler[list[tuple[int, int, int]]]):
    """Batches for one process: lists of (part, place in the part's samples of the run, sample).

    Args:
        orders: of each part.
        taken: each step's part and its turn, see `turns`; only steps that are to be made.
        accumulation: batches of a step of one process.
        rank, world: this process and their number.
    """

    def __init__(
        self, orders: list[BatchOrder], taken: list[tuple[int, int]], accumulation: int, rank: int, world: int
    ) -> None:
        self.orders, self.taken = orders, taken
        self.accumulation, self.rank, self.world = accumulation, rank, world

    def __len__(self) -> int:
        return len(self.taken) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for part, turn in self.taken:
            order = self.orders[part]
            placed = [(part, turn * order.total + i, sample) for i, sample in enumerate(order.step(turn))]
            micro = order.total // (self.accumulation * self.world)
            for batch in range(self.accumulation):
                start = (batch * self.world + self.rank) * micro
                yield placed[start : start + micro]


class PlacedSamples(torch.utils.data.Dataset):
    """Samples with their draws: (place, sample) -> latents, noise, timestep index, conditions (or the empty caption's).

    Args:
        data: the cache.
        objective: draws timesteps.
        seed: of the draws.
        empty_share: share of samples with the empty caption.
        strength: highest noise level, as image-to-image's.
        part: number of the part of the run whose samples these are.
    """

    def __init__(
        self,
        data: EncodedDataset,
        objective: Objective,
        seed: int,
        empty_share: float,
        strength: float = 1.0,
        part: int = 0,
    ) -> None:
        self.data, self.objective, self.seed, self.empty_share = data, objective, seed, empty_share
        self.strength, self.part = strength, part

    def __getitem__(self, placed: tuple[int, int]) -> dict[str, Any]:
        place, index = placed
        sample, size = self.data[index], self.data.sizes[index]
        generator = _generator(self.seed, -1, place)
        latents = sample.pop("latents").float()
        step = self.objective.below(self.objective.draw(generator), self.strength)
        if torch.rand((), generator=generator) < self.empty_share:
            sample = self.data.empty[size]
        noise = torch.randn(latents.shape, generator=generator)
        return {"latents": latents, "noise": noise, "index": step, "size": size, "conditions": sample}

    def fixed(self, place: int, index: int, among: int) -> dict[str, Any]:
        """One of `among` held-out samples with its own caption and noise that no training sample has; their timesteps
        are spread evenly."""
        sample = self.data[index]
        latents = sample.pop("latents").float()
        noise = torch.randn(latents.shape, generator=_generator(self.seed, -3, place))
        conditions = {name: value for name, value in self.data[index].items() if name != "latents"}
        return {
            "latents": latents,
            "noise": noise,
            "index": self.objective.below(int((place + 0.5) / among * self.objective.steps), self.strength),
            "size": self.data.sizes[index],
            "conditions": conditions,
        }

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Arguments of `StudentStep.forward` for samples of one size."""
        conditions = {
            name: torch.stack([item["conditions"][name] for item in items]) for name in items[0]["conditions"]
        }
        size = items[0]["size"]
        return {
            "latents": torch.stack([item["latents"] for item in items]),
            "noise": torch.stack([item["noise"] for item in items]),
            "indices": torch.tensor([item["index"] for item in items]),
            "conditions": {**conditions, **self.data.shared.get(size, {})},
            "size": size,
            "part": self.part,
        }


class Parts(torch.utils.data.Dataset):
    """Samples of all parts of a run: (part, place, sample) -> as `PlacedSamples`; a batch is of one part."""

    def __init__(self, parts: list[PlacedSamples]) -> None:
        self.parts = parts

    def __getitem__(self, placed: tuple[int, int, int]) -> dict[str, Any]:
        part, place, index = placed
        return {**self.parts[part][place, index], "part": part}

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        return self.parts[items[0]["part"]].collate(items)


def loader(samples: Parts, sampler: StepSampler, workers: int) -> DataLoader:
    """Batches of one process. Workers only read: results do not depend on their number."""
    return DataLoader(
        samples,
        batch_sampler=sampler,
        collate_fn=samples.collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=False,
    )


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch's tensors on `device`."""
    moved: dict[str, Any] = {}
    for key, value in batch.items():
        if isinstance(value, dict):
            moved[key] = to_device(value, device)
        else:
            moved[key] = value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
    return moved


def held_out(data: EncodedDataset, count: int, seed: int) -> tuple[list[int], list[int]]:
    """(samples to train on, samples held out), the latter all of the first one's size."""
    order = torch.randperm(len(data), generator=_generator(seed, -2)).tolist()
    size = data.sizes[order[0]]
    out = [index for index in order if data.sizes[index] == size][: min(count, len(data) - 1)]
    kept = set(out)
    return [index for index in range(len(data)) if index not in kept], out


def without_rows(data: EncodedDataset, rows: list[int]) -> tuple[list[int], list[int]]:
    """As `held_out`, for the same pictures at another resolution: those of `rows` are held out.

    Raises:
        TrainingError: nothing is left to train on.
    """
    hidden = set(rows)
    kept = [index for index, row in enumerate(data.rows) if row not in hidden]
    if not kept:
        raise TrainingError(
            f"All {len(data)} samples at {data.sizes[0]} pixels are held out; raise --max_train_samples or lower "
            "--holdout_samples."
        )
    place = {row: index for index, row in enumerate(data.rows)}
    out = [place[row] for row in rows if row in place]
    return kept, [index for index in out if data.sizes[index] == data.sizes[out[0]]]


__all__ = [
    "BatchOrder", "Parts", "PlacedSamples", "StepSampler", "held_out", "loader", "to_device", "turns", "without_rows",
]  # fmt: skip
