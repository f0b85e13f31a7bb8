"""DDPO's objective: images are sampled from a policy, their scores become advantages, and their steps are reweighted.

Black et al., arXiv 2305.13301, DDPO-IS. Rewards need no gradient. Each of the q points of an evaluation is the same
weights, and its image is one sample on a seed of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ipgo_opt.models.policy import Trajectory, replayed, sampled
from ipgo_opt.objective import Evaluation, Objective
from ipgo_opt.strategies.base import Strategy

MOST_ADVANTAGE = 5.0
"""Deviations to which an advantage is clipped, as in the paper's code."""


def advantages(scores: Tensor) -> Tensor:
    """Scores (q,) of one prompt's images less their mean, in deviations, clipped; 0 for those that are not finite."""
    good = scores.isfinite()
    known = scores[good]
    out = torch.zeros_like(scores)
    if len(known) > 1:
        out[good] = (known - known.mean()) / (known.std(correction=0) + 1e-8)
    return out.clamp(-MOST_ADVANTAGE, MOST_ADVANTAGE)


def surrogate(now: Tensor, then: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """min(ρ A, clip(ρ, 1 − c, 1 + c) A) with ρ = exp(now − then), each (q,): PPO's clipped objective."""
    ratio = (now - then).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


class PolicyObjective(Objective):
    """Scores of sampled images, and gradients that are estimated from them.

    Asked for a gradient, it samples an image for every row of x on the seed of the same number; `reuse` then improves
    the weights further on the same images. Without a gradient it is the objective of every other method.
    """

    trajectories: list[Trajectory]
    advantage: Tensor

    def __call__(self, x: Tensor | None, seeds: list[int], *, gradient: bool = False) -> Evaluation:
        """Evaluates points x (q, D), one seed for each, or as `Objective` does."""
        if not gradient or x is None:
            return super().__call__(x, seeds)
        with torch.no_grad():
            conditioning, penalty = self.applied(x, seeds)
            images, self.trajectories = sampled(self.sampler, conditioning, seeds)
            prompts = [self.config.prompt] * len(images)
            parts = self.reward.parts(images, prompts)
            scores = self.reward.total(parts).float().cpu()
            judged = None if self.judge is None else self.judge(images, prompts)[:, None].cpu()
        self.advantage = advantages(scores)
        return Evaluation(
            images,
            scores[:, None],
            {name: part.float().cpu()[:, None] for name, part in parts.items()},
            judged,
            penalty.float().cpu(),
            scores - self.config.gamma * penalty.float().cpu(),
            self.again(x),
        )

    def again(self, x: Tensor) -> Tensor:
        """Gradient (q, D) of the clipped objective of the images last sampled, at points x (q, D).

        It is the mean over the steps, and for row i it is that of image i alone.
        """
        gradients = []
        start = 0
        for trajectory in self.trajectories:
            rows = slice(start, start + len(trajectory.seeds))
            start = rows.stop
            gradients.append(self._gradient(x[rows], trajectory, self.advantage[rows]))
        return torch.cat(gradients)

    def _gradient(self, x: Tensor, trajectory: Trajectory, advantage: Tensor) -> Tensor:
        leaf = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            conditioning, penalty = self.applied(leaf, trajectory.seeds)
        total = torch.zeros_like(leaf)
        if penalty.requires_grad:
            total -= torch.autograd.grad(self.config.gamma * penalty.sum(), leaf, retain_graph=True)[0]

        def use(now: Tensor, then: Tensor) -> None:
            if now.requires_grad:  # else a step without fresh noise
                value = surrogate(now, then, advantage.to(now), self.config.clip_range).sum()
                (slope,) = torch.autograd.grad(value, leaf, retain_graph=True)
                total.add_(slope / len(trajectory.reached))

        replayed(self.sampler, conditioning, trajectory, use)
        return total

    def reuse(self, strategy: Strategy, value: Tensor) -> None:
        """The updates after the first: new weights, the same images, probabilities reweighted by their ratio."""
        for _ in range(self.config.inner_updates - 1):
            x: Any = strategy.ask()
            strategy.tell(x, value, self.again(x))
