"""Solvers side by side: the same prompts, starting noise and number of images; paired differences with intervals.

Every run is an ordinary run directory under OUT/runs, so a comparison that is stopped goes on where it was, and one
that is finished can be added to: only what is missing is run.

    compare.json   settings, one entry per run, the table and the paired differences
    compare.csv    one line per run
    compare.png    best reward so far, above the raw prompt's, against images
    sheet.png      raw and every solver's best image, one row per prompt
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import resource
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ipgo_opt.config import RunConfig, configure
from ipgo_opt.errors import BadInput
from ipgo_opt.grid import grid
from ipgo_opt.methods import METHODS
from ipgo_opt.run import Result, Silence, optimize, resume
from ipgo_opt.spaces import SPACES
from ipgo_opt.store import Store, read_run, slug, write_whole
from ipgo_opt.strategies import STRATEGIES

REPEAT_SEEDS = 1000
"""Distance between the first seeds of two repeats: as many seeds as one repeat may try."""

RESAMPLES = 10_000
"""Bootstrap resamples behind each interval."""

SHARES = (0.25, 0.5, 1.0)
"""Shares of the budget at which the best reward so far is shown."""


@dataclass(frozen=True)
class Cell:
    """One run of a comparison: what it is called, where it lives and what it is."""

    prompt: str
    solver: str
    repeat: int
    folder: Path
    config: RunConfig


class Watcher(Protocol):
    """Is told how a comparison goes; the command line's display is one."""

    def running(self, cell: Cell, done: int, total: int) -> None:
        """A run begins or goes on after `done` of `total`."""
        ...

    def finished(self, cell: Cell, entry: dict[str, Any]) -> None:
        """A run is over."""
        ...


def solver_settings(name: str) -> dict[str, Any]:
    """Settings of a solver as `compare` names it: a method, a strategy, a space for random search, SPACE*STRATEGY."""
    if name in METHODS:
        return dict(METHODS[name].settings)
    space, star, strategy = name.partition("*")
    if star:
        SPACES.check(space)
        STRATEGIES.check(strategy)
        return {"space": space, "strategy": strategy}
    if name in SPACES and name not in STRATEGIES:
        return {"space": name, "strategy": "random"}
    STRATEGIES.check(name)
    return {"strategy": name}


