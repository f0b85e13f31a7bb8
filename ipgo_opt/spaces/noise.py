"""ReNO's space: the starting noise of each seed.

Paper: Eyring et al., "ReNO: Enhancing One-step Text-to-Image Models through Reward-based Noise Optimization", NeurIPS
2024, arXiv 2406.04312. The noise ε is optimized under a penalty that keeps its norm where that of Gaussian noise is:
the negative logarithm of the density of the chi distribution,

    K(ε) = ½ ‖ε‖² − (n − 1) log ‖ε‖,        n coordinates,

which is least at ‖ε‖ = √(n − 1).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ipgo_opt.conditioning import Conditioning
from ipgo_opt.spaces.base import Coordinates, Space

if TYPE_CHECKING:
    from ipgo_opt.config import RunConfig
    from ipgo_opt.models.sampler import Sampler


def norm_penalty(noise: Tensor) -> Tensor:
    """K(ε) − min K ≥ 0 of noise (q, S, …), (q, S): 0 at the mode of the norm, √(n − 1)."""
    norm = noise.double().flatten(2).norm(dim=2)
    mode = math.sqrt(noise[0, 0].numel() - 1)
    return ((norm.square() - mode**2) / 2 - mode**2 * (norm / mode).log()).float()


class NoiseSpace(Space):
    """A change δ of the noise, the same for every seed: ε = noise(seed) + δ. The vector is δ / u, from 0, no bounds.

    At the start every image is the raw prompt's own. With several search seeds one δ serves them all; ReNO is the case
    of one seed. The gradient reaches the noise through every sampler step, so all of them are differentiated.

    Args:
        shape: of one image's noise, (…).
        weight: factor on the penalty.
        unit: u, what a coordinate of 1 adds to the noise.

    """

    needs_noise: ClassVar[bool] = True
    bounded: ClassVar[bool] = False

    def __init__(self, shape: tuple[int, ...], weight: float = 1.0, unit: float = 1.0) -> None:
        self.shape, self.weight, self.unit = shape, weight, unit

    @classmethod
    def made(cls, config: RunConfig, sampler: Sampler) -> NoiseSpace:
        """The space for the noise of a sampler's model."""
        return cls(tuple(sampler.noise([config.seed]).shape[1:]), config.noise_weight, config.noise_unit)

    def coordinates(self, *, full: bool) -> Coordinates:
        """No change, and no bounds."""
        start = torch.zeros(math.prod(self.shape))
        bound = torch.full_like(start, math.inf)
        return Coordinates(start, -bound, bound)

    def apply(self, x: Tensor, conditioning: Conditioning, *, full: bool) -> tuple[Conditioning, Tensor]:
        """Noise (B, S, …) of q changes x (q, D) on the seeds whose noise (B, S, …) the conditioning holds.

        The penalty (B,) is the mean over the seeds.
        """
        rows = conditioning.expand(len(x))
        assert rows.noise is not None
        change = self.unit * x.view(-1, 1, *self.shape).to(rows.noise).repeat_interleave(len(rows) // len(x), 0)
        changed = rows.noise + change
        return replace(rows, noise=changed), self.weight * norm_penalty(changed).mean(1)

    def learned(self, x: Tensor, *, full: bool) -> dict[str, Tensor]:
        """The change "noise" (…) of a point x (D,)."""
        return {"noise": self.unit * x.view(self.shape)}

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing: the noise is that of the seeds."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing."""
