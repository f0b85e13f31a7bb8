"""Rewards for real models: their weights found, read safely, and scores as the originals' own code gives them."""

from __future__ import annotations

import gzip
import importlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import open_clip as published
import pytest
import tiny
import torch
from torch.nn import functional as F

from ipgo_opt.config import configure
from ipgo_opt.errors import BadInput
from ipgo_opt.rewards import REWARDS, aesthetic, hps, imscore, open_clip, pickscore, stands_for
from ipgo_opt.rewards.aesthetic import AestheticHead
from ipgo_opt.rewards.base import Term, parse, prepare
from ipgo_opt.rewards.clip import ClipEncoder, ClipReward
from ipgo_opt.rewards.open_clip import OpenClipEncoder, load_model
from ipgo_opt.store import to_pil

PROMPTS = ["a fox", "two rockets on a purple background", "a fox and a rocket at night, neon"]
HEAD = Path(__file__).parents[2] / "shared" / "data" / "sac+logos+ava1-l14-linearMSE.pth"
REAL = ("clip", "aesthetic", "hps", "hps:v2.1", "pickscore", "clip:ViT-B-32/openai", "clip:someone/clip")
SHAPE: dict[str, Any] = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 4},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def pictures(*size: int, n: int = 3, seed: int = 0) -> torch.Tensor:
    """Smooth random images (n, 3, H, W) in 256 steps, as PNG files hold them."""
    coarse = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size, mode="bicubic", align_corners=False).clamp(0, 1).mul(255).round().div(255)


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny architecture that open_clip knows by name."""
    folder = tmp_path_factory.mktemp("architectures")
    (folder / "tiny-clip.json").write_text(json.dumps(SHAPE))
    published.add_model_config(folder)
    return "tiny-clip"


@pytest.fixture(scope="module")
def checkpoint(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of it, in the form of HPS's files."""
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = published.create_model(architecture, load_weights=False)
        torch.nn.init.normal_(model.logit_scale, 2.0, 0.1)
    torch.save({"state_dict": model.state_dict()}, path)
    return path


@pytest.mark.parametrize("size", [(16, 16), (40, 24), (33, 48)], ids=str)
def test_open_clip_is_open_clips_own(architecture, checkpoint, size):
    """Its transform of 8-bit images and its model, on the same weights; only the resizing is not bit for bit."""
    model, _, transform = published.create_model_and_transforms(architecture, pretrained=str(checkpoint))
    images = pictures(*size)
    seen = torch.stack([transform(to_pil(image)) for image in images])
    said = published.get_tokenizer(architecture)(PROMPTS)
    with torch.no_grad():
        left = F.normalize(model.eval().encode_image(seen), dim=-1)
        expected = (left * F.normalize(model.encode_text(said), dim=-1)).sum(-1)
    made = OpenClipEncoder(load_model(architecture, "", checkpoint), architecture)
    scores = ClipReward(made)(images, PROMPTS)
    tolerance = 3e-6 if size == (16, 16) else 0.05 * (left[0] - left[1]).norm().item()
    torch.testing.assert_close(scores, expected, rtol=0, atol=tolerance)
    assert scores.std() > 1e-3


def test_open_clip_is_differentiable(architecture, checkpoint):
    """Against a difference quotient, in float64."""
    made = OpenClipEncoder(load_model(architecture, "", checkpoint).double(), architecture)
    images = pictures(24, 20, n=2).double().requires_grad_()
    reward = ClipReward(made)
    (slope,) = torch.autograd.grad(reward(images, PROMPTS[:2]).sum(), images)
    step = 1e-6 * slope / slope.norm()
    with torch.no_grad():
        rise = reward(images + step, PROMPTS[:2]).sum() - reward(images - step, PROMPTS[:2]).sum()
    assert rise.item() / 2e-6 == pytest.approx(slope.norm().item(), rel=1e-3)


