"""Conditioning files: everything is in them, other tools can read them, the wrong ones are refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ipgo_opt
from ipgo_opt import BadInput, optimize
from ipgo_opt.apply import apply
from ipgo_opt.artefact import write_comfyui
from ipgo_opt.cli import app
from ipgo_opt.verify import verify

ROOT = Path(__file__).parent.parent


def run(model: Path, out: Path, **changed: Any) -> Any:
    given: dict[str, Any] = {"reward": tiny.Redness(), "budget": 6, **tiny.RUN, "held_out": 0} | changed
    return optimize("a fox", model=str(model), out=out, **given)


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    made = run(tiny_folder, tmp_path_factory.mktemp("runs") / "run", search_seeds=2, attend=True)
    assert made.reward > made.raw_reward
    return made


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "xl"
    tiny.pipeline_xl().save_pretrained(str(folder))
    return folder


def changed_file(source: Path, target: Path, *, drop: str = "", **about: str) -> Path:
    """A conditioning file without a tensor, or with other metadata."""
    with safe_open(source / "best.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = {key: tensor for key, tensor in load_file(source / "best.safetensors").items() if key != drop}
    save_file(tensors, target, metadata | about)
    return target


def same(a: Any, b: Any) -> bool:
    return bool((np.asarray(a) == np.asarray(b)).all())


def test_everything_is_in_the_file(finished):
    file = ipgo_opt.load_conditioning(finished.folder)
    about = file.metadata
    expected = {
        "prompt": "a fox", "pipeline": "StableDiffusionPipeline", "scheduler": "LMSDiscreteScheduler", "seed": "0",
        "num_inference_steps": "3", "guidance_scale": "3.0", "attend": "1", "anchor": "0",
        "torch": torch.__version__.split("+")[0], "diffusers": diffusers.__version__, "height": "8", "width": "8",
        "length": "81",
    }  # fmt: skip
    assert expected == {name: about[name].split("+")[0] for name in expected}
    assert about["model"] == json.loads((finished.folder / "run.json").read_text())["config"]["model"]
    assert file.tensors["prompt_embeds"].shape == (1, 81, tiny.WIDTH)


def test_back_into_a_pipeline(tiny_folder, finished):
    """The same image as best.png, from the file and a pipeline that this package has not touched."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    file = ipgo_opt.load_conditioning(finished.folder / "best.safetensors")
    image = pipe(**file.to_pipeline(pipe)).images[0]
    assert same(image, finished.image)
    assert not same(image, finished.raw_image)
    assert pipe.unet.training is False


def test_pooled_embeddings_and_their_absence(xl_folder, tmp_path):
    """SDXL's file holds them and makes the same image; without them it is refused before anything is made."""
    result = run(xl_folder, tmp_path / "run")
    assert verify(tmp_path / "run")["same"]
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(xl_folder, add_watermarker=False)
    file = ipgo_opt.load_conditioning(tmp_path / "run")
    assert {"pooled_prompt_embeds", "negative_pooled_prompt_embeds"} <= file.tensors.keys()
    assert same(pipe(**file.to_pipeline(pipe)).images[0], result.image)
    lacking = changed_file(tmp_path / "run", tmp_path / "lacking.safetensors", drop="pooled_prompt_embeds")
    with pytest.raises(BadInput, match=r"StableDiffusionXLPipeline needs 'pooled_prompt_embeds', which .*lacking"):
        ipgo_opt.load_conditioning(lacking).to_pipeline(pipe)


def test_another_model_is_refused_by_name(tiny_folder, xl_folder, finished, tmp_path):
    """Another class, another width, another encoder of the same width."""
    file = ipgo_opt.load_conditioning(finished.folder)
    wide = diffusers.StableDiffusionXLPipeline.from_pretrained(xl_folder, add_watermarker=False)
    with pytest.raises(BadInput, match="is for a StableDiffusionPipeline, but got a StableDiffusionXLPipeline"):
        file.to_pipeline(wide)
    disguised = changed_file(finished.folder, tmp_path / "d.safetensors", pipeline="StableDiffusionXLPipeline")
    with pytest.raises(BadInput, match=rf"made for the model '{tiny_folder}', whose encoder is 16 wide.* 32 wide"):
        ipgo_opt.load_conditioning(disguised).to_pipeline(wide)
    other = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    with torch.no_grad():
        for parameter in other.text_encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)))
    with pytest.raises(BadInput, match=rf"made for the model '{tiny_folder}'.* has another text encoder"):
        file.to_pipeline(other)
    other.save_pretrained(str(tmp_path / "other"))
    with pytest.raises(BadInput, match="has another text encoder"):
        apply(finished.folder, ["a fox"], model=str(tmp_path / "other"))


