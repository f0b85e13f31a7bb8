"""Which model paints: names, folders and hub ids, checked before any weights load."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipgo_opt.errors import BadInput, RunFailed
from ipgo_opt.registry import unknown

if TYPE_CHECKING:
    from ipgo_opt.models.sampler import Sampler, SamplerSettings

EMBEDDED = {"emoji": Path(__file__).parent / "emoji"}
"""Models inside the package, by name."""

MODELS = {
    "emoji": "embedded: 48 emoji objects, 4 styles, 15 backgrounds, 64 × 64, runs on a laptop CPU",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "the paper's model, from the Hugging Face hub or its cache",
}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class ModelSource:
    """A model that can be loaded.

    Attributes:
        name: as the user gave it.
        location: a folder or a hub id.
        class_name: the pipeline's class, or None for a hub id that is not in the cache yet.
        embedded: whether it is one of the package's own.

    """

    name: str
    location: str
    class_name: str | None
    embedded: bool = False


def resolve(name: str) -> ModelSource:
    """Finds out what `name` means without loading weights; BadInput if it is no model."""
    if name in EMBEDDED:
        return ModelSource(name, str(EMBEDDED[name]), _class_name(EMBEDDED[name]), True)
    folder = Path(name)
    if folder.is_dir():
        return ModelSource(name, str(folder), _class_name(folder))
    if folder.exists():
        raise BadInput(f"model must be a name, a diffusers folder or a hub id, but {name!r} is a file.")
    if HUB_ID.fullmatch(name):
        return ModelSource(name, name, _cached_class_name(name))
    raise unknown("model", name, list(MODELS))


def _class_name(folder: Path) -> str:
    index = folder / "model_index.json"
    if not index.is_file():
        raise BadInput(f"a model folder must hold a diffusers pipeline, but {str(folder)!r} has no model_index.json.")
    try:
        class_name = json.loads(index.read_text())["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{str(index)!r} names no pipeline class ({error}).") from None
    _check_class(str(class_name))
    return str(class_name)


def _cached_class_name(hub_id: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(hub_id, "model_index.json")
    if isinstance(index, str):
        return _class_name(Path(index).parent)
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise BadInput(
            f"model {hub_id!r} is not in the Hugging Face cache and HF_HUB_OFFLINE is set; "
            f"get it with: hf download {hub_id}"
        )
    return None


def _check_class(class_name: str) -> None:
    import diffusers

    from ipgo_opt.models.interface import unsupported

    pipeline_class = getattr(diffusers, class_name, None)
    if pipeline_class is None:
        raise BadInput(f"the model's pipeline must be a class of diffusers, but it is {class_name!r}.")
    reason = unsupported(pipeline_class)
    if reason:
        raise BadInput(f"{class_name} is not supported: {reason}.")


def load(
    source: ModelSource,
    settings: Callable[[], SamplerSettings],
    *,
    device: str,
    dtype: str,
    scheduler: str,
    chunk: int,
) -> Sampler:
    """`load_pipeline` and `make_sampler` in one."""
    return make_sampler(load_pipeline(source, device, dtype), settings, scheduler=scheduler, chunk=chunk)


def load_pipeline(source: ModelSource, device: str, dtype: str) -> Any:
    """Loads the weights (safetensors only, no remote code) of what `resolve` found, in torch's `dtype`."""
    import warnings

    import diffusers
    import torch
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()  # its advice on loading is not the user's to follow
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch_dtype is the name that all versions know
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                source.location, torch_dtype=getattr(torch, dtype), use_safetensors=True
            )
    except Exception as error:
        raise RunFailed(f"model {source.name!r} did not load: {type(error).__name__}: {error}") from error
    if source.class_name is None:
        _check_class(type(pipeline).__name__)
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker = None  # it turns images into PIL, through which no gradient passes
    pipeline.own_scheduler = pipeline.scheduler  # runs that share the pipeline may each bring another one
    return pipeline.to(device)


def make_sampler(pipeline: Any, settings: Callable[[], SamplerSettings], *, scheduler: str, chunk: int) -> Sampler:
    """The sampler on a loaded pipeline, with counters at zero.

    Args:
        pipeline: what `load_pipeline` gave.
        settings: makes the sampler's settings.
        scheduler: a scheduler class of diffusers, "" for the model's own.
        chunk: most images per pipeline call.

    """
    import diffusers

    from ipgo_opt.models.sampler import Sampler

    pipeline.scheduler = pipeline.own_scheduler
    if scheduler:
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.own_scheduler.config)
    return Sampler(pipeline, settings(), chunk)
