"""Bayesian optimization with BoTorch: a Gaussian process of the values proposes the next points.

The model is BoTorch's `SingleTaskGP`: a squared-exponential kernel with one lengthscale per coordinate under the
dimension-scaled log-normal prior of Hvarfner et al. (2024, "Vanilla Bayesian Optimization Performs Great in High
Dimensions", arXiv 2402.02229), and a small noise variance that is learned (at least 1e-4 of the variance of the data),
so that noise-free, repeated or ill-conditioned data can be solved. It is fitted anew for every `ask`, always from the
prior's mode, so that points depend on nothing but the seed and what was asked and told.

How points are proposed, the whole rule:

1. The start point and scrambled Sobol points, until `design_size` values are known: a fifth of the budget, at most 2 D
   points, at least 2 and at least one batch. In the trust-region mode they lie in the first region around the start.
2. Then, with at most 20 coordinates (`GLOBAL_DIMENSIONS`), the batch that maximizes qLogExpectedImprovement (Ament et
   al. 2023, arXiv 2310.20708) jointly over the whole box; for noisy values, qLogNoisyExpectedImprovement.
3. With more coordinates, TuRBO (Eriksson et al. 2019, arXiv 1910.01739): Thompson samples inside a box around the best
   point whose length adapts. A budget of a few points per coordinate can't cover the whole box, where the model's
   uncertainty, and with it the expected improvement, is largest in the corners.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from botorch.acquisition.logei import qLogExpectedImprovement, qLogNoisyExpectedImprovement
from botorch.exceptions.errors import BotorchError, ModelFittingError
from botorch.exceptions.warnings import InputDataWarning
from botorch.fit import fit_gpytorch_mll
from botorch.generation.sampling import MaxPosteriorSampling
from botorch.models import SingleTaskGP
from botorch.optim.optimize import optimize_acqf
from botorch.sampling.normal import SobolQMCNormalSampler
from botorch.utils.sampling import draw_sobol_samples
from gpytorch.mlls import ExactMarginalLogLikelihood  # type: ignore[import-untyped]
from linear_operator.utils.errors import NanError, NotPSDError  # type: ignore[import-untyped]
from linear_operator.utils.warnings import NumericalWarning  # type: ignore[import-untyped]
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ipgo_opt.errors import BadInput
from ipgo_opt.strategies.base import Problem, check_tell

GLOBAL_DIMENSIONS = 20
"""Up to so many coordinates the whole box is searched; with more, a trust region."""


@dataclass(frozen=True)
class BayesOptions:
    """Settings of the solver.

    Attributes:
        noisy: whether the same point may get different values: the best point is then the one with the best posterior
            mean rather than the best value seen.
        trust_region: whether to search inside a trust region; None decides by the number of coordinates.
        design: values to know before the model is used; None decides by budget, batch and dimensions.
        candidates: points of the trust region to choose from.
        raw: batches of which the best are the starts of the climbs (whole box).
        restarts: batches of which the acquisition function climbs (whole box).
        climb: L-BFGS steps of each climb.
        fit: L-BFGS steps of fitting the model.

    """

    noisy: bool = False
    trust_region: bool | None = None
    design: int | None = None
    candidates: int = 1000
    raw: int = 256
    restarts: int = 4
    climb: int = 30
    fit: int = 50

    def __post_init__(self) -> None:
        counts = self.candidates, self.raw, self.restarts, self.climb, self.fit
        if min(counts) < 1 or not (self.design is None or self.design >= 2):
            raise BadInput(
                "`candidates`, `raw`, `restarts`, `climb` and `fit` must be at least 1 and `design` at least 2, "
                f"but got {self}."
            )


@dataclass
class Region:
    """TuRBO's trust region (Eriksson et al. 2019, section 2), lengths in units of the box's width.

    The length doubles after `SUCCESSES` batches in a row that brought an improvement and halves after `patience` in a
    row that did not. Below `LEAST` the search restarts: a new design, and the model forgets the values from before.

    Attributes:
        patience: batches without an improvement, in a row, before the length halves.
        length: current length.
        successes, failures: batches in a row with and without an improvement.
        first: index of the first value that belongs to this region.

    """

    FIRST: ClassVar[float] = 0.8
    MOST: ClassVar[float] = 1.6
    LEAST: ClassVar[float] = 0.5**7
    SUCCESSES: ClassVar[int] = 3
    MARGIN: ClassVar[float] = 1e-3
    """What counts as an improvement, as a share of the standard deviation of the region's values."""

    patience: int
    length: float = FIRST
    successes: int = 0
    failures: int = 0
    first: int = 0

    def learn(self, before: Tensor, batch: Tensor) -> None:
        """Adapts the length to the values of a batch (q,), given all values (n,) that the region had before."""
        improved = bool(batch.max() > before.max() + self.MARGIN * before.std(correction=0))
        self.successes, self.failures = (self.successes + 1, 0) if improved else (0, self.failures + 1)
        if self.successes == self.SUCCESSES:
            self.length, self.successes = min(2 * self.length, self.MOST), 0
        elif self.failures >= self.patience:
            self.length, self.failures = self.length / 2, 0

    def box(self, center: Tensor, lengthscales: Tensor) -> Tensor:
        """Bounds (2, D) around a center (D,), longer where the lengthscales (D,) are, of the same volume, in [0, 1]."""
        weights = lengthscales / lengthscales.log().mean().exp()
        half = weights * self.length / 2
        return torch.stack([center - half, center + half]).clamp(0, 1)


