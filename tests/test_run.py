"""A whole run on the tiny pipeline: what it promises, what it writes, and what survives a kill."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import numpy as np
import pytest
import tiny
import torch
import worker
from PIL import Image
from safetensors import safe_open
from torch import Tensor

import ipgo_opt
from ipgo_opt import BadInput, Result, RunFailed, optimize, resume
from ipgo_opt.config import RunConfig
from ipgo_opt.registry import Entry
from ipgo_opt.store import Store, to_pil
from ipgo_opt.strategies import STRATEGIES
from ipgo_opt.strategies.random import Random

strategies = pytest.mark.parametrize("strategy", ["gradient", "random"])
FIELDS = ["image", "evaluation", "candidate", "seed", "reward", "parts", "judge", "penalty", "best", "seconds"]
FILES = {
    "run.json", "history.jsonl", "raw.png", "best.png", "best.safetensors", "report.html", "checkpoint.safetensors",
    "space.safetensors",
}  # fmt: skip


def run(folder: Path, reward: Any = None, **changed: Any) -> Result:
    """A short run on the tiny pipeline in `folder`."""
    settings: dict[str, Any] = {"budget": 8, **tiny.RUN} | changed
    return optimize("a fox", reward=reward or tiny.Redness(), model=str(folder), **settings)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [strict(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def pixels(image: Image.Image) -> list[Any]:
    """Rows of columns of channels."""
    return np.asarray(image).tolist()


def strict(text: str) -> Any:
    """JSON as every reader knows it: without NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory) -> Result:
    """A finished run with the gradient strategy."""
    return run(tiny_folder, out=tmp_path_factory.mktemp("runs") / "finished")


@strategies
@pytest.mark.parametrize("seed", [0, 3, 8])
def test_the_best_is_never_below_the_raw_prompt(tiny_folder, strategy, seed):
    """Evaluation 0 is the raw prompt's own image; `best` is the running maximum from there on."""
    result = run(tiny_folder, strategy=strategy, seed=seed, budget=7, held_out=0)
    assert result.history[0]["evaluation"] == 0
    assert result.history[0]["reward"] == result.raw_reward
    assert result.history[0]["penalty"] == 0
    rewards = [record["reward"] for record in result.history]
    assert [record["best"] for record in result.history] == [max(rewards[: n + 1]) for n in range(7)]
    assert result.reward == max(rewards) >= result.raw_reward
    assert len(set(rewards)) == 7
    plain = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    image = plain(
        "a fox", generator=torch.Generator("cpu").manual_seed(seed), num_inference_steps=3, guidance_scale=3.0
    )
    assert pixels(result.raw_image) == pixels(image.images[0])


def test_the_gradient_strategy_climbs(tiny_folder):
    """Every one of its first steps is uphill, and the reward is that of the image on disk."""
    result = run(tiny_folder, budget=12, learning_rate=0.02, held_out=0, gamma=0.0)
    rewards = [record["reward"] for record in result.history[1:]]
    assert rewards == sorted(rewards)
    assert rewards[-1] > rewards[0] + 1e-5
    image = torch.tensor(pixels(result.image)).permute(2, 0, 1)[None] / 255
    assert tiny.Redness()(image, ["a fox"]).item() == pytest.approx(result.reward, abs=2e-2)


