"""A UNet whose every map is spread over the ranks by rows, from the latents to the prediction.

Almost all of a UNet treats each row for itself. What does not gets help: 3 x 3 convolutions fetch the row above and
below from the neighbours, group norms combine their statistics, GSPN-2 layers exchange row shards for channel shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapter import few
from ..patching import patched_modules
from ..patching.families import family_of, find_model
from ..patching.processors import LAYER
from .exchange import Group, all_to_all, gather_rows, neighbour_rows, row_heights
from .scan import sharded_gspn2_scan


@dataclass
class _Shards:
    """Shared by everything that a sharded model was given: the group, and the latent rows of each rank in this call."""

    group: Group
    unit: int
    heights: list[int] = field(default_factory=list)


@dataclass
class LevelRows:
    """What a GSPN-2 layer needs to know about the shards of its map, each token `factor` latent pixels high."""

    shards: _Shards
    factor: int

    @property
    def heights(self) -> list[int]:
        return [-(-rows // self.factor) for rows in self.shards.heights]

    @property
    def height(self) -> int:
        """Height of the whole map."""
        return sum(self.heights)

    def scan(self, x: Tensor, lam: Tensor | None, u: Tensor | None, logits: Tensor, **options: Any) -> Tensor:
        return sharded_gspn2_scan(x, lam, u, logits, heights=self.heights, group=self.shards.group, **options)


@contextmanager
def shard_rows(pipe_or_model: Any, group: Group = None) -> Iterator[None]:
    """Inside the block one denoising call runs on all ranks of a group, each holding some rows of every map.

    Every rank runs the same pipeline with the same arguments and seeds and gets the same result; weights are on every
    rank. Inference only.

        torchrun --nproc-per-node 2 script.py
            with shard_rows(pipe):
                image = pipe(prompt, height=8192, width=8192, generator=torch.Generator().manual_seed(0)).images[0]

    Args:
        pipe_or_model: a pipeline with a UNet2DConditionModel, or that model, with every self-attention replaced by
            `apply_gspn2`.
        group: the process group, None for the default one.

    Raises:
        TypeError: another kind of model.
        ValueError: a self-attention is not replaced, or the model has a layer that cannot be sharded by rows.
        RuntimeError: torch.distributed is not initialised.
    """
    if not dist.is_initialized():
        raise RuntimeError("torch.distributed is not initialised; start with torchrun and call init_process_group.")
    model: Any = find_model(pipe_or_model)
    family = family_of(model)
    assert family is not None
    if family.model_class != "UNet2DConditionModel":
        raise TypeError(f"{type(model).__name__} cannot be sharded by rows yet; use a model of UNet2DConditionModel.")
    sites = {site.name: site for site in family.find_sites(model)}
    patched = {name: module for name, module, _ in patched_modules(model)}
    if softmax := [name for name in sites if name not in patched]:
        raise ValueError(
            f"{few(softmax)} is still softmax attention, which needs every row; apply_gspn2 to all layers first."
        )
    forwards: list[tuple[Any, Any]] = []
    shards = _Shards(group, unit=2 ** (len(model.config.down_block_types) - 1))
    for name, module in model.named_modules():
        forward = _sharded_forward(name, module, group)
        if forward is not None:
            forwards.append((module, forward))
    handles = [
        # Before the grid hooks, which are to see this rank's rows.
        model.register_forward_pre_hook(_SplitRows(shards), with_kwargs=True, prepend=True),
        model.register_forward_hook(_JoinRows(shards)),
    ]
    layers = [(getattr(module, LAYER), sites[name].factor) for name, module in patched.items()]
    try:
        for module, forward in forwards:
            module.forward = forward
        for layer, factor in layers:
            layer.rows = LevelRows(shards, factor)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, _ in forwards:
            vars(module).pop("forward", None)
        for layer, _ in layers:
            layer.rows = None


def _sharded_forward(name: str, module: nn.Module, group: Group) -> Any:
    """What runs in place of a module's forward, None where rows do not matter."""
    if isinstance(module, nn.GroupNorm):
        new = partial(_group_norm, module, group)
    elif isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
        if (module.kernel_size, module.padding, module.dilation, module.padding_mode) != (
            (3, 3), (1, 1), (1, 1), "zeros",
        ) or module.stride not in ((1, 1), (2, 2)):  # fmt: skip
            raise ValueError(f"{name} is {module}; only 3 x 3 convolutions with zero padding 1 can be sharded by rows.")
        new = partial(_conv, module, group)
    else:
        return None
    if "forward" in vars(module):
        raise ValueError(f"{name} is hooked (offloading or casting), which sharding cannot go with; take it off first.")
    return new


