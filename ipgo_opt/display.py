"""What a run looks like on a terminal: a live panel, or plain lines where the output is none. All on stderr."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ipgo_opt.report import rows
from ipgo_opt.rewards.base import shown

if TYPE_CHECKING:
    from ipgo_opt.comparison import Cell
    from ipgo_opt.config import RunConfig

BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float], width: int = 48) -> str:
    """The values as a row of at most `width` bars; each bar is the mean of its share."""
    if not values:
        return ""
    cells = min(width, len(values))
    edges = [round(i * len(values) / cells) for i in range(cells + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    return "".join(BARS[round((mean - low) / span * (len(BARS) - 1)) if span else 0] for mean in means)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


class Display:
    """A reporter on a console.

    Args:
        console: where it is shown; defaults to standard error.

    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.live: Live | None = None
        self.history: list[dict[str, Any]] = []
        self.printed = 0.0

    def started(self, config: RunConfig, out: Path, history: list[dict[str, Any]], runs: int = 1) -> None:
        """Shows what is run and opens the live panel."""
        self.history = list(history)
        self.total = config.budget * runs
        again = f", continued after {len(history)} images" if history else ""
        self.console.print(
            f"{config.prompt!r}: {config.space} × {config.strategy} on {config.model}, reward {shown(config.reward)}, "
            f"{self.total} images{again}",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
        if not self.console.is_terminal:
            return
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=self.console,
        )  # fmt: skip
        self.task: TaskID = self.progress.add_task("search", total=self.total, completed=len(history))
        self.live = Live(self._panel(), console=self.console, refresh_per_second=8, transient=True)
        self.live.start()

    def _panel(self) -> RenderableType:
        table = Table(box=None, pad_edge=False)
        for column in ("", "raw", "current", "best"):
            table.add_column(column, justify="left" if not column else "right")
        scored = [record for record in self.history if record["reward"] is not None]
        if scored:
            raw, now = scored[0], scored[-1]
            best = max((record for record in scored if not record.get("estimate")), key=lambda record: record["reward"])
            table.add_row("reward", *(_number(record["reward"]) for record in (raw, now, best)))
            for name in now["parts"] if len(now["parts"]) > 1 else ():
                table.add_row(f"  {name}", *(_number(record["parts"][name]) for record in (raw, now, best)))
            if now["judge"] is not None:
                table.add_row("judge", *(_number(record["judge"]) for record in (raw, now, best)), style="cyan")
        line = Text(sparkline([record["reward"] for record in scored]), style="green")
        return Group(table, line, self.progress)

    def evaluated(self, record: dict[str, Any]) -> None:
        """Takes in a scored image."""
        self.history.append(record)
        if self.live is not None:
            self.progress.update(self.task, completed=len(self.history))
            self.live.update(self._panel())
        elif time.monotonic() - self.printed > 2 or len(self.history) in (1, self.total):
            self.printed = time.monotonic()
            self.console.print(
                f"image {len(self.history)}/{self.total}  reward {_number(record['reward'])}  "
                f"best {_number(record['best'])}  judge {_number(record['judge'])}  {record['seconds']:.0f} s",
                highlight=False,
            )

    def judging(self, done: int, total: int) -> None:
        """Takes in the progress of the verdict."""
        if self.live is not None:
            self.progress.update(self.task, description="fresh seeds", completed=done, total=total)
        elif done == total:
            self.console.print(f"{total} images on fresh seeds", highlight=False)

    def warned(self, message: str) -> None:
        """Shows a warning above the panel."""
        self.console.print(message, style="yellow", highlight=False, markup=False, soft_wrap=True)

    def stop(self) -> None:
        """Closes the live panel."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def finished(self, summary: dict[str, Any]) -> None:
        """Shows the result."""
        self.stop()
        table = Table(box=None, pad_edge=False)
        table.add_column("")
        table.add_column("raw", justify="right")
        table.add_column("optimized", justify="right", style="bold")
        for row in rows(summary):
            table.add_row(*row)
        self.console.print(table)
        for name, text in (summary.get("optimized") or {}).items():
            self.console.print(
                f"{name.replace('_', ' ')}: {text or '(none)'}", highlight=False, markup=False, soft_wrap=True
            )
        scores = [record["reward"] for record in self.history if record["reward"] is not None]
        self.console.print(Text(sparkline(scores), style="green"))
        out = summary["out"]
        self.console.print(
            f"{summary['images']} images, {summary['seconds']:.0f} s. Raw {out}/raw.png, optimized {out}/best.png, "
            f"page {out}/report.html",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
        judge = summary["judge"]
        if judge and judge["optimized"] < 0.9 * judge["raw"]:  # the search reward never falls
            self.console.print(
                f"The reward rose, but the held-out judge fell from {judge['raw']:.3f} to {judge['optimized']:.3f}: "
                "look at the image, the reward may have been hacked.",
                style="yellow", highlight=False,
            )  # fmt: skip


def show_applied(made: dict[str, Any], folder: Path, console: Console | None = None) -> None:
    """Scores of applied tokens beside the raw prompts', and where the images are."""
    console = console or Console(stderr=True)
    table = Table(box=None, pad_edge=False)
    for column in ("strength", "", "raw", "with the tokens", "difference [95 %]"):
        table.add_column(column, justify="left" if column in ("strength", "") else "right")
    for entry in made["differences"]:
        for name in ("reward", "judge"):
            if name in entry:
                row = (_number(entry[name]["raw"]), _number(entry[name]["mean"]), difference(entry[name]["difference"]))
                table.add_row(f"{entry['strength']:g}", f"{name} {made[name]}", *row)
    if table.row_count:
        console.print(table)
    console.print(f"{len(made['images'])} images in {folder}", highlight=False, markup=False, soft_wrap=True)


