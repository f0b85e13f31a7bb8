"""The search: what is to be evaluated next, and what follows from what was found.

A search says what it wants evaluated (`next`) and takes in what was found (`receive`); `drive` evaluates the wishes of
one search or of many at once and leaves a checkpoint after every round. That is the one loop of every strategy, every
space, one prompt and many.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ipgo_opt.config import FIRST_HELD_OUT_SEED, RunConfig
from ipgo_opt.errors import RunFailed
from ipgo_opt.objective import Evaluation, Objective, Request
from ipgo_opt.store import Store
from ipgo_opt.strategies.base import Exhausted, Strategy

MOST_FAILURES = 10
"""Evaluations in a row without a finite reward after which a run gives up."""


class Reporter(Protocol):
    """Is told what happens; the command line's display is one."""

    def started(self, config: RunConfig, out: Path, history: list[dict[str, Any]], runs: int = 1) -> None:
        """The search begins or goes on after `history`; `runs` searches like it go on in one pass."""
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


class Search(ABC):
    """State of a search: what a checkpoint holds, and the files that go with it.

    Args:
        config: the run's configuration.
        store: the run directory.
        reporter: is told what happens.
        strategy: who searches.

    Attributes:
        history: one record per evaluated image.
        evaluation: number of the next evaluation; 0 is the raw prompt.
        raw, seed_reward: mean score of the raw prompt before and after seeds were chosen.
        best, best_x: best mean score and its point; None is the raw prompt.
        images, denoiser_calls: what the search has cost.
        failed: why it was given up, or None.
        held_out, judged: the verdict (verdict.py), once it was given.
        space: what it searches, where that is made for its prompt alone; None is what the objective has.

    """

    KEPT: ClassVar[tuple[str, ...]] = (
        "evaluation", "failures", "raw", "seed_reward", "best", "best_x", "worst", "seconds", "images",
        "denoiser_calls",
    )  # fmt: skip
    """What a checkpoint holds besides the history and the strategy."""

    def __init__(self, config: RunConfig, store: Store, reporter: Reporter, strategy: Strategy) -> None:
        self.config, self.store, self.reporter, self.strategy = config, store, reporter, strategy
        self.history: list[dict[str, Any]] = []
        self.evaluation = self.failures = self.images = self.denoiser_calls = 0
        self.seconds = 0.0
        self.raw = self.seed_reward = self.best = -math.inf
        self.worst = math.inf
        self.best_x: Tensor | None = None
        self.failed: RunFailed | None = None
        self.held_out: dict[str, Any] | None = None
        self.judged: dict[str, Any] | None = None
        self.space: Any = None
        self.started = time.monotonic()

    @abstractmethod
    def next(self) -> Request | None:
        """What is to be evaluated next, or None if the search is over."""

    @abstractmethod
    def receive(self, request: Request, made: Evaluation) -> None:
        """Takes in what `next` asked for."""

    @abstractmethod
    def shown(self) -> tuple[str, int]:
        """Prompt and seed of raw.png and best.png."""

    @abstractmethod
    def fresh(self) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
        """Prompts, and fresh seeds for each, on which raw and best are compared in the end."""

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """What results say of this kind of search beside what they say of all."""

    @property
    def elapsed(self) -> float:
        """Seconds so far, those before a checkpoint was loaded included."""
        return self.seconds + time.monotonic() - self.started

    def write(self, request: Request, made: Evaluation, bests: Sequence[float], **more: Any) -> None:
        """A line of the history for each image; `bests` holds the best reward after each."""
        seconds = round(self.elapsed, 3)
        prompts = [prompt for prompt, seeds in zip(request.prompts, request.seeds, strict=True) for _ in seeds]
        seeds = [seed for own in request.seeds for seed in own]
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
                    **(made.notes[k] if made.notes else {}),
                }
                records.append(entry | ({"prompt": prompts[s], **more} if more else {}))
        self.failures = 0 if bool(made.scores.mean(1).isfinite().any()) else self.failures + 1
        self.images, self.denoiser_calls = self.images + len(records), self.denoiser_calls + made.denoiser_calls
        self.history += records
        self.store.append_history(records)
        for entry in records:
            self.reporter.evaluated(entry)
        if self.failures >= MOST_FAILURES:
            raise RunFailed(f"the reward gave no finite score in {self.failures} evaluations in a row.")

    def tell(self, x: Tensor, made: Evaluation) -> None:
        """Tells the strategy; a failed evaluation counts as the worst value seen, without slope."""
        good = made.value.isfinite()
        if made.gradient is not None:
            good &= made.gradient.isfinite().all(1)
        if bool(good.any()):
            self.worst = min(self.worst, float(made.value[good].min()))
        value = torch.where(good, made.value, torch.tensor(self.worst if math.isfinite(self.worst) else 0.0))
        gradient = made.gradient
        if gradient is not None:
            gradient = torch.where(good[:, None], gradient, torch.zeros_like(gradient))
        self.strategy.tell(x, value, gradient)

    def state_dict(self) -> dict[str, Any]:
        """What the next evaluation depends on."""
        state = {name: getattr(self, name) for name in self.KEPT}
        return state | {
            "lines": len(self.history), "seconds": self.elapsed, "strategy": self.strategy.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict` and cuts the history back to it. A search that was given up is tried again."""
        self.history = self.store.cut_history(state["lines"])
        for name in self.KEPT:
            setattr(self, name, state.get(name, getattr(self, name)))  # earlier versions kept less
        self.strategy.load_state_dict(state["strategy"])


class Loop(Search):
    """The search for one prompt.

    The raw prompt is evaluated on `config.tried_seeds` seeds first (evaluation 0); the `search_seeds` best of them are
    the ones that every candidate is scored on from then on. Without a share for seeds these are the first ones.

    Args:
        config: the run's configuration.
        store: the run directory.
        reporter: is told what happens.
        strategy: who searches.
        steps: evaluations after the raw prompt's.
        room: images that one evaluation of the raw prompt may have beyond `search_seeds`.

    Attributes:
        seeds: the seeds that candidates are scored on; all that were tried until they are chosen.
        raw_scores: the raw prompt's score on each seed tried, in order.

    """

    KEPT: ClassVar[tuple[str, ...]] = (*Search.KEPT, "raw_scores", "stale")

    def __init__(
        self, config: RunConfig, store: Store, reporter: Reporter, strategy: Strategy, steps: int, room: int
    ) -> None:
        super().__init__(config, store, reporter, strategy)
        self.steps, self.room = steps, room
        self.raw_scores: list[float] = []
        self.stale = 0

    @property
    def seeds(self) -> list[int]:
        """The best `search_seeds` of the seeds tried, best first; in their order if there was no choice."""
        S = self.config.search_seeds
        order = range(len(self.raw_scores))
        if self.config.tried_seeds > S:
            return [self.config.seed + k for k in sorted(order, key=lambda k: -self.raw_scores[k])[:S]]
        return [self.config.seed + k for k in order]

    def next(self) -> Request | None:
        """The raw prompt on the next seeds, then candidates on the chosen ones."""
        tried, most, prompts = len(self.raw_scores), self.config.tried_seeds, (self.config.prompt,)
        if tried < most:
            last = min(most, tried + max(self.config.search_seeds, self.room))
            seeds = tuple(self.config.seed + k for k in range(tried, last))
            return Request(None, prompts, (seeds,), space=self.space)
        if self.evaluation > self.steps or 0 < self.config.patience <= self.stale:
            return None
        try:
            x = self.strategy.ask()
        except Exhausted as end:
            self.reporter.warned(f"{end} The search ends after {len(self.history)} of {self.config.budget} images.")
            return None
        slope, update = self.strategy.uses_gradient, self.evaluation - 1
        return Request(x, prompts, (tuple(self.seeds),), slope, update=update, space=self.space)

    def receive(self, request: Request, made: Evaluation) -> None:
        """Keeps the best and writes the history."""
        if request.x is None:
            self._tried(request, made)
        else:
            self._found(request.x, request, made)

    def _tried(self, request: Request, made: Evaluation) -> None:
        """The raw prompt on further seeds; after the last ones, evaluation 0 is done."""
        assert made.images is not None
        tried, S, seeds = len(self.raw_scores), self.config.search_seeds, request.seeds[0]
        if not tried:
            self.store.write_image("raw.png", made.images[0])
        self.raw_scores += [score if math.isfinite(score) else -math.inf for score in made.scores[0].tolist()]
        top = self.seeds[0] - seeds[0]
        if top >= 0:  # the best one so far is among these
            self.store.write_image("best.png", made.images[top])
        self.raw = math.fsum(self.raw_scores[:S]) / S
        bests = [self._best_raw(max(S, tried + k + 1)) for k in range(len(seeds))]
        self.best = self.seed_reward = bests[-1]
        self.write(request, made, bests)
        self.evaluation = int(len(self.raw_scores) == self.config.tried_seeds)

    def _best_raw(self, tried: int) -> float:
        """Mean score of the raw prompt on the best `search_seeds` of the first `tried` seeds."""
        S = self.config.search_seeds
        return math.fsum(sorted(self.raw_scores[:tried], reverse=True)[:S]) / S

    def _found(self, x: Tensor, request: Request, made: Evaluation) -> None:
        """Candidates on the chosen seeds."""
        assert made.images is not None
        bests, self.stale = [], self.stale + 1
        for k in range(len(made.scores)):
            reward = float(made.scores[k].mean())
            if math.isfinite(reward) and reward > self.best and not made.estimate:
                self.best, self.best_x, self.stale = reward, x[k].clone(), 0
                self.store.write_image("best.png", made.images[k * len(self.seeds)])
            bests += [self.best] * len(self.seeds)
        self.write(request, made, bests)
        self.evaluation += 1
        self.tell(x, made)

    def shown(self) -> tuple[str, int]:
        """The prompt on the best of the chosen seeds (raw.png is on the first one tried)."""
        return self.config.prompt, self.seeds[0]

    def fresh(self) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
        """The prompt on seeds that no search uses."""
        return (self.config.prompt,), (tuple(FIRST_HELD_OUT_SEED + i for i in range(self.config.held_out)),)

    def summary(self) -> dict[str, Any]:
        """The chosen seeds."""
        return {"seeds": self.seeds}


def drive(searches: Sequence[Search], objective: Objective, save: Callable[[], None], *, lenient: bool = False) -> None:
    """Runs what is left of the searches, all in one pass: a round evaluates the next wish of each.

    Args:
        searches: that share the objective's model, reward and space.
        objective: evaluates.
        save: leaves a checkpoint of all of them.
        lenient: whether a search that fails is left out from then on, instead of ending all.

    """

    def dropped(search: Search, failed: RunFailed) -> None:
        if not lenient:
            raise failed
        search.failed = failed

    while True:
        asked: list[tuple[Search, Request]] = []
        for search in searches:
            try:
                request = search.next() if search.failed is None else None
            except RunFailed as failed:
                dropped(search, failed)
                continue
            if request is not None:
                asked.append((search, request))
        if not asked:
            return
        for (search, request), made in zip(asked, objective([request for _, request in asked]), strict=True):
            try:
                search.receive(request, made)
            except RunFailed as failed:
                dropped(search, failed)
        save()
