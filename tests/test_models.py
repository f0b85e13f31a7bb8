"""What `--model` takes, and what it refuses in one line before any weights load; levers that save memory."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import families
import original
import pytest
import tiny
import torch
from safetensors.torch import save_file

from ipgo_opt import cli, optimize
from ipgo_opt.config import RunConfig, check_device, configure
from ipgo_opt.errors import BadInput
from ipgo_opt.models import load_pipeline, make_sampler, memory, resolve
from ipgo_opt.models.gate import denoiser
from ipgo_opt.models.interface import Interface
from ipgo_opt.models.sampler import Sampler

RUN: dict[str, Any] = tiny.RUN | {"budget": 3, "held_out": 0}


@pytest.fixture
def own_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pipeline that may be spoilt."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """The one line that `ipgo-opt run` says when it ends with exit code 2."""
    monkeypatch.setattr("sys.argv", ["ipgo-opt", "run", "a fox", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.entry()
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2, lines
    assert len(lines) == 1
    return lines[0]


def test_a_folder_without_an_index(capsys, monkeypatch, tmp_path):
    line = refused(capsys, monkeypatch, "--model", str(tmp_path))
    assert "has no model_index.json" in line


def test_a_pipeline_that_starts_from_an_image(capsys, monkeypatch, own_folder):
    index = own_folder / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"))
    line = refused(capsys, monkeypatch, "--model", str(own_folder))
    assert "StableDiffusionImg2ImgPipeline is not supported: it starts from an image" in line


def test_truncated_weights(capsys, monkeypatch, own_folder):
    weights = own_folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    line = refused(capsys, monkeypatch, "--model", str(own_folder))
    assert "diffusion_pytorch_model.safetensors' is not a whole safetensors file" in line


def test_a_file_that_can_hold_code(capsys, monkeypatch, tmp_path):
    """It is not even opened."""
    path, exploded = tmp_path / "model.ckpt", tmp_path / "exploded"
    path.write_bytes(pickle.dumps(Bomb(exploded)))
    line = refused(capsys, monkeypatch, "--model", str(path))
    assert "must be a safetensors file" in line
    assert not exploded.exists()


def test_half_precision_on_the_cpu(capsys, monkeypatch):
    line = refused(capsys, monkeypatch, "--device", "cpu", "--dtype", "float16")
    assert "float16 does not run on the CPU" in line
    assert check_device("cpu", "bfloat16") == ("cpu", "bfloat16")


def test_code_of_its_own_runs_only_when_asked_to(own_folder):
    index = own_folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": ["pipeline", "MyPipeline"]}))
    with pytest.raises(BadInput, match="--trust-remote-code"):
        resolve(str(own_folder))
    assert resolve(str(own_folder), remote_code=True).class_name is None


def test_a_hub_id_that_is_not_cached():
    """Tests run offline, so it says how to get it."""
    with pytest.raises(BadInput, match="hf download someone/something --revision abc"):
        resolve("someone/something", revision="abc")


def test_a_single_file(tmp_path, tiny_folder):
    """Which pipeline it is comes from the configuration that is given, or from what its tensors are called."""
    path = tmp_path / "model.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2, 4, 3, 3)}, path)
    source = resolve(str(path), config=str(tiny_folder))
    assert (source.class_name, source.config) == ("StableDiffusionPipeline", str(tiny_folder))
    with pytest.raises(BadInput, match="hf download stable-diffusion-v1-5/stable-diffusion-v1-5"):
        resolve(str(path))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadInput, match="not a whole safetensors file"):
        resolve(str(path), config=str(tiny_folder))


def test_a_scheduler_of_another_kind(tmp_path):
    """Flow matching and noise schedules do not mix."""
    pipeline = families.FAMILIES["flux"]()
    pipeline.own_scheduler = pipeline.scheduler
    settings = RunConfig("a fox").sampler_settings
    with pytest.raises(BadInput, match="FlowMatchEulerDiscreteScheduler, but got 'LMSDiscreteScheduler'"):
        make_sampler(pipeline, settings, scheduler="LMSDiscreteScheduler", chunk=1)
    assert isinstance(make_sampler(pipeline, settings, scheduler="", chunk=1), Sampler)


def test_defaults_are_the_pipelines_own(tmp_path, tiny_folder):
    """The paper's for the paper's class, the call's for every other, none for models distilled to a few steps."""
    paper = configure("a fox", model=str(tiny_folder), reward="jpeg-compressibility", strategy="random")
    assert (paper.scheduler, paper.num_inference_steps, paper.guidance_scale) == ("LMSDiscreteScheduler", 50, 7.5)
    families.FAMILIES["pixart_sigma"]().save_pretrained(str(tmp_path / "pixart"))
    other = configure("a fox", model=str(tmp_path / "pixart"), reward="jpeg-compressibility", strategy="random")
    assert (other.scheduler, other.num_inference_steps, other.guidance_scale) == ("", 20, 4.5)


@pytest.mark.parametrize(
    ("levers", "strategy", "shown"),
    [("chekpoint", "gradient", "Did you mean 'checkpoint'"), ("model-offload", "gradient", "accelerate|gradient")],
)
def test_bad_levers_are_refused(levers, strategy, shown):
    with pytest.raises(BadInput, match=shown):
        RunConfig("a fox", memory=levers, strategy=strategy).memory_levers()


