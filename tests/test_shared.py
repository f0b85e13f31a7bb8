"""Shared tokens: what is trained on, what is chosen by, when it stops, and what a kill leaves."""

from __future__ import annotations

import json
import math
import signal
from collections import Counter
from typing import Any

import pytest
import tiny
import torch
import worker
from torch import Tensor

from ipgo_opt import BadInput, optimize, resume
from ipgo_opt.config import FIRST_VALIDATION_SEED, configure
from ipgo_opt.objective import Objective, Request
from ipgo_opt.registry import Entry
from ipgo_opt.report import rows
from ipgo_opt.rewards import JUDGES
from ipgo_opt.run import assemble

PROMPTS = ["a fox", "two frogs", "a castle at sunset", "a pizza", "a robot", "a tree", "an apple", "a bus", "a heart"]
VALIDATION = ["a lion", "a fish"]


def settings(**changed: Any) -> dict[str, Any]:
    return {
        "reward": tiny.Redness(), "budget": 40, **tiny.RUN, "held_out": 1, "shared": True, "prompts": PROMPTS,
        "validation": VALIDATION, "prompt_batch": 3, "patience": 0,
    } | changed  # fmt: skip


def run(folder: Any, **changed: Any) -> Any:
    return optimize(model=str(folder), **settings(**changed))


def by_evaluation(history: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return [[r for r in history if r["evaluation"] == e] for e in dict.fromkeys(r["evaluation"] for r in history)]


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    return run(tiny_folder, out=tmp_path_factory.mktemp("runs") / "shared")


def test_epochs_batches_and_seeds(finished):
    """Every epoch sees every prompt once, each image has a seed of its own, validation has prompts and seeds apart."""
    evaluations = by_evaluation(finished.history)
    assert [e[0]["part"] for e in evaluations] == (["validation"] + ["train"] * 3) * 3 + ["validation"] + [
        "train"
    ] * 1 + ["validation"]
    assert len(finished.history) == finished.summary["images"] == 2 * 5 + 3 * 10 <= 40
    train = [record for record in finished.history if record["part"] == "train"]
    for epoch in range(3):
        own = train[9 * epoch : 9 * epoch + 9]
        assert Counter(record["prompt"] for record in own) == Counter(PROMPTS)
    assert [r["prompt"] for r in train[:9]] != [r["prompt"] for r in train[9:18]]
    assert [record["seed"] for record in train] == list(range(30))
    for evaluation in evaluations:
        if evaluation[0]["part"] == "validation":
            assert [record["prompt"] for record in evaluation] == VALIDATION
            assert [record["seed"] for record in evaluation] == [FIRST_VALIDATION_SEED, FIRST_VALIDATION_SEED + 1]


def test_the_best_is_the_best_on_validation(finished):
    """Raw prompts included; it rises, on training prompts as well."""
    means = [sum(r["reward"] for r in e) / 2 for e in by_evaluation(finished.history) if e[0]["part"] == "validation"]
    assert finished.raw_reward == pytest.approx(means[0], abs=1e-6)
    assert finished.reward == pytest.approx(max(means), abs=1e-6)
    assert finished.reward > finished.raw_reward
    assert finished.held_out["n"] == 2
    assert finished.summary["updates"] == 10


def test_the_gradient_is_that_of_the_minibatch(tiny_folder):
    """Mean over prompts, accumulated over chunks: autograd of the mean written out, whatever the chunk."""
    slopes = []
    for chunk in (1, 2, 8):
        given = settings(chunk=chunk, gamma=0.3, reward="object:Redness")
        config = configure("many", model=str(tiny_folder), **given)
        parts = assemble(config, tiny.Redness(), {})
        objective = Objective(config, parts.sampler, parts.reward, None, parts.space, True)
        x = parts.space.coordinates(full=True).start[None]
        (made,) = objective([Request(x, tuple(PROMPTS[:3]), ((5,), (6,), (7,)), True)])
        slopes.append(made.gradient)
        assert made.scores.shape == (1, 3)
    leaf = x.clone().requires_grad_()
    total = torch.zeros(())
    for prompt, seed in zip(PROMPTS[:3], (5, 6, 7), strict=True):
        T, p_conf = parts.space.apply(leaf, parts.sampler.encode(prompt), full=True)
        image = parts.sampler.generate(T, [seed], gradient=True)
        total = total + (tiny.Redness()(image, [prompt]) - 0.3 * p_conf).sum() / 3
    (expected,) = torch.autograd.grad(total, leaf)
    assert expected.abs().max() > 1e-4
    for slope in slopes:
        assert (slope - expected).abs().max() < 1e-6


class Falling:
    """A judge that dislikes every change: 1 on the first call, then less and less."""

    differentiable = False

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images: Tensor, prompts: Any) -> Tensor:
        self.calls += 1
        return torch.full((len(images),), 1.02 - 0.02 * self.calls)


