"""Gradient ascent on all parameters of a space: with Adam, IPGO's solver (arXiv 2503.21812, section 4).

The paper's settings: learning rate 1e-3, multiplied by 0.9 every 10 updates, gradient norm clipped at 1, no weight
decay; bounded coordinates are clamped after each update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ipgo_opt.errors import BadInput
from ipgo_opt.strategies.base import Problem, check_tell

OPTIMIZERS = ("adam", "nesterov")


@dataclass(frozen=True)
class GradientOptions:
    """Settings of the solver; the defaults are the paper's.

    Attributes:
        learning_rate: step size; Adam's is in units of the coordinates.
        decay: factor on the learning rate every `decay_every` updates.
        decay_every: updates between two decays.
        max_grad_norm: Euclidean norm to which each candidate's gradient is clipped.
        optimizer: "adam", or "nesterov": gradient steps with Nesterov's momentum 0.9 (ReNO's).

    """

    learning_rate: float = 1e-3
    decay: float = 0.9
    decay_every: int = 10
    max_grad_norm: float = 1.0
    optimizer: str = "adam"

    def __post_init__(self) -> None:
        if not (self.learning_rate > 0 and 0 < self.decay <= 1 and self.decay_every >= 1 and self.max_grad_norm > 0):
            raise BadInput(
                "`learning_rate > 0`, `0 < decay <= 1`, `decay_every >= 1` and `max_grad_norm > 0` must hold, "
                f"but got {self}."
            )
        if self.optimizer not in OPTIMIZERS:
            raise BadInput(f"optimizer must be one of {', '.join(OPTIMIZERS)}, but got {self.optimizer!r}.")


def moments(optimizer: torch.optim.Optimizer, x: Tensor) -> dict[str, Tensor]:
    """What an optimizer keeps of x between two steps."""
    return {key: value.clone() for key, value in optimizer.state.get(x, {}).items()}


def restore(optimizer: torch.optim.Optimizer, x: Tensor, kept: dict[str, Tensor]) -> None:
    """Restores what `moments` gave."""
    optimizer.state.clear()
    if kept:
        optimizer.state[x] = {key: value.clone() for key, value in kept.items()}


class Gradient:
    """Ascent from the start point; with a batch, every row climbs on its own.

    >>> solver = Gradient(problem)
    >>> while True:
    ...     x = solver.ask()
    ...     solver.tell(x, *value_and_gradient(x))
    """

    uses_gradient: ClassVar[bool] = True

    def __init__(self, problem: Problem, options: GradientOptions | None = None) -> None:
        self.problem, self.options = problem, options or GradientOptions()
        self.updates = 0
        self.x = problem.start.expand(problem.batch, -1).clone()
        rate = self.options.learning_rate
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.Adam([self.x], lr=rate)
            if self.options.optimizer == "adam"
            else torch.optim.SGD([self.x], lr=rate, momentum=0.9, nesterov=True)
        )

    def ask(self) -> Tensor:
        """The current points (q, D)."""
        return self.x.clone()

    def tell(self, x: Tensor, value: Tensor, gradient: Tensor | None = None) -> None:
        """One clipped, clamped step uphill."""
        check_tell(self.problem, x, value, gradient, True)
        assert gradient is not None
        if not torch.equal(x, self.x):
            raise BadInput("gradient ascent must be told the points that it asked for.")
        norm = gradient.norm(dim=1, keepdim=True)
        self.x.grad = -gradient * (self.options.max_grad_norm / norm.clamp(min=self.options.max_grad_norm))
        rate = self.options.learning_rate * self.options.decay ** (self.updates // self.options.decay_every)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.x.clamp_(self.problem.lower, self.problem.upper)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Points, update count and the optimizer's moments."""
        return {"x": self.x.clone(), "updates": self.updates, "moments": moments(self.optimizer, self.x)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self.x.copy_(state["x"])
        self.updates = state["updates"]
        restore(self.optimizer, self.x, state["moments"])