def test_a_lever_that_the_model_lacks(tiny_folder):
    with pytest.raises(BadInput, match=r"UNet2DConditionModel|attention backend"):
        load_pipeline(resolve(str(tiny_folder)), "cpu", "float32", ("attention=nonsense",))


def saved_bytes(levers: tuple[str, ...], folder: Path) -> tuple[int, torch.Tensor, torch.Tensor]:
    """What a gradient step keeps for backward, its image and its gradient."""
    pipeline = load_pipeline(resolve(str(folder)), "cpu", "float32", levers)
    made = Sampler(pipeline, tiny.settings(num_inference_steps=2))
    given = made.encode("a fox")
    leaf = given.prompt_embeds.clone().requires_grad_()
    kept: list[int] = []
    weights = {p.data_ptr() for part in (denoiser(pipeline), pipeline.vae) for p in part.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(0 if tensor.data_ptr() in weights else tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        image = made.generate(replace(given, prompt_embeds=leaf), [0], gradient=True)
    (slope,) = torch.autograd.grad(image.square().sum(), leaf)
    return sum(kept), image.detach(), slope


def test_checkpointing_saves_memory_and_changes_nothing(tiny_folder):
    """Neither do the other levers that --low-memory may pull."""
    plain, image, slope = saved_bytes((), tiny_folder)
    less, same_image, same_slope = saved_bytes(("checkpoint", "slicing"), tiny_folder)
    assert less < 0.7 * plain
    torch.testing.assert_close(same_image, image)
    torch.testing.assert_close(same_slope, slope)


def test_low_memory_leaves_the_image_as_it_is():
    levers = memory.parse("tiling", low=True)
    assert set(levers) - {"tiling"} <= set(memory.LOW)
    assert "checkpoint" in levers
    assert not memory.NO_GRADIENT & set(memory.LOW)
    assert memory.parse("") == ()


def test_text_encoders_wait_in_main_memory(tiny_folder):
    """They come when a prompt is encoded; the image is the same."""
    pytest.importorskip("accelerate")
    plain = Sampler(load_pipeline(resolve(str(tiny_folder)), "cpu", "float32"), tiny.settings())
    pipeline = load_pipeline(resolve(str(tiny_folder)), "cpu", "float32", ("text-offload",))
    made = Sampler(pipeline, tiny.settings())
    assert len(pipeline.text_hooks) == 1
    images = [one.generate(one.encode("a fox"), [0]) for one in (plain, made)]
    assert torch.equal(*images)


def test_a_run_with_levers(tiny_folder, tmp_path):
    settings = RUN | {"low_memory": True, "memory": "tiling"}
    result = optimize("a fox", reward=tiny.Redness(), model=str(tiny_folder), out=tmp_path / "run", **settings)
    assert result.summary["images"] == 3


def test_a_checkpoint_in_one_file_paints_the_same(tmp_path, tiny_folder):
    """Under the names of the original checkpoints, with a folder for what the file lacks."""
    made = original.save(tmp_path / "model.safetensors")
    source = resolve(str(tmp_path / "model.safetensors"), config=str(tiny_folder))
    images = [
        one.generate(one.encode("a fox"), [0])
        for one in (
            Sampler(made, tiny.settings()),
            Sampler(load_pipeline(source, "cpu", "float32"), tiny.settings()),
        )
    ]
    torch.testing.assert_close(*images)


def test_a_judge_may_be_a_reward_that_is_not_optimized(tiny_folder, tmp_path):
    """With a model of any kind; one that is optimized is refused."""
    settings = RUN | {"held_out": 2, "strategy": "random", "reward": "jpeg-compressibility"}
    result = optimize("a fox", model=str(tiny_folder), judge="jpeg-incompressibility", out=tmp_path / "run", **settings)
    judged = result.summary["judge"]
    assert judged["name"] == "jpeg-incompressibility"
    assert judged["raw"] == pytest.approx(-result.summary["held_out"]["raw_mean"], rel=1e-5)
    with pytest.raises(BadInput, match="must be held out"):
        configure("a fox", model=str(tiny_folder), judge="jpeg-compressibility", **settings)


@pytest.mark.parametrize(
    ("class_name", "negative_prompt", "true_cfg_scale", "shown"),
    [
        ("StableDiffusionPipeline", "", 2.0, "one guidance only"),
        ("LatentConsistencyModelPipeline", "blurry", 1.0, "reads no negative prompt"),
        ("FluxPipeline", "blurry", 1.0, "if `true_cfg_scale > 1`"),
    ],
)
def test_guidance_that_would_be_passed_over_is_refused(class_name, negative_prompt, true_cfg_scale, shown):
    """By the class alone; with the other settings it is accepted."""
    interface = Interface.of(getattr(diffusers, class_name))
    with pytest.raises(BadInput, match=shown):
        interface.check_guidance(negative_prompt, true_cfg_scale)
    interface.check_guidance("", 1.0)
    Interface.of(diffusers.FluxPipeline).check_guidance("blurry", 2.0)
