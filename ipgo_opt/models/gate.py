"""The gradient gate: K-step truncated backpropagation through a pipeline's own sampling loop.

While it is open, the denoiser's `forward` runs the first T − K sampler steps under `no_grad`; in the last K steps the
unconditional half of classifier-free guidance runs apart from the conditional one, and under `no_grad` as long as
nothing that enters it needs a gradient. The result is exactly the gradient of DRaFT-K (Clark et al.,
arXiv 2309.17400) with respect to whatever tensors were given to the pipeline.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch


class Gate:
    """Counts denoiser calls and decides which of them build an autograd graph.

    Args:
        pipeline: a diffusers pipeline with a `unet` or `transformer`.
        grad_steps: K, sampler steps at the end that are differentiated; 0 for none.
        negative_needs_grad: whether the negative embeddings carry a gradient themselves.

    Attributes:
        calls: images denoised by one denoiser evaluation each, the unconditional ones included.

    """

    def __init__(self, pipeline: Any, grad_steps: int, negative_needs_grad: bool = False) -> None:
        self.pipeline, self.grad_steps, self.negative_needs_grad = pipeline, grad_steps, negative_needs_grad
        self.denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
        self.calls = self.iteration = 0

    def __enter__(self) -> Gate:
        self.own = self.denoiser.__dict__.get("forward")  # set by offloading hooks, for example
        self.original = self.denoiser.forward
        self.denoiser.forward = self._forward
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.own is None:
            del self.denoiser.forward
        else:
            self.denoiser.forward = self.own

    def on_step_end(self, pipeline: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's `callback_on_step_end`: one iteration of the sampling loop is over."""
        self.iteration += 1
        return {}

    def _differentiated(self) -> bool:
        scheduler = self.pipeline.scheduler
        order = getattr(scheduler, "order", 1)  # iterations per sampler step
        steps = -(-len(scheduler.timesteps) // order)
        return self.iteration >= order * (steps - self.grad_steps)

    def _forward(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls += len(sample)
        if not self._differentiated():
            with torch.no_grad():
                return self.original(sample, *args, **kwargs)
        if getattr(self.pipeline, "do_classifier_free_guidance", False) and not kwargs.get("return_dict", True):
            return self._halves(sample, args, kwargs)
        return self.original(sample, *args, **kwargs)

    def _halves(self, sample: torch.Tensor, args: Any, kwargs: Any) -> Any:
        batch, half = len(sample), len(sample) // 2

        def part(value: Any, rows: slice) -> Any:
            if isinstance(value, torch.Tensor) and value.ndim and len(value) == batch:
                return value[rows]
            if isinstance(value, dict):
                return {key: part(inner, rows) for key, inner in value.items()}
            return value

        out = []
        for rows, needs_grad in (
            (slice(0, half), sample.requires_grad or self.negative_needs_grad),
            (slice(half, batch), True),
        ):
            with torch.set_grad_enabled(needs_grad):
                inputs = [part(value, rows) for value in args]
                out.append(self.original(sample[rows], *inputs, **part(kwargs, rows))[0])
        return (torch.cat(out),)
