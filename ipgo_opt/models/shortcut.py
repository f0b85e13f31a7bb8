"""The shortcut text gradient of DPO-Diff (Wang et al., ICML 2024, section 4.3): one denoiser call with a gradient.

The pipeline runs without gradient up to one sampler step. There the denoiser is called with a gradient, and the closed
form of the image that its answer stands for takes the place of the scheduler's step. What is left of the loop passes
that through without another denoiser call, so that the pipeline itself decodes it: memory and time of the gradient do
not depend on the number of steps, and every pipeline unpacks and scales its latents as it always does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ipgo_opt.models.gate import Gate
from ipgo_opt.models.prediction import clean, levels

EVERY, STEPS = 2, 50
"""After how many updates the shortcut moves on by one of how many sampler steps: the paper's schedule."""


def shortcut_step(update: int, start: float, steps: int) -> int:
    """The sampler step, of `steps`, at which update `update` (from 0) is taken; the paper's `start` is 15/50."""
    return min(int((start * STEPS + update // EVERY) * steps / STEPS + 1e-9), steps - 1)


class Shortcut(Gate):
    """A gate through which one sampler step is differentiated and all later ones are left out.

    Args:
        pipeline: a diffusers pipeline with a `unet` or `transformer`.
        at: the sampler step with the gradient, from 0.
        rows: images of the pipeline call.
        searched: the tensors given to the pipeline that need a gradient.

    """

    def __init__(self, pipeline: Any, at: int, rows: int, searched: Sequence[Tensor] = ()) -> None:
        super().__init__(pipeline, 1, rows, searched)
        self.at = at
        self.output: Any = None

    def _stop(self) -> int:
        """The scheduler's iteration that is the step `at` (some schedulers take several a step)."""
        return self.at * getattr(self.pipeline.scheduler, "order", 1)

    def _differentiated(self) -> bool:
        return self.iteration == self._stop()

    def _gated(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        gated = super()._gated(forward)

        def shortened(*args: Any, **kwargs: Any) -> Any:
            if self.iteration <= self._stop():
                self.output = gated(*args, **kwargs)
            return self.output

        return shortened

    def _counted(self, step: Callable[..., Any]) -> Callable[..., Any]:
        from diffusers.schedulers.scheduling_utils import SchedulerOutput

        signature = inspect.signature(step)

        def counted(*args: Any, **kwargs: Any) -> Any:
            given = list(signature.bind(*args, **kwargs).arguments.values())[:3]
            self.iteration += 1
            if self.iteration - 1 < self._stop():
                return step(*args, **kwargs)
            output, timestep, sample = given
            if self.iteration - 1 == self._stop():
                scheduler = self.pipeline.scheduler
                sample = clean(scheduler, output, sample, *levels(scheduler, torch.as_tensor(timestep), sample))
            return SchedulerOutput(prev_sample=sample)

        return counted
