"""Learned tokens on new prompts, their strength, and what can be read in them."""

from __future__ import annotations

import json
import math
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file

from ipgo_opt import BadInput, optimize
from ipgo_opt.apply import apply
from ipgo_opt.cli import entry
from ipgo_opt.reading import read_tokens

PROMPTS = ["a lion", "two fish"]


def train(tiny_folder, folder, **changed):
    given: dict[str, Any] = {
        **tiny.RUN,
        "held_out": 1,
        "validation": ["a bus"],
        "patience": 0,
        "learning_rate": 0.3,
    } | changed
    made = optimize(
        prompts=["a fox", "a tree", "a robot"], shared=True, reward=tiny.Redness(), model=str(tiny_folder), budget=20,
        out=folder, **given,
    )  # fmt: skip
    assert made.reward > made.raw_reward
    return made


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    return train(tiny_folder, tmp_path_factory.mktemp("runs") / "shared")


def pixels(path: Any) -> Any:
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize("anchor", [False, True])
def test_images_are_those_of_a_plain_pipeline(tiny_folder, finished, tmp_path, anchor):
    """Raw and at each strength: T built by hand from the file's tokens, through unmodified diffusers."""
    if anchor:
        finished = train(tiny_folder, tmp_path / "anchored", anchor=True)
    made = apply(finished.folder, PROMPTS, seeds=[3, 7], strengths=[0.5, 1.5], out=tmp_path, picture=True)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    tokens = load_file(finished.folder / "best.safetensors")
    assert len(made["images"]) == 2 * 2 * 3
    for one in made["images"]:
        states, negative = pipe.encode_prompt(one["prompt"], "cpu", 1, True, "")
        if one["strength"] is not None:
            mean = states.mean(1) if anchor else 0
            V = {side: one["strength"] * tokens[side][None] + mean for side in ("prefix", "suffix")}
            states = torch.cat([V["prefix"], states, V["suffix"]], 1)
            negative = torch.cat([negative, negative[:, -1:].expand(-1, 4, -1)], 1)
        image = pipe(
            prompt_embeds=states, negative_prompt_embeds=negative, num_inference_steps=3, guidance_scale=3.0,
            generator=torch.Generator("cpu").manual_seed(one["seed"]),
        ).images[0]  # fmt: skip
        assert np.abs(np.asarray(image) - pixels(tmp_path / one["file"])).max() <= 1, one
    assert len({(tmp_path / one["file"]).read_bytes() for one in made["images"]}) == 12
    assert json.loads((tmp_path / "apply.json").read_text()) == made
    assert Image.open(tmp_path / "grid.png").width == 3 * (128 + 6)


def test_from_the_file_alone(finished, tmp_path):
    """The same images as from the directory."""
    loaded: dict[Any, Any] = {}
    for source, out in ((finished.folder, "a"), (finished.folder / "best.safetensors", "b")):
        apply(source, PROMPTS, seeds=[1], out=tmp_path / out, loaded=loaded)
    for path in (tmp_path / "a").glob("*.png"):
        assert np.abs(pixels(path) - pixels(tmp_path / "b" / path.name)).max() <= 1


def test_rewards_beside_raw(finished):
    """Scores, means and paired differences when asked for, none otherwise."""
    made = apply(finished.folder, PROMPTS, seeds=[0, 1], reward="jpeg-compressibility")
    (difference,) = made["differences"]
    raw = [one["reward"] for one in made["images"] if one["strength"] is None]
    best = [one["reward"] for one in made["images"] if one["strength"] == 1.0]
    assert difference["reward"]["raw"] == pytest.approx(np.mean(raw), abs=1e-6)
    assert difference["reward"]["difference"]["mean"] == pytest.approx(np.mean(best) - np.mean(raw), abs=1e-6)
    assert difference["reward"]["difference"]["n"] == 2
    assert "judge" not in difference
    plain = apply(finished.folder, PROMPTS)
    assert plain["differences"] == [{"strength": 1.0}]
    assert all(one["reward"] is None for one in plain["images"])