def test_broken_files(finished, tmp_path):
    """Truncated, of another kind, missing."""
    data = (finished.folder / "best.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(BadInput, match=r"half\.safetensors' can't be read"):
        ipgo_opt.load_conditioning(tmp_path / "half.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(BadInput, match="no conditioning file"):
        ipgo_opt.load_conditioning(tmp_path / "a.safetensors")
    with pytest.raises(BadInput, match="nowhere"):
        ipgo_opt.load_conditioning(tmp_path / "nowhere")


def test_verify(tiny_folder, tmp_path, monkeypatch, capsys):
    """0 for the same image, 1 when the file or the image is another one."""
    run(tiny_folder, tmp_path / "run", search_seeds=2)

    def command() -> int:
        try:
            app(["verify", str(tmp_path / "run")])
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    assert command() == 0
    assert "pixel for pixel" in capsys.readouterr().out
    pixels = np.asarray(Image.open(tmp_path / "run" / "best.png")).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(tmp_path / "run" / "best.png")
    assert command() == 1
    assert "1 pixels differ, by up to 1" in capsys.readouterr().out
    tensors = load_file(tmp_path / "run" / "best.safetensors")
    assert verify(tmp_path / "run")["different_pixels"] == 1
    tensors["prompt_embeds"] *= 2
    with safe_open(tmp_path / "run" / "best.safetensors", "pt") as file:
        save_file(tensors, tmp_path / "run" / "best.safetensors", file.metadata())
    assert verify(tmp_path / "run")["different_pixels"] > 1


def snippet() -> str:
    """The documented code."""
    page = (ROOT / "docs" / "sharing.md").read_text()
    return page.split("<!-- plain -->\n```python\n")[1].split("```")[0]


def test_the_documented_snippet_without_this_package(tmp_path):
    """At most ten lines; in a process where ipgo_opt can't be imported, the same image, pixel for pixel."""
    text = snippet()
    assert len([line for line in text.splitlines() if line.strip() and not line.startswith(("import", "from"))]) <= 10
    result = optimize("a fox", budget=4, search_seeds=1, seed_share=0.0, held_out=0, out=tmp_path / "runs" / "fox")
    from ipgo_opt.models import EMBEDDED

    (tmp_path / "emoji").symlink_to(EMBEDDED["emoji"])
    guard = "import sys\nsys.modules['ipgo_opt'] = None\n"
    check = "\ntry:\n    import ipgo_opt\nexcept ImportError:\n    print('not importable')\n"
    done = subprocess.run([sys.executable, "-c", guard + text + check], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not importable" in done.stdout
    assert same(Image.open(tmp_path / "fox.png"), result.image)


def test_for_comfyui(finished, xl_folder, tmp_path):
    """As the reader of ComfyUI-LTXVideo takes it apart: one conditioning in each file."""
    paths = write_comfyui(ipgo_opt.load_conditioning(finished.folder), tmp_path / "fox.safetensors")
    assert [path.name for path in paths] == ["fox.safetensors", "fox.negative.safetensors"]
    own = ipgo_opt.load_conditioning(finished.folder).tensors
    for path, name in zip(paths, ("prompt_embeds", "negative_prompt_embeds"), strict=True):
        tensors = load_file(path)
        assert list(tensors) == ["conditioning_data_0"]
        assert torch.equal(tensors["conditioning_data_0"], own[name])
    run(xl_folder, tmp_path / "xl")
    first, second = write_comfyui(ipgo_opt.load_conditioning(tmp_path / "xl"), tmp_path / "out" / "xl.safetensors")
    own = ipgo_opt.load_conditioning(tmp_path / "xl").tensors
    assert torch.equal(load_file(first)["option_0_pooled_output"], own["pooled_prompt_embeds"])
    assert torch.equal(load_file(second)["option_0_pooled_output"], own["negative_pooled_prompt_embeds"])
