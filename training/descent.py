"""One update of a model that is trained."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_NORM = 1.0
"""Of the whole gradient."""


def descend(
    loss: Tensor,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> None:
    """A step down the gradient of a loss, whose norm over the model is clipped at MOST_NORM."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MOST_NORM)
    optimizer.step()
    if schedule is not None:
        schedule.step()
