"""Comparisons on the tiny pipeline: equal budgets, numbers that can be recomputed, nothing lost when stopped."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import tiny
from PIL import Image

import ipgo_opt
from ipgo_opt import BadInput, compare
from ipgo_opt.comparison import interval, named, paired, plan, solver_settings
from ipgo_opt.config import configure

SETTINGS: dict[str, Any] = {
    **{name: value for name, value in tiny.RUN.items() if name != "seed_share"},
    "reward": "jpeg-incompressibility", "judge": "none", "budget": 6,
}  # fmt: skip
PROMPTS, SOLVERS = ["a fox", "a cat"], ["random", "seeds"]


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A finished comparison: two prompts, two solvers, two repeats."""
    out = tmp_path_factory.mktemp("compare")
    return out, compare(PROMPTS, SOLVERS, out=out, repeats=2, model=str(tiny_folder), seed_share=None, **SETTINGS)


def test_what_it_leaves_behind(made):
    """The promised files, a finished run for every cell, and the returned object on disk."""
    out, found = made
    names = {path.name for path in out.iterdir()} - {".lock"}
    assert names == {"compare.json", "compare.csv", "compare.png", "sheet.png", "runs"}
    assert json.loads((out / "compare.json").read_text()) == json.loads(json.dumps(found))
    assert len(found["runs"]) == 8
    for run in found["runs"]:
        assert json.loads((Path(run["folder"]) / "run.json").read_text())["status"] == "finished"
    rows = list(csv.DictReader((out / "compare.csv").open()))
    assert [float(row["best"]) for row in rows] == [run["best"] for run in found["runs"]]
    with Image.open(out / "compare.png") as plot, Image.open(out / "sheet.png") as sheet:
        assert plot.width > 600
        assert len(sheet.getcolors(maxcolors=2**20) or []) > 50


def test_all_have_the_same_budget_noise_and_prompt(made):
    """Repeats begin at seeds 0 and 1000; every solver of a repeat sees the same raw image."""
    _, found = made
    for prompt in PROMPTS:
        for repeat in (0, 1):
            folders = [
                Path(run["folder"]) for run in found["runs"] if (run["prompt"], run["repeat"]) == (prompt, repeat)
            ]
            assert len({(folder / "raw.png").read_bytes() for folder in folders}) == 1
            for folder in folders:
                config = json.loads((folder / "run.json").read_text())["config"]
                assert (config["seed"], config["budget"], config["prompt"]) == (1000 * repeat, 6, prompt)
    assert {run["images"] for run in found["runs"]} == {6}


def test_the_table_is_the_mean_of_the_runs(made):
    """Recomputed from the histories on disk."""
    _, found = made
    for row in found["table"]:
        histories = []
        for run in found["runs"]:
            if run["solver"] == row["solver"]:
                lines = (Path(run["folder"]) / "history.jsonl").read_text().splitlines()
                histories.append([json.loads(line)["reward"] for line in lines])
        assert row["runs"] == len(histories) == 4
        assert row["best"] == pytest.approx(np.mean([max(rewards) for rewards in histories]))
        assert row["best_at_50%"] == pytest.approx(np.mean([max(rewards[:3]) for rewards in histories]))
        assert row["gain"] == pytest.approx(np.mean([max(rewards) - rewards[0] for rewards in histories]))


def test_differences_are_paired_and_prompts_are_what_is_drawn(made):
    """Repeats of a prompt are averaged: the interval has as many independent values as there are prompts."""
    _, found = made
    assert found["reference"] == "random"
    best = {(run["solver"], run["prompt"], run["repeat"]): run["best"] for run in found["runs"]}
    by_prompt = [np.mean([best["seeds", p, r] - best["random", p, r] for r in (0, 1)]) for p in PROMPTS]
    difference = found["differences"]["seeds"]["best"]
    assert difference["n"] == 2
    assert difference["mean"] == pytest.approx(np.mean(by_prompt))
    assert difference["interval"] == pytest.approx([min(by_prompt), max(by_prompt)])  # of two values, all that can be


def test_the_interval_is_the_percentile_bootstrap():
    """Against scipy's."""
    values = np.random.default_rng(3).normal(0.2, 1, 25)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, random_state=np.random.default_rng(1)
    ).confidence_interval
    assert interval(values.tolist())["interval"] == pytest.approx([expected.low, expected.high], abs=0.02)
    assert interval([0.5])["interval"] is None
    assert interval([]) == {"n": 0, "mean": None, "interval": None}


def test_what_an_earlier_version_began_goes_on(tiny_folder, tmp_path):
    """A run whose configuration lacks a setting that there was not yet; one with another value is refused."""
    given = {"model": str(tiny_folder), "budget": 4, "reward": "jpeg-incompressibility"} | tiny.RUN
    first = compare(["a fox"], ["random"], out=tmp_path, **given)
    (path,) = tmp_path.glob("runs/*/*/run.json")
    run = json.loads(path.read_text())
    del run["config"]["anchor"]
    path.write_text(json.dumps(run))
    assert compare(["a fox"], ["random"], out=tmp_path, **given) == first
    run["config"]["anchor"] = True
    path.write_text(json.dumps(run))
    with pytest.raises(BadInput, match="other settings"):
        compare(["a fox"], ["random"], out=tmp_path, **given)


