"""Muon with AdamW for what is not a matrix: few steps, little arithmetic, so that a CPU can train the tiny model."""

import torch


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Newton-Schulz iteration of Muon (Jordan et al. 2024): (B, m, n) -> about U V^T of each matrix's SVD."""
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT


class MuonAdamW(torch.optim.Optimizer):
    """One optimizer: groups with `muon=True` hold matrices and convolutions (flattened to matrices), others AdamW's.

    Muon's update has root mean square 0.2 (Liu et al. 2025, arXiv 2502.16982), so that one learning rate serves both.
    """

    def __init__(self, params, lr=1e-3, momentum=0.95, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "muon": False,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            lr = group["lr"]
            by_shape: dict[tuple[int, int], list] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if group["muon"]:
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    buffer = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                    update = p.grad.lerp(buffer, group["momentum"]).flatten(1)
                    by_shape.setdefault(tuple(update.shape), []).append((p, update))
                    continue
                if not state:
                    state.update(step=torch.zeros(()), first=torch.zeros_like(p), second=torch.zeros_like(p))
                state["step"] += 1
                first, second = group["betas"]
                state["first"].lerp_(p.grad, 1 - first)
                state["second"].lerp_(p.grad.square(), 1 - second)
                n = state["step"].item()
                scale = (state["second"] / (1 - second**n)).sqrt_().add_(group["eps"])
                p.mul_(1 - lr * group["weight_decay"]).addcdiv_(state["first"], scale, value=-lr / (1 - first**n))
            for shape, members in by_shape.items():
                updates = orthogonalise(torch.stack([u for _, u in members])) * (0.2 * max(shape) ** 0.5)
                for (p, _), update in zip(members, updates, strict=True):
                    p.mul_(1 - lr * group["weight_decay"]).add_(update.view_as(p), alpha=-lr)


def parameter_groups(*modules: torch.nn.Module, lr: float | list[float]) -> list[dict]:
    """Muon for convolutions and linear layers, AdamW for embeddings, norms and biases."""
    groups = []
    for module, rate in zip(modules, lr if isinstance(lr, list) else [lr] * len(modules), strict=True):
        embeddings = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.Embedding)}
        trained = [p for p in module.parameters() if p.requires_grad]
        matrix = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
        other = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
        groups += [{"params": matrix, "lr": rate, "muon": True}, {"params": other, "lr": rate, "muon": False}]
    return groups
