"""The results of a suite as tables: what they say, and how they are written (Markdown, LaTeX, HTML, CSV)."""

from __future__ import annotations

import base64
import csv
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ipgo_opt.bench.published import published
from ipgo_opt.bench.suites import Part
from ipgo_opt.comparison import interval, table_csv
from ipgo_opt.grid import grid as tiled
from ipgo_opt.report import STYLE
from ipgo_opt.rewards.base import shown

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

FIELDS = {
    "best": "search reward", "held_out": "reward on held-out seeds", "judge": "held-out judge on held-out seeds",
}  # fmt: skip
"""What a run is judged by, in the order in which the tables stand."""

SHORT = {"best": "search", "held_out": "held out", "judge": "judge"}
"""The same for narrow columns."""

RAW = {"best": "raw", "held_out": "held_out_raw", "judge": "judge_raw"}
"""The same of the raw prompt."""


MOST_COLUMNS = 8
"""Solvers that stand side by side as in the paper's table; more of them are rows."""


@dataclass(frozen=True)
class Grid:
    """A table of texts; `bold` are the (row, column) that stand out."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    bold: frozenset[tuple[int, int]] = field(default_factory=frozenset)

    def turned(self) -> Grid:
        """Columns as rows."""
        lines = list(zip(self.header, *self.rows, strict=True))
        return Grid(self.title, lines[0], tuple(lines[1:]), frozenset((c - 1, r + 1) for r, c in self.bold))


def cell_score(entries: Sequence[dict[str, Any]], name: str) -> tuple[float, float, int] | None:
    """Mean, standard error of the mean and number of a field over runs; None if no run has it."""
    values = [entry[name] for entry in entries if entry[name] is not None]
    if not values:
        return None
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(np.mean(values)), spread, len(values)


def _score(found: tuple[float, float, int] | None, digits: int = 3) -> str:
    if found is None:
        return "–"
    error = "" if math.isnan(found[1]) else f" ± {found[1]:.{digits}f}"
    return f"{found[0]:.{digits}f}{error}"


def with_raw(part: Part, entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of a part, and one of the solver `raw` for each prompt and repeat: what all of them started from.

    A policy samples in a way of its own, and so has another raw image: its is taken only if there is no other.
    """
    own = [e for e in entries if e["group"] == part.group and e["reward_spec"] == part.reward]
    policies = {cell.solver for cell in part.cells if cell.config.strategy == "policy"}
    ranked = sorted(own, key=lambda e: e["solver"] in policies)
    first = {(e["prompt"], e["repeat"]): e for e in reversed(ranked)}
    raw = [{**e, "solver": "raw", **{name: e[start] for name, start in RAW.items()}} for e in first.values()]
    return [*raw, *own]


def versus(entries: Sequence[dict[str, Any]], ours: str, other: str, name: str) -> dict[str, dict[str, Any]]:
    """How often and by how much a solver is better than another, run by run on the same prompt and noise.

    Args:
        entries: runs of one reward, of any groups of prompts.
        ours: the solver that is compared.
        other: the one that it is compared with.
        name: the field; larger is better.

    Returns:
        `wins` (a tie is half a win) and `gain`, relative to the other's absolute value: mean and bootstrap interval
        over the prompts, repeats of which are averaged first.

    """
    values = {(e["solver"], e["group"], e["prompt"], e["repeat"]): e[name] for e in entries}
    wins: dict[tuple[str, str], list[float]] = {}
    gains: dict[tuple[str, str], list[float]] = {}
    for (solver, group, prompt, repeat), value in values.items():
        theirs = values.get((other, group, prompt, repeat))
        if solver == ours and value is not None and theirs is not None:
            wins.setdefault((group, prompt), []).append(0.5 if value == theirs else float(value > theirs))
            if theirs:
                gains.setdefault((group, prompt), []).append((value - theirs) / abs(theirs))
    return {
        "wins": interval([float(np.mean(one)) for one in wins.values()]),
        "gain": interval([float(np.mean(one)) for one in gains.values()]),
    }


