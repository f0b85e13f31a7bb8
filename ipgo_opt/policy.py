"""DDPO's objective: images are sampled from a policy, their scores become advantages, and their steps are reweighted.

Black et al., arXiv 2305.13301, DDPO-IS. Rewards need no gradient. An update samples one point, the weights, on many
seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ipgo_opt.conditioning import Conditioning
from ipgo_opt.loop import Loop
from ipgo_opt.models.policy import Trajectory, replayed, sampled
from ipgo_opt.objective import Evaluation, Objective, Request

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

    Asked for a gradient at one point, it samples an image for every prompt and seed of the request; `Evaluation.again`
    then gives the gradient at other points from the same images. Without a gradient it is the objective of every other
    method.
    """

    def __call__(self, requests: Sequence[Request], progress: Callable[[int], None] | None = None) -> list[Evaluation]:
        """As `Objective` does; requests with a gradient have one point."""
        plain = iter(super().__call__([request for request in requests if not request.gradient], progress))
        return [self._sampled(request) if request.gradient else next(plain) for request in requests]

    @torch.no_grad()
    def _sampled(self, request: Request) -> Evaluation:
        assert request.x is not None
        if request.q != 1:
            raise ValueError(f"a policy is sampled at one point, but got {request.q}.")
        prompts = [text for text, seeds in zip(request.prompts, request.seeds, strict=True) for _ in seeds]
        seeds = [seed for own in request.seeds for seed in own]
        given = Conditioning.stack([self.encoded(text) for text in prompts])
        rows, penalty = self.applied(request.x, given, request.space)
        calls = self.sampler.denoiser_calls
        images, trajectories = sampled(self.sampler, rows, seeds)
        parts = self.reward.parts(images, prompts)
        scores = self.reward.total(parts).float().cpu()
        judged = None if self.judge is None else self.judge(images, prompts)[None].float().cpu()
        advantage = torch.zeros_like(scores)
        for text in set(prompts):
            own = torch.tensor([prompt == text for prompt in prompts])
            advantage[own] = advantages(scores[own])
        penalty = penalty.float().cpu().mean()[None]

        def again(x: Tensor) -> Tensor:
            return self._gradient(x, given, trajectories, advantage, request.space)

        return Evaluation(
            images if request.images else None,
            scores[None],
            {name: part.float().cpu()[None] for name, part in parts.items()},
            judged,
            penalty,
            scores.mean()[None] - self.gamma * penalty,
            again(request.x),
            self.sampler.denoiser_calls - calls,
            again,
        )

    def _gradient(
        self, x: Tensor, given: Conditioning, trajectories: list[Trajectory], advantage: Tensor, space: Any
    ) -> Tensor:
        """Gradient (1, D), at a point x (1, D), of the clipped objective: its mean over images and steps."""
        start, slopes = 0, []
        for trajectory in trajectories:
            part = slice(start, start + len(trajectory.seeds))
            start = part.stop
            rows = given.map(lambda tensor, part=part: tensor[part])
            slopes.append(self._of_trajectory(x, rows, trajectory, advantage[part], space))
        return torch.stack(slopes).sum(0) / len(advantage)

    def _of_trajectory(
        self, x: Tensor, given: Conditioning, trajectory: Trajectory, advantage: Tensor, space: Any
    ) -> Tensor:
        """The sum over the images of one pipeline call, (1, D)."""
        leaf = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            rows, penalty = self.applied(leaf, given, space)
        total = torch.zeros_like(leaf)
        if penalty.requires_grad:
            total -= torch.autograd.grad(self.gamma * penalty.sum(), leaf, retain_graph=True)[0]

        def use(now: Tensor, then: Tensor) -> None:
            if now.requires_grad:  # else a step without fresh noise
                value = surrogate(now, then, advantage.to(now), self.config.clip_range).sum()
                (slope,) = torch.autograd.grad(value, leaf, retain_graph=True)
                total.add_(slope / len(trajectory.reached))

        replayed(self.sampler, rows, trajectory, use)
        return total


class PolicyLoop(Loop):
    """The search of a policy for one prompt: every sample of an update is made on a seed of its own.

    The best image is the best of all samples, and the best point is the one that it was sampled at.

    Attributes:
        best_seed: the seed of the best image.

    """

    KEPT: ClassVar[tuple[str, ...]] = (*Loop.KEPT, "best_seed")
    best_seed: int | None = None

    def next(self) -> Request | None:
        """The raw prompt on the next seeds, then samples of the policy on seeds that nothing was scored on yet."""
        wish = super().next()
        if wish is None or wish.x is None:
            return wish
        q = len(wish.x)
        first = self.config.seed + self.config.tried_seeds + (self.evaluation - 1) * q
        seeds = tuple((first + k,) for k in range(q))
        return replace(wish, x=wish.x[:1], prompts=(self.config.prompt,) * q, seeds=seeds)

    def _found(self, x: Tensor, request: Request, made: Evaluation) -> None:
        """Samples of a policy, and the updates that they are good for."""
        assert made.images is not None
        assert made.gradient is not None
        assert made.again is not None
        bests, self.stale = [], self.stale + 1
        for k, (seed,) in enumerate(request.seeds):
            reward = float(made.scores[0, k])
            if math.isfinite(reward) and reward > self.best:
                self.best, self.best_x, self.best_seed, self.stale = reward, x[0].clone(), seed, 0
                self.store.write_image("best.png", made.images[k])
            bests.append(self.best)
        self.write(request, made, bests)
        self.evaluation += 1
        scores, q = made.scores[0], len(request.seeds)
        value = torch.where(
            scores.isfinite(), scores, scores[scores.isfinite()].min() if scores.isfinite().any() else 0.0
        )
        gradient = made.gradient
        for update in range(self.config.inner_updates):
            point = self.strategy.ask()
            if update:
                gradient = made.again(point[:1])
            self.strategy.tell(point, value, gradient.nan_to_num(0.0, 0.0, 0.0).expand(q, -1))

    def shown(self) -> tuple[str, int]:
        """The prompt on the seed of the best sample."""
        prompt, seed = super().shown()
        return prompt, seed if self.best_seed is None else self.best_seed

    def summary(self) -> dict[str, Any]:
        """The seed of the best image."""
        return {"seeds": [self.shown()[1]]}
