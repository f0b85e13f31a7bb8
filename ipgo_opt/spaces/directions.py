"""Which subspace of the encoder's states the tokens live in: the columns that E is made of.

A black box moves only Z and θ, so E decides what it can reach; a gradient moves E as well and cares less.
"""

from __future__ import annotations

import torch
from torch import Tensor


def principal(states: Tensor, count: int) -> Tensor:
    """The `count` directions (d, count) in which token states (n, d) have the largest mean square, largest first.

    Not centred: the tokens are E Z themselves, not differences from a mean.
    """
    _, _, rows = torch.linalg.svd(states.double(), full_matrices=False)
    return rows[:count].T.float()


def learned(tokens: Tensor, basis: Tensor) -> Tensor:
    """The tokens (M, d) that a run found, then its basis (d, N), as directions (d, M + N)."""
    return torch.cat([tokens.T, basis], dim=1)
