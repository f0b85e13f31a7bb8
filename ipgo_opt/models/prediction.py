"""What noisy latents are made of, and what a denoiser's output says of the clean ones."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from ipgo_opt.errors import BadInput


def levels(scheduler: Any, timestep: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    """(a, s) of `sample = a · x0 + s · ε` at a timestep, each like the sample, in the scheduler's own convention."""
    zero, one = torch.zeros_like(sample), torch.ones_like(sample)
    add = getattr(scheduler, "add_noise", None) or scheduler.scale_noise
    takes = list(inspect.signature(add).parameters)
    when = timestep.reshape(1).expand(len(sample)) if timestep.ndim == 0 else timestep

    def noised(image: Tensor, noise: Tensor) -> Tensor:
        given = {"noise": noise, "timesteps": when, "timestep": when}
        noisy: Tensor = add(image, *(given[name] for name in takes[1:3]))
        return noisy

    return noised(one, zero), noised(zero, one)


def clean(scheduler: Any, output: Tensor, sample: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """The estimate x̂0 of the clean latents from a denoiser's output, whatever it predicts, at the levels (a, s).

    For ε it is `(x_t − s·ε̂) / a`, DPO-Diff's equation with a = sqrt(ᾱ_t) and s = sqrt(1 − ᾱ_t).

    Raises:
        BadInput: the scheduler predicts something that is not known.

    """
    kind = scheduler.config.get("prediction_type", "epsilon" if hasattr(scheduler, "alphas_cumprod") else "flow")
    if hasattr(scheduler, "precondition_outputs"):
        kind = "preconditioned"
    if kind == "epsilon":
        return (sample - s * output) / a
    if kind == "v_prediction":
        norm = (a.square() + s.square()).sqrt()
        return (a * sample / norm - s * output) / norm
    if kind == "sample":
        return output
    if kind in ("flow", "flow_prediction"):
        return sample - s * output
    raise BadInput(f"it is not known what {type(scheduler).__name__} predicts ({kind!r}).")
