"""Every published method, end to end on the tiny pipeline: run, stop, resume, compare."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import worker
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from ipgo_opt import comparison
from ipgo_opt.cli import app
from ipgo_opt.config import configure
from ipgo_opt.errors import BadInput
from ipgo_opt.methods import METHODS, method_settings
from ipgo_opt.run import optimize, resume

OWN: dict[str, dict[str, Any]] = {
    "draft-1": {"rank": 2}, "draft-lv": {"rank": 2}, "pez": {"suffix": 2, "prefix": 0, "learning_rate": 0.5},
    "reno": {"grad_steps": 3, "learning_rate": 5.0}, "reno+ipgo": {"grad_steps": 3}, "best-of-n": {"seed_share": 1.0},
    "ddpo": {"rank": 2, "scheduler": "DDIMScheduler", "eta": 1.0, "batch_size": 3},
    **{name: {"words": str(Path(__file__).parent / "words.json")} for name in ("dpo-diff", "gpo", "epo")},
}  # fmt: skip
"""What the tiny pipeline wants beside tiny.RUN."""

WRITERS = {"promptist", "llm", "opt2i"}
"""Methods that need a language model: tests/test_rewriting.py."""

every_method = pytest.mark.parametrize("method", [name for name in METHODS if name not in WRITERS])


def settings(method: str, **changed: Any) -> dict[str, Any]:
    return tiny.RUN | {"budget": 10, "held_out": 0} | OWN.get(method, {}) | method_settings(method) | changed


class Interrupted:
    """Redness until Ctrl-C is pressed in the call of that number."""

    differentiable = True

    def __init__(self, call: float = math.inf) -> None:
        self.calls, self.last = 0, call

    def __call__(self, images: Tensor, prompts: Any) -> Tensor:
        self.calls += 1
        if self.calls > self.last:
            raise KeyboardInterrupt
        return tiny.Redness()(images, prompts)


@every_method
def test_stopped_and_resumed_it_ends_the_same(method, tiny_folder, tmp_path):
    """At every third call of the reward, again and again, until it is through: history, result and adapter."""
    reward = Interrupted()
    optimize("a fox", reward=reward, model=str(tiny_folder), out=tmp_path / "whole", **settings(method))
    calls = reward.calls
    with pytest.raises(KeyboardInterrupt):
        optimize("a fox", reward=Interrupted(0), model=str(tiny_folder), out=tmp_path / "stopped", **settings(method))
    stops = 0
    for _ in range(calls + 1):
        try:
            resume(tmp_path / "stopped", reward=Interrupted(1 if method == "best-of-n" else 3))
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops >= (1 if calls > 3 else 0)
    assert worker.history(tmp_path / "stopped") == worker.history(tmp_path / "whole")
    whole, stopped = (worker.result(tmp_path / name)["result"] for name in ("whole", "stopped"))
    assert whole == stopped
    assert (tmp_path / "whole" / "best.png").read_bytes() == (tmp_path / "stopped" / "best.png").read_bytes()
    names = ["best.safetensors", *(["adapter/adapter_model.safetensors"] if whole["space"] == "lora" else [])]
    for name in names:
        first, second = (load_file(tmp_path / run / name) for run in ("whole", "stopped"))
        assert set(first) == set(second)
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("method", ["ddpo", "reno+ipgo", "pez"])
def test_killed_and_resumed_it_ends_the_same(method, tiny_folder, tmp_path):
    """SIGKILL in the middle of writing a checkpoint."""
    given = settings(method)
    assert worker.end(worker.start(worker.go, str(tiny_folder), str(tmp_path / "whole"), given)) == 0
    kill = worker.start(worker.go, str(tiny_folder), str(tmp_path / "killed"), given, "checkpoint.safetensors", 3)
    assert worker.end(kill) == -9
    assert worker.end(worker.start(worker.go, str(tiny_folder), str(tmp_path / "killed"), given)) == 0
    assert worker.history(tmp_path / "killed") == worker.history(tmp_path / "whole")
    assert worker.result(tmp_path / "killed") == worker.result(tmp_path / "whole")


@every_method
def test_the_best_is_never_below_the_raw_prompt_and_the_verdict_is_on_fresh_seeds(method, tiny_folder):
    result = optimize("a fox", reward=tiny.Redness(), model=str(tiny_folder), **settings(method, held_out=2))
    assert result.reward >= result.raw_reward
    assert result.held_out is not None
    assert math.isfinite(result.held_out["mean"])
    assert result.summary["images"] == len(result.history) <= 10


def test_methods_side_by_side(tiny_folder, tmp_path):
    """`compare` takes them by name, at one budget, from one raw prompt."""
    file = tmp_path / "judge.py"
    file.write_text(
        "def redness(images, prompts):\n    return images[:, 0].mean((1, 2)) - images.square().mean((1, 2, 3))\n"
        "redness.differentiable = True\n"
    )
    common = {key: value for key, value in tiny.RUN.items() if key not in ("batch_size", "prefix", "suffix")}
    made = comparison.compare(
        ["a fox"], ["ipgo", "draft-1", "reno", "pez", "embedding", "draft-lv"], out=tmp_path / "compared", budget=5,
        model=str(tiny_folder), reward=f"{file}:redness", **common | {"held_out": 0},
    )  # fmt: skip
    assert [row["solver"] for row in made["table"]] == ["ipgo", "draft-1", "reno", "pez", "embedding", "draft-lv"]
    assert {row["images"] for row in made["table"]} == {5}
    assert len({row["raw"] for row in made["table"]}) == 1


def test_the_command_line(tmp_path):
    """--method on the embedded model, the words on standard error and in the JSON object."""
    line = ["run", "a fox", "--method", "pez", "--suffix", "2", "--budget", "3", "--search-seeds", "1", "--seed-share",
            "0", "--held-out", "0", "--steps", "2", "--out", str(tmp_path / "run"), "--json"]  # fmt: skip
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert summary["space"] == "hard-tokens"
    raw = summary["search_reward"] == summary["raw_reward"]
    assert (summary["optimized"] == {"prompt": "a fox", "negative_prompt": ""}) == raw
    assert json.loads((tmp_path / "run" / "run.json").read_text())["result"] == summary


@every_method
def test_defaults_are_complete(method):
    """By its name alone, on the embedded model and on the paper's."""
    config = configure("a fox", **method_settings(method))
    assert config.model == "emoji"
    if method.startswith("reno"):
        assert config.grad_steps == config.num_inference_steps == 10
    if method == "ddpo":
        assert (config.scheduler, config.eta, config.search_seeds) == ("DDIMScheduler", 1.0, 1)


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"space": "lora", "rank": 0}, "rank=0"),
        ({"space": "lora", "lora_targets": " , "}, "lora_targets"),
        ({"space": "lora", "lora_targets": "to_x"}, "'to_x' ends none"),
        ({"lv_samples": 1, "grad_steps": 2}, "grad_steps=2"),
        ({"lv_samples": -1}, "lv_samples=-1"),
        ({"lv_samples": 1, "num_inference_steps": 1}, "num_inference_steps=1"),
        ({"eta": 0.5}, "scheduler=''"),
        ({"eta": 1.5, "scheduler": "DDIMScheduler"}, "eta=1.5"),
        ({"optimizer": "sgd"}, "'sgd'"),
        ({"space": "hard-tokens", "memory": "text-offload"}, "text-offload"),
        ({"inner_updates": 0}, "inner_updates=0"),
        ({"noise_weight": math.nan}, "noise_weight=nan"),
    ],
    ids=str,
)
def test_bad_settings_are_one_line(tiny_folder, tmp_path, wrong, rule):
    """The rule and the value, and nothing is written."""
    given = tiny.RUN | {"budget": 4} | wrong
    with pytest.raises(BadInput, match=rule) as caught:
        optimize("a fox", reward=tiny.Redness(), model=str(tiny_folder), out=tmp_path / "run", **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
