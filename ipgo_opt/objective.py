"""Points in, images and scores out: where space, sampler and reward meet, and where gradients are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ipgo_opt.conditioning import Conditioning
from ipgo_opt.config import RunConfig
from ipgo_opt.models.raw_images import RawImages
from ipgo_opt.models.renoised import renoised
from ipgo_opt.models.shortcut import shortcut_step
from ipgo_opt.rewards.base import Reward, WeightedSum
from ipgo_opt.spaces.base import Readable

if TYPE_CHECKING:
    from ipgo_opt.models.sampler import Sampler


@dataclass(frozen=True)
class Request:
    """Candidates to be evaluated, each on every prompt and its seeds.

    Attributes:
        x: q points (q, D), or None for the prompts as they are.
        prompts: b prompts.
        seeds: S seeds for each prompt, (b, S).
        gradient: whether the slope of the value is asked for.
        images: whether the images are to be kept.
        update: number of the solver's update, from 0.
        space: the space that x belongs to, where it is made for one prompt; None is the objective's.

    """

    x: Tensor | None
    prompts: tuple[str, ...]
    seeds: tuple[tuple[int, ...], ...]
    gradient: bool = False
    images: bool = True
    update: int = 0
    space: Any = None

    @property
    def q(self) -> int:
        """Candidates."""
        return 1 if self.x is None else len(self.x)


@dataclass
class Evaluation:
    """What one request found: images and scores of q candidates on b prompts with S seeds each.

    Attributes:
        images: (q·b·S, 3, H, W), seeds innermost, candidates outermost; None unless they were to be kept.
        scores: (q, b·S), and each of `parts` and `judge` likewise.
        penalty: mean over the prompts (q,).
        value: what the solver maximizes (q,).
        gradient: of `value`, (q, D), if it was asked for.
        denoiser_calls: images × denoiser evaluations that it took.
        again: the gradient at another point (1, D), estimated from the same images, where a method has that.
        notes: what each candidate's lines in the history hold beside their numbers.
        estimate: whether the images are not the candidates' own but estimates, which are no result.

    """

    images: Tensor | None
    scores: Tensor
    parts: dict[str, Tensor]
    judge: Tensor | None
    penalty: Tensor
    value: Tensor
    gradient: Tensor | None
    denoiser_calls: int
    again: Callable[[Tensor], Tensor] | None = None
    notes: list[dict[str, Any]] = field(default_factory=list)
    estimate: bool = False


@dataclass(frozen=True)
class _Block:
    """The part of a request that stays together: one candidate on some of its prompts with some of their seeds."""

    request: int
    candidate: int
    prompts: tuple[int, ...]
    seeds: range


class _Sheet:
    """An evaluation as it is filled in, block by block."""

    def __init__(self, request: Request, terms: Sequence[str], judged: bool) -> None:
        self.request, (b, S) = request, (len(request.prompts), len(request.seeds[0]))
        self.scores = torch.zeros(request.q, b, S)
        self.parts = {name: torch.zeros(request.q, b, S) for name in terms}
        self.judge = torch.zeros(request.q, b, S) if judged else None
        self.penalty = torch.zeros(request.q, b)
        self.gradient = torch.zeros_like(request.x) if request.gradient and request.x is not None else None
        self.images: dict[tuple[int, int, int], Tensor] = {}
        self.calls = 0

    def evaluation(self, gamma: float) -> Evaluation:
        q, penalty = self.request.q, self.penalty.mean(1)
        scores = self.scores.view(q, -1)
        return Evaluation(
            torch.stack([self.images[at] for at in sorted(self.images)]) if self.request.images else None,
            scores,
            {name: part.view(q, -1) for name, part in self.parts.items()},
            None if self.judge is None else self.judge.view(q, -1),
            penalty,
            scores.mean(1) - gamma * penalty,
            self.gradient,
            self.calls,
        )


class Objective:
    """Points in, images and scores out: `value = mean reward − γ · mean penalty`, equation (12).

    The means are over the prompts and seeds of a request. What is asked for at once, by one search or by many, is
    evaluated in batches of at most `config.chunk` images; gradients are accumulated over them, so that memory is that
    of one batch.

    Args:
        config: the settings of all the runs that ask.
        sampler: makes the images.
        reward: scores them.
        judge: a second opinion, or None.
        space: turns points into conditionings.
        full: which view of the space the points belong to.
        kept: raw images of this model that need not be made again.

    """

    def __init__(
        self, config: RunConfig, sampler: Sampler, reward: WeightedSum, judge: Reward | None, space: Any, full: bool,
        kept: RawImages | None = None,
    ) -> None:  # fmt: skip
        self.config, self.sampler, self.reward, self.judge = config, sampler, reward, judge
        self.space, self.full, self.kept = space, full, RawImages(0) if kept is None else kept
        self.gamma = config.gamma if "conformity" in config.kept_constraints() else 0.0
        self.encoded = sampler.encode

    def applied(self, x: Tensor, conditioning: Conditioning, space: Any = None) -> tuple[Conditioning, Tensor]:
        """Conditioning and penalty of points x (q, D) on B prompts (see Space.apply)."""
        applied: tuple[Conditioning, Tensor] = (space or self.space).apply(x, conditioning, full=self.full)
        return applied

    def __call__(self, requests: Sequence[Request], progress: Callable[[int], None] | None = None) -> list[Evaluation]:
        """Evaluates all requests; `progress` is told the number of images after every batch."""
        terms = [term.name for term in self.reward.terms]
        sheets = [_Sheet(request, terms, self.judge is not None) for request in requests]
        for batch in self._batches(requests):
            rows = self._evaluate(batch, requests, sheets)
            if progress is not None:
                progress(rows)
        made = [sheet.evaluation(self.gamma) for sheet in sheets]
        for request, evaluation in zip(requests, made, strict=True):
            evaluation.estimate = self.config.estimates and request.gradient
            evaluation.notes = self._notes(request)
        return made

    def _notes(self, request: Request) -> list[dict[str, Any]]:
        """What is noted of each candidate of a request."""
        if self.config.estimates and request.gradient:
            return [{"estimate": True}] * request.q
        space, raw = request.space or self.space, (request.prompts[0], self.config.negative_prompt)
        points = [None] if request.x is None else list(request.x)
        return [readable(space, raw, x, full=self.full) for x in points]

    def _batches(self, requests: Sequence[Request]) -> list[list[_Block]]:
        """Blocks that can share a pipeline call: the same numbers of prompts and seeds, the same shapes."""
        most = self.config.chunk
        alike: dict[Any, list[_Block]] = {}
        for r, request in enumerate(requests):
            S = len(request.seeds[0])
            by_shape: dict[Any, list[int]] = {}
            for p, prompt in enumerate(request.prompts):
                by_shape.setdefault(self.encoded(prompt).shapes, []).append(p)
            for k, (shapes, found) in product(range(request.q), by_shape.items()):
                together = max(1, most // S)
                for first, start in product(range(0, len(found), together), range(0, S, most)):
                    block = _Block(r, k, tuple(found[first : first + together]), range(start, min(S, start + most)))
                    how = (request.x is None, request.gradient, request.update)
                    kind = (how, shapes, len(block.prompts), len(block.seeds))
                    alike.setdefault(kind, []).append(block)
        batches = []
        for blocks in alike.values():
            together = max(1, most // (len(blocks[0].prompts) * len(blocks[0].seeds)))
            batches += [blocks[start : start + together] for start in range(0, len(blocks), together)]
        return batches

    def _evaluate(self, batch: list[_Block], requests: Sequence[Request], sheets: list[_Sheet]) -> int:
        """One pipeline call, scored and entered; returns its number of images."""
        first, b, S = requests[batch[0].request], len(batch[0].prompts), len(batch[0].seeds)
        gradient = first.gradient
        texts = [requests[block.request].prompts[p] for block in batch for p in block.prompts]
        seeds = [requests[block.request].seeds[p][s] for block in batch for p in block.prompts for s in block.seeds]
        prompts = [text for text in texts for _ in range(S)]
        leaves: list[Tensor] = []
        with torch.set_grad_enabled(gradient):
            if first.x is None:
                images, calls = self.kept.images(self.sampler, prompts, seeds, self._encoded)
                penalty = torch.zeros(len(texts))
            else:
                before = self.sampler.denoiser_calls
                leaves, rows, penalty = self._changed(batch, requests)
                rows = rows.repeat(S)
                shortcut = None
                if gradient and self.config.estimates:
                    steps = self.config.num_inference_steps
                    shortcut = shortcut_step(first.update, self.config.shortcut_start, steps)
                images = self.sampler.generate(rows, seeds, gradient=gradient, shortcut=shortcut)
            parts = self.reward.parts(images, prompts)
            scores = climbed = self.reward.total(parts).view(-1, b, S)
            penalty = penalty.to(scores).view(-1, b)
            if gradient and self.config.lv_samples:
                copies = self._lower_variance(rows, seeds, prompts, first.update)
                climbed = (scores + copies.view_as(scores)) / (1 + self.config.lv_samples)
            value = (climbed - self.gamma * penalty[..., None]).sum((1, 2))
        slopes: list[Tensor] = []
        if gradient:
            of_mean = torch.tensor([1 / sheets[block.request].scores[0].numel() for block in batch]).to(value)
            slopes = [slope for of_leaf in torch.autograd.grad(value, leaves, of_mean) for slope in of_leaf]
        images = images.detach()
        if first.x is not None:
            calls = self.sampler.denoiser_calls - before
        with torch.no_grad():
            judged = None if self.judge is None else _cpu(self.judge(images, prompts)).view(-1, b, S)
        scores, penalty = _cpu(scores), _cpu(penalty)
        parts = {name: _cpu(part).view(-1, b, S) for name, part in parts.items()}
        for i, block in enumerate(batch):
            sheet, k, p, s = sheets[block.request], block.candidate, list(block.prompts), list(block.seeds)
            at = (k, torch.tensor(p)[:, None], torch.tensor(s))
            sheet.scores[at] = scores[i]
            sheet.penalty[k, p] = penalty[i]
            for name, part in parts.items():
                sheet.parts[name][at] = part[i]
            if sheet.judge is not None and judged is not None:
                sheet.judge[at] = judged[i]
            if sheet.gradient is not None:
                sheet.gradient[k] += slopes[i]
            if sheet.request.images:
                sheet.images |= {(k, *where): images[i * b * S + n] for n, where in enumerate(product(p, s))}
            sheet.calls += calls // len(batch)
        return len(images)

    def _changed(self, batch: list[_Block], requests: Sequence[Request]) -> tuple[list[Tensor], Conditioning, Tensor]:
        """Points as leaves, one (q, D) for each space, and what becomes of their prompts: rows and penalties."""
        leaves, rows, penalties = [], [], []
        for _, group in groupby(batch, lambda block: id(requests[block.request].space)):
            blocks = list(group)
            request = requests[blocks[0].request]
            points = [requests[block.request].x[block.candidate] for block in blocks]  # type: ignore[index]
            leaves.append(torch.stack(points).requires_grad_(request.gradient))
            changed, penalty = self.applied(
                leaves[-1], self._conditioning(blocks, requests, request.space), request.space
            )
            rows.append(changed)
            penalties.append(penalty)
        return leaves, rows[0] if len(rows) == 1 else Conditioning.stack(rows), torch.cat(penalties)

    def _conditioning(self, blocks: Sequence[_Block], requests: Sequence[Request], space: Any) -> Conditioning:
        """The prompts encoded, a row for each; one row for all candidates if each has one prompt, the same."""
        noisy = (space or self.space).needs_noise
        texts = [requests[block.request].prompts[p] for block in blocks for p in block.prompts]
        if len(blocks[0].prompts) == 1 and len(set(texts)) == 1 and not noisy:
            return self.encoded(texts[0])
        rows = self._encoded(texts)
        if not noisy:
            return rows
        seeds = [requests[block.request].seeds[p][s] for block in blocks for p in block.prompts for s in block.seeds]
        noise = self.sampler.noise(seeds)
        return replace(rows, noise=noise.view(len(texts), -1, *noise.shape[1:]))

    def _encoded(self, texts: Sequence[str]) -> Conditioning:
        """The prompts encoded, a row for each."""
        return Conditioning.stack([self.encoded(text) for text in texts])

    def _lower_variance(self, rows: Conditioning, seeds: Sequence[int], prompts: Sequence[str], update: int) -> Tensor:
        """Sum of the rewards (B,) of `lv_samples` noisier copies of each image just made, denoised again."""
        finished = self.sampler.latents
        total = torch.zeros(len(prompts), device=finished.device)
        for copy in range(self.config.lv_samples):
            noise = torch.stack([
                torch.randn(
                    finished.shape[1:], dtype=finished.dtype,
                    generator=torch.Generator().manual_seed((seed * 1_000_003 + update) * 1_009 + copy),
                )
                for seed in seeds
            ])  # fmt: skip
            copies = renoised(self.sampler, rows, seeds, finished, noise)
            total = total + self.reward.total(self.reward.parts(copies, list(prompts))).to(total)
        return total


def readable(space: Any, raw: tuple[str, str], x: Tensor | None, *, full: bool) -> dict[str, str]:
    """The texts that a point x (D,) stands for, by name, in a space that has texts; None is the `raw` ones."""
    if not isinstance(space, Readable):
        return {}
    if x is None:
        return dict(zip(("prompt", "negative_prompt"), raw, strict=True))
    return space.readable(x, full=full)


def _cpu(scores: Tensor) -> Tensor:
    return scores.detach().float().cpu()
