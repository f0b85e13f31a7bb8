"""A gradient on distributions, then points drawn from them: `hybrid` and `gpo` of DPO-Diff (Wang et al., ICML 2024).

The full vector holds the log-coefficients of a categorical distribution for each group of coordinates. RMSprop climbs
the gradient of points drawn from them; then points that are one choice per group are searched, by evolution that starts
in the learned distribution (`hybrid`) or by drawing from it alone (`gpo`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ipgo_opt.errors import BadInput
from ipgo_opt.strategies.base import Problem, check_tell
from ipgo_opt.strategies.evolution import Evolution, EvolutionOptions
from ipgo_opt.strategies.gradient import moments, restore


@dataclass(frozen=True)
class HybridOptions:
    """Settings of the gradient's part; the defaults are the paper's.

    Attributes:
        iterations: updates, at most half of the budget.
        learning_rate, momentum: of RMSprop.
        clamp: each entry of the gradient is clamped to ±clamp.

    """

    iterations: int = 20
    learning_rate: float = 0.1
    momentum: float = 0.5
    clamp: float = 0.025

    def __post_init__(self) -> None:
        if not (self.iterations >= 1 and self.learning_rate > 0 and 0 <= self.momentum < 1 and self.clamp > 0):
            raise BadInput(
                "`iterations >= 1`, `learning_rate > 0`, `0 <= momentum < 1` and `clamp > 0` must hold, but got "
                f"{self}."
            )


class Hybrid:
    """RMSprop on log-coefficients, then evolution over the choices that they stand for.

    The rows of a batch are draws from one distribution, and the mean of their gradients counts. The second part asks
    for corners of the box: the chosen coordinate of each group at its upper bound, the others at their lower one.
    Without groups, the vector is one group.
    """

    uses_gradient: bool = True

    def __init__(self, problem: Problem, options: HybridOptions | None = None) -> None:
        if not bool((problem.lower.isfinite() & problem.upper.isfinite()).all()):
            raise BadInput("the gradient of distributions needs finite bounds for every coordinate.")
        self.problem, self.options = problem, options or HybridOptions()
        self.groups = problem.groups or (len(problem.start),)
        self.iterations = min(self.options.iterations, problem.budget // (2 * problem.batch))
        self.updates = 0
        self.x = problem.start.clone()
        self.optimizer = torch.optim.RMSprop(
            [self.x], lr=self.options.learning_rate, momentum=self.options.momentum, foreach=False
        )  # fmt: skip
        self.second: Evolution | None = None
        self._turn()

    def ask(self) -> Tensor:
        """The log-coefficients, once for each row (q, D), and after the last update corners (q, D)."""
        if self.second is None:
            return self.x.repeat(self.problem.batch, 1)
        return self._corners(self.second.ask())

    def tell(self, x: Tensor, value: Tensor, gradient: Tensor | None = None) -> None:
        """One RMSprop step uphill with clamped gradients, kept in the bounds; or values of corners."""
        check_tell(self.problem, x, value, gradient, self.uses_gradient)
        if self.second is not None:
            self.second.tell(self._numbers(x), value)
            return
        if not all(torch.equal(row, self.x) for row in x):
            raise BadInput("the gradient's part must be told the points that it asked for.")
        assert gradient is not None
        self.x.grad = -gradient.mean(0).clamp(-self.options.clamp, self.options.clamp)
        self.optimizer.step()
        self.x.clamp_(self.problem.lower, self.problem.upper)
        self.updates += 1
        self._turn()

    def distribution(self) -> list[Tensor]:
        """The learned probabilities of each group's choices."""
        return [one.softmax(0) for one in torch.split(self.x, list(self.groups))]

    def evolution(self, budget: int) -> EvolutionOptions:
        """How the second part searches."""
        return EvolutionOptions()

    def _turn(self) -> None:
        """After the last update, the second part begins."""
        if self.updates < self.iterations:
            return
        weights = self.distribution()
        start = torch.stack([one.argmax() for one in weights]).to(self.x)
        last = torch.tensor(self.groups).to(self.x) - 1
        budget = max(1, self.problem.budget - self.updates * self.problem.batch)
        problem = Problem(start, torch.zeros_like(last), last, budget, self.problem.batch, self.problem.seed)
        self.second = Evolution(problem, self.evolution(budget), weights)
        self.uses_gradient = False

    def _corners(self, numbers: Tensor) -> Tensor:
        """Points (q, D) of choices (q, groups)."""
        chosen = [
            torch.nn.functional.one_hot(column.long(), n) for column, n in zip(numbers.T, self.groups, strict=True)
        ]
        return torch.where(torch.cat(chosen, dim=1) == 1, self.problem.upper, self.problem.lower)

    def _numbers(self, x: Tensor) -> Tensor:
        """Choices (q, groups) of points (q, D), measured from the lower bounds."""
        above = (x - self.problem.lower) / (self.problem.upper - self.problem.lower).clamp(min=1e-12)
        return torch.stack([one.argmax(1) for one in torch.split(above, list(self.groups), dim=1)], dim=1).to(self.x)

    def state_dict(self) -> dict[str, Any]:
        """Log-coefficients, update count, RMSprop's averages and the second part's state."""
        return {
            "x": self.x.clone(), "updates": self.updates, "moments": moments(self.optimizer, self.x),
            "second": None if self.second is None else self.second.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self.x.copy_(state["x"])
        self.updates = state["updates"]
        restore(self.optimizer, self.x, state["moments"])
        self.second, self.uses_gradient = None, True
        self._turn()
        if self.second is not None:
            self.second.load_state_dict(state["second"])


class Gpo(Hybrid):
    """RMSprop on log-coefficients, then draws from the learned distribution, the most probable point first."""

    def evolution(self, budget: int) -> EvolutionOptions:
        """A population as large as what is left of the budget, and no generations."""
        return EvolutionOptions(population=2 * budget, keep=0.0)
