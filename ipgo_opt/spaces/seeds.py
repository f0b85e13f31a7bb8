"""The space of nothing but seeds: the raw prompt as it is, on as many seeds as the budget pays for (best-of-n)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ipgo_opt.conditioning import Conditioning
from ipgo_opt.spaces.base import Coordinates, Space

if TYPE_CHECKING:
    from ipgo_opt.config import RunConfig
    from ipgo_opt.models.sampler import Sampler


class SeedSpace(Space):
    """A space without coordinates: what is chosen is the seed, and the loop does that for every space."""

    @classmethod
    def made(cls, config: RunConfig, sampler: Sampler) -> SeedSpace:
        """The space, whatever the configuration and the model."""
        return cls()

    def coordinates(self, *, full: bool) -> Coordinates:
        """No coordinates, (0,)."""
        return Coordinates(torch.zeros(0), torch.zeros(0), torch.zeros(0))

    def apply(self, x: Tensor, conditioning: Conditioning, *, full: bool) -> tuple[Conditioning, Tensor]:
        """The conditioning, one row at least for each row of x (q, 0), and no penalty."""
        rows = conditioning.expand(len(x))
        return rows, torch.zeros(len(rows))

    def learned(self, x: Tensor, *, full: bool) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing."""
