"""The benchmark suites on the tiny pipeline: tables that can be recomputed, cells that are never done twice."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import worker
from PIL import Image

from ipgo_opt import BadInput
from ipgo_opt.bench import runner
from ipgo_opt.bench.published import GROUPS, METHODS, TABLE, published
from ipgo_opt.bench.runner import examine, run_all
from ipgo_opt.bench.suites import ABLATIONS, ablation, groups, table1, with_shares
from ipgo_opt.bench.tables import (
    Grid,
    ablation_grid,
    cell_score,
    latex,
    markdown,
    page,
    sheet,
    sheets,
    table1_grids,
    versus,
    with_raw,
)
from ipgo_opt.config import configure
from ipgo_opt.methods import method_settings
from ipgo_opt.models.sampler import Sampler

SETTINGS: dict[str, Any] = {
    **{name: value for name, value in tiny.RUN.items() if name != "seed_share"}, "judge": "none", "budget": 5,
}  # fmt: skip
PROMPTS = {"one": ["a fox", "a cat"], "two": ["a dog"]}
JUDGE = """
import ipgo_opt

@ipgo_opt.reward("tensors", differentiable=True)
def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2))
"""


@pytest.fixture(scope="module")
def redness(tmp_path_factory) -> str:
    """A differentiable reward in a file."""
    path = tmp_path_factory.mktemp("judge") / "judge.py"
    path.write_text(JUDGE)
    return f"{path}:redness"


@pytest.fixture(scope="module")
def suite(tiny_folder, tmp_path_factory, redness) -> tuple[Path, Any, list[dict[str, Any]]]:
    """A finished table: two groups, two rewards, two methods, with and without a share for the seed."""
    out = tmp_path_factory.mktemp("bench")
    parts = table1(
        PROMPTS, [redness, "jpeg-incompressibility"], ["ipgo", "random", "best-of-n"], out, model=str(tiny_folder),
        seed_shares=(0.0, 0.5), **SETTINGS,
    )  # fmt: skip
    entries, failures = run_all(parts)
    assert not failures
    return out, parts, entries


def test_every_cell_is_a_finished_run_of_its_method(suite, redness):
    """The gradient takes no part where there is none; best-of-n has no share to vary; all have the same budget."""
    _, parts, entries = suite
    shares = [" (0 for seeds)", " (0.5 for seeds)"]
    by_reward = {part.reward: part.solvers for part in parts}
    assert by_reward[redness] == (*(f"ipgo{s}" for s in shares), *(f"random{s}" for s in shares), "best-of-n")
    assert by_reward["jpeg-incompressibility"] == (*(f"random{s}" for s in shares), "best-of-n")
    assert len(entries) == 3 * (5 + 3)
    for entry in entries:
        config = json.loads((Path(entry["folder"]) / "run.json").read_text())["config"]
        assert config["budget"] == 5
        assert config["seed_share"] == {"0": 0.0, "5": 0.5}.get(entry["solver"].partition("(0.")[2][:1], 0.0) or (
            config["space"] == "seeds"
        )


def test_the_tables_are_the_means_of_the_runs(suite, redness):
    """Recomputed from the run directories on disk."""
    _, parts, entries = suite
    grids = table1_grids(parts, entries)
    title = f"{redness.replace(':', ':')}: search reward"
    grid = next(g for g in grids if g.title.endswith("redness: search reward") or g.title == title)
    column = grid.header.index("random (0.5 for seeds)")
    for label, prompts in {**PROMPTS, "all": ["a fox", "a cat", "a dog"]}.items():
        bests = []
        for entry in entries:
            if (entry["solver"], entry["reward_spec"]) == (grid.header[column], redness) and entry["prompt"] in prompts:
                lines = (Path(entry["folder"]) / "history.jsonl").read_text().splitlines()
                bests.append(max(json.loads(line)["reward"] for line in lines))
        error = f" ± {np.std(bests, ddof=1) / math.sqrt(len(bests)):.3f}" if len(bests) > 1 else ""
        row = next(row for row in grid.rows if row[0] == label)
        assert row[column] == f"{np.mean(bests):.3f}{error}"


def test_the_overview_has_differences_prompt_by_prompt(suite, redness):
    """To best-of-n what is found, to the raw prompt what holds on fresh seeds; recomputed."""
    _, parts, entries = suite
    grid = next(g for g in table1_grids(parts, entries) if g.title.endswith("redness: what is found, and what of it "
                                                                            "holds on fresh seeds"))  # fmt: skip
    assert grid.header[2:] == (
        "search: minus raw", "search: minus best-of-n", "held out: minus raw", "judge: minus raw"
    )  # fmt: skip
    own = [entry for entry in entries if entry["reward_spec"] == redness]
    best = {(entry["solver"], entry["prompt"]): entry["best"] for entry in own}
    for row in grid.rows[1:]:
        mine = [entry for entry in own if entry["solver"] == row[0]]
        found = (
            [e["best"] - e["raw"] for e in mine],
            [e["best"] - best["best-of-n", e["prompt"]] for e in mine],
            [e["held_out"] - e["held_out_raw"] for e in mine],
        )
        for text, differences in zip(row[2:], found, strict=False):
            assert text == "–" or text.startswith(f"{np.mean(differences):+.3f} [")
        assert row[5] == "–"  # there is no judge


def test_a_policys_own_raw_image_is_not_everybodys(tiny_folder, tmp_path, redness):
    """DDPO samples with fresh noise: it is compared with its own raw image, and the others' is the table's."""
    given = {name: value for name, value in SETTINGS.items() if name not in ("batch_size", "scheduler")}
    parts = table1({"one": ["a fox", "a cat"]}, [redness], ["ddpo", "random"], tmp_path,
                   model=str(tiny_folder), **given | {"rank": 2})  # fmt: skip
    entries, failures = run_all(parts)
    assert not failures
    raw = {name: {e["prompt"]: e["raw"] for e in entries if e["solver"] == name} for name in ("ddpo", "random")}
    assert raw["ddpo"] != raw["random"]
    assert {e["prompt"]: e["raw"] for e in with_raw(parts[0], entries) if e["solver"] == "raw"} == raw["random"]
    overview = table1_grids(parts, entries)[0]
    row = next(row for row in overview.rows if row[0] == "ddpo")
    gain = np.mean([e["best"] - e["raw"] for e in entries if e["solver"] == "ddpo"])
    assert row[2].startswith(f"{gain:+.3f}")


def test_ipgo_is_compared_at_its_own_share(suite, redness):
    _, parts, entries = suite
    grids = [g for g in table1_grids(parts, entries) if "redness: ipgo" in g.title]
    assert [[row[0] for row in grid.rows] for grid in grids] == [
        ["raw", f"random ({share} for seeds)", "best-of-n"] for share in ("0", "0.5")
    ]


def test_a_table_turned():
    """Rows become columns, and what stood out still does."""
    grid = Grid("t", ("prompts", "a", "b"), (("one", "1", "2"), ("two", "3", "4"), ("all", "5", "6")),
                frozenset({(0, 2), (1, 1)}))  # fmt: skip
    turned = grid.turned()
    assert turned.header == ("prompts", "one", "two", "all")
    assert turned.rows == (("a", "1", "3", "5"), ("b", "2", "4", "6"))
    assert {turned.rows[r][c] for r, c in turned.bold} == {"2", "3"}


def test_a_sheet_shows_what_the_solvers_found(suite, redness):
    """Of every reward: raw and best images of the first prompt of each group, as they are on disk."""
    _, parts, _ = suite
    made = sheets(parts)
    assert list(made) == [redness, "jpeg-incompressibility"]
    picture = np.asarray(Image.open(io.BytesIO(made[redness])).convert("RGB"))
    assert picture.shape[:2] == (16 + 2 * (128 + 16 + 6), 6 * (128 + 6))
    cells = [cell for cell in parts[1].cells if cell.prompt == "a dog"]
    for column, path in enumerate([cells[0].folder / "raw.png", *(cell.folder / "best.png" for cell in cells)]):
        tile = Image.open(path).convert("RGB").resize((128, 128), Image.Resampling.BICUBIC)
        top, left = 16 + 150 + 16, column * 134
        assert np.array_equal(picture[top : top + 128, left : left + 128], np.asarray(tile))


def test_a_sheet_of_many_solvers_has_them_as_rows():
    tiles = [[Image.new("RGB", (128, 128), (10 * row, 10 * column, 0)) for column in range(12)] for row in range(2)]
    picture = np.asarray(sheet(tiles, [f"s{n} (0.33 for seeds)" for n in range(12)], {"g": "a fox", "h": "a dog"}))
    assert picture.shape[:2] == (16 + 12 * 150, 2 * 134)
    assert picture[16 + 7 * 150 + 80, 134 + 64].tolist() == [10, 70, 0]


def test_wins_and_gains_are_paired():
    """Per prompt: two wins, a tie, a loss, and a prompt that the other has not run."""
    ours, theirs = [2.0, 3.0, 1.0, 4.0, 9.0], [1.0, 2.0, 1.0, 8.0]
    entries = [
        {"solver": solver, "group": "g", "prompt": str(k), "repeat": 0, "best": value}
        for solver, values in (("a", ours), ("b", theirs)) for k, value in enumerate(values)
    ]  # fmt: skip
    found = versus(entries, "a", "b", "best")
    assert found["wins"]["mean"] == 2.5 / 4
    assert found["gain"]["mean"] == pytest.approx((1.0 + 0.5 + 0.0 - 0.5) / 4)
    assert found["gain"]["n"] == 4
    low, high = found["wins"]["interval"]
    assert 0 <= low < 0.625 < high <= 1
    negative = [entry | {"best": -entry["best"]} for entry in entries]  # a reward below zero: less negative is a gain
    assert versus(negative, "a", "b", "best")["gain"]["mean"] == pytest.approx(-0.25)


def test_means_leave_out_what_is_missing():
    assert cell_score([{"x": 1.0}, {"x": None}, {"x": 3.0}], "x") == (2.0, 1.0, 2)
    assert cell_score([{"x": None}], "x") is None


def test_published_rows_stand_beside_ours():
    """The figures behind the paper's claims: 98 % of comparisons won against these columns, and one cell by hand."""
    assert published("clip:ViT-L-14/openai", "Person", "draft-1") == 0.31
    assert published("aesthetic", "room", "raw") == 5.09
    assert published("aesthetic", "people", "ipgo") == 6.22
    assert published("aesthetic", "animals", "ipgo") is None
    assert published("jpeg-incompressibility", "room", "ipgo") is None
    assert all(len(rows) == len(GROUPS) and {len(row) for row in rows} == {len(METHODS)} for rows in TABLE.values())
    wins = [row[0] >= other for rows in TABLE.values() for row in rows for other in row[1:]]
    assert np.mean(wins) > 0.97


