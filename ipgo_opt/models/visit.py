"""A pipeline call led through given noisy images: its steps are computed, and answered by someone else.

DDPO scores steps that were taken earlier under new weights, DRaFT-LV takes the last step again from noisier images.
Both go through the pipeline's own code, with its guidance, instead of a loop of their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ipgo_opt.errors import BadInput
from ipgo_opt.models.gate import Gate, first_input, tensors

Follow = Callable[[int, Tensor, Tensor, Tensor], Tensor | None]
"""(iteration, the denoiser's guided output, timestep, noisy images) to the next noisy images; None ends the call."""


class Arrived(Exception):
    """Ends a pipeline call where nothing after it is of use."""


class Visit(Gate):
    """A gate whose steps lead where `follow` says; before the last `grad_steps` steps the denoiser does not run.

    The scheduler's own step is taken as well, on zeros, before `follow` is asked, so that it counts on.

    Args:
        pipeline, grad_steps, rows, searched, adapted: as in Gate.
        follow: is asked after every iteration.

    """

    def __init__(
        self, pipeline: Any, grad_steps: int, rows: int, searched: Sequence[Tensor], adapted: bool, follow: Follow
    ) -> None:
        super().__init__(pipeline, grad_steps, rows, searched, adapted)
        self.follow = follow

    def _gated(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        differentiated = super()._gated(forward)

        def skipped(*args: Any, **kwargs: Any) -> Any:
            if self._differentiated():
                return differentiated(*args, **kwargs)
            sample = first_input(forward, args, kwargs)
            if not isinstance(sample, Tensor) or kwargs.get("return_dict", True):
                raise BadInput(f"{type(self.pipeline).__name__} can't be led through given noisy images.")
            return (torch.zeros_like(sample),)

        return skipped

    def _counted(self, step: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(step)

        def followed(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            output, timestep, sample = (given.pop(name) for name in ("model_output", "timestep", "sample"))
            iteration, self.iteration = self.iteration, self.iteration + 1
            nothing = torch.zeros_like(sample)
            made = step(nothing, timestep, nothing, **given)
            reached = self.follow(iteration, output, timestep, sample)
            if reached is None:
                raise Arrived
            if isinstance(made, tuple):
                return (reached, *made[1:])
            return type(made)(prev_sample=reached)

        return followed


class Recorder:
    """Writes down every step of the pipeline calls made while it is open: what the scheduler was given and gave.

    Attributes:
        steps: (output, timestep, noisy images, next noisy images) of each iteration, detached.

    """

    def __init__(self) -> None:
        self.steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def listening(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The scheduler's `step`, overheard."""
        signature = inspect.signature(step)

        def overheard(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            made = step(*args, **kwargs)
            entering = (given["model_output"].detach(), given["timestep"], given["sample"].detach())
            self.steps.append((*entering, next(tensors(made)).detach()))
            return made

        return overheard
