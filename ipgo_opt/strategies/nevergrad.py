"""Any optimizer of Nevergrad (Rapin and Teytaud 2018, github.com/facebookresearch/nevergrad), CMA-ES among them.

Nevergrad minimizes, so it is told negated values. Points are scaled to the unit cube, whose bounds Nevergrad keeps by
reflection; coordinates whose bounds coincide stay where they are.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

import nevergrad as ng
import numpy as np
import torch
from nevergrad.common.errors import TellNotAskedNotSupportedError
from nevergrad.optimization.optimizerlib import _TBPSA
from torch import Tensor

from ipgo_opt.errors import BadInput, RunFailed
from ipgo_opt.registry import unknown
from ipgo_opt.strategies.base import Problem, check_tell

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Could not import matplotlib")  # which pycma needs for nothing but plots
    from cma.sigma_adaptation import CMAAdaptSigmaCSA  # type: ignore[import-untyped]


class Nevergrad:
    """The start point first, then what the optimizer asks for; a batch is asked for before any of it is told.

    A point that is told without having been asked for is passed on as such; the few optimizers that can't use one
    ignore it. The state is what was asked and told, in order: restoring it is repeating it with the same seed, for
    nothing that was pickled is ever loaded from a file.
    """

    uses_gradient: ClassVar[bool] = False
    name: ClassVar[str]
    """Nevergrad's name of the optimizer."""

    def __init__(self, problem: Problem) -> None:
        if not bool((problem.lower.isfinite() & problem.upper.isfinite()).all()):
            raise BadInput(f"Nevergrad's {self.name} needs finite bounds for every coordinate.")
        self.problem = problem
        try:
            self._begin(problem.seed)
        except RunFailed as error:  # a missing package; no parallel asking; …
            raise BadInput(str(error)) from error

    def _optimizer(self, cube: Any) -> Any:
        """The optimizer over `cube`, an array (D,) with bounds 0 and 1 whose value is the start point."""
        return ng.optimizers.registry[self.name](cube, budget=self.problem.budget, num_workers=self.problem.batch)

    def _begin(self, seed: int) -> None:
        """Forgets everything; a fresh optimizer."""
        self.seed, self.asked = seed, 0
        self.pending: list[tuple[Tensor, Any]] = []
        """Points (D,) that were asked and not told yet, and what they are to the optimizer."""
        self.points: list[Tensor] = []
        self.values: list[float] = []
        self.asked_before: list[int] = []
        """For each point told, how many had been asked for by then."""
        self.source = np.random.RandomState(seed % 2**32)
        self._globals = self.source.get_state(), random.Random(seed).getstate()
        self.optimizer: Any = None
        if not self.design:
            with self._own_globals():
                self._start(self.problem.start)

    def _start(self, x: Tensor) -> None:
        """The optimizer begins at x (D,)."""
        start = self._unit(x)
        cube = ng.p.Array(init=start, lower=np.zeros_like(start), upper=np.ones_like(start))
        cube.random_state = self.source
        self.optimizer = self._optimizer(cube)
        if not self.design:
            self.optimizer.suggest(start)

    @property
    def design(self) -> int:
        """Points drawn uniformly at the beginning, the start first; the optimizer begins at the best of them."""
        return 0

    @contextmanager
    def _own_globals(self) -> Iterator[None]:
        """Gives the solver numpy's and Python's global generators of its own: some of Nevergrad draws from them."""
        outside = np.random.get_state(), random.getstate()  # noqa: NPY002
        np.random.set_state(self._globals[0])  # noqa: NPY002
        random.setstate(self._globals[1])
        try:
            with warnings.catch_warnings():
                # the start is told in place of the first point of CMA-ES's, which shifts its populations by one
                warnings.filterwarnings("ignore", "orphanated injected solution")
                yield
        except Exception as error:  # several hundred optimizers, each with ways of its own to fail
            raise RunFailed(f"Nevergrad's {self.name} failed: {type(error).__name__}: {error}") from error
        finally:
            self._globals = np.random.get_state(), random.getstate()  # noqa: NPY002
            np.random.set_state(outside[0])  # noqa: NPY002
            random.setstate(outside[1])

    def _unit(self, x: Tensor) -> Any:
        """A point (D,) as a numpy vector in [0, 1]."""
        lower, upper = self.problem.lower.double(), self.problem.upper.double()
        width = torch.where(upper > lower, upper - lower, 1.0)
        return ((x.double() - lower) / width).clamp(0, 1).numpy()

    def _ask_one(self) -> Tensor:
        lower, upper = self.problem.lower, self.problem.upper
        candidate = None
        if self.asked < self.design:
            unit = torch.from_numpy(self.source.uniform(size=len(lower)))
        else:
            if self.optimizer is None:
                self._start(self.points[int(np.argmax(self.values))] if self.values else self.problem.start)
            candidate = self.optimizer.ask()
            unit = torch.from_numpy(np.asarray(candidate.value, dtype=np.float64))
        if self.asked == 0:
            x = self.problem.start.clone()
        else:
            x = (lower.double() + unit * (upper.double() - lower.double())).to(lower.dtype).clamp(lower, upper)
        self.pending.append((x, candidate))
        self.asked += 1
        return x

    def _tell_one(self, x: Tensor, value: float) -> None:
        index = next((i for i, (asked, _) in enumerate(self.pending) if torch.equal(asked, x)), None)
        candidate = None  # of the design
        if index is not None:
            candidate = self.pending.pop(index)[1]
        elif self.optimizer is not None:
            candidate = self.optimizer.parametrization.spawn_child(new_value=self._unit(x))
        # TBPSA takes the distance of the start from its center as the step size that made it: here zero, forever
        still = isinstance(self.optimizer, _TBPSA) and torch.equal(x, self.problem.start)
        if candidate is not None and not still:
            with suppress(TellNotAskedNotSupportedError):
                self.optimizer.tell(candidate, -value)
        self.points.append(x.clone())
        self.values.append(value)
        self.asked_before.append(self.asked)

    def ask(self) -> Tensor:
        """Points (q, D) inside the bounds; the very first one is the start."""
        with self._own_globals():
            return torch.stack([self._ask_one() for _ in range(self.problem.batch)])

    def tell(self, x: Tensor, value: Tensor, gradient: Tensor | None = None) -> None:
        """Values (q,) of points (q, D), larger is better."""
        check_tell(self.problem, x, value, gradient, False)
        with self._own_globals():
            for point, one in zip(x, value.tolist(), strict=True):
                self._tell_one(point, one)

    def state_dict(self) -> dict[str, Any]:
        """The seed and all that was asked and told: points (n, D), values (n,), order; and the number asked."""
        points = torch.stack(self.points) if self.points else self.problem.start.new_empty(0, len(self.problem.start))
        return {
            "seed": self.seed,
            "asked": self.asked,
            "x": points,
            "value": torch.tensor(self.values, dtype=torch.float64),
            "asked_before": list(self.asked_before),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Repeats what `state_dict` recorded."""
        self._begin(state["seed"])
        with self._own_globals():
            for x, value, asked in zip(state["x"], state["value"].tolist(), state["asked_before"], strict=True):
                while self.asked < asked:
                    self._ask_one()
                self._tell_one(x, value)
            while self.asked < state["asked"]:
                self._ask_one()


DESIGN_SHARE = 0.5
"""Share of CMA-ES's budget for points drawn uniformly over the box, the best of which it begins at."""

SIGMA = 0.15
"""Standard deviation of CMA-ES's first steps, as a share of the width of the box."""


class Cma(Nevergrad):
    """CMA-ES (Hansen 2016, arXiv 1604.00772) from the best of a uniform design, the start point among it.

    From the start itself, the raw prompt, its short first steps find less at 100 images than uniform points do: good
    tokens are long ones (docs/blackbox.md). What follows the design is what Nevergrad's `CMA` chooses for a bounded box
    – diagonal covariance, the best point kept – with populations of 4 (or a batch and one) instead of 7 or more and
    first steps of SIGMA instead of 0.04 of the box's width. Of first steps from 0.05 to 0.3, such small and usual
    populations, diagonal and full covariances, with and without keeping the best, this did well on each of five test
    functions in 40 dimensions at 100 evaluations (two low-dimensional bowls, Hartmann's function, a quadratic, a random
    network), in batches of 1 and 4.

    The step size adapts cumulatively (CSA) in any dimension: from 300 on pycma would use two-point adaptation, which
    fails when batches are smaller than populations.
    """

    name = "CMA"

    @property
    def design(self) -> int:
        """See DESIGN_SHARE."""
        return math.ceil(DESIGN_SHARE * self.problem.budget)

    def _optimizer(self, cube: Any) -> Any:
        cube.set_mutation(sigma=SIGMA)
        scale = 1 / 0.3 if cube.dimension < 18 else 1 / 0.15  # Nevergrad multiplies by 0.3 or 0.15 in a bounded box
        recipe = ng.optimizers.ParametrizedCMA(
            scale=scale, diagonal=True, elitist=True, popsize_factor=0, inopts={"AdaptSigma": CMAAdaptSigmaCSA}
        )
        return recipe(cube, budget=self.problem.budget, num_workers=self.problem.batch)


def named(name: str) -> type[Nevergrad]:
    """The strategy that wraps Nevergrad's optimizer `name`; BadInput with the nearest names if there is none."""
    if name not in ng.optimizers.registry:
        raise unknown("an optimizer of Nevergrad", name, sorted(ng.optimizers.registry))
    return type(name, (Nevergrad,), {"name": name})
