"""Many prompts in one pass: what one by one would have found, in as many run directories, surviving a kill."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import worker
from PIL import Image
from test_run import FILES, Moody
from torch import Tensor

import ipgo_opt
from ipgo_opt import BadInput, RunFailed, optimize, resume

PROMPTS = ["a fox", "two frogs on a blue background", "a castle at sunset"]


def settings(folder: Path, **changed: Any) -> dict[str, Any]:
    return {"reward": tiny.Redness(), "model": str(folder), "budget": 10, "held_out": 3, **tiny.RUN} | changed


def numbers(value: Any) -> Any:
    """Nested JSON without what depends on clock and place."""
    if isinstance(value, dict):
        return {key: numbers(inner) for key, inner in value.items() if key not in ("seconds", "out")}
    return [numbers(inner) for inner in value] if isinstance(value, list) else value


def assert_close(a: Any, b: Any) -> None:
    """Equal, numbers within 1e-5."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_close(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_close(one, other)
    elif isinstance(a, float):
        assert a == pytest.approx(b, abs=1e-5)
    else:
        assert a == b


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"search_seeds": 2, "seed_share": 0.4, "budget": 20, "chunk": 4},
        {"strategy": "random", "batch_size": 2},
        {"patience": 1, "learning_rate": 5.0, "budget": 14},
        {"attend": True, "layout": "per_token", "suffix": 0},
        {"space": "hard-tokens", "prefix": 0, "learning_rate": 0.5},
        {"space": "words", "strategy": "hybrid"},
        {"space": "lora", "strategy": "policy", "scheduler": "DDIMScheduler", "eta": 1.0, "batch_size": 3, "rank": 2},
    ],
    ids=str,
)
def test_the_same_as_one_by_one(tiny_folder, tmp_path, changed):
    """Histories, results, tokens and images; each in a directory as `optimize` leaves it."""
    lists = {"synonyms": {"fox": ["cat", "dog"]}, "additions": [["at night", "in the snow"]], "negative": ["blurry"]}
    (tmp_path / "words.json").write_text(json.dumps(lists))
    given = settings(tiny_folder, words=str(tmp_path / "words.json"), **changed)
    together = optimize(prompts=PROMPTS, out=tmp_path / "many", **given)
    assert [result.folder.name for result in together] == [
        "0-a-fox", "1-two-frogs-on-a-blue-background", "2-a-castle-at-sunset"
    ]  # fmt: skip
    lengths = set()
    for prompt, one in zip(PROMPTS, together, strict=True):
        alone = optimize(prompt, out=tmp_path / "alone" / one.folder.name, **given)
        assert_close(numbers(one.summary), numbers(alone.summary))
        assert_close(numbers(one.history), numbers(alone.history))
        lengths.add(len(one.history))
        assert {path.name for path in one.folder.iterdir()} - {".lock", "adapter"} == FILES
        a, b = (ipgo_opt.load_conditioning(result.folder) for result in (one, alone))
        assert a.metadata == b.metadata
        assert a.tensors.keys() == b.tensors.keys()
        for name in a.tensors:
            assert (a.tensors[name] - b.tensors[name]).abs().max() < 1e-4, name
        for name in ("raw.png", "best.png"):
            gap = np.asarray(Image.open(one.folder / name)).astype(int) - np.asarray(Image.open(alone.folder / name))
            assert np.abs(gap).max() <= 1
    assert len({one.reward for one in together}) == len(PROMPTS)
    if changed.get("patience"):
        assert min(lengths) < 14, "nobody stopped early"


def test_one_pass(tiny_folder, monkeypatch):
    """A round of all prompts is one pipeline call, not one for each."""
    from ipgo_opt.models.sampler import Sampler

    sizes: list[int] = []
    generate = Sampler.generate

    def counted(self: Sampler, conditioning: Any, seeds: Any, **how: Any) -> Tensor:
        sizes.append(len(seeds))
        return generate(self, conditioning, seeds, **how)

    monkeypatch.setattr(Sampler, "generate", counted)
    optimize(prompts=PROMPTS, **settings(tiny_folder, budget=4, held_out=0))
    assert sizes == [3, 3, 3, 3, 1, 1, 1]  # raw, three updates, best.png of each