def show_tokens(found: dict[str, Any], console: Console | None = None) -> None:
    """What `reading.read_tokens` found."""
    console = console or Console()
    table = Table(
        title=f"tokens of {found['prompt']!r} (a word's norm: {found['word_norm']:.2f})", title_justify="left"
    )
    for column in ("token", "norm", "θ1", "θ2", "nearest words (similarity)"):
        table.add_column(column, justify="left" if column[0] in "tn" and column != "norm" else "right")
    for token in found["tokens"]:
        angles = found["angles"][token["side"]]
        own = [angle[token["place"] if len(angle) > 1 else 0] for angle in (angles["theta1"], angles["theta2"])]
        near = ", ".join(f"{one['word']} ({one['similarity']:.2f})" for one in token["nearest"])
        table.add_row(
            f"{token['side']} {token['place'] + 1}", f"{token['norm']:.2f}", *(f"{a:+.3f}" for a in own), near
        )
    console.print(table)
    console.print(f"conformity penalty {found['conformity']:.4f}", highlight=False)
    console.print(Text(sparkline(found["rewards"]), style="green"))


class Comparison:
    """A watcher of a comparison on a console: a bar, a line for each finished run, and the tables at the end.

    Args:
        console: where it is shown; defaults to standard error.

    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.progress: Progress | None = None

    def running(self, cell: Cell, done: int, total: int) -> None:
        """Shows which run is under way."""
        if not self.console.is_terminal:
            return
        if self.progress is None:
            self.progress = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                console=self.console, transient=True,
            )  # fmt: skip
            self.task = self.progress.add_task("", total=total)
            self.progress.start()
        self.progress.update(self.task, completed=done, description=f"{cell.solver}: {cell.prompt}")

    def finished(self, cell: Cell, entry: dict[str, Any]) -> None:
        """A line for a finished run."""
        self.console.print(
            f"{cell.prompt!r} {cell.solver} {cell.repeat}: {_number(entry['raw'])} to {_number(entry['best'])}, "
            f"held out {_number(entry['held_out_raw'])} to {_number(entry['held_out'])}, {entry['images']} images, "
            f"{entry['seconds']:.0f} s",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip

    def stop(self) -> None:
        """Closes the bar."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def show(self, made: dict[str, Any], folder: Path) -> None:
        """The table and the paired differences."""
        budget, reference = made["budget"], made["reference"]
        table = Table(title=f"means over runs, {budget} images each", title_justify="left")
        columns = {
            f"best at {budget // 4}": "best_at_25%", f"at {budget // 2}": "best_at_50%", f"at {budget}": "best",
            "gain": "gain", "held out": "held_out", "± sd": "held_out_sd", "judge": "judge", "images": "images",
            "denoiser calls": "denoiser_calls", "seconds": "seconds", "peak MiB": "peak_memory_mib",
        }  # fmt: skip
        table.add_column("solver")
        for column in columns:
            table.add_column(column, justify="right")
        for row in made["table"]:
            cells = [
                "–" if row[name] is None else f"{row[name]:.0f}" if index > 6 else f"{row[name]:.4f}"
                for index, name in enumerate(columns.values())
            ]
            table.add_row(row["solver"], *cells)
        if made["table"]:
            first = made["table"][0]
            table.add_section()
            raw = {"held_out": "held_out_raw", "judge": "judge_raw", "best": "raw"}
            table.add_row("raw prompt", *(_number(first[raw[n]]) if n in raw else "" for n in columns.values()))
        self.console.print(table)
        if made["differences"]:
            table = Table(title=f"minus {reference}, prompt by prompt [95 % bootstrap interval]", title_justify="left")
            for column in ("solver", "search reward", "held-out reward", "judge"):
                table.add_column(column)
            for solver, fields in made["differences"].items():
                table.add_row(solver, *(difference(fields[name]) for name in ("best", "held_out", "judge")))
            self.console.print(table)
        self.console.print(f"{folder}/compare.json, compare.csv, compare.png, sheet.png", markup=False, soft_wrap=True)


def difference(value: dict[str, Any], digits: int = 4) -> str:
    """A mean difference with its interval (see `comparison.interval`), a dash if there is none."""
    if value["mean"] is None:
        return "–"
    bounds = value["interval"]
    shown = f"{value['mean']:+.{digits}f}"
    return shown + (f" [{bounds[0]:+.{digits}f}, {bounds[1]:+.{digits}f}]" if bounds else "")