def _share(found: dict[str, Any], signed: bool = False) -> str:
    if found["mean"] is None:
        return "–"
    sign = "+" if signed else ""
    bounds = found["interval"]
    text = f"{100 * found['mean']:{sign}.1f} %"
    return text + (f" [{100 * bounds[0]:{sign}.1f}, {100 * bounds[1]:{sign}.1f}]" if bounds else "")


def table1_grids(parts: Sequence[Part], entries: Sequence[dict[str, Any]]) -> list[Grid]:
    """For every reward: the solvers over all prompts, groups × solvers for each field, and IPGO against the others.

    The published rows stand beneath those of the paper's groups.
    """
    grids = []
    for reward in dict.fromkeys(part.reward for part in parts):
        own = [part for part in parts if part.reward == reward and part.cells]
        solvers = list(dict.fromkeys(["raw", *(name for part in own for name in part.solvers)]))
        runs = [run for part in own for run in with_raw(part, entries)]
        grids.append(_overview(shown(reward), runs, solvers))
        for name, meaning in FIELDS.items():
            grids.append(_groups_grid(f"{shown(reward)}: {meaning}", own, runs, solvers, name))
        grids += [_against(shown(reward), runs, solvers, ours) for ours in solvers if _method(ours).startswith("ipgo")]
    return grids


def _method(solver: str) -> str:
    """A solver's name without its share for seeds."""
    return solver.split(" ")[0]


def _overview(title: str, runs: list[dict[str, Any]], solvers: Sequence[str]) -> Grid:
    """Over all prompts: what each solver finds, against best-of-n where that took part, and what becomes of it.

    Each is compared with the raw prompt as it samples it itself.
    """
    from ipgo_opt.comparison import paired
    from ipgo_opt.display import difference

    own_raw = [{**run, "solver": f"raw {run['solver']}", **{name: run[start] for name, start in RAW.items()}}
               for run in runs if run["solver"] != "raw"]  # fmt: skip
    both = runs + own_raw
    yardstick = [("best", "best-of-n")] if "best-of-n" in solvers else []
    asked = (("best", "raw"), *yardstick, ("held_out", "raw"), ("judge", "raw"))
    rows = []
    for solver in solvers:
        own = [run for run in runs if run["solver"] == solver]
        differences = (
            "–"
            if solver == other
            else difference(paired(both, solver, f"raw {solver}" if other == "raw" else other, name), 3)
            for name, other in asked
        )
        rows.append((solver, _score(cell_score(own, "best")), *differences))
    header = ("all prompts", "search reward", *(f"{SHORT[name]}: minus {other}" for name, other in asked))
    return Grid(f"{title}: what is found, and what of it holds on fresh seeds", header, tuple(rows))


def _against(title: str, runs: Sequence[dict[str, Any]], solvers: Sequence[str], ours: str) -> Grid:
    """How often and by how much `ours` is better than each solver with the same share for seeds, or none to vary."""
    share = ours.removeprefix(_method(ours))
    rows = []
    for other in solvers:
        if other == ours or other.removeprefix(_method(other)) not in ("", share):
            continue
        against = {name: versus(runs, ours, other, name) for name in FIELDS}
        rows.append((
            other, *(text for name in FIELDS for text in (
                _share(against[name]["wins"]), _share(against[name]["gain"], signed=True),
            )),
        ))  # fmt: skip
    header = (f"{ours} against", *(text for name in SHORT.values()
                                   for text in (f"wins, {name}", f"gain, {name}")))  # fmt: skip
    return Grid(f"{title}: {ours} against each, prompt by prompt", header, tuple(rows))