def named(solvers: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The settings of solvers by their names, each of which may be given once."""
    if len(set(solvers)) < len(solvers):
        raise BadInput(f"each strategy may be given once, but got {', '.join(solvers)}.")
    return {name: solver_settings(name) for name in solvers}


def plan(
    prompts: Sequence[str],
    solvers: Mapping[str, dict[str, Any]],
    out: Path,
    *,
    repeats: int = 1,
    seed: int = 0,
    **settings: Any,
) -> list[Cell]:
    """The runs of a comparison, all settings checked; BadInput before anything is loaded or written.

    Args:
        prompts: what the images should show.
        solvers: by label, the settings that make each solver; they come before `settings`.
        out: where everything is kept.
        repeats: runs per prompt and solver.
        seed: first seed of the first repeat.
        settings: any other field of RunConfig, for all runs.

    All solvers search on one seed unless `search_seeds` is given: best rewards over different numbers of seeds could
    not be compared.

    """
    if not prompts or not solvers:
        raise BadInput("a comparison needs at least one prompt and one strategy.")
    if len(set(prompts)) < len(prompts):
        raise BadInput(f"each prompt may be given once, but got {', '.join(prompts)}.")
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise BadInput(f"`repeats >= 1` must hold for a whole number, but got repeats={repeats!r}.")
    cells = []
    for prompt in prompts:
        name = f"{slug(prompt)}-{zlib.crc32(prompt.encode()):08x}"
        for repeat in range(repeats):
            for solver, made_of in solvers.items():
                own = {"search_seeds": 1} | settings | made_of | {"seed": seed + REPEAT_SEEDS * repeat}
                if own.get("strategy") == "gradient":
                    own["batch_size"] = 1  # the black boxes' setting
                config = configure(prompt, **own)
                if config.used_seeds > REPEAT_SEEDS and repeats > 1:
                    raise BadInput(
                        f"with repeats, a run may try {REPEAT_SEEDS} seeds, but {solver} would try {config.used_seeds}."
                    )
                folder = out / "runs" / name / f"{re.sub('[^A-Za-z0-9]+', '-', solver)}-{repeat}"
                cells.append(Cell(prompt, solver, repeat, folder, config))
    budgets = {cell.config.budget for cell in cells}
    if len(budgets) > 1:
        raise BadInput(
            f"all solvers must have the same budget, but their defaults are {sorted(budgets)} images; give one budget."
        )
    return cells


def compare(
    prompts: Sequence[str],
    strategies: Sequence[str],
    *,
    out: str | Path,
    repeats: int = 1,
    seed: int = 0,
    reference: str | None = None,
    budget: int = 100,
    watcher: Watcher | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Runs every strategy on every prompt `repeats` times with the same budget and compares them.

    Args:
        prompts: what the images should show.
        strategies: who searches, as `solver_settings` reads it.
        out: where everything is kept; a comparison that is there already is continued.
        repeats: runs per prompt and strategy, on different seeds.
        seed: first seed of the first repeat; all strategies start from the same noise.
        reference: the strategy that the others are compared with; "random" if it takes part, else the first one.
        budget: images of each run.
        watcher: is told how it goes.
        settings: any other field of RunConfig, for all runs.

    Returns:
        What compare.json holds.

    """
    folder = Path(out)
    if reference is None:
        reference = "random" if "random" in strategies else strategies[0] if strategies else ""
    elif reference not in strategies:
        raise BadInput(f"reference must be one of the strategies {', '.join(strategies)}, but got {reference!r}.")
    cells = plan(prompts, named(strategies), folder, repeats=repeats, seed=seed, budget=budget, **settings)
    store = Store(folder)
    try:
        loaded: dict[Any, Any] = {}
        entries = []
        for done, cell in enumerate(cells):
            if watcher is not None:
                watcher.running(cell, done, len(cells))
            entry = measure(cell, loaded)
            entries.append(entry)
            if watcher is not None:
                watcher.finished(cell, entry)
            made = summary(entries, list(strategies), reference, budget)
            store.write_json("compare.json", made)  # after every run: what is finished is never lost
            store.write_text("compare.csv", table_csv(entries))
        plot(entries, strategies, budget, store)
        sheet(cells, strategies, store)
        return made
    finally:
        store.close()


def measure(cell: Cell, loaded: dict[Any, Any]) -> dict[str, Any]:
    """Runs, continues or reads one cell."""
    measured, fresh = cell.folder / "cost.json", True
    _peak_memory(reset=True)
    if check_settings(cell):
        fresh = read_run(cell.folder)["status"] != "finished"
        result = resume(cell.folder, reporter=Silence(), loaded=loaded)
    else:
        result = optimize(cell.prompt, out=cell.folder, loaded=loaded, **given(cell.config))
    if fresh or not measured.exists():
        write_whole(measured, json.dumps({"peak_memory_mib": _peak_memory() if fresh else None}).encode())
    return entry(cell, result) | json.loads(measured.read_text())


def check_settings(cell: Cell) -> bool:
    """Whether there is a run in a cell's folder; BadInput if it is one with other settings."""
    if not (cell.folder / "run.json").exists():
        return False
    try:
        known = RunConfig(**read_run(cell.folder)["config"])  # an earlier version had fewer settings
    except (KeyError, TypeError):
        known = None
    if known is None or _json(known.read()) != _json(cell.config.read()):
        raise BadInput(f"{str(cell.folder)!r} holds a run with other settings; choose another output directory.")
    return True


def given(config: RunConfig) -> dict[str, Any]:
    """What `optimize` must be given beside the prompt to run this configuration of one prompt."""
    return {name: value for name, value in vars(config).items() if name not in ("prompt", "prompts", "shared")}


def _json(settings: dict[str, Any]) -> Any:
    return json.loads(json.dumps(settings))


def _peak_memory(reset: bool = False) -> float | None:
    """Peak memory in MiB since the last reset: of the GPU where one is used, else of this process; None if unknown."""
    import torch

    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the process's high-water mark
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        peak = None
    return (
        round(int(peak[1]) / 1024, 1) if peak else round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
    )


def entry(cell: Cell, result: Result) -> dict[str, Any]:
    """What the comparison keeps of a run."""
    found, best = result.summary, [record["best"] for record in result.history]
    held_out, judge = found["held_out"] or {}, found["judge"] or {}

    def at(share: float) -> float | None:
        image = math.floor(share * cell.config.budget)
        return best[min(max(image, 1), len(best)) - 1]

    return {
        "prompt": cell.prompt,
        "solver": cell.solver,
        "repeat": cell.repeat,
        "folder": str(cell.folder),
        "raw": found["raw_reward"],
        "seed_reward": found["seed_reward"],
        "best": found["search_reward"],
        **{f"best_at_{share:.0%}": at(share) for share in SHARES},
        "held_out_raw": held_out.get("raw_mean"),
        "held_out": held_out.get("mean"),
        "held_out_sd": held_out.get("sd"),
        "judge_raw": judge.get("raw"),
        "judge": judge.get("optimized"),
        "images": found["images"],
        "denoiser_calls": found["denoiser_calls"],
        "seconds": found["seconds"],
        "curve": best,
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def interval(differences: Sequence[float]) -> dict[str, Any]:
    """Mean of independent differences and its 95 % percentile bootstrap interval (None for fewer than two)."""
    values = np.array(differences, dtype=float)
    out: dict[str, Any] = {"n": len(values), "mean": float(values.mean()) if len(values) else None, "interval": None}
    if len(values) > 1:
        draws = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
        low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
        out["interval"] = [float(low), float(high)]
    return out


def paired(entries: list[dict[str, Any]], solver: str, reference: str, field: str) -> dict[str, Any]:
    """Differences of `field` between two solvers, run by run; repeats of a prompt are averaged before they are drawn.

    With one prompt the repeats themselves are drawn: the interval then speaks of that prompt only.
    """
    values = {(e["solver"], e["prompt"], e["repeat"]): e[field] for e in entries}
    by_prompt: dict[str, list[float]] = {}
    for (name, prompt, repeat), value in values.items():
        other = values.get((reference, prompt, repeat))
        if name == solver and value is not None and other is not None:
            by_prompt.setdefault(prompt, []).append(value - other)
    if len(by_prompt) == 1:
        return interval(next(iter(by_prompt.values())))
    return interval([float(np.mean(repeats)) for repeats in by_prompt.values()])


def summary(entries: list[dict[str, Any]], strategies: Sequence[str], reference: str, budget: int) -> dict[str, Any]:
    """The table (means over prompts and repeats) and the paired differences to the reference."""
    table = []
    for solver in strategies:
        own = [e for e in entries if e["solver"] == solver]
        if not own:
            continue
        row: dict[str, Any] = {"solver": solver, "runs": len(own)}
        for name in (*(f"best_at_{share:.0%}" for share in SHARES), "raw", "seed_reward", "best"):
            row[name] = _mean([e[name] for e in own])
        row["gain"] = _mean([e["best"] - e["raw"] for e in own if e["raw"] is not None])
        for name in (
            "held_out_raw", "held_out", "held_out_sd", "judge_raw", "judge", "images", "denoiser_calls", "seconds",
            "peak_memory_mib",
        ):  # fmt: skip
            row[name] = _mean([e.get(name) for e in own])
        table.append(row)
    differences = {
        solver: {field: paired(entries, solver, reference, field) for field in ("best", "held_out", "judge")}
        for solver in strategies
        if solver != reference and any(e["solver"] == solver for e in entries)
    }
    return {
        "budget": budget, "reference": reference, "table": table, "differences": differences,
        "runs": [{key: value for key, value in e.items() if key != "curve"} for e in entries],
    }  # fmt: skip


def table_csv(entries: list[dict[str, Any]]) -> str:
    """One line per run."""
    out = io.StringIO()
    names = [name for name in entries[0] if name != "curve"]
    writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(entries)
    return out.getvalue()


def plot(entries: list[dict[str, Any]], strategies: Sequence[str], budget: int, store: Store) -> None:
    """compare.png: each solver's best reward so far minus the raw prompt's, mean over runs, against images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for solver in strategies:
        curves = []
        for made in entries:
            if made["solver"] == solver and made["raw"] is not None:
                curve = [math.nan if value is None else value - made["raw"] for value in made["curve"]]
                curves.append(curve + [curve[-1]] * (budget - len(curve)))
        if curves:
            axes.step(range(1, budget + 1), np.mean(curves, axis=0), where="post", label=f"{solver} ({len(curves)})")
    axes.axhline(0, color="0.6", linestyle="--", linewidth=1)
    axes.set(xlabel="images", ylabel="best search reward so far − raw prompt's", xlim=(1, budget))
    axes.legend(frameon=False, title="solver (runs)")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    store.write_bytes("compare.png", buffer.getvalue())


def sheet(cells: Sequence[Cell], strategies: Sequence[str], store: Store) -> None:
    """sheet.png: the first repeat's raw image and every solver's best one, a row for each prompt."""
    from PIL import Image

    first = [cell for cell in cells if cell.repeat == 0]
    prompts = list(dict.fromkeys(cell.prompt for cell in first))
    rows = []
    for prompt in prompts:
        own = {cell.solver: cell.folder for cell in first if cell.prompt == prompt}
        paths = [own[strategies[0]] / "raw.png", *(own[name] / "best.png" for name in strategies)]
        rows.append([Image.open(path) for path in paths])
    buffer = io.BytesIO()
    grid(rows, ["raw", *strategies], prompts).save(buffer, "PNG")
    store.write_bytes("sheet.png", buffer.getvalue())