def test_every_way_of_writing_has_every_cell(suite):
    _, parts, entries = suite
    grids = table1_grids(parts, entries)
    texts = {text for grid in grids for row in grid.rows for text in row[1:]}
    assert all(text in markdown(grids) for text in texts)
    in_latex = latex(grids)
    assert in_latex.count(r"\begin{tabular}") == in_latex.count(r"\end{tabular}") == len(grids)
    assert "±" not in in_latex
    assert not [line for line in in_latex.splitlines() if line.endswith(r"\\") and line.count(" & ") < 2]

    class Reader(HTMLParser):
        cells: list[str] = []  # noqa: RUF012
        images = 0

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            self.images += tag == "img"

        def handle_data(self, data: str) -> None:
            self.cells.append(data)

    reader = Reader()
    reader.feed(page("t", "a", grids, parts))
    assert texts <= set(reader.cells)
    assert reader.images == sum(1 + len(part.solvers) for part in parts)


def test_a_plan_counts_what_is_left(suite, tiny_folder, tmp_path, redness):
    """Of the finished suite nothing is left; of a new one all images, both halves of guidance; nothing is written."""
    _, parts, _ = suite
    done = examine(parts)
    assert (done.runs, done.finished, done.search_images, done.verdict_images) == (24, 24, 0, 0)
    out = tmp_path / "new"
    fresh = table1(PROMPTS, [redness], ["ipgo", "best-of-n"], out, model=str(tiny_folder), **SETTINGS)
    found = examine(fresh, timed=True)
    assert (found.runs, found.finished) == (6, 0)
    assert (found.search_images, found.verdict_images) == (6 * 5, 6 * 2 * 2)
    assert found.denoiser_calls == (30 + 24) * 3 * 2
    assert found.seconds is not None
    assert 0 < found.seconds < 60
    assert not out.exists()