def _groups_grid(
    title: str, parts: Sequence[Part], runs: Sequence[dict[str, Any]], solvers: Sequence[str], name: str
) -> Grid:
    rows: list[tuple[str, ...]] = []
    bold = set()
    for label in [*(part.group for part in parts), "all"]:
        of = [run for run in runs if label in ("all", run["group"])]
        scores = [cell_score([run for run in of if run["solver"] == solver], name) for solver in solvers]
        means = [-math.inf if score is None else score[0] for score in scores]
        if max(means) > -math.inf:
            bold.add((len(rows), 1 + int(np.argmax(means))))
        rows.append((label, *(_score(score) for score in scores)))
        paper = [published(parts[0].reward, label, _method(solver)) for solver in solvers]
        if name == "best" and any(value is not None for value in paper):
            known = ("–" if value is None else f"{value:.2f}" for value in paper)
            rows.append((f"{label}, published (SD 1.5)", *known))
    grid = Grid(title, ("prompts", *solvers), tuple(rows), frozenset(bold))
    return grid if len(solvers) <= MOST_COLUMNS else grid.turned()


def ablation_grid(part: Part, entries: Sequence[dict[str, Any]], reference: str) -> Grid:
    """A row per variant: means, and paired differences to the reference."""
    from ipgo_opt.comparison import paired
    from ipgo_opt.display import difference

    runs = with_raw(part, entries)
    rows = []
    for solver in ["raw", *part.solvers]:
        of = [run for run in runs if run["solver"] == solver]
        rows.append((
            solver, *(_score(cell_score(of, name)) for name in FIELDS),
            *("–" if solver == reference else difference(paired(runs, solver, reference, name), 3) for name in FIELDS),
        ))  # fmt: skip
    header = ("variant", *FIELDS.values(), *(f"{name} minus {reference}" for name in SHORT.values()))
    return Grid(f"{part.group}, reward {shown(part.reward)}", header, tuple(rows))


def markdown(grids: Sequence[Grid]) -> str:
    """The tables for GitHub."""
    out = []
    for grid in grids:
        out += [f"## {grid.title}", "", "| " + " | ".join(grid.header) + " |", "|" + "---|" * len(grid.header)]
        for r, row in enumerate(grid.rows):
            cells = (f"**{text}**" if (r, c) in grid.bold else text for c, text in enumerate(row))
            out.append("| " + " | ".join(cells) + " |")
        out.append("")
    return "\n".join(out)


def latex(grids: Sequence[Grid]) -> str:
    """The tables for a paper (needs the package booktabs)."""
    marks = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "±": r"$\pm$", "–": "--", "−": "$-$", "×": r"$\times$",
             "γ": r"$\gamma$"}  # fmt: skip

    def clean(text: str) -> str:
        return "".join(marks.get(letter, letter) for letter in text)

    out = []
    for grid in grids:
        out += [
            r"\begin{table}",
            rf"\caption{{{clean(grid.title)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(grid.header) - 1)}}}",
        ]
        out += [r"\toprule", " & ".join(map(clean, grid.header)) + r" \\", r"\midrule"]
        for r, row in enumerate(grid.rows):
            cells = (rf"\textbf{{{clean(t)}}}" if (r, c) in grid.bold else clean(t) for c, t in enumerate(row))
            out.append(" & ".join(cells) + r" \\")
        out += [r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    return "\n".join(out)


def page(title: str, about: str, grids: Sequence[Grid], parts: Sequence[Part]) -> str:
    """The tables on one page, and after them a strip of pictures for the first prompt of every part."""
    out = [f"<h1>{html.escape(title)}</h1><p><code>{html.escape(about.strip('`'))}</code></p>"]
    for grid in grids:
        head = "".join(f"<th>{html.escape(text)}</th>" for text in grid.header)
        body = ""
        for r, row in enumerate(grid.rows):
            tags = ("b" if (r, c) in grid.bold else "span" for c in range(len(row)))
            cells = (f"<td><{tag}>{html.escape(text)}</{tag}></td>" for tag, text in zip(tags, row, strict=True))
            body += f"<tr>{''.join(cells)}</tr>"
        out.append(f"<h2>{html.escape(grid.title)}</h2><table><tr>{head}</tr>{body}</table>")
    out += [strip for part in parts if (strip := _strip(part))]
    style = STYLE.replace("62rem", "none").replace("width: 320px", "width: 120px")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{style}</style>{"".join(out)}</html>\n'
    )


