"""The contract of a space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from ipgo_opt.conditioning import Conditioning

if TYPE_CHECKING:
    from ipgo_opt.config import RunConfig
    from ipgo_opt.models.sampler import Sampler


@dataclass(frozen=True)
class Coordinates:
    """A flat vector view of a space.

    Attributes:
        start: where a search begins, (D,).
        lower: least value of each coordinate, (D,), −inf where there is none.
        upper: greatest value of each coordinate, (D,), inf where there is none.
        groups: sizes of consecutive groups of coordinates that each stand for one choice, the largest wins; or ().

    """

    start: Tensor
    lower: Tensor
    upper: Tensor
    groups: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.start)


class Space(Protocol):
    """A map from a flat vector to changed sampler inputs.

    `full` chooses between two views of the same space: every parameter (for a gradient), or the bounded
    low-dimensional coordinates (for a black-box solver).

    Attributes:
        needs_noise: whether `apply` must be given the starting noise of the seeds in the conditioning.
        bounded: whether there are bounded low-dimensional coordinates, without which only a gradient can search.
        one_prompt: whether it is made for one prompt, so that several prompts can't be searched in it together.

    """

    needs_noise: ClassVar[bool] = False
    bounded: ClassVar[bool] = True
    one_prompt: ClassVar[bool] = False

    @classmethod
    def made(cls, config: RunConfig, sampler: Sampler) -> Space:
        """The space that a configuration describes, for a sampler's model: it reads its own settings and shapes."""
        ...

    def coordinates(self, *, full: bool) -> Coordinates:
        """Start and bounds of the flat vector."""
        ...

    def apply(self, x: Tensor, conditioning: Conditioning, *, full: bool) -> tuple[Conditioning, Tensor]:
        """Changed inputs of q candidates x (q, D) for B prompts, and their penalties (B,) ≥ 0.

        B is a multiple of q, the prompts of a candidate together, or 1: then every candidate gets that prompt, and q
        rows come back.
        """
        ...

    def learned(self, x: Tensor, *, full: bool) -> dict[str, Tensor]:
        """What one point x (D,) stands for, by name, to be kept beside the best image."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Everything random that was fixed when the space was made."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_dict` gave."""
        ...


@runtime_checkable
class Readable(Protocol):
    """A space whose points are texts that a person can read and give to any model."""

    def readable(self, x: Tensor, *, full: bool) -> dict[str, str]:
        """The texts of a point x (D,): "prompt" and "negative_prompt"."""
        ...
