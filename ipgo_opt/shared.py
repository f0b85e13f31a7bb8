"""The search for one set of tokens that serves many prompts: the paper's prompt-batch training.

arXiv 2503.21812, section 5: minibatches of 4 or 10 prompts, constant learning rate, 20 epochs. Here some prompts and a
seed for each are kept apart: on them the raw prompts are evaluation 0, the tokens are scored after every epoch, the
best tokens are those that are best there as long as the judge has not fallen too far, and training stops when they have
not become better for a while. All of these images belong to the budget.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ipgo_opt.config import FIRST_HELD_OUT_SEED, FIRST_VALIDATION_SEED, RunConfig
from ipgo_opt.loop import Reporter, Search
from ipgo_opt.objective import Evaluation, Request
from ipgo_opt.store import Store
from ipgo_opt.strategies.base import Strategy


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """The order of `count` prompts in an epoch: the same in every process."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


class SharedLoop(Search):
    """Updates on minibatches, every `config.epoch_updates` of them a validation.

    Each image of a minibatch is made from a seed of its own. A strategy without gradients compares values, so its
    candidates are all scored on one minibatch with its seeds, and the best of them so far is what is validated.

    Attributes:
        leader, leader_value: what is validated next, and its value on the fixed minibatch (black boxes).
        raw_judge: the judge's mean on the raw validation prompts.
        stale: validations in a row that found nothing better.

    """

    KEPT: ClassVar[tuple[str, ...]] = (*Search.KEPT, "leader", "leader_value", "raw_judge", "stale", "updates")

    def __init__(self, config: RunConfig, store: Store, reporter: Reporter, strategy: Strategy) -> None:
        super().__init__(config, store, reporter, strategy)
        self.leader: Tensor | None = None
        self.leader_value = -math.inf
        self.raw_judge: float | None = None
        self.stale = self.updates = 0
        self.schedule = config.schedule

    def next(self) -> Request | None:
        """Validation of the raw prompts, then the updates and validations that the budget pays for."""
        config = self.config
        if self.evaluation == 0:
            return self._validation(None)
        if self.evaluation >= len(self.schedule) or 0 < config.patience <= self.stale:
            return None
        if self.schedule[self.evaluation] == "validate":
            best_yet = self.strategy.ask()[0] if self.strategy.uses_gradient else self.leader
            return self._validation(None if best_yet is None else best_yet[None])
        n, b = len(config.prompts), config.prompt_batch
        first = self.updates * b if self.strategy.uses_gradient else 0
        drawn = [divmod(i, n) for i in range(first, first + b)]
        prompts = tuple(config.prompts[shuffled(n, config.seed, epoch)[at]] for epoch, at in drawn)
        seeds = tuple((config.seed + i,) for i in range(first, first + b))
        slope = self.strategy.uses_gradient
        return Request(self.strategy.ask(), prompts, seeds, slope, images=False, update=self.updates)

    def _validation(self, x: Tensor | None) -> Request:
        prompts = tuple(self.config.validation)
        return Request(x, prompts, tuple((FIRST_VALIDATION_SEED + i,) for i in range(len(prompts))))

    def receive(self, request: Request, made: Evaluation) -> None:
        """Keeps what is best on the validation prompts and tells the strategy of updates."""
        if request.images:
            self._validated(request, made)
        else:
            assert request.x is not None
            top = int(made.value.nan_to_num(-math.inf, -math.inf, -math.inf).argmax())
            if float(made.value[top]) > self.leader_value:
                self.leader, self.leader_value = request.x[top].clone(), float(made.value[top])
            self.write(request, made, [self.best] * made.scores.numel(), part="train")
            self.tell(request.x, made)
            self.updates += 1
        self.evaluation += 1

    def _validated(self, request: Request, made: Evaluation) -> None:
        assert made.images is not None
        reward = float(made.scores.mean())
        judge = None if made.judge is None else float(made.judge.mean())
        raw = self.evaluation == 0
        if raw:
            self.raw = self.seed_reward = reward if math.isfinite(reward) else -math.inf
            self.raw_judge = judge
            self.store.write_image("raw.png", made.images[0])
        self.stale += 1
        if raw or (reward > self.best and self._kept(judge)):
            self.best, self.stale = (self.raw if raw else reward), 0
            self.best_x = None if request.x is None else request.x[0].clone()
            self.store.write_image("best.png", made.images[0])
        self.write(request, made, [self.best] * made.scores.numel(), part="validation")

    def _kept(self, judge: float | None) -> bool:
        """Whether the judge has not fallen by more than is tolerated."""
        if judge is None or self.raw_judge is None:
            return True
        return judge >= self.raw_judge - self.config.judge_tolerance * abs(self.raw_judge)

    def shown(self) -> tuple[str, int]:
        """The first validation prompt on its seed."""
        return self.config.validation[0], FIRST_VALIDATION_SEED

    def fresh(self) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
        """The validation prompts on `held_out` seeds each that nothing was chosen by."""
        prompts, each = tuple(self.config.validation), self.config.held_out
        seeds = [tuple(FIRST_HELD_OUT_SEED + i * each + k for k in range(each)) for i in range(len(prompts))]
        return prompts, tuple(seeds)

    def summary(self) -> dict[str, Any]:
        """How many prompts and updates there were, and the seed of the first validation prompt."""
        return {
            "seeds": [FIRST_VALIDATION_SEED], "prompts": len(self.config.prompts),
            "validation_prompts": len(self.config.validation), "updates": self.updates,
            "epochs": self.updates * self.config.prompt_batch / len(self.config.prompts),
        }  # fmt: skip
