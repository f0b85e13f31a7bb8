"""Free tokens: the inserted tokens V are trained themselves, without E, Z and θ (the ablation of arXiv 2503.21812).

They start as the token space's first tokens of the same settings and seed, so that both begin at the same image.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ipgo_opt.conditioning import Conditioning
from ipgo_opt.spaces.base import Coordinates, Space
from ipgo_opt.spaces.tokens import TokenSpace, surrounded

if TYPE_CHECKING:
    from ipgo_opt.config import RunConfig
    from ipgo_opt.models.sampler import Sampler


class EmbeddingSpace(Space):
    """Prefix and suffix tokens with every coordinate free: the vector is (V_pre, V_suf), row by row, without bounds.

    Args:
        tokens: the tokens at the start (M, d), by side ("prefix", "suffix").

    """

    bounded: ClassVar[bool] = False

    def __init__(self, tokens: dict[str, Tensor]) -> None:
        self.start = {name: V.detach().clone() for name, V in tokens.items()}

    @classmethod
    def made(cls, config: RunConfig, sampler: Sampler) -> EmbeddingSpace:
        """The space that a configuration describes: as many tokens, and at first the same, as in the token space."""
        tokens = TokenSpace.made(config, sampler)
        with torch.no_grad():
            start = tokens.tokens(tokens.coordinates(full=True).start[None], full=True)
        return cls({name: V[0] for name, V in start.items()})

    def coordinates(self, *, full: bool) -> Coordinates:
        """The first tokens, flat, and no bounds."""
        start = torch.cat([V.flatten() for V in self.start.values()])
        bound = torch.full_like(start, math.inf)
        return Coordinates(start, -bound, bound)

    def tokens(self, x: Tensor) -> dict[str, Tensor]:
        """The tokens V (q, M, d) of vectors x (q, D), by side."""
        parts = torch.split(x, [V.numel() for V in self.start.values()], dim=1)
        return {name: part.view(-1, *V.shape) for (name, V), part in zip(self.start.items(), parts, strict=True)}

    def apply(self, x: Tensor, conditioning: Conditioning, *, full: bool) -> tuple[Conditioning, Tensor]:
        """T of equation (2) for q candidates x (q, D) and B encoded prompts, and p_conf (B,) of equation (11)."""
        return surrounded(self.tokens(x), conditioning)

    def learned(self, x: Tensor, *, full: bool) -> dict[str, Tensor]:
        """The tokens "prefix" and "suffix" (M, d) of a point x (D,)."""
        return {name: V[0] for name, V in self.tokens(x[None]).items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The first tokens."""
        return dict(self.start)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores `state_dict`."""
        self.start = {name: state[name].clone() for name in self.start}
