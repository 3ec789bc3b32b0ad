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
            members = [p for p in group["params"] if p.grad is not None]
            if not members:
                continue
            gradients = [p.grad for p in members]
            updates = (self._muon if group["muon"] else self._adamw)(group, members, gradients)
            torch._foreach_mul_(members, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(members, updates, alpha=-group["lr"])

    def _muon(self, group, members, gradients) -> list[torch.Tensor]:
        for p in members:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum"] for p in members]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        nesterov = list(torch._foreach_lerp(gradients, buffers, group["momentum"]))
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for i, update in enumerate(nesterov):
            by_shape.setdefault(tuple(update.flatten(1).shape), []).append(i)
        for shape, indices in by_shape.items():
            stacked = torch.stack([nesterov[i].flatten(1) for i in indices])
            for i, update in zip(indices, orthogonalise(stacked) * (0.2 * max(shape) ** 0.5), strict=True):
                nesterov[i] = update.view_as(members[i])
        return nesterov

    def _adamw(self, group, members, gradients) -> list[torch.Tensor]:
        for p in members:
            if not self.state[p]:
                self.state[p].update(step=torch.zeros(()), first=torch.zeros_like(p), second=torch.zeros_like(p))
        states = [self.state[p] for p in members]
        torch._foreach_add_([state["step"] for state in states], 1)
        n, (first, second) = states[0]["step"].item(), group["betas"]
        firsts, seconds = [state["first"] for state in states], [state["second"] for state in states]
        torch._foreach_lerp_(firsts, gradients, 1 - first)
        torch._foreach_lerp_(seconds, torch._foreach_mul(gradients, gradients), 1 - second)
        scales = torch._foreach_sqrt(torch._foreach_div(seconds, 1 - second**n))
        torch._foreach_add_(scales, group["eps"])
        return torch._foreach_div(torch._foreach_div(firsts, 1 - first**n), scales)


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
