"""DDPO's solver: Adam on the mean of gradients that were estimated from single samples of a policy.

Black et al., arXiv 2305.13301. All points of an `ask` are the same weights; each is told the score of its own sample
and the gradient of the clipped objective for it. How such gradients are estimated is the objective's business.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from ipgo_opt.errors import BadInput
from ipgo_opt.strategies.base import Problem, check_tell
from ipgo_opt.strategies.gradient import Gradient, GradientOptions


class Policy:
    """One point, sampled `batch` times; every `tell` is one update, with the gradient averaged over the samples."""

    uses_gradient: ClassVar[bool] = True

    def __init__(self, problem: Problem, options: GradientOptions | None = None) -> None:
        self.problem = problem
        self.solver = Gradient(replace(problem, batch=1), options)

    def ask(self) -> Tensor:
        """The current point, `batch` times, (q, D)."""
        return self.solver.ask().repeat(self.problem.batch, 1)

    def tell(self, x: Tensor, value: Tensor, gradient: Tensor | None = None) -> None:
        """One step uphill on the mean of the gradients (q, D)."""
        check_tell(self.problem, x, value, gradient, True)
        assert gradient is not None
        if bool((x != x[:1]).any()):
            raise BadInput("a policy must be told samples of the one point that it asked for.")
        self.solver.tell(x[:1], value.mean()[None], gradient.mean(0, keepdim=True))

    def state_dict(self) -> dict[str, Any]:
        """The state of Adam."""
        return self.solver.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self.solver.load_state_dict(state)
