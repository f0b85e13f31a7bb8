"""Points in, images and scores out: where space, sampler and reward meet, and where gradients are made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ipgo_opt.conditioning import Conditioning
from ipgo_opt.config import RunConfig
from ipgo_opt.models.shortcut import shortcut_step
from ipgo_opt.rewards.base import Reward, WeightedSum
from ipgo_opt.spaces.base import Readable

if TYPE_CHECKING:
    from ipgo_opt.models.sampler import Sampler


@dataclass
class Evaluation:
    """Images and scores of q candidates on S seeds.

    `images` (q·S, 3, H, W); `scores` (q, S) and each of `parts`, `judge` likewise; `value` (q,) what the solver
    maximizes; `gradient` (q, D) of it, if asked for; `notes` what each candidate's lines in the history hold beside
    their numbers; `estimate` says that the images are not the candidates' own but estimates, which are no result.
    """

    images: Tensor
    scores: Tensor
    parts: dict[str, Tensor]
    judge: Tensor | None
    penalty: Tensor
    value: Tensor
    gradient: Tensor | None
    notes: list[dict[str, Any]] = field(default_factory=list)
    estimate: bool = False


class Objective:
    """Points in, images and scores out: `value = mean reward over the seeds − γ · penalty`, equation (12).

    Args:
        config: the run's configuration.
        sampler: makes the images.
        reward: scores them.
        judge: a second opinion, or None.
        space: turns points into conditionings.
        full: which view of the space the points belong to.

    """

    def __init__(
        self, config: RunConfig, sampler: Sampler, reward: WeightedSum, judge: Reward | None, space: Any, full: bool
    ) -> None:
        self.config, self.sampler, self.reward, self.judge = config, sampler, reward, judge
        self.space, self.full = space, full
        self.conditioning = sampler.encode(config.prompt)

    def applied(self, x: Tensor | None) -> tuple[Conditioning, Tensor]:
        """Conditioning and penalty (q,) of points x (q, D); None is the raw prompt."""
        if x is None:
            return self.conditioning, torch.zeros(1)
        conditioning, penalty = self.space.apply(x, self.conditioning, full=self.full)
        return conditioning, penalty

    def readable(self, x: Tensor | None) -> dict[str, str]:
        """The texts that a point x (D,), or the raw prompt, stands for, by name, in a space that has texts."""
        if not isinstance(self.space, Readable):
            return {}
        if x is None:
            return {"prompt": self.config.prompt, "negative_prompt": self.config.negative_prompt}
        return self.space.readable(x, full=self.full)

    def _notes(self, x: Tensor | None, q: int, estimate: bool) -> list[dict[str, Any]]:
        """What is noted of q candidates beside their numbers."""
        if estimate:
            return [{"estimate": True}] * q
        return [self.readable(None if x is None else x[k]) for k in range(q)]

    def __call__(self, x: Tensor | None, seeds: list[int], *, gradient: bool = False, update: int = 0) -> Evaluation:
        """Evaluates points x (q, D), or the raw prompt, on every seed; `update` is the solver's, from 0."""
        shortcut = None
        if gradient and self.config.estimates:
            shortcut = shortcut_step(update, self.config.shortcut_start, self.config.num_inference_steps)
        leaf = x.detach().clone().requires_grad_() if gradient and x is not None else x
        with torch.set_grad_enabled(gradient):
            conditioning, penalty = self.applied(leaf)
            q = len(conditioning)
            images = self.sampler.generate(
                conditioning.repeat(len(seeds)), seeds * q, gradient=gradient, shortcut=shortcut
            )
            prompts = [self.config.prompt] * len(images)
            parts = self.reward.parts(images, prompts)
            scores = self.reward.total(parts).view(q, len(seeds))
            value = scores.mean(1) - self.config.gamma * penalty.to(scores)
        slope = None
        if gradient and leaf is not None:
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        with torch.no_grad():
            judged = None if self.judge is None else self.judge(images.detach(), prompts).view(q, -1).cpu()
        return Evaluation(
            images.detach(),
            scores.detach().float().cpu(),
            {name: part.detach().float().view(q, -1).cpu() for name, part in parts.items()},
            judged,
            penalty.detach().float().cpu(),
            value.detach().float().cpu(),
            slope,
            self._notes(x, q, shortcut is not None),
            shortcut is not None,
        )
