"""Runs the cells of a suite, in several processes if asked; what is finished is read, not done again."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ipgo_opt.bench.suites import Part
from ipgo_opt.comparison import Cell, Watcher, check_settings, given, measure
from ipgo_opt.config import configure
from ipgo_opt.errors import BadInput, RunFailed
from ipgo_opt.models.raw_images import RawImages
from ipgo_opt.run import assemble, optimize, optimize_side_by_side, resume
from ipgo_opt.store import read_run

SIDE_BY_SIDE = 64
"""Most runs in one pass."""

PASS = "pass"
"""Folder, in the run directory of one of its runs, where the state of a pass is."""

TIMED = 8
"""Most runs in the pass that is timed for a plan."""

_loaded: dict[Any, Any] = {}
"""Models and rewards of this process, for all cells that it runs."""


@dataclass(frozen=True)
class Plan:
    """What a suite costs: runs in all and finished ones, images of the searches and verdicts of the others.

    `denoiser_calls` counts images × steps, both halves of guidance; `seconds` is None where it was not measured.
    """

    runs: int
    finished: int
    search_images: int
    verdict_images: int
    denoiser_calls: int
    seconds: float | None

    def text(self, jobs: int) -> str:
        """One line for people."""
        time_left = "" if self.seconds is None else f", about {_hours(self.seconds / jobs)} with {jobs} at a time"
        return (
            f"{self.runs} runs, {self.finished} of them finished; left: {self.search_images:,} images of searches and "
            f"{self.verdict_images:,} of verdicts, about {self.denoiser_calls:,} denoiser calls{time_left}."
        )


def _hours(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes / 60:.1f} h" if minutes >= 90 else f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.0f} s"


def finished(cell: Cell) -> bool:
    """Whether a cell's run is over."""
    if not (cell.folder / "run.json").exists():
        return False
    return bool(read_run(cell.folder)["status"] == "finished")


def what_is_finished(parts: Sequence[Part]) -> list[Part]:
    """The parts with nothing but the cells whose runs are over."""
    return [replace(part, cells=tuple(cell for cell in part.cells if finished(cell))) for part in parts]


def examine(parts: Sequence[Part], *, timed: bool = False) -> Plan:
    """What is to be done; with `timed` a few images are made in every way that there is, to see how long it takes."""
    cells = [cell for part in parts for cell in part.cells]
    left = [cell for cell in cells if not finished(cell)]
    search, verdict, calls, seconds = 0, 0, 0, 0.0
    rates: dict[Any, float] = {}
    for cell in left:
        config = cell.config
        images = config.budget, 2 * config.held_out
        search, verdict = search + images[0], verdict + images[1]
        halves = 2 if max(config.guidance_scale, config.true_cfg_scale) > 1 else 1
        calls += sum(images) * config.num_inference_steps * halves
        if timed:
            way = config.space, config.strategy, config.grad_steps, config.lv_samples, config.reward
            if way not in rates:
                rates[way] = _seconds_per_image(cell)
            seconds += sum(images) * rates[way]
    return Plan(len(cells), len(cells) - len(left), search, verdict, calls, seconds if timed else None)


