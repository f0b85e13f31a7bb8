"""The gradient gate: K-step truncated backpropagation through a pipeline's own sampling loop.

While it is open, the denoiser's `forward` runs the first T − K sampler steps under `no_grad`; in the last K steps the
half of classifier-free guidance that depends on nothing that needs a gradient runs apart from the other one, under
`no_grad`. The result is exactly the gradient of DRaFT-K (Clark et al., arXiv 2309.17400) with respect to whatever
tensors were given to the pipeline. Pipelines that call the denoiser twice a step instead of on both halves together
need nothing more: a call into which no gradient enters builds no graph.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor


@contextmanager
def shadowed(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """While open, `make(method)` stands where the method `name` of `owner` is.

    What was in the instance before (the hooks of offloading, for example) is there again afterwards.
    """
    before = owner.__dict__.get(name)
    method = getattr(owner, name)
    object.__setattr__(owner, name, functools.wraps(method)(make(method)))
    try:
        yield
    finally:
        if before is None:
            object.__delattr__(owner, name)
        else:
            object.__setattr__(owner, name, before)


def undecorated(pipeline: Any, encode: Callable[..., Any]) -> Callable[..., Any]:
    """A pipeline's `encode_prompt` without the `no_grad` that some pipelines put on it."""
    inner = getattr(encode, "__wrapped__", None)
    return functools.partial(encode) if inner is None else functools.partial(inner, pipeline)


def denoiser(pipeline: Any) -> Any:
    """The module that a pipeline calls in every step."""
    unet = getattr(pipeline, "unet", None)
    return pipeline.transformer if unet is None else unet


def first_input(module: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The noisy images of a denoiser call: its first argument, by position or by name; their number is its len."""
    return args[0] if args else kwargs[next(iter(inspect.signature(module).parameters))]


class Gate:
    """Counts denoiser calls and decides which of them build an autograd graph.

    Args:
        pipeline: a diffusers pipeline with a `unet` or `transformer`.
        grad_steps: K, sampler steps at the end that are differentiated; 0 for none.
        rows: images of the pipeline call.
        searched: the tensors given to the pipeline that need a gradient.
        adapted: whether the denoiser itself is what is searched, so that both halves need a gradient.

    Attributes:
        calls: images denoised by one denoiser evaluation each, the unconditional ones included.
        latents: where the last step led.

    """

    def __init__(
        self, pipeline: Any, grad_steps: int, rows: int, searched: Sequence[Tensor] = (), adapted: bool = False
    ) -> None:
        self.pipeline, self.grad_steps, self.rows, self.searched = pipeline, grad_steps, rows, searched
        self.adapted = adapted
        self.calls = self.iteration = 0
        self.latents = torch.zeros(0)

    def __enter__(self) -> Gate:
        self.shadows = (
            shadowed(denoiser(self.pipeline), "forward", self._gated),
            shadowed(self.pipeline.scheduler, "step", self._counted),
            shadowed(self.pipeline, "encode_prompt", functools.partial(undecorated, self.pipeline)),
        )
        for shadow in self.shadows:
            shadow.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for shadow in self.shadows:
            shadow.__exit__(None, None, None)

    def _counted(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.iteration += 1
            made = step(*args, **kwargs)
            self.latents = next(tensors(made)).detach()
            return made

        return counted

    def _differentiated(self) -> bool:
        """Whether the denoiser is within its last K sampler steps."""
        scheduler = self.pipeline.scheduler
        order = getattr(scheduler, "order", 1)  # iterations per sampler step
        steps = -(-len(scheduler.timesteps) // order)
        return self.iteration >= order * (steps - self.grad_steps)

    def _gated(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def gated(*args: Any, **kwargs: Any) -> Any:
            size = len(first_input(forward, args, kwargs))
            self.calls += size
            if not self._differentiated():
                with torch.no_grad():
                    return forward(*args, **kwargs)
            perturbed = getattr(self.pipeline, "do_perturbed_attention_guidance", False)  # reads the batch as a whole
            apart = not self.adapted and not perturbed
            if size == 2 * self.rows and apart and not kwargs.get("return_dict", True):
                return self._halves(forward, size, args, kwargs)
            return forward(*args, **kwargs)

        return gated

    def _halves(self, forward: Callable[..., Any], batch: int, args: Any, kwargs: Any) -> Any:
        out = []
        for rows in (slice(0, batch // 2), slice(batch // 2, batch)):
            inputs = [_part(value, rows, batch) for value in args]
            named = {name: _part(value, rows, batch) for name, value in kwargs.items()}
            with torch.set_grad_enabled(self._needs_grad(first_input(forward, inputs, named), [inputs, named])):
                out.append(forward(*inputs, **named)[0])
        return (out[0] + out[1] if isinstance(out[0], list) else torch.cat(out),)

    def _needs_grad(self, sample: Any, half: Any) -> bool:
        """Whether a half depends on a searched tensor: through the noisy images, or with a slope that is not 0."""
        if any(tensor.requires_grad for tensor in tensors(sample)):
            return True
        entering = [tensor.sum() for tensor in tensors(half) if tensor.requires_grad]
        if not entering:
            return False
        slopes = torch.autograd.grad(entering, list(self.searched), retain_graph=True, allow_unused=True)
        return any(slope is not None and bool(slope.any()) for slope in slopes)


def _part(value: Any, rows: slice, batch: int) -> Any:
    """The rows of an argument, and of what it holds, that has one row per image of the batch."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and len(value) == batch else value
    if isinstance(value, dict):
        return {key: _part(inner, rows, batch) for key, inner in value.items()}
    if isinstance(value, list) and len(value) == batch:
        return value[rows]
    return value


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from tensors(inner)