def test_a_prompt_that_fails_does_not_stop_the_others(tiny_folder, tmp_path):
    """It is named at the end; what the others found is finished."""

    class Picky(tiny.Redness):
        def __call__(self, images: Tensor, prompts: Any) -> Tensor:
            bad = torch.tensor([prompt == PROMPTS[1] for prompt in prompts])
            return torch.where(bad, torch.nan, super().__call__(images, prompts))

    with pytest.raises(RunFailed, match=r"1 of 3 prompts failed.*two frogs.*no finite score"):
        optimize(prompts=PROMPTS, out=tmp_path, **settings(tiny_folder, reward=Picky()))
    status = [json.loads((home / "run.json").read_text())["status"] for home in sorted(tmp_path.glob("?-*"))]
    assert status == ["finished", "running", "finished"]


@pytest.mark.parametrize(("dies_at", "times"), [("checkpoint.safetensors", 3), ("best.png", 5), ("run.json", 6)])
def test_killed_and_resumed(tiny_folder, tmp_path, dies_at, times):
    """SIGKILL at a write: the histories and results are those of an undisturbed pass, bit for bit."""
    given = {key: value for key, value in settings(tiny_folder).items() if key not in ("reward", "model")}
    whole, torn = str(tmp_path / "whole"), str(tmp_path / "torn")
    assert worker.end(worker.start(worker.go_many, str(tiny_folder), whole, PROMPTS, given)) == 0
    killed = worker.end(worker.start(worker.go_many, str(tiny_folder), torn, PROMPTS, given, dies_at, times))
    assert killed == -signal.SIGKILL
    assert worker.end(worker.start(worker.go_many, str(tiny_folder), torn, PROMPTS, given)) == 0
    for home in sorted(Path(whole).glob("?-*")):
        other = Path(torn) / home.name
        assert worker.history(home) == worker.history(other)
        assert worker.result(home) == worker.result(other)
        assert (home / "best.png").read_bytes() == (other / "best.png").read_bytes()


def test_finished_prompts_are_not_run_again(tiny_folder, tmp_path):
    results = optimize(prompts=PROMPTS, out=tmp_path, **settings(tiny_folder, budget=3, held_out=0))
    again = resume(tmp_path)
    assert [one.summary for one in again] == [one.summary for one in results]
    assert [one.history for one in again] == [one.history for one in results]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": ["a fox", " "]}, "must not be empty"),
        ({}, "give a prompt"),
        ({"prompt": "a fox", "prompts": ["a fox"]}, "give a prompt"),
        ({"prompt": "a fox", "shared": True}, "give a prompt"),
    ],
    ids=str,
)
def test_bad_prompts(tiny_folder, tmp_path, given, shown):
    with pytest.raises(BadInput, match=shown):
        optimize(**given, out=tmp_path / "run", **settings(tiny_folder))
    assert not (tmp_path / "run").exists()


def test_failures_of_one_are_its_own(tiny_folder):
    """An image without a score in one search leaves the other's history as it was."""
    given = settings(tiny_folder, reward=Moody(), held_out=0)
    calm = optimize(prompts=PROMPTS[:2], **given)

    class Once(tiny.Redness):
        calls = 0

        def __call__(self, images: Tensor, prompts: Any) -> Tensor:
            Once.calls += 1
            scores = super().__call__(images, prompts)
            return torch.cat([scores[:1] * torch.nan, scores[1:]]) if Once.calls == 3 else scores

    torn = optimize(prompts=PROMPTS[:2], **settings(tiny_folder, reward=Once(), held_out=0))
    assert [record["reward"] for record in torn[0].history].count(None) == 1
    assert [r["reward"] for r in torn[1].history] == [r["reward"] for r in calm[1].history]