class Bayes:
    """Bayesian optimization on the unit cube; see the module for the rule it follows.

    Coordinates whose bounds coincide stay where they are. All computations are in double precision.
    """

    uses_gradient: ClassVar[bool] = False

    def __init__(self, problem: Problem, options: BayesOptions | None = None) -> None:
        if not bool((problem.lower.isfinite() & problem.upper.isfinite()).all()):
            raise BadInput("Bayesian optimization needs finite bounds for every coordinate.")
        self.problem, self.options = problem, options or BayesOptions()
        dimensions, q = len(problem.start), problem.batch
        self.local = self.options.trust_region
        if self.local is None:
            self.local = dimensions > GLOBAL_DIMENSIONS
        self.design_size = self.options.design or max(2, q, min(2 * dimensions, problem.budget // 5))
        # TuRBO waits for D evaluations; with a budget of a few D it would hardly ever shrink
        self.region = Region(patience=math.ceil(max(4, min(dimensions, problem.budget / 10)) / q))
        self.seed, self.asked = problem.seed, 0
        self.start = self._unit(problem.start)
        self.x = self.start.new_empty(0, dimensions)
        self.value = self.start.new_empty(0)

    def _unit(self, x: Tensor) -> Tensor:
        """Points (…, D) in the unit cube."""
        lower, upper = self.problem.lower.double(), self.problem.upper.double()
        return ((x.double() - lower) / torch.where(upper > lower, upper - lower, 1.0)).clamp(0, 1)

    def ask(self) -> Tensor:
        """Points (q, D) inside the bounds; the very first one is the start."""
        lower, upper = self.problem.lower, self.problem.upper
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((self.seed * 1_000_003 + self.asked) % 2**63)
            unit = self._design() if len(self.value) - self.region.first < self.design_size else self._propose()
        x = (lower.double() + unit * (upper.double() - lower.double())).to(lower.dtype).clamp(lower, upper)
        if self.asked == 0:
            x[0] = self.problem.start
        self.asked += len(x)
        return x

    def _design(self) -> Tensor:
        """The next Sobol points (q, D); the first region's lie around the start."""
        box = torch.stack([torch.zeros_like(self.start), torch.ones_like(self.start)])
        if self.local and self.region.first == 0:
            box = self.region.box(self.start, torch.ones_like(self.start))
        return draw_sobol_samples(box, self.asked + self.problem.batch, 1, seed=self.seed)[self.asked :, 0]

    def _model(self, x: Tensor, value: Tensor) -> SingleTaskGP:
        """The Gaussian process of values (n,), standardized, at points (n, D)."""
        spread = value.std()
        y = (value - value.mean()) / (spread if spread > 0 else 1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InputDataWarning)  # equal values can't have a variance of 1
            model = SingleTaskGP(x, y[:, None], outcome_transform=None)
        likelihood = ExactMarginalLogLikelihood(model.likelihood, model)
        fit_gpytorch_mll(likelihood, optimizer_kwargs={"options": {"maxiter": self.options.fit}})
        return model

    def _propose(self) -> Tensor:
        """Points (q, D) that the model thinks best."""
        x, value = self.x[self.region.first :], self.value[self.region.first :]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NumericalWarning)  # jitter was added to a covariance, which is no harm
                model = self._model(x, value)
                score = model.posterior(x).mean[:, 0].detach() if self.options.noisy else value
                best = x[score.argmax()]
                return self._thompson(model, best) if self.local else self._improvement(model, best)
        except (BotorchError, ModelFittingError, NanError, NotPSDError, LinAlgError) as error:
            warnings.warn(
                f"the Gaussian process failed on {len(value)} values ({type(error).__name__}: {error}); "
                f"{self.problem.batch} Sobol points are asked for instead.",
                RuntimeWarning,
                stacklevel=2,
            )
            return self._design()

    def _perturbed(self, n: int, best: Tensor, box: Tensor) -> Tensor:
        """Points (n, D) of a box: the best point with about 20 of its coordinates (all, if fewer) drawn anew.

        This is TuRBO's mask: in many dimensions, moving all coordinates at once leaves the neighbourhood.
        """
        dimensions = len(best)
        drawn = draw_sobol_samples(box, n, 1)[:, 0]
        mask = torch.rand(n, dimensions) < min(20 / dimensions, 1.0)
        mask[torch.arange(n), torch.randint(dimensions, (n,))] = True  # at least one
        return torch.where(mask, drawn, best)

    def _thompson(self, model: SingleTaskGP, best: Tensor) -> Tensor:
        """For each of q functions drawn from the posterior, the candidate in the region where it is largest."""
        box = self.region.box(best, model.covar_module.lengthscale.detach()[0])
        candidates = self._perturbed(max(self.options.candidates, self.problem.batch), best, box)
        with torch.no_grad():
            return MaxPosteriorSampling(model, replacement=False)(candidates, num_samples=self.problem.batch)

    def _improvement(self, model: SingleTaskGP, best: Tensor) -> Tensor:
        """The batch that maximizes log expected improvement over the whole box, climbing from the best of many."""
        q, n = self.problem.batch, math.ceil(self.options.raw / 2)
        sampler = SobolQMCNormalSampler(torch.Size([128]), seed=self.asked)
        train_x, train_y = model.train_inputs[0], model.train_targets
        improvement: qLogExpectedImprovement | qLogNoisyExpectedImprovement
        if self.options.noisy:
            improvement = qLogNoisyExpectedImprovement(model, train_x, sampler=sampler, prune_baseline=True)
        else:
            improvement = qLogExpectedImprovement(model, train_y.max(), sampler=sampler)
        cube = torch.stack([torch.zeros_like(best), torch.ones_like(best)])
        near = Region(patience=1, length=0.2).box(best, torch.ones_like(best))
        far = draw_sobol_samples(cube, n * q, 1)[:, 0]
        raw = torch.cat([far, self._perturbed(n * q, best, near)])[torch.randperm(2 * n * q)].view(-1, q, len(best))
        with torch.no_grad():
            ready = raw[improvement(raw).topk(min(self.options.restarts, len(raw))).indices]
        points, _ = optimize_acqf(
            improvement,
            cube,
            q,
            len(ready),
            batch_initial_conditions=ready,
            options={"maxiter": self.options.climb},
        )
        return points.detach()

    def tell(self, x: Tensor, value: Tensor, gradient: Tensor | None = None) -> None:
        """Values (q,) of points (q, D), larger is better; they adapt the trust region."""
        check_tell(self.problem, x, value, gradient, False)
        if not len(value):
            return
        before, batch = self.value[self.region.first :], value.double()
        self.x, self.value = torch.cat([self.x, self._unit(x)]), torch.cat([self.value, batch])
        if self.local and len(before) >= self.design_size:
            self.region.learn(before, batch)
            if self.region.length < Region.LEAST:
                self.region = Region(patience=self.region.patience, first=len(self.value))

    def state_dict(self) -> dict[str, Any]:
        """Seed, number asked, all points (n, D) of the unit cube and their values (n,), and the trust region."""
        return {
            "seed": self.seed,
            "asked": self.asked,
            "x": self.x.clone(),
            "value": self.value.clone(),
            "region": vars(self.region).copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self.seed, self.asked = state["seed"], state["asked"]
        self.x, self.value = state["x"].clone(), state["value"].clone()
        self.region = Region(**state["region"])
