"""Raw images that are made once: every method begins with the same ones, on the same seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ipgo_opt.conditioning import Conditioning
from ipgo_opt.models.sampler import Sampler


class RawImages:
    """Images of prompts as they are, by model, settings, prompt and seed, the oldest forgotten first.

    Args:
        most_bytes: that may be kept; 0 keeps nothing.

    """

    def __init__(self, most_bytes: int = 2**28) -> None:
        self.most_bytes, self.bytes = most_bytes, 0
        self.found: dict[Any, tuple[Tensor, int]] = {}

    @torch.no_grad()
    def images(
        self, sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int],
        encode: Callable[[Sequence[str]], Conditioning],
    ) -> tuple[Tensor, int]:  # fmt: skip
        """The images (B, 3, H, W) of B prompts and seeds, and the denoiser calls that they take or took.

        Args:
            sampler: makes those that are not here yet.
            prompts: one for each image.
            seeds: likewise.
            encode: the conditioning of some of the prompts, a row for each.

        """
        settings = replace(sampler.settings, grad_steps=1)
        pipeline = sampler.pipeline  # in the keys it is kept alive, so that no other one takes its place
        model = pipeline, type(pipeline.scheduler).__name__, settings
        keys = [(model, prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        known = {key: self.found[key] for key in keys if key in self.found}
        missing = [n for n, key in enumerate(keys) if key not in known]
        if missing:
            before = sampler.denoiser_calls
            made = sampler.generate(encode([prompts[n] for n in missing]), [seeds[n] for n in missing])
            calls = (sampler.denoiser_calls - before) // len(missing)
            known |= {keys[n]: (image, calls) for n, image in zip(missing, made, strict=True)}
            for n in missing:
                self._keep(keys[n], known[keys[n]])
        return torch.stack([known[key][0] for key in keys]), sum(known[key][1] for key in keys)

    def _keep(self, key: Any, found: tuple[Tensor, int]) -> None:
        size = found[0].nbytes
        if size > self.most_bytes or key in self.found:
            return
        self.found[key] = (found[0].clone(), found[1])  # not a view of its whole batch
        self.bytes += size
        while self.bytes > self.most_bytes:
            oldest = next(iter(self.found))
            self.bytes -= self.found.pop(oldest)[0].nbytes
