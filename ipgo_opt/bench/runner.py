"""Runs the cells of a suite, in several processes if asked; what is finished is read, not done again."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from ipgo_opt.bench.suites import Part, needs_gradient
from ipgo_opt.comparison import Cell, Watcher, given, measure
from ipgo_opt.errors import BadInput, RunFailed
from ipgo_opt.store import read_run

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


def examine(parts: Sequence[Part], *, timed: bool = False) -> Plan:
    """What is to be done; with `timed` a few images are made to see how long it takes, with and without gradient."""
    cells = [cell for part in parts for cell in part.cells]
    left = [cell for cell in cells if not finished(cell)]
    search, verdict, calls, seconds = 0, 0, 0, 0.0
    rates: dict[bool, float] = {}
    for cell in left:
        config = cell.config
        images = config.budget, 2 * config.held_out
        search, verdict = search + images[0], verdict + images[1]
        halves = 2 if max(config.guidance_scale, config.true_cfg_scale) > 1 else 1
        calls += sum(images) * config.num_inference_steps * halves
        slope = needs_gradient(vars(config))
        if timed and slope not in rates:
            rates[slope] = _seconds_per_image(cell)
        if timed:
            seconds += images[0] * rates[slope] + images[1] * rates.get(False, rates[slope])
    return Plan(len(cells), len(cells) - len(left), search, verdict, calls, seconds if timed else None)


def _seconds_per_image(cell: Cell) -> float:
    """Of a search like the cell's, once everything is loaded."""
    from ipgo_opt.run import optimize

    changed = {"budget": 4 * cell.config.search_seeds, "held_out": 0, "seed_share": 0.0, "batch_size": 1}
    if cell.config.space == "seeds":
        changed["seed_share"] = 1.0
    settings = given(cell.config) | changed
    for _ in range(2):  # the first loads
        begun = time.monotonic()
        summary = optimize(cell.prompt, loaded=_loaded, **settings).summary
    return (time.monotonic() - begun) / summary["images"]


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

    def take(number: int, found: dict[str, Any] | str) -> None:
        part, cell = cells[number]
        if isinstance(found, str):
            failures[str(cell.folder)] = found
            return
        made[number] = found | {"group": part.group, "reward_spec": part.reward}
        if watcher is not None:
            watcher.finished(cell, found)

    if jobs == 1:
        for number, (_, cell) in enumerate(cells):
            if watcher is not None:
                watcher.running(cell, number, len(cells))
            take(number, _one(cell))
    else:
        threads = max(1, (os.cpu_count() or 1) // jobs)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, context, _begin, (os.getpid(), threads)) as pool:
            waiting = {pool.submit(_one, cell): number for number, (_, cell) in enumerate(cells)}
            try:
                for done, future in enumerate(as_completed(waiting)):
                    if watcher is not None:
                        watcher.running(cells[waiting[future]][1], done + 1, len(cells))
                    take(waiting[future], future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for child in multiprocessing.active_children():  # what they have done is on disk
                    child.terminate()
                raise
    return [made[number] for number in sorted(made)], failures


def _one(cell: Cell) -> dict[str, Any] | str:
    """A cell's entry, or why its run failed."""
    try:
        return measure(cell, _loaded)
    except RunFailed as error:
        return str(error)


def _begin(parent: int, threads: int) -> None:
    """A process of the pool: its share of the cores, and an end when the one that started it ends."""
    import torch

    torch.set_num_threads(threads)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
