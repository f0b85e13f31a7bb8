"""The contract between the loop and a solver. Larger values are better, everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ipgo_opt.errors import BadInput


@dataclass(frozen=True)
class Problem:
    """What a solver is told of the search.

    Attributes:
        start: a point to begin with, (D,).
        lower, upper: bounds of each coordinate, (D,); infinite where there are none.
        budget: points that may be evaluated in all.
        batch: points per `ask`, q.
        seed: seed of the solver's own generator.
        groups: sizes of consecutive groups of coordinates that each stand for one choice, the largest wins; () if there
            are none.

    """

    start: Tensor
    lower: Tensor
    upper: Tensor
    budget: int
    batch: int = 1
    seed: int = 0
    groups: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.start.ndim == self.lower.ndim == self.upper.ndim == 1:
            raise BadInput("`start`, `lower` and `upper` must be vectors.")
        if not len(self.start) == len(self.lower) == len(self.upper):
            raise BadInput(
                f"`start`, `lower` and `upper` must be equally long, but got {len(self.start)}, {len(self.lower)} "
                f"and {len(self.upper)}."
            )
        if not bool((self.lower <= self.upper).all()):
            raise BadInput("`lower <= upper` must hold for every coordinate.")
        if self.budget < 1 or self.batch < 1:
            raise BadInput(f"`budget >= 1` and `batch >= 1` must hold, but got {self.budget} and {self.batch}.")
        if self.groups and (min(self.groups) < 1 or sum(self.groups) != len(self.start)):
            raise BadInput(f"`groups` must add up to the {len(self.start)} coordinates, but got {self.groups}.")


class Exhausted(Exception):
    """A solver has nothing left to ask for, and says why: the search ends before its budget."""


class Strategy(Protocol):
    """A solver: `ask` for points, evaluate them, `tell` the values; repeat.

    `uses_gradient` says whether `tell` needs gradients: of a class, whether it ever does, and with them the full vector
    of a space (without, the solver works on the bounded low-dimensional coordinates); of a solver, whether the next
    `tell` does. Tensors passed in are not changed or kept.
    """

    @property
    def uses_gradient(self) -> bool:
        """Whether the next `tell` needs gradients."""
        ...

    def ask(self) -> Tensor:
        """Points to evaluate, (q, D), inside the bounds; raises Exhausted if there are none left."""
        ...

    def tell(self, x: Tensor, value: Tensor, gradient: Tensor | None = None) -> None:
        """Finite values (q,) of points x (q, D), larger is better, and their gradients (q, D) where used."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next `ask` depends on, random generator included: tensors, numbers, lists, dicts."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        ...


def check_tell(problem: Problem, x: Tensor, value: Tensor, gradient: Tensor | None, uses_gradient: bool) -> None:
    """Raises BadInput unless what is told has the shapes of the contract and is finite."""
    if x.ndim != 2 or x.shape[1] != len(problem.start) or value.shape != x.shape[:1]:
        raise BadInput(
            f"tell needs x (q, {len(problem.start)}) and value (q,), but got {tuple(x.shape)} and {tuple(value.shape)}."
        )
    if not bool(value.isfinite().all()):
        raise BadInput(f"values told to a strategy must be finite, but got {value.tolist()}.")
    if uses_gradient and (gradient is None or gradient.shape != x.shape or not bool(gradient.isfinite().all())):
        raise BadInput(f"this strategy needs a finite gradient of shape {tuple(x.shape)}.")
