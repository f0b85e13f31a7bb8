"""Points in, images and scores out: where space, sampler and reward meet, and where gradients are made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ipgo_opt.conditioning import Conditioning
from ipgo_opt.config import RunConfig
from ipgo_opt.models.renoised import renoised
from ipgo_opt.rewards.base import Reward, WeightedSum
from ipgo_opt.strategies.base import Strategy

if TYPE_CHECKING:
    from ipgo_opt.models.sampler import Sampler


@dataclass
class Evaluation:
    """Images and scores of q candidates on S seeds.

    `images` (q·S, 3, H, W); `scores` (q, S) and each of `parts`, `judge` likewise; `value` (q,) what the solver
    maximizes; `gradient` (q, D) of it, if asked for.
    """

    images: Tensor
    scores: Tensor
    parts: dict[str, Tensor]
    judge: Tensor | None
    penalty: Tensor
    value: Tensor
    gradient: Tensor | None


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

    def applied(self, x: Tensor | None, seeds: list[int]) -> tuple[Conditioning, Tensor]:
        """Conditioning and penalty (q,) of points x (q, D) on these seeds; None is the raw prompt."""
        if x is None:
            return self.conditioning, torch.zeros(1)
        given = self.conditioning
        if self.space.needs_noise:
            given = replace(given, noise=self.sampler.noise(seeds)[None])
        conditioning, penalty = self.space.apply(x, given, full=self.full)
        return conditioning, penalty

    def __call__(self, x: Tensor | None, seeds: list[int], *, gradient: bool = False) -> Evaluation:
        """Evaluates points x (q, D), or the raw prompt, on every seed."""
        leaf = x.detach().clone().requires_grad_() if gradient and x is not None else x
        with torch.set_grad_enabled(gradient):
            conditioning, penalty = self.applied(leaf, seeds)
            q = len(conditioning)
            rows, dealt = conditioning.repeat(len(seeds)), seeds * q
            images = self.sampler.generate(rows, dealt, gradient=gradient)
            prompts = [self.config.prompt] * len(images)
            parts = self.reward.parts(images, prompts)
            scores = self.reward.total(parts).view(q, len(seeds))
            cost = self.config.gamma * penalty.to(scores)
            value = climbed = scores.mean(1) - cost
            if gradient and self.config.lv_samples:
                copies = self._lower_variance(rows, dealt, prompts).view_as(scores)
                climbed = ((scores + copies) / (1 + self.config.lv_samples)).mean(1) - cost
        slope = None
        if gradient and leaf is not None:
            (slope,) = torch.autograd.grad(climbed.sum(), leaf)
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
        )

    def _lower_variance(self, rows: Conditioning, seeds: list[int], prompts: list[str]) -> Tensor:
        """Sum of the rewards (B,) of `lv_samples` noisier copies of each image just made, denoised again."""
        finished = self.sampler.latents
        generator = torch.Generator().manual_seed(self.sampler.images)  # the same again after a resume
        total = torch.zeros(len(prompts), device=finished.device)
        for _ in range(self.config.lv_samples):
            noise = torch.randn(finished.shape, generator=generator, dtype=finished.dtype)
            copies = renoised(self.sampler, rows, seeds, finished, noise)
            total = total + self.reward.total(self.reward.parts(copies, prompts)).to(total)
        return total

    def reuse(self, strategy: Strategy, value: Tensor) -> None:
        """Further updates from the images just made, if a method has them: here none."""