def test_settings_of_models_that_are_not_asked_do_not_matter(tiny_folder, tmp_path):
    """A language model's name can be given when its column is added."""
    given = {"model": str(tiny_folder), "budget": 4, "reward": "jpeg-incompressibility"} | tiny.RUN
    first = compare(["a fox"], ["random"], out=tmp_path, **given)
    assert compare(["a fox"], ["random"], out=tmp_path, llm_model="another", promptist="some/model", **given) == first
    config = configure("a fox", strategy="promptist")
    assert {"promptist", "promptist_template"} < set(config.read())
    assert "llm_model" not in config.read()


def test_one_prompt_is_judged_by_its_repeats():
    runs = [
        {"solver": solver, "prompt": "p", "repeat": k, "best": value}
        for solver, values in (("a", (1.0, 3.0, None)), ("b", (0.0, 1.0, 5.0)))
        for k, value in enumerate(values)
    ]
    assert paired(runs, "a", "b", "best") == {"n": 2, "mean": 1.5, "interval": [1.0, 2.0]}


def test_a_finished_comparison_can_be_added_to(made, tiny_folder, tmp_path):
    """Only what is missing is run; what is there stays as it is, to the file time."""
    out, _ = made
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/run.json")}
    again = compare(PROMPTS, [*SOLVERS, "gradient"][:2], out=out, repeats=2, model=str(tiny_folder), **SETTINGS)
    assert {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/run.json")} == before
    more = compare(PROMPTS, [*SOLVERS, "cma"], out=out, repeats=2, model=str(tiny_folder), **SETTINGS)
    assert len(more["runs"]) == 12
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert again["table"] == [row for row in more["table"] if row["solver"] != "cma"]
    with pytest.raises(BadInput, match="other settings"):
        compare(PROMPTS, SOLVERS, out=out, repeats=2, model=str(tiny_folder), **SETTINGS | {"guidance_scale": 5.0})


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"strategies": []}, "at least one"),
        ({"prompts": []}, "at least one"),
        ({"strategies": ["random", "random"]}, "once"),
        ({"strategies": ["randon"]}, "'random'"),
        ({"strategies": ["seeds*gradient"]}, "strategy='gradient'"),
        ({"strategies": ["gradient"]}, "differentiable"),
        ({"repeats": 0}, "repeats=0"),
        ({"reference": "cma"}, "'cma'"),
        ({"budget": 0}, "budget=0"),
    ],
    ids=str,
)
def test_bad_comparisons_are_refused_before_anything_is_written(tiny_folder, tmp_path, change, shown):
    given: dict[str, Any] = {"prompts": PROMPTS, "strategies": SOLVERS, "model": str(tiny_folder), **SETTINGS} | change
    with pytest.raises(BadInput, match=shown):
        compare(given.pop("prompts"), given.pop("strategies"), out=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_how_solvers_are_named():
    assert solver_settings("cma") == {"strategy": "cma"}
    assert solver_settings("seeds") == {"space": "seeds", "strategy": "random"}
    assert solver_settings("tokens*bayes") == {"space": "tokens", "strategy": "bayes"}


def test_gradient_follows_one_candidate_whatever_the_batch(tmp_path):
    cells = plan(["a fox"], named(["gradient", "random"]), tmp_path, budget=20, batch_size=4)
    assert [cell.config.batch_size for cell in cells] == [1, 4]
    assert {cell.config.budget for cell in cells} == {20}


def test_ctrl_c_keeps_what_is_finished_and_the_same_line_continues(tiny_folder, tmp_path):
    """Through the command line, in a process that gets a real SIGINT."""
    words = [
        "compare", *PROMPTS, "--strategies", "random,seeds", "--repeats", "3", "--out", "out", "--model",
        str(tiny_folder), "--reward", "jpeg-incompressibility", "--judge", "none", "--budget", "10", "--held-out", "0",
        "--steps", "3", "--scheduler", "", "--basis", "random", "--prefix", "2", "--suffix", "2", "--basis-size", "4",
        "--batch-size", "1", "--device", "cpu",
    ]  # fmt: skip
    command = [sys.executable, "-m", "ipgo_opt.cli", *words]
    root = str(Path(ipgo_opt.__file__).parent.parent)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    )  # fmt: skip
    until = time.monotonic() + 120
    while len(list(tmp_path.glob("out/runs/*/*/cost.json"))) < 2:
        assert time.monotonic() < until
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    finished = [path.with_name("report.html") for path in tmp_path.glob("out/runs/*/*/cost.json")]
    kept = {path: path.read_bytes() for path in finished}
    assert 2 <= len(kept) < 12
    done = subprocess.run([*command, "--json"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert all(path.read_bytes() == data for path, data in kept.items())
    found = json.loads(done.stdout)
    assert len(found["runs"]) == 12
    assert found == json.loads((tmp_path / "out" / "compare.json").read_text())
