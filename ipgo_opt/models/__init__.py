"""Which model paints: names, folders, checkpoints and hub ids, checked before any weights load."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
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
        location: a folder, a safetensors file or a hub id.
        class_name: the pipeline's class; None if the model brings a class of its own.
        embedded: whether it is one of the package's own.
        revision: branch, tag or commit on the hub, "" for the main one.
        variant: which files, for example "fp16", "" for the plain ones.
        remote_code: whether code that the model brings may run.
        config: folder or hub id of the configuration that a single file lacks.

    """

    name: str
    location: str
    class_name: str | None
    embedded: bool = False
    revision: str = ""
    variant: str = ""
    remote_code: bool = False
    config: str = ""


def resolve(
    name: str, *, revision: str = "", variant: str = "", remote_code: bool = False, config: str = ""
) -> ModelSource:
    """Finds out what `name` means without loading weights; BadInput if it is no model that can be driven.

    Of a hub id that is not in the cache, model_index.json is fetched, unless HF_HUB_OFFLINE is set.
    """
    if name in EMBEDDED:
        return ModelSource(name, str(EMBEDDED[name]), _class_name(EMBEDDED[name], False), True)
    folder = Path(name)
    if folder.is_dir():
        class_name = _class_name(folder, remote_code)
        _check_files(folder)
        return ModelSource(name, str(folder), class_name, False, "", variant, remote_code)
    if folder.exists():
        return _single_file(name, folder, config)
    if HUB_ID.fullmatch(name):
        index = _index(name, revision)
        class_name = _class_name(index.parent, remote_code)
        _check_files(index.parent)
        return ModelSource(name, name, class_name, False, revision, variant, remote_code)
    raise unknown("model", name, list(MODELS))


def _class_name(folder: Path, remote_code: bool) -> str | None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise BadInput(f"a model folder must hold a diffusers pipeline, but {str(folder)!r} has no model_index.json.")
    try:
        class_name = json.loads(index.read_text())["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{str(index)!r} names no pipeline class ({error}).") from None
    if isinstance(class_name, list):  # [file, class]
        if not remote_code:
            raise BadInput(
                f"{str(folder)!r} brings the code of its pipeline ({class_name[0]}.py); --trust-remote-code runs it."
            )
        return None
    _check_class(str(class_name))
    return str(class_name)


def _index(hub_id: str, revision: str) -> Path:
    """The cached model_index.json of a hub id; it is fetched if that is allowed."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    index = try_to_load_from_cache(hub_id, "model_index.json", revision=revision or None)
    if isinstance(index, str):
        return Path(index)
    if offline():
        raise BadInput(
            f"model {hub_id!r} is not in the Hugging Face cache and HF_HUB_OFFLINE is set; "
            f"get it with: hf download {hub_id}{f' --revision {revision}' if revision else ''}"
        )
    try:
        return Path(hf_hub_download(hub_id, "model_index.json", revision=revision or None))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(f"model {hub_id!r} is not in the Hugging Face cache and can't be fetched: {reason}") from None


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def _single_file(name: str, path: Path, config: str) -> ModelSource:
    """A checkpoint in one file; what it lacks comes from the repository that diffusers takes it to be made from."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config
    from safetensors import safe_open
    from torch import empty

    if path.suffix != ".safetensors":
        raise BadInput(
            f"a model in one file must be a safetensors file (others can hold code that runs), but got {name!r}."
        )
    check_safetensors(path)
    if not config:
        with safe_open(str(path), "pt") as file:
            shapes = {key: empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}  # noqa: SIM118
        config = fetch_diffusers_config(shapes)["pretrained_model_name_or_path"]
    where = Path(config) if Path(config).is_dir() else _index(config, "").parent
    class_name = _class_name(where, False)
    import diffusers

    if not hasattr(getattr(diffusers, str(class_name)), "from_single_file"):
        raise BadInput(f"{class_name} can't be loaded from one file.")
    return ModelSource(name, str(path), class_name, config=config)


def check_safetensors(path: Path) -> None:
    """Raises BadInput unless the file is a whole safetensors file; reads its header only."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{str(path)!r} is not a whole safetensors file ({error}); get it again.") from None


def _check_files(folder: Path) -> None:
    for path in sorted(folder.rglob("*.safetensors")):
        check_safetensors(path)


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


def load_pipeline(source: ModelSource, device: str, dtype: str, memory: Sequence[str] = ()) -> Any:
    """Loads the weights of what `resolve` found, from safetensors only.

    Args:
        source: the model.
        device: where it runs.
        dtype: of its weights, by torch's name.
        memory: levers of `memory.py`, in any order.

    """
    import warnings

    import diffusers
    import transformers

    from ipgo_opt.models.memory import pull

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()  # its advice on loading is not the user's to follow
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch_dtype is the name that all versions know
            pipeline = _loaded(source, dtype)
    except Exception as error:
        raise RunFailed(f"model {source.name!r} did not load: {type(error).__name__}: {error}") from error
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker = None  # it turns images into PIL, through which no gradient passes
    pipeline.own_scheduler = pipeline.scheduler  # runs that share the pipeline may each bring another one
    return pull(pipeline, device, memory)


def _loaded(source: ModelSource, dtype: str) -> Any:
    import diffusers
    import torch

    given: dict[str, Any] = {"torch_dtype": getattr(torch, dtype)}
    if source.config:
        pipeline_class = getattr(diffusers, str(source.class_name))
        return pipeline_class.from_single_file(source.location, config=source.config, **given)
    if source.remote_code:
        given["trust_remote_code"] = True
    return diffusers.DiffusionPipeline.from_pretrained(
        source.location, revision=source.revision or None, variant=source.variant or None, use_safetensors=True, **given
    )


def make_sampler(pipeline: Any, settings: Callable[[], SamplerSettings], *, scheduler: str, chunk: int) -> Sampler:
    """The sampler on a loaded pipeline, with counters at zero.

    Args:
        pipeline: what `load_pipeline` gave.
        settings: makes the sampler's settings.
        scheduler: a scheduler class of diffusers, "" for the model's own.
        chunk: most images per pipeline call.

    Raises:
        BadInput: the scheduler is of another kind than the model's own.

    """
    import diffusers

    from ipgo_opt.models.sampler import Sampler

    pipeline.scheduler = own = pipeline.own_scheduler
    if scheduler:
        chosen = getattr(diffusers, scheduler)
        if chosen not in own.compatibles and type(own) not in chosen._get_compatibles():
            raise BadInput(
                f"scheduler must suit the model, whose own is {type(own).__name__}, but got {scheduler!r}; "
                "without --scheduler it keeps its own."
            )
        pipeline.scheduler = chosen.from_config(own.config)
    return Sampler(pipeline, settings(), chunk)
