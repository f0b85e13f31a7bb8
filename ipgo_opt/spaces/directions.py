"""Which subspace of the encoder's states the tokens live in: the columns that E is made of.

A black box moves only Z and θ, so E decides what it can reach; a gradient moves E as well and cares less.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ipgo_opt.store import read_best

if TYPE_CHECKING:
    from ipgo_opt.models.sampler import Sampler


def principal(states: Tensor, count: int) -> Tensor:
    """The `count` directions (d, count) in which token states (n, d) have the largest mean square, largest first.

    Not centred: the tokens are E Z themselves, not differences from a mean.
    """
    _, _, rows = torch.linalg.svd(states.double(), full_matrices=False)
    return rows[:count].T.float()


def learned(tokens: Tensor, basis: Tensor) -> Tensor:
    """The tokens (M, d) that a run found, then its basis (d, N), as directions (d, M + N)."""
    return torch.cat([tokens.T, basis], dim=1)


def starting(basis: str, sampler: Sampler) -> dict[str, Tensor] | None:
    """What the bases of the tokens span at the start, by side, as `basis` names it; None for a random subspace."""
    if basis == "random":
        return None
    if basis == "states":
        found = principal(sampler.word_states(), sampler.width)
        return {"prefix": found, "suffix": found}
    tensors, _ = read_best(Path(basis))
    sides = [side for side in ("prefix", "suffix") if side in tensors]
    made = {side: learned(tensors[side], tensors[f"basis.{side}"]) for side in sides}
    return {side: made.get(side, made[sides[0]]) for side in ("prefix", "suffix")}