class _SplitRows:
    """Pre-hook of the model: leaves this rank's rows of the latents."""

    def __init__(self, shards: _Shards) -> None:
        self.shards = shards

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("A model sharded by rows has no gradients; run it under torch.no_grad().")
        for name in ("down_block_additional_residuals", "down_intrablock_additional_residuals"):
            if kwargs.get(name) is not None:
                raise ValueError(f"A model sharded by rows cannot take {name} (ControlNet, T2I-Adapter).")
        sample = args[0] if args else kwargs["sample"]
        group = self.shards.group
        self.shards.heights = row_heights(sample.shape[2], dist.get_world_size(group), self.shards.unit)
        own = sample.split(self.shards.heights, dim=2)[dist.get_rank(group)]
        return ((own, *args[1:]), kwargs) if args else (args, {**kwargs, "sample": own})


class _JoinRows:
    """Forward hook of the model: the whole prediction, on every rank."""

    def __init__(self, shards: _Shards) -> None:
        self.shards = shards

    def __call__(self, model: nn.Module, args: Any, output: Any) -> Any:
        sample = output[0]
        whole = gather_rows(sample.transpose(1, 2), self.shards.heights, self.shards.group).transpose(1, 2)
        return (whole, *output[1:]) if isinstance(output, tuple) else type(output)(sample=whole)


def _conv(conv: nn.Conv2d, group: Group, x: Tensor, *args: Any) -> Tensor:
    above, below = neighbour_rows(x, group)
    # With stride 2 each output row starts at an odd row of [above, x], so an even shard needs nothing from below.
    rows = [above, x] if conv.stride == (2, 2) and x.shape[2] % 2 == 0 else [above, x, below]
    return F.conv2d(torch.cat(rows, dim=2), conv.weight, conv.bias, conv.stride, padding=(0, 1))


def _group_norm(norm: nn.GroupNorm, group: Group, x: Tensor) -> Tensor:
    """Means and squared deviations of all ranks, combined as by Chan et al. (1979): no cancellation."""
    grouped = x.unflatten(1, (norm.num_groups, -1)).flatten(2)
    variance, mean = torch.var_mean(grouped.float(), dim=2, correction=0)
    count = torch.full_like(mean, grouped.shape[2])
    own = torch.stack([count, mean, variance])
    ranks = dist.get_world_size(group)
    counts, means, variances = torch.stack(all_to_all([own] * ranks, [own.shape] * ranks, group)).unbind(1)
    share = counts / counts.sum(0)
    mean = (share * means).sum(0)
    variance = (share * (variances + (means - mean) ** 2)).sum(0)
    scale = (variance + norm.eps).rsqrt()
    # y = x a + b for each channel: one pass over x, in float32 and rounded once.
    per_group = x.shape[1] // norm.num_groups
    a, b = (t.repeat_interleave(per_group, dim=1) for t in (scale, -mean * scale))
    if norm.affine:
        a, b = a * norm.weight.float(), b * norm.weight.float() + norm.bias.float()
    sides: Sequence[int] = (x.shape[0], x.shape[1], *[1] * (x.ndim - 2))
    return torch.addcmul(b.view(sides), x, a.view(sides), out=torch.empty_like(x))
