"""Evolution over choices: the genetic search of DPO-Diff (Wang et al., ICML 2024, section 4.4).

A population is drawn; then generations of children of the best points seen so far follow, some by mutation (each
coordinate takes another choice with a small probability) and some by crossing two parents (each coordinate comes from
one of them).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ipgo_opt.errors import BadInput
from ipgo_opt.strategies.base import Problem, check_tell

TRIES = 50
"""Tries of each way to make a point that has not been made before."""


@dataclass(frozen=True)
class EvolutionOptions:
    """Settings of the solver; the defaults are the paper's.

    Attributes:
        population: points that are drawn at first, at most half of the budget.
        parents: best points from which children are made.
        mutants: children of a generation by mutation.
        crossings: children of a generation by crossing.
        rate: probability that a coordinate mutates; at least one does.
        keep: probability that a coordinate of the first population stays as it is at the start (0 in the paper, whose
            lists hold synonyms only: with choices that change what is shown, most of what is drawn would be worse).

    """

    population: int = 20
    parents: int = 10
    mutants: int = 10
    crossings: int = 10
    rate: float = 0.1
    keep: float = 0.6

    def __post_init__(self) -> None:
        if min(self.population, self.parents, self.mutants, self.crossings) < 1 or not (
            0 < self.rate <= 1 and 0 <= self.keep < 1
        ):
            raise BadInput(
                "`population >= 1`, `parents >= 1`, `mutants >= 1`, `crossings >= 1`, `0 < rate <= 1` "
                f"and `0 <= keep < 1` must hold, but got {self}."
            )


class Evolution:
    """Evolution from the start point; the choices of a coordinate are its lower bound, one more, and so on.

    Args:
        problem: with finite bounds.
        options: its settings.
        weights: the distribution that the population is drawn from, a vector of probabilities for the choices of each
            coordinate; uniform without.

    """

    uses_gradient: ClassVar[bool] = False

    def __init__(
        self, problem: Problem, options: EvolutionOptions | None = None, weights: Sequence[Tensor] | None = None
    ) -> None:
        if not bool((problem.lower.isfinite() & problem.upper.isfinite()).all()):
            raise BadInput("evolution needs finite bounds for every coordinate.")
        self.problem, self.options = problem, options or EvolutionOptions()
        self.first = min(self.options.population, max(2, problem.budget // 2))
        counts = (problem.upper - problem.lower + 1e-6).floor().long() + 1
        self.weights = list(weights) if weights is not None else [torch.ones(int(n)) for n in counts]
        self.generator = torch.Generator().manual_seed(problem.seed)
        self.made = [problem.start.clone()]
        self.asked = 0
        self.x = problem.start.new_empty(0, len(problem.start))
        self.value = torch.empty(0, dtype=torch.float64)

    def ask(self) -> Tensor:
        """Points (q, D) at choices of every coordinate; the very first one is the start."""
        while len(self.made) < self.asked + self.problem.batch:
            if len(self.made) < self.first or not len(self.x):
                self._add(self._drawn)
                continue
            for make, count in ((self._mutant, self.options.mutants), (self._crossing, self.options.crossings)):
                for _ in range(count):
                    self._add(make)
        x = torch.stack(self.made[self.asked : self.asked + self.problem.batch])
        self.asked += len(x)
        return x

    def tell(self, x: Tensor, value: Tensor, gradient: Tensor | None = None) -> None:
        """Values (q,) of points (q, D), larger is better."""
        check_tell(self.problem, x, value, gradient, False)
        self.x, self.value = torch.cat([self.x, x]), torch.cat([self.value, value.double()])

    def _add(self, make: Callable[[], Tensor]) -> None:
        """A point that has not been made before, if tries find one: as asked for, then a mutant, then a draw."""
        points = (way() for way in (make, self._mutant if len(self.x) else make, self._drawn) for _ in range(TRIES))
        for point in points:
            if not any(torch.equal(point, other) for other in self.made):
                break
        self.made.append(point)

    def _random(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def _drawn(self) -> Tensor:
        numbers = [torch.multinomial(one, 1, generator=self.generator)[0] for one in self.weights]
        drawn = self.problem.lower + torch.stack(numbers).to(self.problem.lower)
        return torch.where(self._random(len(drawn)) < self.options.keep, self.problem.start, drawn)

    def _parent(self) -> Tensor:
        best = self.value.argsort(descending=True, stable=True)[: self.options.parents]
        return self.x[best[int(self._random(1) * len(best))]]

    def _mutant(self) -> Tensor:
        parent = self._parent()
        changed = self._random(len(parent)) < self.options.rate
        changed[int(self._random(1) * len(parent))] = True
        numbers = torch.stack([(self._random(1)[0] * len(one)).floor() for one in self.weights])
        return torch.where(changed, self.problem.lower + numbers.to(self.problem.lower), parent)

    def _crossing(self) -> Tensor:
        first, second = self._parent(), self._parent()
        return torch.where(self._random(len(first)) < 0.5, first, second)

    def state_dict(self) -> dict[str, Any]:
        """All points made (n, D), how many of them were asked, what was told, and the generator."""
        return {
            "made": torch.stack(self.made), "asked": self.asked, "x": self.x.clone(), "value": self.value.clone(),
            "generator": self.generator.get_state(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self.made = list(state["made"].clone())
        self.asked = state["asked"]
        self.x, self.value = state["x"].clone(), state["value"].clone()
        self.generator.set_state(state["generator"])