def run_command(*arguments: str, **more: Any) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "ipgo_opt.cli", "bench", *arguments]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def options(tiny_folder: Path, out: Path) -> list[str]:
    names = {"num_inference_steps": "steps"}
    flags = [
        (f"--{names.get(name, name).replace('_', '-')}", str(value)) for name, value in SETTINGS.items() if value != ""
    ]
    return [*(text for pair in flags for text in pair), "--model", str(tiny_folder), "--out", str(out)]


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_killed_and_started_again(tiny_folder, tmp_path, redness, jobs):
    """SIGKILL between cells: those that were finished are not touched again, the tables are those of one go."""
    files = []
    for name, prompts in PROMPTS.items():
        (tmp_path / name).write_text("\n".join(prompts) + "\n")
        files += ["--prompts", f"{name}={tmp_path / name}"]
    given = ["table1", *files, "--rewards", redness, "--methods", "ipgo,random,best-of-n,embedding,cma", "--jobs", jobs]
    whole = run_command(*given, *options(tiny_folder, tmp_path / "whole"))
    expected, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, errors

    out = tmp_path / "killed"
    first = run_command(*given, *options(tiny_folder, out), start_new_session=True)
    deadline = time.monotonic() + 120
    while len(list(out.glob("*/*/runs/*/*/cost.json"))) < 3:
        assert time.monotonic() < deadline
        assert first.poll() is None, "it was over before it could be killed"
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    deadline = time.monotonic() + 20
    while subprocess.run(["pgrep", "-s", str(first.pid)], capture_output=True, check=False).stdout:
        assert time.monotonic() < deadline, "the processes of the pool outlived the one that started them"
        time.sleep(0.1)
    done = {
        path: path.stat().st_mtime_ns
        for path in out.glob("*/*/runs/*/*/run.json")
        if json.loads(path.read_text())["status"] == "finished"
    }
    assert 3 <= len(done) < 15
    again = run_command(*given, *options(tiny_folder, out))
    output, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert output == expected
    assert {path: path.stat().st_mtime_ns for path in done} == done


