"""A finished run taken up again: its configuration, what it found, and its model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ipgo_opt.artefact import ConditioningFile, load_conditioning
from ipgo_opt.config import RunConfig, check, check_device
from ipgo_opt.errors import BadInput
from ipgo_opt.models import load_pipeline, make_sampler
from ipgo_opt.store import read_run

if TYPE_CHECKING:
    from ipgo_opt.models.sampler import Sampler


def reopened(folder: Path) -> tuple[RunConfig, ConditioningFile, Sampler]:
    """Reads a run directory and loads the run's model; BadInput unless the run is finished and of one search."""
    run = read_run(folder)
    if run["status"] != "finished" or "config" not in run:
        raise BadInput(f"a finished run of one prompt, or of shared tokens, is needed, but {str(folder)!r} is none.")
    config = RunConfig(**run["config"])
    file = load_conditioning(folder)
    source = check(config)
    device, dtype = check_device(config.device, config.dtype)
    pipeline = load_pipeline(source, device, dtype, config.memory_levers())
    sampler = make_sampler(pipeline, config.sampler_settings, scheduler=config.scheduler, chunk=config.chunk)
    return config, file, sampler