def test_tokens_that_the_judge_dislikes_are_not_kept(tiny_folder, monkeypatch):
    """Its means are 1, 0.92, 0.84, …: with a tolerance of 10 % only the first validation after the raw one counts."""
    monkeypatch.setitem(JUDGES, "judge", Entry(f"{__name__}:falling", "falls"))
    monkeypatch.setattr("ipgo_opt.config.EMBEDDED", {str(tiny_folder): tiny_folder})
    kept = {}
    for tolerance in (0.05, 0.1, 1.0):
        result = run(tiny_folder, judge="judge", judge_tolerance=tolerance, held_out=0)
        validations = [e for e in by_evaluation(result.history) if e[0]["part"] == "validation"]
        assert [e[0]["judge"] for e in validations[:3]] == pytest.approx([1.0, 0.92, 0.84])
        kept[tolerance] = result.reward
    means = [sum(r["reward"] for r in e) / 2 for e in validations]
    assert kept[0.05] == pytest.approx(means[0], abs=1e-6)
    assert kept[0.1] == pytest.approx(max(means[:2]), abs=1e-6)
    assert kept[1.0] == pytest.approx(max(means), abs=1e-6)
    assert kept[0.05] < kept[0.1]


def falling(device: str) -> Falling:
    return Falling()


def test_it_stops_early(tiny_folder):
    """After as many validations in a row as patience says without a better one."""
    result = run(tiny_folder, learning_rate=30.0, patience=2, budget=200, validate_every=1)
    bests = [e[0]["best"] for e in by_evaluation(result.history) if e[0]["part"] == "validation"]
    assert len(result.history) < 195
    assert bests[-4] < bests[-3] == bests[-2] == bests[-1]


def test_black_boxes_compare_on_one_minibatch(tiny_folder):
    """The same prompts and seeds for every candidate; the best of them so far is what is validated."""
    result = run(tiny_folder, strategy="random", batch_size=2, budget=100)
    train = [r for r in result.history if r["part"] == "train"]
    assert {(r["prompt"], r["seed"]) for r in train} == {(r["prompt"], r["seed"]) for r in train[:3]}
    assert {r["candidate"] for r in train} == {0, 1}
    assert result.reward >= result.raw_reward


@pytest.mark.parametrize(
    ("dies_at", "times"), [("checkpoint.safetensors", 4), ("checkpoint.safetensors", 9), ("best.png", 2)]
)
def test_killed_and_resumed(tiny_folder, tmp_path, finished, dies_at, times):
    """SIGKILL at a write: history and result are those of an undisturbed run, bit for bit."""
    given = {key: value for key, value in settings().items() if key != "reward"}
    prompts = given.pop("prompts")
    out = str(tmp_path / "torn")
    assert (
        worker.end(worker.start(worker.go_many, str(tiny_folder), out, prompts, given, dies_at, times))
        == -signal.SIGKILL
    )
    assert worker.end(worker.start(worker.go_many, str(tiny_folder), out, prompts, given)) == 0
    assert worker.history(tmp_path / "torn") == worker.history(finished.folder)
    assert worker.result(tmp_path / "torn") == worker.result(finished.folder)


def test_the_report_speaks_of_validation_prompts(finished):
    labels = [row[0] for row in rows(finished.summary)]
    assert labels[:2] == ["reward on 2 validation prompts", "reward on 2 fresh seeds (mean ± sd)"]
    assert "optimized, same seed" in (finished.folder / "report.html").read_text()


def test_a_finished_run_comes_back(finished):
    again = resume(finished.folder)
    assert again.summary == finished.summary
    assert json.loads((finished.folder / "run.json").read_text())["config"]["prompts"] == PROMPTS


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        ({"prompts": ["a fox"], "validation": None}, "0 and 1"),
        ({"validation": ["a fox"]}, "'a fox' in both"),
        ({"budget": 6}, "budget=6"),
        ({"search_seeds": 2}, "search_seeds=2"),
        ({"space": "seeds", "strategy": "random"}, "space of seeds"),
        ({"prompt_batch": 0}, "prompt_batch=0"),
        ({"judge_tolerance": math.nan}, "judge_tolerance=nan"),
        ({"seed": 8_999_999}, "seed=8999999"),
    ],
    ids=str,
)
def test_bad_settings(tiny_folder, tmp_path, changed, shown):
    with pytest.raises(BadInput, match=shown):
        run(tiny_folder, out=tmp_path / "run", **changed)
    assert not (tmp_path / "run").exists()


def test_the_papers_budget_is_twenty_epochs(tiny_folder):
    """With a tenth of the prompts for validation, if nothing else is said; the learning rate is constant."""
    prompts = [f"a fox {n}" for n in range(40)]
    config = configure("many", model=str(tiny_folder), shared=True, prompts=prompts, reward="object:Redness")
    assert (len(config.prompts), len(config.validation), config.decay) == (36, 4, 1.0)
    assert config.schedule.count("update") * config.prompt_batch == 20 * 36
    assert config.schedule.count("validate") == 21
    assert config.budget == 20 * 36 + 21 * 4
