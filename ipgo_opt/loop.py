"""The search: seeds first, then ask, evaluate, tell, record, checkpoint. The one loop of every strategy and space."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ipgo_opt.config import RunConfig
from ipgo_opt.errors import RunFailed
from ipgo_opt.objective import Evaluation, Objective
from ipgo_opt.store import Store
from ipgo_opt.strategies.base import Exhausted, Strategy

MOST_FAILURES = 10
"""Evaluations in a row without a finite reward after which a run gives up."""


class Reporter(Protocol):
    """Is told what happens; the command line's display is one."""

    def started(self, config: RunConfig, out: Path, history: list[dict[str, Any]]) -> None:
        """The search begins or goes on after `history`."""
        ...

    def evaluated(self, record: dict[str, Any]) -> None:
        """An image was scored."""
        ...

    def judging(self, done: int, total: int) -> None:
        """`done` of `total` images of the verdict are made."""
        ...

    def warned(self, message: str) -> None:
        """Something that the user should know and that does not stop the run."""
        ...

    def finished(self, summary: dict[str, Any]) -> None:
        """The run is over."""
        ...


def finite(value: Any) -> float | None:
    """The value as a number that JSON knows, or None."""
    return float(value) if math.isfinite(value) else None


class Loop:
    """State of a search: what a checkpoint holds, and the files that go with it.

    The raw prompt is evaluated on `config.tried_seeds` seeds first (evaluation 0); the `search_seeds` best of them are
    the ones that every candidate is scored on from then on. Without a share for seeds these are the first ones.

    Args:
        config: the run's configuration.
        store: the run directory.
        reporter: is told what happens.
        objective: evaluates.

    Attributes:
        seeds: the seeds that candidates are scored on; all that were tried until they are chosen.
        raw_scores: the raw prompt's score on each seed tried, in order.
        raw: mean score of the raw prompt on the first `search_seeds` seeds.
        seed_reward: mean score of the raw prompt on the chosen seeds.
        best, best_x: best mean score and its point; None is the raw prompt.

    """

    def __init__(self, config: RunConfig, store: Store, reporter: Reporter, objective: Objective) -> None:
        self.config, self.store, self.reporter, self.objective = config, store, reporter, objective
        self.history: list[dict[str, Any]] = []
        self.raw_scores: list[float] = []
        self.evaluation = self.failures = 0
        self.seconds = 0.0
        self.raw = self.seed_reward = self.best = -math.inf
        self.worst = math.inf
        self.best_x: Tensor | None = None
        self.started = time.monotonic()

    @property
    def seeds(self) -> list[int]:
        """The best `search_seeds` of the seeds tried, best first; in their order if there was no choice."""
        S = self.config.search_seeds
        order = range(len(self.raw_scores))
        if self.config.tried_seeds > S:
            return [self.config.seed + k for k in sorted(order, key=lambda k: -self.raw_scores[k])[:S]]
        return [self.config.seed + k for k in order]

    def search(self, strategy: Strategy, steps: int) -> None:
        """Runs what is left of the search and leaves a checkpoint after every evaluation."""
        while len(self.raw_scores) < self.config.tried_seeds:
            self.try_seeds()
            self.save(strategy)
        while self.evaluation <= steps:
            try:
                self.step(strategy)
            except Exhausted as end:
                self.reporter.warned(f"{end} The search ends after {len(self.history)} of {self.config.budget} images.")
                return
            self.save(strategy)

    def save(self, strategy: Strategy) -> None:
        """Leaves a checkpoint."""
        self.store.save_checkpoint(self.state_dict() | {"strategy": strategy.state_dict()})

    def step(self, strategy: Strategy) -> None:
        """Asks, evaluates, records and tells."""
        x = strategy.ask()
        made = self.objective(x, self.seeds, gradient=strategy.uses_gradient, update=self.evaluation - 1)
        self._record(x, made)
        value, gradient = self._told(made)
        strategy.tell(x, value, gradient)

    def try_seeds(self) -> None:
        """Evaluates the raw prompt on the next seeds; after the last ones, evaluation 0 is done."""
        tried, S = len(self.raw_scores), self.config.search_seeds
        first = self.config.seed + tried
        last = self.config.seed + min(self.config.tried_seeds, tried + max(S, self.config.chunk))
        seeds = list(range(first, last))
        made = self.objective(None, seeds)
        if not tried:
            self.store.write_image("raw.png", made.images[0])
        self.raw_scores += [score if math.isfinite(score) else -math.inf for score in made.scores[0].tolist()]
        top = self.seeds[0] - first
        if top >= 0:  # the best one so far is among these
            self.store.write_image("best.png", made.images[top])
        self.raw = math.fsum(self.raw_scores[:S]) / S
        bests = [self._best_raw(max(S, tried + k + 1)) for k in range(len(seeds))]
        self.best = self.seed_reward = bests[-1]
        self._write(made, seeds, bests)
        self.evaluation = int(len(self.raw_scores) == self.config.tried_seeds)

    def _best_raw(self, tried: int) -> float:
        """Mean score of the raw prompt on the best `search_seeds` of the first `tried` seeds."""
        S = self.config.search_seeds
        return math.fsum(sorted(self.raw_scores[:tried], reverse=True)[:S]) / S

    def _record(self, x: Tensor, made: Evaluation) -> None:
        """Keeps the best candidate and writes an evaluation to the history."""
        bests = []
        for k in range(len(made.scores)):
            reward = float(made.scores[k].mean())
            if math.isfinite(reward) and reward > self.best and not made.estimate:
                self.best, self.best_x = reward, x[k].clone()
                self.store.write_image("best.png", made.images[k * len(self.seeds)])
            bests += [self.best] * len(self.seeds)
        self._write(made, self.seeds, bests)
        self.evaluation += 1

    def _write(self, made: Evaluation, seeds: list[int], bests: list[float]) -> None:
        """A line for each image; `bests` holds the best reward after each."""
        seconds = round(self.seconds + time.monotonic() - self.started, 3)
        records: list[dict[str, Any]] = []
        for k in range(len(made.scores)):
            for s, seed in enumerate(seeds):
                entry = {
                    "image": len(self.history) + len(records),
                    "evaluation": self.evaluation,
                    "candidate": k,
                    "seed": seed,
                    "reward": finite(made.scores[k, s]),
                    "parts": {name: finite(part[k, s]) for name, part in made.parts.items()},
                    "judge": None if made.judge is None else finite(made.judge[k, s]),
                    "penalty": finite(made.penalty[k]),
                    "best": finite(bests[k * len(seeds) + s]),
                    "seconds": seconds,
                    **made.notes[k],
                }
                records.append(entry)
        self.failures = 0 if bool(made.scores.mean(1).isfinite().any()) else self.failures + 1
        self.history += records
        self.store.append_history(records)
        for entry in records:
            self.reporter.evaluated(entry)
        if self.failures >= MOST_FAILURES:
            raise RunFailed(f"the reward gave no finite score in {self.failures} evaluations in a row.")

    def _told(self, made: Evaluation) -> tuple[Tensor, Tensor | None]:
        """Values and gradients fit to be told: a failed evaluation counts as the worst value seen, without slope."""
        good = made.value.isfinite()
        if made.gradient is not None:
            good &= made.gradient.isfinite().all(1)
        if bool(good.any()):
            self.worst = min(self.worst, float(made.value[good].min()))
        value = torch.where(good, made.value, torch.tensor(self.worst if math.isfinite(self.worst) else 0.0))
        gradient = made.gradient
        if gradient is not None:
            gradient = torch.where(good[:, None], gradient, torch.zeros_like(gradient))
        return value, gradient

    def state_dict(self) -> dict[str, Any]:
        """What the next evaluation depends on."""
        sampler = self.objective.sampler
        return {
            "lines": len(self.history), "evaluation": self.evaluation, "failures": self.failures,
            "raw_scores": list(self.raw_scores), "raw": self.raw, "seed_reward": self.seed_reward,
            "best": self.best, "best_x": self.best_x, "worst": self.worst,
            "seconds": self.seconds + time.monotonic() - self.started,
            "images": sampler.images, "denoiser_calls": sampler.denoiser_calls,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict` and cuts the history back to it."""
        self.history = self.store.cut_history(state["lines"])
        for name in (
            "evaluation", "failures", "raw_scores", "raw", "seed_reward", "best", "best_x", "worst", "seconds"
        ):  # fmt: skip
            setattr(self, name, state[name])
        self.objective.sampler.images, self.objective.sampler.denoiser_calls = state["images"], state["denoiser_calls"]