def _pictures(part: Part) -> tuple[str, dict[str, Path]]:
    """A part's first prompt, and its raw image and every solver's best one by what they are called."""
    first = [cell for cell in part.cells if cell.prompt == part.cells[0].prompt and cell.repeat == 0]
    files = {"raw": first[0].folder / "raw.png"} | {cell.solver: cell.folder / "best.png" for cell in first}
    return first[0].prompt, files


def sheets(parts: Sequence[Part]) -> dict[str, bytes]:
    """For every reward a PNG of the first prompt of each group, raw and every solver's best image; see `sheet`."""
    from PIL import Image

    out = {}
    for reward in dict.fromkeys(part.reward for part in parts):
        of = {part.group: _pictures(part) for part in parts if part.reward == reward and part.cells}
        whole = {
            group: (prompt, files) for group, (prompt, files) in of.items() if all(map(Path.exists, files.values()))
        }
        if not whole:
            continue
        shown_solvers = list(next(iter(whole.values()))[1])
        whole = {group: one for group, one in whole.items() if list(one[1]) == shown_solvers}  # others are under way
        rows = [[Image.open(path) for path in files.values()] for _, files in whole.values()]
        buffer = io.BytesIO()
        sheet(rows, shown_solvers, {group: prompt for group, (prompt, _) in whole.items()}).save(buffer, "PNG")
        out[reward] = buffer.getvalue()
    return out


def sheet(rows: Sequence[Sequence[Picture]], solvers: Sequence[str], prompts: Mapping[str, str]) -> Picture:
    """A row of images for each group's prompt, a column for each solver; the other way round for many solvers."""
    short = [name.replace(" (", " @").replace(" for seeds)", "") for name in solvers]
    if len(solvers) <= MOST_COLUMNS:
        return tiled(rows, short, [f"{group}: {prompt}" for group, prompt in prompts.items()])
    return tiled(list(zip(*rows, strict=True)), list(prompts), short)


def _strip(part: Part) -> str:
    """Raw and every solver's best image of a part's first prompt."""
    if not part.cells:
        return ""
    prompt, pictures = _pictures(part)
    figures = "".join(
        f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}"><figcaption>{html.escape(name)}</figcaption></figure>'
        for name, path in pictures.items()
        if path.exists()
    )
    return f"<h3>{html.escape(f'{part.group}, {shown(part.reward)}: {prompt}')}</h3>{figures}"


def grids_csv(grids: Sequence[Grid]) -> str:
    """Every cell of every table on a line of its own."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["table", "row", "column", "text"])
    for grid in grids:
        for row in grid.rows:
            for column, text in zip(grid.header[1:], row[1:], strict=True):
                writer.writerow([grid.title, row[0], column, text])
    return out.getvalue()


def write(
    out: Path,
    stem: str,
    title: str,
    about: str,
    grids: Sequence[Grid],
    parts: Sequence[Part],
    entries: list[dict[str, Any]],
) -> list[str]:
    """STEM.md, .tex, .html, .csv with the tables, STEM-REWARD.png, and runs.csv with every run; the files' names."""
    from ipgo_opt.store import slug, write_whole

    files = {
        f"{stem}.md": f"# {title}\n\n{about}\n\n{markdown(grids)}",
        f"{stem}.tex": latex(grids),
        f"{stem}.html": page(title, about, grids, parts),
        f"{stem}.csv": grids_csv(grids),
    }
    if entries:
        files["runs.csv"] = table_csv(entries)
    for name, text in files.items():
        write_whole(out / name, text.encode())
    pictures = {f"{stem}-{slug(reward)}.png": data for reward, data in sheets(parts).items()}
    for name, data in pictures.items():
        write_whole(out / name, data)
    return [*files, *pictures]