@pytest.mark.parametrize(("dies_at", "times"), [("checkpoint.safetensors", 3), ("run.json", 6)])
def test_a_pass_killed_in_the_middle(tiny_folder, tmp_path, redness, dies_at, times):
    """SIGKILL at a write while three prompts are searched side by side: the histories of an undisturbed pass."""
    given = (str(tiny_folder), PROMPTS, redness, SETTINGS)
    assert worker.end(worker.start(worker.go_bench, str(tmp_path / "whole"), *given)) == 0
    assert worker.end(worker.start(worker.go_bench, str(tmp_path / "torn"), *given, dies_at, times)) == -signal.SIGKILL
    (begun,) = (tmp_path / "torn").glob("*/*/runs/*/*/pass/checkpoint.safetensors")
    assert worker.end(worker.start(worker.go_bench, str(tmp_path / "torn"), *given)) == 0
    assert not begun.parent.exists()
    folders = [
        path.parent.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").glob("*/*/runs/*/*/run.json")
    ]
    assert len(folders) == 3
    for folder in folders:
        whole, torn = (tmp_path / name / folder for name in ("whole", "torn"))
        assert worker.history(whole) == worker.history(torn)
        assert worker.result(whole) == worker.result(torn)


def test_prompts_go_side_by_side_and_raw_images_are_made_once(tiny_folder, tmp_path, redness, monkeypatch):
    """Three prompts of two groups, two methods: their pipeline calls hold all three, and none makes an image again."""
    calls: list[int] = []
    generate = Sampler.generate

    def counted(self: Sampler, conditioning: Any, seeds: Any, **how: Any) -> Any:
        calls.append(len(seeds))
        return generate(self, conditioning, seeds, **how)

    parts = table1(PROMPTS, [redness], ["random", "best-of-n"], tmp_path, model=str(tiny_folder), **SETTINGS)
    monkeypatch.setattr(Sampler, "generate", counted)
    monkeypatch.setattr(runner, "_loaded", {})  # other tests have made some of them
    entries, _ = run_all(parts)
    artefacts = [1, 1, 1]
    of_random = [3, 3, 3, 3, 3, 6, 6, *artefacts]  # raw, four candidates, two fresh seeds raw and best
    of_seeds = [3, 6, 3, *artefacts]  # four seeds more, two at a time; the fresh seeds are known
    assert calls == of_random + of_seeds
    costs = {(entry["solver"], entry["images"], entry["denoiser_calls"]) for entry in entries}
    assert costs == {("random", 5, 30), ("best-of-n", 5, 30)}  # what is kept is counted all the same


def test_a_run_that_fails_leaves_the_others(tiny_folder, tmp_path):
    """The table has what there is, the error says what is missing, and the same line tries it again."""
    judge = tmp_path / "judge.py"
    judge.write_text("def score(image, prompt):\n    assert prompt != 'a cat', 'no cats'\n    return 1.0\n")
    (tmp_path / "prompts.txt").write_text("a fox\na cat\n")
    given = ["table1", "--prompts", str(tmp_path / "prompts.txt"), "--rewards", f"{judge}:score", "--methods", "random"]
    first = run_command(*given, *options(tiny_folder, tmp_path / "out"))
    output, errors = first.communicate(timeout=120)
    assert first.returncode == 1
    assert "1 runs failed" in errors
    assert "no cats" in errors
    assert "1.000" in output
    judge.write_text("def score(image, prompt):\n    return 1.0\n")
    again = run_command(*given, *options(tiny_folder, tmp_path / "out"))
    again.communicate(timeout=120)
    assert again.returncode == 0
    assert len(list(csv.DictReader((tmp_path / "out" / "runs.csv").open()))) == 2