@pytest.mark.parametrize(
    ("settings", "images"),
    [
        ({"budget": 2}, 2),
        ({"budget": 8}, 8),
        ({"budget": 8, "strategy": "random"}, 8),
        ({"budget": 8, "strategy": "random", "batch_size": 3}, 7),
        ({"budget": 11, "strategy": "random", "batch_size": 2, "search_seeds": 2}, 10),
        ({"budget": 9, "search_seeds": 3}, 9),
        ({"budget": 9, "search_seeds": 4, "chunk": 3}, 8),
    ],
    ids=str,
)
def test_the_budget_is_kept_to_the_image(tiny_folder, tmp_path, settings, images):
    """As many images as whole steps fit in, each with a line; the verdict's are not counted."""
    config = RunConfig("a fox", **settings)
    result = run(tiny_folder, out=tmp_path / "run", **settings)
    records = lines(tmp_path / "run")
    assert len(records) == result.summary["images"] == images <= settings["budget"]
    assert [record["image"] for record in records] == list(range(images))
    assert [record["seed"] for record in records] == [k % config.search_seeds for k in range(images)]
    per_step = config.search_seeds * config.batch_size
    evaluations = [0] * config.search_seeds
    for step in range(1, (images - config.search_seeds) // per_step + 1):
        evaluations += [step] * per_step
    assert [record["evaluation"] for record in records] == evaluations
    assert {record["candidate"] for record in records} == set(range(config.batch_size))
    assert result.summary["denoiser_calls"] == images * 3 * 2
    best = max(
        math.fsum(r["reward"] for r in records if (r["evaluation"], r["candidate"]) == at) / config.search_seeds
        for at in {(r["evaluation"], r["candidate"]) for r in records}
    )
    assert result.reward == pytest.approx(best, abs=1e-6)


def test_what_a_run_leaves_behind(tiny_folder, finished):
    """The promised files and nothing else; every line with every field; what is in memory is what is on disk."""
    folder = finished.folder
    assert {path.name for path in folder.iterdir()} - {".lock"} == FILES
    records = lines(folder)
    assert records == finished.history
    for record in records:
        assert list(record) == FIELDS
        assert record["parts"] == {"object:Redness": record["reward"]}
        assert record["judge"] is None
        assert (record["penalty"] > 0) == (record["evaluation"] > 0)
    seconds = [record["seconds"] for record in records]
    assert 0 < seconds[0] <= seconds[-1] <= finished.summary["seconds"] + 0.01
    assert seconds == sorted(seconds)
    written = strict((folder / "run.json").read_text())
    assert written["status"] == "finished"
    assert written["result"] == finished.summary
    assert set(written["config"]) == {field.name for field in dataclasses.fields(RunConfig)}
    assert written["config"] | tiny.RUN == written["config"]
    assert set(written["versions"]) == {"python", "torch", "diffusers", "transformers"}
    assert finished.image.size == finished.raw_image.size == (tiny.PIXELS, tiny.PIXELS)
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page.replace('"http-equiv', "")


def test_the_summary(tiny_folder, finished):
    """Search reward and held-out reward side by side, the latter on seeds of its own, against numbers made anew."""
    summary = finished.summary
    assert (summary["prompt"], summary["model"]) == ("a fox", str(tiny_folder))
    assert (summary["space"], summary["strategy"], summary["reward"]) == ("tokens", "gradient", "object:Redness")
    assert (summary["seed"], summary["failed"], summary["judge"]) == (0, 0, None)
    assert summary["out"] == str(finished.folder)
    assert finished.raw_reward == summary["raw_reward"] == finished.history[0]["reward"]
    assert finished.held_out == summary["held_out"]
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    with safe_open(finished.folder / "best.safetensors", "pt") as file:
        best = {key: file.get_tensor(key) for key in ("prompt_embeds", "negative_prompt_embeds")}
    for prefix, inputs in (("raw_", {"prompt": "a fox"}), ("", best)):
        scores = []
        for seed in (10_000_000, 10_000_001):
            generator = torch.Generator("cpu").manual_seed(seed)
            made = pipe(
                **inputs, generator=generator, num_inference_steps=3, guidance_scale=3.0, output_type="pt"
            ).images
            scores.append(tiny.Redness()(made, ["a fox"]).item())
        assert summary["held_out"][f"{prefix}mean"] == pytest.approx(sum(scores) / 2, abs=1e-5)
        assert summary["held_out"][f"{prefix}sd"] == pytest.approx(abs(scores[0] - scores[1]) / math.sqrt(2), abs=1e-5)
    assert summary["held_out"]["n"] == 2


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance_scale": 1.0},
        {"search_seeds": 2, "layout": "per_token"},
        {"strategy": "random"},
        {"strategy": "random", "batch_size": 3, "search_seeds": 2, "budget": 20, "negative_prompt": "a rocket"},
    ],
    ids=str,
)
def test_the_best_image_comes_back_from_plain_diffusers(tiny_folder, tmp_path, settings):
    """prompt_embeds and negative_prompt_embeds of best.safetensors in an unmodified pipeline: best.png, every pixel."""
    guidance = settings.get("guidance_scale", 3.0)
    result = run(tiny_folder, out=tmp_path, seed=5, held_out=0, **settings)
    with safe_open(tmp_path / "best.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        about = file.metadata()
    assert result.reward > result.raw_reward  # else the raw prompt would be compared with itself
    assert set(tensors) == {"encoder", "prompt_embeds", "x", "prefix", "suffix", "basis.prefix", "basis.suffix"} | (
        {"negative_prompt_embeds"} if guidance > 1 else set()
    )
    assert torch.equal(tensors["prompt_embeds"][0, :2], tensors["prefix"])
    assert torch.equal(tensors["prompt_embeds"][0, -2:], tensors["suffix"])
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    image = pipe(
        prompt_embeds=tensors["prompt_embeds"], negative_prompt_embeds=tensors.get("negative_prompt_embeds"),
        generator=torch.Generator("cpu").manual_seed(int(about["seed"])), height=int(about["height"]),
        num_inference_steps=int(about["num_inference_steps"]), guidance_scale=float(about["guidance_scale"]),
    ).images[0]  # fmt: skip
    assert about["scheduler"] == type(pipe.scheduler).__name__
    assert pixels(image) == pixels(Image.open(tmp_path / "best.png"))
    assert pixels(image) == pixels(result.image)


class Moody:
    """Redness, but NaN in the calls whose numbers are given; counts from 0, the raw prompt."""

    differentiable = True

    def __init__(self, *bad: int, value: float = math.nan) -> None:
        self.bad, self.value, self.calls = bad, value, 0

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.calls += 1
        scores = tiny.Redness()(images, prompts)
        return scores * self.value if self.calls - 1 in self.bad else scores


@strategies
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_images_without_a_score_are_recorded_and_survived(tiny_folder, tmp_path, strategy, value):
    """As null; they are never the best, and the run goes on to its budget."""
    result = run(tiny_folder, Moody(1, 3, 4, value=value), out=tmp_path, strategy=strategy, held_out=0)
    records = lines(tmp_path)
    assert [record["image"] for record in records if record["reward"] is None] == [1, 3, 4]
    assert len(records) == result.summary["images"] == 8
    assert result.summary["failed"] == 3
    good = [record["reward"] for record in records if record["reward"] is not None]
    assert result.reward == max(good)
    assert all(record["parts"] == {"object:Moody": record["reward"]} for record in records)


class Spy(Random):
    """Random search that writes down what it is told."""

    told: ClassVar[list[float]] = []

    def tell(self, x: Tensor, value: Tensor, gradient: Tensor | None = None) -> None:
        super().tell(x, value, gradient)
        self.told.extend(value.tolist())


class Interrupted(Moody):
    """Moody, until Ctrl-C is pressed in its seventh call."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if self.calls == 6:
            raise KeyboardInterrupt
        return super().__call__(images, prompts)


def test_a_solver_is_told_a_failure_as_the_worst_value(tiny_folder, tmp_path, monkeypatch):
    """Finite, and never better than what it has seen, across a Ctrl-C and a resume as well."""
    monkeypatch.setitem(STRATEGIES, "spy", Entry(f"{__name__}:Spy", "random search that takes notes"))
    monkeypatch.setattr(Spy, "told", [])
    with pytest.raises(KeyboardInterrupt):
        run(tiny_folder, Interrupted(1, 4), out=tmp_path, strategy="spy", budget=9, held_out=0, gamma=0.5)
    first = list(Spy.told)
    assert len(first) == 5
    resume(tmp_path, reward=Moody(0))  # its first call is the one that was interrupted
    told = Spy.told[5:]
    assert len(told) == 3
    good = [r["reward"] - 0.5 * r["penalty"] for r in lines(tmp_path)[1:] if r["reward"] is not None]
    assert first == pytest.approx([0.0, good[0], good[1], min(good[:2]), good[2]], abs=1e-6)
    assert told == pytest.approx([min(good[:3]), good[3], good[4]], abs=1e-6)


def test_a_raw_prompt_without_a_score(tiny_folder, tmp_path):
    """The search goes on; what is not known is null, in JSON that every reader knows."""
    result = run(tiny_folder, Moody(0), out=tmp_path, held_out=0)
    assert lines(tmp_path)[0]["best"] is None
    assert result.reward == max(record["reward"] for record in result.history[1:])
    assert math.isnan(result.raw_reward)
    assert strict((tmp_path / "run.json").read_text())["result"]["raw_reward"] is None


def test_a_held_out_image_without_a_score(tiny_folder, tmp_path):
    """Does not make run.json unreadable."""
    run(tiny_folder, Moody(8), out=tmp_path, budget=8, chunk=1)
    strict((tmp_path / "run.json").read_text())


@pytest.mark.parametrize(("budget", "recorded"), [(5, 5), (30, 10)])
@strategies
def test_a_reward_that_never_scores_fails_the_run(tiny_folder, tmp_path, strategy, budget, recorded):
    """At the budget, or after ten in a row; what was recorded is kept."""
    with pytest.raises(RunFailed, match="no finite score"):
        run(tiny_folder, Moody(*range(99)), out=tmp_path, strategy=strategy, budget=budget)
    records = lines(tmp_path)
    assert len(records) == recorded
    assert all(record["reward"] is None and record["best"] is None for record in records)
    assert strict((tmp_path / "run.json").read_text())["status"] != "finished"


class Opaque(tiny.Redness):
    """A reward without a gradient, which it enforces."""

    differentiable = False

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([float(score) for score in super().__call__(images.detach(), prompts)])


def test_a_reward_without_gradient(tiny_folder, tmp_path):
    """Is searched by a black-box strategy, and refused by one that needs the gradient before anything is written."""
    result = run(tiny_folder, Opaque(), strategy="random", held_out=0)
    assert result.reward > result.raw_reward
    with pytest.raises(BadInput, match="differentiable"):
        run(tiny_folder, Opaque(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_basis_wider_than_the_encoder_leaves_nothing(tiny_folder, tmp_path):
    """A rule that needs the model's width to be checked is a rule all the same."""
    with pytest.raises(BadInput, match="d=16"):
        run(tiny_folder, out=tmp_path / "run", basis_size=30)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        ({"budget": 1}, "budget=1"),
        ({"budget": 8.0}, "budget=8.0"),
        ({"budget": True}, "budget=True"),
        ({"search_seeds": 8}, "16 images"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 10_000_000}, "held out"),
        ({"grad_steps": 4}, "grad_steps=4"),
        ({"guidance_scale": math.nan}, "guidance_scale=nan"),
        ({"learning_rate": math.inf}, "learning_rate=inf"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"scheduler": "NoScheduler"}, "'NoScheduler'"),
        ({"scheduler": "UNet2DConditionModel"}, "'UNet2DConditionModel'"),
        ({"strategy": "gradeint"}, "Did you mean 'gradient'"),
        ({"judge": "nobody"}, "'nobody'"),
        ({"judge": "judge"}, "embedded model"),
        ({"device": "tpu"}, "'tpu'"),
        ({"device": "cpu", "dtype": "float16"}, "float16"),
        ({"dtype": "int8"}, "'int8'"),
        ({"learning_rat": 1.0}, "'learning_rat'"),
        ({"model": "nowhere"}, "'nowhere'"),
        ({"model": "some/hub-model"}, "hf download some/hub-model"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(tiny_folder, tmp_path, setting, shown):
    """Before weights load: in one line that shows the value, with nothing written."""
    settings: dict[str, Any] = {"budget": 8, "model": str(tiny_folder), **tiny.RUN} | setting
    with pytest.raises(BadInput, match=shown) as caught:
        optimize("a fox", reward=tiny.Redness(), out=tmp_path / "run", **settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_model_of_the_wrong_kind_is_refused(tiny_folder, tmp_path):
    """By its index alone: no weights are there to load."""
    for class_name, shown in (
        ("StableDiffusionImg2ImgPipeline", "starts from an image"),
        ("NoPipeline", "'NoPipeline'"),
        (None, "names no pipeline class"),
    ):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": class_name} if class_name else {}))
        with pytest.raises(BadInput, match=shown):
            run(tmp_path, out=tmp_path / "run")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(RunFailed, match="did not load"):
        run(tmp_path, out=tmp_path / "run")


def test_a_run_without_a_folder_can_be_saved(tiny_folder, tmp_path):
    """save copies the whole directory, says where it is, refuses one that holds a run, and outlives the result."""
    result = run(tiny_folder, held_out=0)
    temporary, history = result.folder, result.history
    saved = result.save(tmp_path / "saved")
    assert saved == tmp_path / "saved"
    assert {path.name for path in saved.iterdir()} == FILES
    for name in set(FILES) - {"run.json"}:
        assert (saved / name).read_bytes() == (temporary / name).read_bytes()
    before, after = (json.loads((folder / "run.json").read_text()) for folder in (temporary, saved))
    assert after["result"]["out"] == result.summary["out"] == str(saved)
    assert before | {"result": before["result"] | {"out": str(saved)}} == after
    with pytest.raises(BadInput, match="another run"):
        result.save(saved)
    del result
    assert not temporary.exists()
    assert resume(saved, reward=tiny.Redness()).history == history


def test_a_finished_run_is_not_run_again(finished):
    """resume gives the same result, needs no reward for it, and writes nothing."""
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in finished.folder.iterdir()}
    again = resume(finished.folder)
    assert (again.summary, again.history) == (finished.summary, finished.history)
    assert pixels(again.image) == pixels(finished.image)
    assert before == {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in finished.folder.iterdir()}


def test_a_folder_with_a_run_is_not_overwritten(tiny_folder, finished):
    before = {path.name: path.read_bytes() for path in finished.folder.iterdir()}
    with pytest.raises(BadInput, match="another run"):
        run(tiny_folder, out=finished.folder)
    assert before == {path.name: path.read_bytes() for path in finished.folder.iterdir()}


class Listener:
    """A reporter that writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def started(self, config: RunConfig, out: Path, history: list[dict[str, Any]]) -> None:
        self.told.append(("started", (config.prompt, out, len(history))))

    def warned(self, message: str) -> None:
        self.told.append(("warned", message))

    def evaluated(self, record: dict[str, Any]) -> None:
        self.told.append(("evaluated", record))

    def judging(self, done: int, total: int) -> None:
        self.told.append(("judging", (done, total)))

    def finished(self, summary: dict[str, Any]) -> None:
        self.told.append(("finished", summary))


def test_a_reporter_is_told_everything(tiny_folder, tmp_path):
    """In order: the start, every record, the verdict's progress, the end; and that a long prompt is cut."""
    settings: dict[str, Any] = tiny.RUN | {"budget": 3, "out": tmp_path}
    listener = Listener()
    prompt = "a fox " * 50
    result = optimize(prompt, reward=tiny.Redness(), model=str(tiny_folder), reporter=listener, **settings)
    assert [name for name, _ in listener.told if name != "warned"] == [
        "started", "evaluated", "evaluated", "evaluated", "judging", "judging", "finished",
    ]  # fmt: skip
    (warning,) = [message for name, message in listener.told if name == "warned"]
    assert f"{len(tiny.tokenizer()(prompt).input_ids)} tokens" in warning
    assert "first 77" in warning
    told = dict(listener.told)
    assert told["started"] == (prompt, tmp_path, 0)
    assert [record for name, record in listener.told if name == "evaluated"] == result.history
    assert told["judging"] == (4, 4)
    assert told["finished"] == result.summary


def uninterrupted(tiny_folder: Path, out: Path, **settings: Any) -> Path:
    """A run in a process of its own that is left alone."""
    assert worker.end(worker.start(worker.go, str(tiny_folder), str(out), tiny.RUN | settings)) == 0
    return out


def assert_equal_runs(first: Path, second: Path) -> None:
    """The same history and result, the same images, tensors and metadata."""
    assert worker.history(first) == worker.history(second)
    assert worker.result(first) == worker.result(second)
    for name in ("raw.png", "best.png"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    for name in ("best.safetensors", "space.safetensors"):
        with safe_open(first / name, "pt") as one, safe_open(second / name, "pt") as other:
            assert sorted(one.keys()) == sorted(other.keys())
            assert one.metadata() == other.metadata()
            for key in one.keys():  # noqa: SIM118
                assert torch.equal(one.get_tensor(key), other.get_tensor(key)), key


@pytest.mark.parametrize(
    ("strategy", "deaths", "settings"),
    [
        ("gradient", 5, {"budget": 40}),
        ("bayes", 20, {"budget": 100, "batch_size": 4, "seed_share": 0.2}),
        ("cma", 20, {"budget": 100, "batch_size": 4, "seed_share": 0.2}),
    ],
    ids=["gradient", "bayes", "cma"],
)
def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(tiny_folder, tmp_path, strategy, deaths, settings):
    """SIGKILL many times in a row at random moments of the search, and a resume after each."""
    settings = tiny.RUN | settings | {"strategy": strategy}
    expected = uninterrupted(tiny_folder, tmp_path / "expected", **settings)
    out, rng = tmp_path / "killed", random.Random(0)
    kills, goal = 0, 0
    recorded = []
    while kills < deaths:
        goal += rng.randint(1, 6)
        process = worker.start(worker.go, str(tiny_folder), str(out), settings)
        path = out / "history.jsonl"
        until = time.monotonic() + 60
        while process.is_alive() and (not path.exists() or path.read_bytes().count(b"\n") < goal):
            assert time.monotonic() < until, "the run made no progress"
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        assert worker.end(process) == -signal.SIGKILL, "the run was over before it could be killed"
        kills += 1
        assert worker.history(out)[: len(recorded)] == recorded
        recorded = worker.history(out)
    assert worker.end(worker.start(worker.go, str(tiny_folder), str(out), settings)) == 0
    assert_equal_runs(out, expected)


@strategies
def test_a_run_killed_at_each_of_its_files_ends_as_if_it_had_not_been(tiny_folder, tmp_path, strategy):
    """Death just before every kind of file is replaced, one after the other in the same run."""
    settings = tiny.RUN | {"budget": 8, "strategy": strategy}
    expected = uninterrupted(tiny_folder, tmp_path / "expected", **settings)
    out = tmp_path / "killed"
    deaths = [
        ("space.safetensors", 1), ("raw.png", 1), ("best.png", 1), ("checkpoint.safetensors", 1), ("best.png", 2),
        ("checkpoint.safetensors", 4), ("checkpoint.safetensors", 1), ("best.safetensors", 1), ("run.json", 1),
        ("report.html", 1),
    ]  # fmt: skip
    for name, times in deaths:
        process = worker.start(worker.go, str(tiny_folder), str(out), settings, name, times)
        assert worker.end(process) == -signal.SIGKILL, name
    assert worker.end(worker.start(worker.go, str(tiny_folder), str(out), settings)) == 0
    assert_equal_runs(out, expected)
    assert (out / "report.html").exists()
    assert not list(out.glob("*.tmp"))


@pytest.fixture
def stopped(tiny_folder, tmp_path) -> Path:
    """A run that was killed before its fifth checkpoint: four are saved, the fifth image is on record."""
    process = worker.start(
        worker.go, str(tiny_folder), str(tmp_path), tiny.RUN | {"budget": 8}, "checkpoint.safetensors", 5
    )
    assert worker.end(process) == -signal.SIGKILL
    assert len(lines(tmp_path)) == 5
    return tmp_path


@pytest.mark.parametrize("torn", ['{"image": 5, "evaluation": 5, "rew', '{"image": 5}', '{"image": 5}\n{"im'])
def test_a_torn_last_line_is_repaired(tiny_folder, stopped, tmp_path_factory, torn):
    """What the dying process had half written disappears."""
    with (stopped / "history.jsonl").open("a") as file:
        file.write(torn)
    result = resume(stopped, reward=tiny.Redness())
    records = lines(stopped)
    assert [record["image"] for record in records] == list(range(8))
    assert records == result.history
    expected = run(tiny_folder, out=tmp_path_factory.mktemp("expected"))
    assert [record["reward"] for record in records] == pytest.approx([r["reward"] for r in expected.history], abs=1e-5)


def test_what_can_not_be_resumed_is_said(stopped, tmp_path_factory):
    """A damaged checkpoint, a history that lacks lines, a layout of the future, a missing reward, no run at all."""

    def refused(shown: str, **given: Any) -> None:
        with pytest.raises(BadInput, match=shown) as caught:
            resume(stopped, **({"reward": tiny.Redness()} | given))
        assert "\n" not in str(caught.value)

    refused("Redness", reward=None)
    for name, damaged, shown in (
        ("history.jsonl", (stopped / "history.jsonl").read_bytes()[:100], "history.jsonl"),
        ("history.jsonl", b"", "must hold 4 records"),
        ("checkpoint.safetensors", (stopped / "checkpoint.safetensors").read_bytes()[:200], "checkpoint.safetensors"),
        ("checkpoint.safetensors", b"", "checkpoint.safetensors"),
        ("space.safetensors", b"nothing", "space.safetensors"),
        ("run.json", b'{"format": 1, "config"', "damaged"),
        ("run.json", b'{"format": 999}', "999"),
        ("run.json", b'{"format": 1, "status": "running"}', "configuration"),
        ("run.json", b"[]", "run.json"),
    ):
        whole = (stopped / name).read_bytes()
        (stopped / name).write_bytes(damaged)
        refused(shown)
        (stopped / name).write_bytes(whole)
    assert len(resume(stopped, reward=tiny.Redness()).history) == 8  # nothing was lost by trying
    with pytest.raises(BadInput, match="a run directory must hold"):
        resume(tmp_path_factory.mktemp("empty"))


def test_two_processes_never_share_a_directory(tiny_folder, stopped, tmp_path_factory):
    """The second is told so; when the first is killed, the directory is free."""
    ready = tmp_path_factory.mktemp("ready") / "ready"
    process = worker.start(worker.hold, str(stopped), str(ready))
    until = time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    before = (stopped / "history.jsonl").read_bytes()
    with pytest.raises(BadInput, match="in use"):
        resume(stopped, reward=tiny.Redness())
    (stopped / "run.json").rename(stopped / "aside.json")  # to a new run, the directory then looks free
    with pytest.raises(BadInput, match="in use"):
        run(tiny_folder, out=stopped)
    (stopped / "aside.json").rename(stopped / "run.json")
    assert (stopped / "history.jsonl").read_bytes() == before
    process.kill()
    assert worker.end(process) == -signal.SIGKILL
    assert len(resume(stopped, reward=tiny.Redness()).history) == 8


def test_checkpoints_keep_any_state(tmp_path):
    """Nested dicts and lists, every kind of number, generators' states and odd dtypes."""
    store = Store(tmp_path)
    state = {
        "numbers": [1, 2.5, -math.inf, True, None, "text", 2**60],
        "generator": torch.Generator().manual_seed(3).get_state(),
        "nested": {"list": [torch.ones(2, 3).T, {"deep": torch.tensor(1, dtype=torch.int64)}], "empty": {}},
        "half": torch.ones(2, dtype=torch.bfloat16),
        "nothing": torch.zeros(0),
    }
    store.save_checkpoint(state)
    loaded = store.load_checkpoint()
    store.close()
    assert loaded["numbers"] == state["numbers"]
    assert loaded["nested"]["empty"] == {}
    for first, second in (
        (loaded["generator"], state["generator"]),
        (loaded["nested"]["list"][0], state["nested"]["list"][0]),
        (loaded["nested"]["list"][1]["deep"], state["nested"]["list"][1]["deep"]),
        (loaded["half"], state["half"]),
        (loaded["nothing"], state["nothing"]),
    ):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)


def test_images_are_rounded_to_the_nearest_step():
    values = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 254.4 / 255, 1.0, 1.2, -0.1])
    image = to_pil(values.view(1, 1, 7).expand(3, 1, 7))
    assert [value[0] for value in pixels(image)[0]] == [0, 0, 1, 254, 255, 255, 0]


def test_the_public_names():
    for name in ipgo_opt.__all__:
        assert getattr(ipgo_opt, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        ipgo_opt.nothing  # noqa: B018