def hpsv2_code(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model code of hpsv2, whose wheel lacks a vocabulary that open_clip has; nothing is written anywhere."""
    pytest.importorskip("hpsv2", reason="parity with hpsv2 needs the extra [hps]", exc_type=ImportError)
    vocabulary = Path(published.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    opened = gzip.open
    monkeypatch.setattr(
        gzip, "open", lambda path, *given: opened(vocabulary if str(path).endswith(vocabulary.name) else path, *given)
    )
    from hpsv2.src.open_clip import model, transform

    return model, transform


def test_hps_is_hpsv2s_own(architecture, checkpoint, monkeypatch):
    """Its model code and its transform, on the same random weights."""
    model, transform = hpsv2_code(monkeypatch)
    theirs = model.CLIP(**SHAPE, output_dict=True).eval()
    theirs.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"], strict=False)
    images = pictures(40, 24)
    prepared = transform.image_transform(16, is_train=False)
    seen = torch.stack([prepared(to_pil(image)) for image in images])
    said = published.get_tokenizer(architecture)(PROMPTS)
    with torch.no_grad():
        out = theirs(seen, said)
        expected = torch.diagonal(out["image_features"] @ out["text_features"].T)
    made = OpenClipEncoder(load_model(architecture, "", checkpoint), architecture, clamp=False)
    torch.testing.assert_close(ClipReward(made)(images, PROMPTS), expected, rtol=0, atol=2e-5)


def test_pickscore_is_the_published_formula(tmp_path):
    """exp(logit_scale) times the cosine of transformers' own embeddings."""
    from transformers import CLIPModel, CLIPProcessor

    folder = tiny.save_clip(tmp_path)
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    images = pictures(16, 16)
    inputs = processor(text=PROMPTS, images=[to_pil(image) for image in images], return_tensors="pt", padding=True)
    with torch.no_grad():
        out = model(**inputs)
    scores = pickscore.PickScore(ClipEncoder(folder))(images, PROMPTS)
    torch.testing.assert_close(scores, out.logits_per_image.diagonal(), rtol=1e-5, atol=1e-4)
    assert scores.std() > 1e-2


def test_the_published_aesthetic_head():
    """It loads without executing anything, and gives this number for this unit vector."""
    if not HEAD.is_file():
        pytest.skip(f"the published head {HEAD.name!r} (3.7 MB) is not beside the repository")
    head = AestheticHead.from_file(HEAD)
    assert [tuple(m.weight.shape) for m in head.layers if hasattr(m, "weight")] == [
        (1024, 768), (128, 1024), (64, 128), (16, 64), (1, 16),
    ]  # fmt: skip
    vector = torch.sin(torch.arange(768.0))
    vector = vector / vector.norm()
    assert head(vector[None]).item() == pytest.approx(5.86787, abs=1e-4)
    out = vector.double().numpy()  # linear layers and nothing between them
    for layer in (0, 2, 4, 6, 7):
        weight, bias = (p.double().numpy() for p in head.layers[layer].parameters())
        out = weight @ out + bias
    assert out.item() == pytest.approx(5.86787, abs=1e-4)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_head_that_holds_code(tmp_path):
    torch.save({"layers.0.weight": Bomb(tmp_path / "exploded")}, tmp_path / "head.pth")
    with pytest.raises(BadInput, match=r"head.pth' is no whole checkpoint of tensors alone") as caught:
        prepare(f"aesthetic:{tmp_path}/head.pth", embedded=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("tensors", "shown"),
    [
        ({"layers.0.weight": (3, 768), "layers.0.bias": (4,)}, "does not fit: size mismatch for layers.0.bias"),
        ({"layers.0.weight": (1, 512), "layers.0.bias": (1,)}, "must read 768 numbers, but .* reads 512"),
        ({"mlp.weight": (1, 768)}, "does not fit: an aesthetic head has layers.0.weight"),
        ({}, "does not fit"),
    ],
)
def test_a_head_of_another_shape(tmp_path, tensors, shown):
    torch.save({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "head.pth")
    with pytest.raises(BadInput, match=shown) as caught:
        prepare(f"aesthetic:{tmp_path}/head.pth", embedded=False)
    assert "\n" not in str(caught.value)


def test_a_clip_of_another_shape(architecture, checkpoint, tmp_path):
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    torch.save({"state_dict": state | {"text_projection": torch.zeros(3, 3)}}, tmp_path / "wrong.pt")
    with pytest.raises(BadInput, match="does not fit: size mismatch for text_projection"):
        load_model(architecture, "", tmp_path / "wrong.pt")
    (tmp_path / "cut.pt").write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(BadInput, match=r"cut.pt"):
        load_model(architecture, "", tmp_path / "cut.pt")


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    """A Hugging Face cache with nothing in it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("spec", REAL)
def test_missing_weights_are_one_line(spec, empty_cache):
    """What is missing, how large it is, the command that gets it, where it belongs; before anything loads."""
    with pytest.raises(BadInput, match=r"needs .* of .* \(.*\), which is not in .*hub; get it with: hf download ") as e:
        prepare(spec, embedded=False)
    assert "\n" not in str(e.value)


def test_weights_are_found_in_the_cache(empty_cache, architecture, checkpoint):
    """Laid out as the hub's own client does."""
    snapshot = empty_cache / "models--xswu--HPSv2" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    (snapshot / "HPS_v2_compressed.pt").write_bytes(checkpoint.read_bytes())
    assert hps.VERSIONS["v2.0"].find() == snapshot / "HPS_v2_compressed.pt"
    assert hps.VERSIONS["v2.1"].find() is None
    assert prepare("hps", embedded=False).differentiable


def test_a_transformers_clip_from_a_folder(tmp_path):
    """Named by its path, with a model of any kind."""
    folder = tiny.save_clip(tmp_path / "clip")
    loaded = prepare(f"0.5*clip:{folder}", embedded=False).load("cpu")
    images = pictures(16, 16)
    np.testing.assert_allclose(loaded(images, PROMPTS), 0.5 * ClipReward(ClipEncoder(folder))(images, PROMPTS))


def test_names_mean_what_suits_the_model():
    """The embedded model keeps its own `clip` and `aesthetic`; what it has no own of is the real one."""
    assert [stands_for(name, True) for name in ("clip", "aesthetic", "hps")] == ["clip", "aesthetic", "hps:v2.0"]
    assert [stands_for(name, False) for name in ("clip", "aesthetic", "hps")] == [
        "clip:ViT-L-14/openai", "aesthetic:laion", "hps:v2.0",
    ]  # fmt: skip
    assert prepare("clip+0.2*aesthetic").embedded


@pytest.mark.parametrize(
    ("spec", "terms"),
    [
        ("clip:ViT-L-14/openai", [(1, "clip:ViT-L-14/openai")]),
        ("aesthetic+0.5*hps:v2.1", [(1, "aesthetic"), (0.5, "hps:v2.1")]),
        ("aesthetic:./sac+logos+ava1-l14-linearMSE.pth+clip", [
            (1, "aesthetic:./sac+logos+ava1-l14-linearMSE.pth"), (1, "clip"),
        ]),
    ],
)  # fmt: skip
def test_members_of_families_are_read(spec, terms):
    assert parse(spec) == tuple(Term(weight, name) for weight, name in terms)


@pytest.mark.parametrize(
    ("spec", "shown"),
    [
        ("clip:ViT-L-14/opnai", "Did you mean 'openai'"),
        ("hps:v3", "must be one of v2.0, v2.1"),
        ("imscore:sesame", "must be one of aesthetic-shadow"),
        ("pickscore:v2", "must be one of v1"),
        ("aesthetic:nothing", "must be laion or a file"),
    ],
)
def test_wrong_members_are_refused(spec, shown):
    with pytest.raises(BadInput, match=shown):
        prepare(spec, embedded=False)


def test_the_embedded_judge_is_refused_elsewhere(tiny_folder):
    with pytest.raises(BadInput, match="'judge' knows the embedded model's world only"):
        configure("a fox", model=str(tiny_folder), reward="jpeg-compressibility", strategy="random", judge="judge")


def test_imscore_is_optional():
    """One line without it; with it, its scorers are known by name."""
    assert set(imscore.SCORERS) >= {"imagereward", "pickscore", "vqascore"}
    if find_spec("imscore") is None:
        with pytest.raises(BadInput, match="pip install imscore"):
            prepare("imagereward", embedded=False)
    else:
        for target, _ in imscore.SCORERS.values():
            module, _, name = target.partition(":")
            assert hasattr(importlib.import_module(f"imscore.{module}"), name)


def test_every_family_is_in_the_registry():
    families = {name for name in REWARDS if name.endswith(":NAME")}
    assert families == {
        "clip:NAME", "clip-spherical:NAME", "aesthetic:NAME", "hps:NAME", "pickscore:NAME", "imscore:NAME"
    }  # fmt: skip
    assert open_clip.checkpoint(*aesthetic.BACKBONE, "clip:ViT-L-14/openai") == aesthetic.BACKBONE_WEIGHTS
    assert aesthetic.LAION.get == "hf download trl-lib/ddpo-aesthetic-predictor aesthetic-model.pth"
