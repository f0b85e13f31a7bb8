"""Runs of the tiny pipeline in processes that are really killed.

A fork server imports the libraries once; every process is a fork of it, in which nothing else has run.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import diffusers
import tiny
import torch
import transformers

from ipgo_opt.bench.runner import run_all
from ipgo_opt.bench.suites import table1
from ipgo_opt.run import optimize, resume
from ipgo_opt.store import Store

CLASSES = (
    diffusers.StableDiffusionPipeline,
    diffusers.LMSDiscreteScheduler,
    transformers.CLIPTextModel,
    transformers.CLIPTokenizer,
)
"""Imported here (both libraries import lazily), so that the forks need not."""


def start(target: Any, *args: Any) -> BaseProcess:
    """A process that runs `target`, which is one of this module's functions."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["worker"])
    process = context.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def end(process: BaseProcess, timeout: float = 300) -> int | None:
    """Waits for the process; its exit code."""
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise TimeoutError("the process did not end")
    return process.exitcode


def go(model: str, out: str, settings: dict[str, Any], dies_at: str = "", times: int = 1) -> None:
    """Starts a run, or resumes the one that is there; dies just before it replaces the file `dies_at` the nth time."""
    torch.set_num_threads(1)
    if dies_at:
        die(dies_at, times)
    if (Path(out) / "run.json").exists():
        resume(out, reward=tiny.Redness())
    else:
        optimize("a fox", reward=tiny.Redness(), model=model, out=out, **settings)


def go_many(
    model: str, out: str, prompts: list[str], settings: dict[str, Any], dies_at: str = "", times: int = 1
) -> None:
    """`go` for many prompts."""
    torch.set_num_threads(1)
    if dies_at:
        die(dies_at, times)
    if (Path(out) / "run.json").exists():
        resume(out, reward=tiny.Redness())
    else:
        optimize(prompts=prompts, reward=tiny.Redness(), model=model, out=out, **settings)


def go_bench(
    out: str, model: str, prompts: dict[str, list[str]], reward: str, settings: dict[str, Any], dies_at: str = "",
    times: int = 1,
) -> None:  # fmt: skip
    """`go` for a benchmark of one method."""
    torch.set_num_threads(1)
    if dies_at:
        die(dies_at, times)
    run_all(table1(prompts, [reward], ["ipgo"], Path(out), model=model, **settings))


def die(name: str, times: int) -> None:
    """Lets this process kill itself at a write."""
    replace, left = os.replace, [times]

    def deadly(source: Any, target: Any) -> None:
        left[0] -= Path(target).name == name
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = deadly  # type: ignore[assignment]


def hold(folder: str, ready: str) -> None:
    """Keeps a run directory open until it is killed."""
    store = Store(Path(folder))
    Path(ready).touch()
    time.sleep(600)
    store.close()


def history(folder: Path) -> list[dict[str, Any]]:
    """The history on disk, without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def result(folder: Path) -> dict[str, Any]:
    """run.json, without what depends on the clock and the place."""
    run: dict[str, Any] = json.loads((folder / "run.json").read_text())
    run["result"] = {key: value for key, value in run["result"].items() if key not in ("seconds", "out")}
    return run
