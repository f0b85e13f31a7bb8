"""The last step taken again from images that were noised again: DRaFT-LV.

Clark et al., arXiv 2309.17400, section 3: n further samples x_1 ~ q(x_1 | x_0) of the finished x_0 (no gradient) are
denoised by the last step alone; averaging the reward's gradient over them lowers its variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ipgo_opt.conditioning import Conditioning
from ipgo_opt.models.prediction import clean, levels
from ipgo_opt.models.sampler import Sampler


def renoised(
    sampler: Sampler, conditioning: Conditioning, seeds: Sequence[int], latents: Tensor, noise: Tensor
) -> Tensor:
    """Images (B, 3, H, W) of the last step alone, from `latents` (B, …) with `noise` (B, …) on top, with gradients.

    The first B of them are the finished latents of the images; one sampler step after another is passed over until the
    last one, which needs two steps or more.
    """
    images = []
    for rows in sampler.chunks(len(seeds)):
        part = conditioning.map(lambda tensor, rows=rows: tensor[rows])
        images.append(_renoised(sampler, part, seeds[rows], latents[rows], noise[rows].to(latents)))
    return torch.cat(images)


def _renoised(
    sampler: Sampler, conditioning: Conditioning, seeds: Sequence[int], latents: Tensor, noise: Tensor
) -> Any:
    scheduler = sampler.pipeline.scheduler
    weights: list[Tensor] = []

    def follow(iteration: int, output: Tensor, timestep: Tensor, sample: Tensor) -> Tensor:
        timesteps = scheduler.timesteps
        last = len(timesteps) - 1
        if iteration == last:
            return clean(scheduler, output, sample, *weights)
        if iteration < last - 1:
            return sample
        weights.extend(levels(scheduler, timesteps[last], latents))
        return weights[0] * latents + weights[1] * noise

    return sampler.revisit(conditioning, seeds, follow, steps=1)