def _seconds_per_image(cell: Cell) -> float:
    """Of searches like the cell's, several at once, when everything is loaded."""
    batch = min(cell.config.batch_size, 4)
    changed: dict[str, Any] = {"budget": (1 + 2 * batch) * cell.config.search_seeds, "batch_size": batch}
    changed |= {"held_out": 0, "seed_share": 1.0 if cell.config.space == "seeds" else 0.0}
    if cell.config.strategy == "llm":  # nobody is asked, and paid, for a plan: its images alone
        changed |= {"space": "seeds", "strategy": "random", "seed_share": 1.0}
    prompts = [cell.prompt] * min(TIMED, max(1, cell.config.chunk // (batch * cell.config.search_seeds)))
    settings = given(cell.config) | changed
    assemble(configure(cell.prompt, **settings), None, _loaded)
    begun = time.monotonic()
    made = optimize(prompts=prompts, loaded=_loaded | {RawImages: None}, **settings)
    return (time.monotonic() - begun) / sum(one.summary["images"] for one in made)


def run_all(
    parts: Sequence[Part], *, jobs: int = 1, watcher: Watcher | None = None
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Runs what is not finished yet.

    Returns:
        One entry per finished run, with its `group` and `reward_spec`, in the order of the parts; and the messages of
        runs that failed, by folder.

    """
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise BadInput(f"`jobs >= 1` must hold for a whole number, but got jobs={jobs!r}.")
    cells = [(part, cell) for part in parts for cell in part.cells]
    made: dict[int, dict[str, Any]] = {}
    failures: dict[str, str] = {}

    def take(found: dict[int, dict[str, Any] | str]) -> None:
        for number, one in found.items():
            part, cell = cells[number]
            if isinstance(one, str):
                failures[str(cell.folder)] = one
                continue
            made[number] = one | {"group": part.group, "reward_spec": part.reward}
            if watcher is not None:
                watcher.finished(cell, one)
                watcher.running(cell, len(made) + len(failures), len(cells))

    passes = _passes([cell for _, cell in cells], jobs)
    if watcher is not None and passes:
        watcher.running(cells[0][1], 0, len(cells))
    if jobs == 1:
        _begin()
        for one in passes:
            take(_run_pass(one))
    else:
        threads = max(1, (os.cpu_count() or 1) // jobs)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, context, _begin, (os.getpid(), threads)) as pool:
            waiting = [pool.submit(_run_pass, one) for one in passes]
            try:
                for future in as_completed(waiting):
                    take(future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for child in multiprocessing.active_children():  # what they have done is on disk
                    child.terminate()
                raise
    return [made[number] for number in sorted(made)], failures


def _passes(cells: Sequence[Cell], jobs: int) -> list[dict[int, Cell]]:
    """Cells by number in groups that differ in their prompts only, of at most SIDE_BY_SIDE and as many as `jobs`."""
    alike: dict[str, list[int]] = {}
    for number, cell in enumerate(cells):
        settings = {name: value for name, value in vars(cell.config).items() if name != "prompt"}
        alike.setdefault(json.dumps(settings, sort_keys=True), []).append(number)
    out = []
    for numbers in alike.values():
        size = min(SIDE_BY_SIDE, math.ceil(len(numbers) / (jobs if len(alike) < jobs else 1)))
        out += [
            {n: cells[n] for n in numbers[start : start + size]} for start in range(0, len(numbers), size)
        ]  # fmt: skip
    return out


def _run_pass(cells: dict[int, Cell]) -> dict[int, dict[str, Any] | str]:
    """Entries of cells, or why their runs failed, by number: what is not finished is run in one pass.

    The state of the pass is in `pass/` of one of the run directories while it lasts. If it fails, what is left is run
    one by one, so that a prompt that can't be run stops no other.
    """
    begun = [folder for cell in cells.values() if _holds(folder := cell.folder / PASS, cells.values())]
    left = [cell for cell in cells.values() if not finished(cell)]
    try:
        if begun:
            resume(begun[0], loaded=_loaded)
        elif len(left) > 1:
            for cell in left:
                check_settings(cell)
            folder = left[0].folder / PASS
            optimize_side_by_side([c.config for c in left], [c.folder for c in left], folder, loaded=_loaded)
    except RunFailed:
        pass
    for cell in cells.values():
        if (cell.folder / PASS).exists():
            shutil.rmtree(cell.folder / PASS)
    return {number: _one(cell) for number, cell in cells.items()}


def _holds(folder: Path, cells: Collection[Cell]) -> bool:
    """Whether a pass over some of these cells, and no others, has been begun in a folder."""
    if not (folder / "run.json").exists():
        return False
    return {(folder / home).resolve() for home in read_run(folder)["folders"]} <= {c.folder.resolve() for c in cells}


def _one(cell: Cell) -> dict[str, Any] | str:
    """A cell's entry, or why its run failed."""
    try:
        return measure(cell, _loaded)
    except RunFailed as error:
        return str(error)


def _begin(parent: int | None = None, threads: int | None = None) -> None:
    """A process that runs cells makes raw images once.

    One of a pool has its share of the cores, and ends when the one that started it ends.
    """
    _loaded.setdefault(RawImages, RawImages())
    if parent is None or threads is None:
        return
    import torch

    torch.set_num_threads(threads)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
