"""Two spaces searched at once: the coordinates side by side, the penalties added."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ipgo_opt.conditioning import Conditioning
from ipgo_opt.spaces import SPACES
from ipgo_opt.spaces.base import Coordinates, Space

if TYPE_CHECKING:
    from ipgo_opt.config import RunConfig
    from ipgo_opt.models.sampler import Sampler


class Product(Space):
    """The product of spaces, by name; each changes what the ones before it left. Names of tensors get "NAME." before.

    Args:
        spaces: the factors; what they change must not be the same.

    """

    factors: ClassVar[tuple[str, ...]]

    def __init__(self, spaces: dict[str, Space]) -> None:
        self.spaces = spaces

    @classmethod
    def made(cls, config: RunConfig, sampler: Sampler) -> Product:
        """The product of `factors`, each as the configuration describes it."""
        return cls({name: SPACES.load(name).made(config, sampler) for name in cls.factors})

    def coordinates(self, *, full: bool) -> Coordinates:
        """The factors' coordinates, one after the other."""
        parts = [space.coordinates(full=full) for space in self.spaces.values()]
        start, lower, upper = (torch.cat([getattr(part, end) for part in parts]) for end in ("start", "lower", "upper"))
        return Coordinates(start, lower, upper)

    def _split(self, x: Tensor, full: bool) -> list[tuple[str, Space, Tensor]]:
        """Name, space and its part of x (…, D)."""
        sizes = [len(space.coordinates(full=full)) for space in self.spaces.values()]
        return [
            (name, self.spaces[name], part) for name, part in zip(self.spaces, torch.split(x, sizes, -1), strict=True)
        ]

    def apply(self, x: Tensor, conditioning: Conditioning, *, full: bool) -> tuple[Conditioning, Tensor]:
        """Every factor's change of the conditioning of q candidates x (q, D), and the sum of their penalties (B,)."""
        changed = conditioning.expand(len(x))
        penalty = torch.zeros(len(changed))
        for _, space, part in self._split(x, full):
            changed, added = space.apply(part, changed, full=full)
            penalty = penalty.to(added) + added
        return changed, penalty

    def learned(self, x: Tensor, *, full: bool) -> dict[str, Tensor]:
        """What every factor's part of a point x (D,) stands for."""
        return {
            f"{name}.{key}": tensor
            for name, space, part in self._split(x, full)
            for key, tensor in space.learned(part, full=full).items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The factors' states."""
        return {f"{name}.{key}": t for name, space in self.spaces.items() for key, t in space.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores `state_dict`."""
        for name, space in self.spaces.items():
            start = f"{name}."
            space.load_state_dict({key[len(start) :]: t for key, t in state.items() if key.startswith(start)})


class TokensNoise(Product):
    """IPGO's tokens and the starting noise together."""

    factors: ClassVar[tuple[str, ...]] = ("tokens", "noise")
    needs_noise: ClassVar[bool] = True
    bounded: ClassVar[bool] = False
