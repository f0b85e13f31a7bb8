"""Levers that trade time for memory, by name; what each one saves is measured in benchmarks/full_size.py."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from ipgo_opt.errors import BadInput
from ipgo_opt.registry import unknown

LEVERS = {
    "checkpoint": "denoiser and autoencoder keep the inputs of their blocks and compute the rest again in backward",
    "slicing": "the autoencoder decodes one image at a time",
    "tiling": "the autoencoder decodes tiles, whose seams may show",
    "text-offload": "text encoders wait in main memory between prompts (accelerate)",
    "model-offload": "every part waits in main memory until its turn (accelerate); not with a gradient",
    "sequential-offload": "every layer does, which is slow (accelerate); not with a gradient",
    "attention=NAME": "an attention backend of diffusers, for example attention=flash",
}
LOW = ("checkpoint", "slicing", "text-offload")
"""What `--low-memory` stands for: levers that leave the image as it is."""

NO_GRADIENT = frozenset({"model-offload", "sequential-offload"})
"""They take weights away that backward still needs."""


def parse(levers: str, *, low: bool = False) -> tuple[str, ...]:
    """The names in a list such as "checkpoint,tiling"; with `low` those of LOW as well. BadInput for another name."""
    named = [name.strip() for name in levers.split(",") if name.strip()]
    for name in named:
        if name not in LEVERS and not name.startswith("attention="):
            raise unknown("a memory lever", name, list(LEVERS))
        if name.endswith("-offload") and find_spec("accelerate") is None:
            raise BadInput(f"memory lever {name!r} needs accelerate: pip install accelerate.")
    if low:
        named += [name for name in LOW if not name.endswith("-offload") or find_spec("accelerate") is not None]
    if len(NO_GRADIENT & set(named)) > 1:
        raise BadInput(f"model-offload and sequential-offload exclude each other, but got {levers!r}.")
    return tuple(dict.fromkeys(named))


def pull(pipeline: Any, device: str, levers: Sequence[str]) -> Any:
    """The pipeline on its device with the levers pulled; BadInput for one that it does not have."""
    from ipgo_opt.models.gate import denoiser

    painter, decoder = denoiser(pipeline), _decoder(pipeline)
    for lever in levers:
        if lever == "checkpoint":
            for part in (painter, decoder):
                if getattr(part, "_supports_gradient_checkpointing", False):
                    part.enable_gradient_checkpointing()
        elif lever in ("slicing", "tiling"):
            if not hasattr(decoder, f"enable_{lever}"):
                raise BadInput(f"memory lever {lever!r} needs an autoencoder that can, but {_name(decoder)} can't.")
            getattr(decoder, f"enable_{lever}")()
        elif lever.startswith("attention="):
            _attention(painter, lever.removeprefix("attention="))
    if "model-offload" in levers:
        pipeline.enable_model_cpu_offload(device=device)
    elif "sequential-offload" in levers:
        pipeline.enable_sequential_cpu_offload(device=device)
    elif "text-offload" in levers:
        _offload_text(pipeline, device)
    else:
        pipeline.to(device)
    return pipeline


def _decoder(pipeline: Any) -> Any:
    return getattr(pipeline, "vae", None)


def _name(part: Any) -> str:
    return "a pipeline without one" if part is None else type(part).__name__


def _attention(painter: Any, backend: str) -> None:
    if not hasattr(painter, "set_attention_backend"):
        raise BadInput(f"{type(painter).__name__} has no choice of attention backends, but got {backend!r}.")
    try:
        painter.set_attention_backend(backend)
    except (ValueError, RuntimeError, ImportError) as error:
        raise BadInput(f"attention backend {backend!r} can't be used here: {error}") from None


def _offload_text(pipeline: Any, device: str) -> None:
    """Text encoders come to the device when they run; `pipeline.text_hooks` send them back."""
    from accelerate import cpu_offload_with_hook
    from torch import nn

    pipeline.text_hooks = []
    for name, part in pipeline.components.items():
        if name.startswith("text_encoder") and isinstance(part, nn.Module):
            pipeline.text_hooks.append(cpu_offload_with_hook(part, device)[1])
        elif isinstance(part, nn.Module):
            part.to(device)
