"""Sampling as a policy: DDIM steps with fresh noise, and their probabilities under other weights.

Black et al., "Training Diffusion Models with Reinforcement Learning", arXiv 2305.13301 (DDPO): every sampler step is an
action, drawn from a Gaussian whose mean is the DDIM step without fresh noise and whose deviation is η times DDIM's σ_t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ipgo_opt.conditioning import Conditioning
from ipgo_opt.models.gate import shadowed
from ipgo_opt.models.sampler import Sampler
from ipgo_opt.models.visit import Recorder


@dataclass(frozen=True)
class Trajectory:
    """How images came about: where each of T steps led, (B, …), and its log-probability then, (B,)."""

    seeds: list[int]
    reached: list[Tensor]
    log_probability: list[Tensor]


def log_probability(
    step: Callable[..., Any], output: Tensor, timestep: Tensor, sample: Tensor, reached: Tensor, eta: float
) -> Tensor:
    """Mean over the coordinates of the log-density (B,) of stepping from `sample` to `reached` (B, …).

    The mean instead of the sum is what the clipping ranges of the paper's code refer to. A step without fresh noise
    (the last one of some schedules) has no density; it counts 0.

    Args:
        step: of a DDIMScheduler.
        output: the denoiser's guided output; gradients reach it.
        timestep: of the step.
        sample: where the step begins.
        reached: where it led.
        eta: η.

    """
    output, sample, reached = output.float(), sample.float(), reached.float()
    mean = step(output, timestep, sample, eta=eta, variance_noise=torch.zeros_like(sample)).prev_sample
    nothing = torch.zeros_like(sample[:1])
    deviation = step(nothing, timestep, nothing, eta=eta, variance_noise=torch.ones_like(nothing)).prev_sample.max()
    if deviation == 0:
        return torch.zeros(len(sample), device=sample.device)
    squared = ((reached - mean) / deviation).square().flatten(1).mean(1)
    return -squared / 2 - deviation.log() - math.log(2 * math.pi) / 2


@torch.no_grad()
def sampled(sampler: Sampler, conditioning: Conditioning, seeds: Sequence[int]) -> tuple[Tensor, list[Trajectory]]:
    """Images (B, 3, H, W) of each row and seed, and how they came about, in the sampler's chunks."""
    scheduler, eta = sampler.pipeline.scheduler, sampler.settings.eta
    images, trajectories = [], []
    for rows in sampler.chunks(len(seeds)):
        recorder = Recorder()
        with shadowed(scheduler, "step", recorder.listening):
            part = conditioning.map(lambda tensor, rows=rows: tensor[rows])
            images.append(sampler.generate(part, seeds[rows]))
        taken = [log_probability(scheduler.step, *step, eta) for step in recorder.steps]
        trajectories.append(Trajectory(list(seeds[rows]), [reached for *_, reached in recorder.steps], taken))
    return torch.cat(images), trajectories


def replayed(
    sampler: Sampler, conditioning: Conditioning, trajectory: Trajectory, use: Callable[[Tensor, Tensor], None]
) -> None:
    """The steps of a trajectory under the conditioning's weights, one after the other; no image is made.

    Args:
        sampler: that the trajectory was sampled with.
        conditioning: its rows, with gradients.
        trajectory: what happened.
        use: is given the log-probability (B,) of each step, with its graph, and what it was then.

    """
    scheduler, eta = sampler.pipeline.scheduler, sampler.settings.eta
    step = scheduler.step  # the visit puts another one in its place

    def follow(iteration: int, output: Tensor, timestep: Tensor, sample: Tensor) -> Tensor | None:
        reached = trajectory.reached[iteration]
        use(log_probability(step, output, timestep, sample, reached, eta), trajectory.log_probability[iteration])
        return reached if iteration + 1 < len(trajectory.reached) else None

    sampler.revisit(conditioning, trajectory.seeds, follow, steps=sampler.settings.num_inference_steps)