@pytest.mark.parametrize("strength", [math.nan, -0.1, 1.6, math.inf])
def test_strengths_out_of_range(finished, tmp_path, strength):
    with pytest.raises(BadInput, match=r"0 <= strength <= 1\.5"):
        apply(finished.folder, PROMPTS, strengths=[1.0, strength], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--prompt", "a fox", "--strength", "nan"], "strength=nan"),
        (["--prompt", "a fox", "--strength", "much"], "'much'"),
        (["--prompt", "a fox", "--seeds", "7-"], "'7-'"),
        (["--prompt", "a fox", "--seeds", "5-2"], "at least"),
        ([], "--prompt"),
        (["--prompt", " "], "must not be empty"),
        (["--prompt", "a fox", "--reward", "beauty"], "'beauty'"),
    ],
    ids=str,
)
def test_a_wrong_command_line(finished, monkeypatch, capsys, tmp_path, arguments, shown):
    """One line, exit code 2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["ipgo-opt", "apply", str(finished.folder), *arguments])
    with pytest.raises(SystemExit) as end:
        entry()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert shown in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_reading_the_tokens(finished):
    """A token's nearest words are those of the largest cosine, computed here; norms, angles and conformity too."""
    found = read_tokens(finished.folder, words=50, nearest=3)
    sampler = tiny.sampler()
    words, states = sampler.vocabulary(50), sampler.word_states(50)
    tokens = load_file(finished.folder / "best.safetensors")
    assert [(one["side"], one["place"]) for one in found["tokens"]] == [
        ("prefix", 0), ("prefix", 1), ("suffix", 0), ("suffix", 1)
    ]  # fmt: skip
    for one in found["tokens"]:
        token = tokens[one["side"]][one["place"]]
        cosines = [float(token @ state / token.norm() / state.norm()) for state in states]
        order = sorted(range(len(words)), key=lambda k: -cosines[k])[:3]
        assert [near["word"] for near in one["nearest"]] == [words[k] for k in order]
        assert [near["similarity"] for near in one["nearest"]] == pytest.approx([cosines[k] for k in order], abs=1e-5)
        assert one["norm"] == pytest.approx(float(token.norm()), rel=1e-5)
    x = tokens["x"]
    assert found["angles"]["suffix"]["theta2"] == pytest.approx([float(x[-1])])
    assert found["angles"]["suffix"]["theta1"] == pytest.approx([float(x[-2])])
    states, T = sampler.encode("a bus").prompt_embeds, tokens["prompt_embeds"]
    assert found["conformity"] == pytest.approx(float((T.mean(1) - states.mean(1)).square().sum()), rel=1e-4)
    assert len(found["rewards"]) == len(finished.history)


def test_show_prints(finished, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ipgo-opt", "show", str(finished.folder), "--words", "20", "--json"])
    with pytest.raises(SystemExit):
        entry()
    shown = json.loads(capsys.readouterr().out)
    monkeypatch.setattr("sys.argv", ["ipgo-opt", "show", str(finished.folder), "--words", "20"])
    with pytest.raises(SystemExit):
        entry()
    text = capsys.readouterr().out
    assert shown["tokens"][0]["nearest"][0]["word"] in text
    assert f"conformity penalty {shown['conformity']:.4f}" in text


def test_adapter_weights_on_new_prompts(tiny_folder, tmp_path):
    """What a run on another space found is applied as it is, with any reward; words are for their own prompt."""
    given = tiny.RUN | {"model": str(tiny_folder), "reward": tiny.Redness(), "held_out": 0}
    found = optimize("a fox", space="lora", rank=2, budget=5, out=tmp_path / "lora", **given)
    assert found.reward > found.raw_reward
    made = apply(tmp_path / "lora", ["a cat"], seeds=[0], reward="jpeg-compressibility", out=tmp_path / "applied")
    raw, changed = ((tmp_path / "applied" / entry["file"]).read_bytes() for entry in made["images"])
    assert raw != changed
    optimize("a fox", space="hard-tokens", budget=5, out=tmp_path / "words", **given)
    with pytest.raises(BadInput, match="its own prompt"):
        apply(tmp_path / "words", ["a cat"], seeds=[0])
