"""The embedded model and its rewards, as they are in the package."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import ipgo_opt
from ipgo_opt import BadInput, optimize, resume
from ipgo_opt.config import configure
from ipgo_opt.models import EMBEDDED, load, resolve
from ipgo_opt.models.sampler import Sampler
from ipgo_opt.rewards import IN_PACKAGE, JUDGES, REWARDS
from ipgo_opt.rewards.clip import EMOJI
from ipgo_opt.store import to_pil

MIB = 2**20
FOLDER = EMBEDDED["emoji"]
PROMPT = "a fox and a rocket"
EMBEDDED_REWARDS = [name for name in IN_PACKAGE if not getattr(REWARDS[name], "any_model", False)]
every_reward = pytest.mark.parametrize("name", [*EMBEDDED_REWARDS, *JUDGES])
ROOT = str(Path(ipgo_opt.__file__).parent.parent)
ENV = os.environ | {"PYTHONPATH": os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])}


def reward(name: str) -> Any:
    return (REWARDS if name in REWARDS else JUDGES).load(name)("cpu")


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    """The embedded model with its default settings, but 6 steps."""
    config = configure(PROMPT, model="emoji", num_inference_steps=6)
    return load(resolve("emoji"), config.sampler_settings, device="cpu", dtype="float32", scheduler="", chunk=8)


@pytest.fixture(scope="module")
def images(sampler: Sampler) -> torch.Tensor:
    """Three different images (3, 3, 64, 64)."""
    return sampler.generate(sampler.encode(PROMPT).expand(3), [0, 1, 2])


@pytest.mark.parametrize("seed", [0, 7])
def test_the_folder_is_a_plain_pipeline(sampler, seed):
    """diffusers loads it as it is; what the sampler makes of the prompt is its image, pixel for pixel."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(FOLDER)
    assert type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"
    settings = sampler.settings
    plain = pipe.to(torch.float32)(
        PROMPT, generator=torch.Generator("cpu").manual_seed(seed), num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
    ).images[0]  # fmt: skip
    ours = to_pil(sampler.generate(sampler.encode(PROMPT), [seed])[0])
    assert sampler.size == (64, 64)
    assert np.array_equal(np.asarray(ours), np.asarray(plain))
    assert np.asarray(ours).std() > 10  # an image, not a plain colour


def test_the_weights_are_small_and_safe():
    """Every file below 16 MiB, both folders below 30, no pickles, half precision."""
    files = [path for folder in (FOLDER, EMOJI) for path in folder.rglob("*") if path.is_file()]
    sizes = {str(path): path.stat().st_size for path in files}
    assert len(files) > 10
    assert max(sizes.values()) < 16 * MIB, max(sizes, key=lambda path: sizes[path])
    assert sum(sizes.values()) < 30 * MIB
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]


def test_the_configurations_name_no_folder():
    """Nothing tells where a part was loaded from when it was packed."""
    configs = [path for folder in (FOLDER, EMOJI) for path in folder.rglob("*.json")]
    assert len(configs) > 5
    assert not [path for path in configs if '"_name_or_path"' in path.read_text()]