@pytest.mark.parametrize("what", ABLATIONS)
def test_variants_of_an_ablation_differ_in_what_they_say(what, tiny_folder, tmp_path):
    """Every label is another configuration, and the reference is among them."""
    reference, variants = ABLATIONS[what]
    big = SETTINGS | {"budget": 40, "num_inference_steps": 6}
    small = {"basis_size": 1} if what == "lengths" else {}
    part = ablation(
        what, ["a fox"], folder=tmp_path, reward="clip", model="emoji",
        **method_settings("reno+ipgo" if what == "noise" else "ipgo") | big | {"basis_size": 2, **small},
    )  # fmt: skip
    assert reference in part.solvers
    configs = [tuple(sorted(vars(cell.config).items())) for cell in part.cells]
    assert len(set(configs)) == len(configs) == len(variants)


def test_who_has_no_seed_to_choose():
    """Best-of-n and DDPO stand once in a table with shares, all others once for each share."""
    found = with_shares(["ipgo", "ddpo", "best-of-n"], (0.0, 0.33))
    assert list(found) == ["ipgo (0 for seeds)", "ipgo (0.33 for seeds)", "ddpo", "best-of-n"]
    assert [own.get("seed_share") for own in found.values()] == [0.0, 0.33, None, None]


def test_an_ablation_compares_with_its_reference(tiny_folder, tmp_path, redness):
    part = ablation(
        "rotation", ["a fox", "a cat"], folder=tmp_path, reward=redness,
        model=str(tiny_folder), **SETTINGS,
    )  # fmt: skip
    entries, failures = run_all([part])
    assert not failures
    reference = part.solvers[0]
    grid = ablation_grid(part, entries, reference)
    best = {(entry["solver"], entry["prompt"]): entry["best"] for entry in entries}
    for row in grid.rows[2:]:
        difference = np.mean([best[row[0], p] - best[reference, p] for p in ("a fox", "a cat")])
        assert row[4].startswith(f"{difference:+.3f} [")


@pytest.mark.parametrize(
    ("what", "given", "said"),
    [
        ("basis", {"space": "lora"}, "of the spaces tokens, tokens.noise, but got space='lora'"),
        ("noise", {}, "of the space tokens.noise, but got space='tokens'"),
        ("learning-rate", {"strategy": "random"}, "gradient and policy have a learning rate, but got 'random'"),
        ("bases", {}, "bases"),
    ],
)
def test_ablations_of_what_has_no_such_thing(tiny_folder, tmp_path, what, given, said):
    with pytest.raises(BadInput, match=said):
        ablation(what, ["a fox"], folder=tmp_path, reward="jpeg-compressibility" if given.get("strategy") else "clip",
                 model="emoji", **given)  # fmt: skip


def test_factors_are_of_the_methods_own_default(tmp_path):
    part = ablation("learning-rate", ["a fox"], folder=tmp_path, reward="clip", space="lora", strategy="gradient")
    usual = configure("a fox", space="lora", strategy="gradient").learning_rate
    assert [cell.config.learning_rate / usual for cell in part.cells] == pytest.approx([0.1, 0.3, 1, 3, 10])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"methods": []}, "at least one"),
        ({"methods": ["ipgoo"]}, "ipgoo"),
        ({"groups": {"empty": []}}, "at least one prompt"),
        ({"rewards": ["clap"]}, "clap"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tiny_folder, tmp_path, change, said):
    given = {"groups": PROMPTS, "rewards": ["jpeg-incompressibility"], "methods": ["random"]} | change
    with pytest.raises(BadInput, match=said):
        table1(out=tmp_path / "out", model=str(tiny_folder), **given, **SETTINGS)
    assert not (tmp_path / "out").exists()


def test_groups_have_names(tmp_path):
    (tmp_path / "mine.txt").write_text("a fox\n\na cat\n")
    path = str(tmp_path / "mine.txt")
    assert groups([path]) == {"mine": ["a fox", "a cat"]}
    assert groups([f"Person={path}"], limit=1) == {"Person": ["a fox"]}
    assert list(groups(None)) == ["people", "rooms", "vehicles", "nature", "buildings"]
    with pytest.raises(BadInput, match="came twice"):
        groups([path, path])
