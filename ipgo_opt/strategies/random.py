"""Uniform random search over the bounded coordinates: the yardstick for every black-box solver."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ipgo_opt.errors import BadInput
from ipgo_opt.strategies.base import Problem, check_tell


class Random:
    """The start point first, then independent uniform points inside the bounds."""

    uses_gradient: ClassVar[bool] = False

    def __init__(self, problem: Problem) -> None:
        if not bool((problem.lower.isfinite() & problem.upper.isfinite()).all()):
            raise BadInput("random search needs finite bounds for every coordinate.")
        self.problem, self.asked = problem, 0
        self.generator = torch.Generator().manual_seed(problem.seed)

    def ask(self) -> Tensor:
        """Uniform points (q, D); the very first one is the start."""
        lower, upper = self.problem.lower, self.problem.upper
        unit = torch.rand(self.problem.batch, len(lower), generator=self.generator, dtype=lower.dtype)
        x = lower + unit * (upper - lower)
        if self.asked == 0:
            x[0] = self.problem.start
        self.asked += len(x)
        return x

    def tell(self, x: Tensor, value: Tensor, gradient: Tensor | None = None) -> None:
        """Checks what is told; random search learns nothing from it."""
        check_tell(self.problem, x, value, gradient, False)

    def state_dict(self) -> dict[str, Any]:
        """Number of points asked and the generator."""
        return {"asked": self.asked, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self.asked = state["asked"]
        self.generator.set_state(state["generator"])