@every_reward
def test_a_reward_keeps_the_contract(name, images):
    """(B,) scores in their range; a batch equals one by one; the gradient reaches every image."""
    score, prompts = reward(name), [PROMPT, "three cats", "a house by the sea, neon"]
    leaf = images.clone().requires_grad_()
    scores = score(leaf, prompts)
    assert scores.shape == (3,)
    assert scores.dtype == torch.float32
    low, high = {"aesthetic": (-2.0, 13.0), "clip-spherical": (-(math.pi**2) / 2, 0.0)}.get(name, (-1.0, 1.0))
    assert ((scores >= low) & (scores <= high)).all()
    assert scores.detach().std() > 1e-3
    assert score.differentiable
    (slope,) = torch.autograd.grad(scores.sum(), leaf)
    assert (slope.abs().amax((1, 2, 3)) > 1e-6).all()
    with torch.no_grad():
        for k, prompt in enumerate(prompts):
            one = score(images[k : k + 1], [prompt])
            torch.testing.assert_close(one, scores.detach()[k : k + 1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["clip", "judge", "preference"])
def test_alignment_tells_prompts_apart(name, sampler):
    """Over eight seeds, an image is closer to its own prompt than to another one."""
    score, prompts = reward(name), ["a fox", "a rocket"]
    for own, other in (prompts, prompts[::-1]):
        made = sampler.generate(sampler.encode(own).expand(8), range(8))
        assert (score(made, [own] * 8) > score(made, [other] * 8)).sum() >= 6


@pytest.mark.parametrize("name", ["aesthetic", "preference"])
def test_taste_is_for_sharp_pictures(name, sampler):
    """Over eight seeds, a blurred and a noisy copy of an image please less than the image."""
    score, made = reward(name), sampler.generate(sampler.encode("a fox").expand(8), range(8))
    blurred = torch.nn.functional.interpolate(
        torch.nn.functional.avg_pool2d(made, 4), scale_factor=4, mode="bilinear", align_corners=False
    )
    noisy = made + torch.randn(made.shape, generator=torch.Generator().manual_seed(0)) * 0.15
    for worse in (blurred, noisy.clamp(0, 1)):
        assert (score(worse, ["a fox"] * 8) < score(made, ["a fox"] * 8)).sum() >= 7


def test_the_judge_is_another_model():
    """Held out means that neither its weights nor its scores are the reward's."""
    clip, judge = reward("clip").encoder.model, reward("judge").encoder.model
    shapes = [model.vision_model.config.hidden_size for model in (clip, judge)]
    assert shapes[0] != shapes[1]
    assert all(
        not torch.equal(a, b) for a, b in zip(clip.parameters(), judge.parameters(), strict=False) if a.numel() > 1
    )


def test_a_run_from_the_command_line(tmp_path):
    """One JSON object with all the keys on standard output and nothing else; the run directory as it says."""
    arguments = [
        "run",
        PROMPT,
        "--budget",
        "4",
        "--held-out",
        "2",
        "--steps",
        "4",
        "--json",
        "--out",
        "runs/fox",
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "ipgo_opt.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=ENV,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    summary = json.loads(done.stdout)
    assert set(summary) >= {
        "prompt", "model", "space", "strategy", "reward", "seed", "images", "denoiser_calls", "seconds", "raw_reward",
        "search_reward", "held_out", "judge", "out",
    }  # fmt: skip
    assert set(summary["held_out"]) >= {"n", "mean", "sd", "raw_mean", "raw_sd"}
    assert set(summary["judge"]) >= {"raw", "optimized"}
    assert (summary["prompt"], summary["model"], summary["images"], summary["held_out"]["n"]) == (PROMPT, "emoji", 4, 2)
    assert summary["denoiser_calls"] == 4 * 4 * 2
    assert summary["search_reward"] >= summary["raw_reward"]
    folder = tmp_path / summary["out"]
    assert Image.open(folder / "best.png").size == (64, 64)
    records = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    for record in records:
        assert set(record["parts"]) == {"clip", "preference"}
        assert record["reward"] == pytest.approx(sum(record["parts"].values()), abs=1e-4)
        assert -1 <= record["judge"] <= 1
    assert json.loads((folder / "run.json").read_text())["result"] == summary
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_ctrl_c_and_resume(tmp_path):
    """Exit code 130, with how to go on; resume generates the images that are left."""
    arguments = ["run", PROMPT, "--budget", "40", "--held-out", "0", "--steps", "2", "--device", "cpu", "--out", "fox"]
    command = [sys.executable, "-m", "ipgo_opt.cli", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=ENV,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    ) as process:  # fmt: skip
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if line.startswith("image "):
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, said + err
    assert out == ""
    assert "Traceback" not in err
    assert "resume" in err
    assert resume(tmp_path / "fox").summary["images"] == 40


def test_search_pays(tmp_path):
    """On the embedded model the aesthetic score of a cat rises within a few steps (docs/first-light.md: 20 of 20)."""
    result = optimize("a cat", reward="aesthetic", budget=12, held_out=0, device="cpu", out=tmp_path)
    assert result.reward > result.raw_reward + 1e-3
    assert (result.summary["model"], result.summary["strategy"]) == ("emoji", "gradient")
    assert configure(PROMPT).reward == "clip+preference"


@pytest.mark.parametrize("wrong", [{"basis_size": 129}, {"reward": "object:Redness"}], ids=str)
def test_rules_that_only_this_model_breaks(tmp_path, wrong):
    """Are bad input as well, and leave nothing behind."""
    with pytest.raises(BadInput):
        optimize(PROMPT, out=tmp_path / "run", budget=2, **wrong)
    assert not (tmp_path / "run").exists()


def test_doctor_finds_the_embedded_weights():
    """Exit code 0 in an environment without problems, with every embedded weight present."""
    done = subprocess.run(
        [sys.executable, "-m", "ipgo_opt.cli", "doctor", "--json"], capture_output=True, text=True, env=ENV
    )
    found = json.loads(done.stdout)
    assert done.returncode == (1 if found["problems"] else 0)
    assert not [problem for problem in found["problems"] if "embedded" in problem]
    present = {entry["name"] for entry in found["weights"] if entry["present"]}
    assert present >= {"emoji", "clip (emoji)", "judge (emoji)", "aesthetic (emoji)", "preference (emoji)"}


def test_names_lead_to_what_is_there():
    """Every listed reward and judge loads, and scores an image of any size."""
    for name in (*IN_PACKAGE, *JUDGES):
        image = torch.full((1, 3, 96, 80), 0.5)
        assert reward(name)(image, ["a fox"]).isfinite().all()
