"""The optimizer of every training stage: Muon for matrices and convolutions, Adam for the rest.

Muon (K. Jordan and others, 2024) takes the momentum of a weight matrix to the nearest orthogonal matrix, by five
Newton-Schulz steps, and goes that way. `torch.optim.Muon` takes matrices only and one at a time; here a convolution
counts as a matrix of (output channels, the rest) and all matrices of a shape are treated in one batch. Updates are
scaled to the size of Adam's (J. Liu and others, arXiv 2502.16982, equation 4), so that one learning rate serves both.
"""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.distributed as dist
from torch import nn

ROOT = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic whose iteration drives every singular value towards 1."""
STEPS = 5
NARROW = 16
"""A weight with fewer inputs or outputs than this is left to Adam: first and last layers."""


def orthogonal(stack: torch.Tensor) -> torch.Tensor:
    """The matrices (n, r, c) with their singular values driven to about 1 (0.7 to 1.2).

    The iteration X ← (a + bG + cG²) X with G = X Xᵀ multiplies X by polynomials in its first G from the left, which
    all commute; so it runs on the small (r, r) matrices and the wide ones are multiplied twice in all.
    """
    tall = stack.shape[1] > stack.shape[2]
    x = stack.mT if tall else stack
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    gram, eye = x @ x.mT, torch.eye(x.shape[1], device=x.device)
    a, b, c = ROOT
    product = factor = a * eye + b * gram + c * gram @ gram
    for _ in range(STEPS - 1):
        gram = factor @ gram @ factor
        factor = a * eye + b * gram + c * gram @ gram
        product = factor @ product
    x = product @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon on the weights of `model`'s linear layers and convolutions, Adam on everything else.

    Args:
        model: whose parameters with `requires_grad` are trained.
        lr: learning rate, on Adam's scale.
        weight_decay: decoupled, on matrices only.

    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float = 0.0) -> None:
        layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        matrices = {
            id(m.weight) for m in layers if m.weight.shape[0] >= NARROW and m.weight[0].numel() >= 9 * NARROW
        } | {id(m.weight) for m in layers if m.weight.ndim == 2 and min(m.weight.shape) >= NARROW}  # fmt: skip
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if id(p) in matrices], "matrix": True, "weight_decay": weight_decay},
            {"params": [p for p in trained if id(p) not in matrices], "matrix": False, "weight_decay": 0.0},
        ]
        super().__init__([group for group in groups if group["params"]], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update from the gradients at hand."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                    if not group["matrix"]:
                        self.state[p] |= {"square": torch.zeros_like(p), "step": torch.tensor(0.0)}
            (self._muon if group["matrix"] else self._adam)(params, group["lr"], group["weight_decay"])

    def _muon(self, params: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        shapes = defaultdict(list)
        for p in params:
            momentum = self.state[p]["momentum"].lerp_(p.grad, 0.05)
            shapes[p.flatten(1).shape].append((p, torch.lerp(p.grad, momentum, 0.95).flatten(1)))
        # each of several processes, whose gradients are equal, takes its share of the matrices
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        moves = torch.zeros(sum(p.numel() for p in params), device=params[0].device)
        where = dict(zip(params, moves.split([p.numel() for p in params]), strict=True))
        for (rows, columns), pairs in shapes.items():
            own = pairs[rank::world]
            if own:
                made = orthogonal(torch.stack([move for _, move in own])) * (0.2 * max(rows, columns) ** 0.5)
                for (p, _), move in zip(own, made, strict=True):
                    where[p].copy_(move.flatten())
        if world > 1:
            dist.all_reduce(moves)
        for p, move in where.items():
            p.mul_(1 - lr * weight_decay).add_(move.view(p.shape), alpha=-lr)

    def _adam(self, params: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        for p in params:
            state = self.state[p]
            state["step"] += 1
            state["momentum"].lerp_(p.grad, 0.1)
            state["square"].lerp_(p.grad.square(), 0.01)
            bias, spread = 1 - 0.9 ** state["step"].item(), 1 - 0.99 ** state["step"].item()
            p.addcdiv_(state["momentum"] / bias, (state["square"] / spread).sqrt_().add_(1e-8), value=-lr)
