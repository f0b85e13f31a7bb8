"""Specifications of rewards, and the CLIP and aesthetic rewards against what they stand for."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor

from ipgo_opt.errors import BadInput
from ipgo_opt.rewards import REWARDS
from ipgo_opt.rewards.aesthetic import AestheticHead, AestheticReward
from ipgo_opt.rewards.base import Reward, Term, WeightedSum, parse, prepare, shown
from ipgo_opt.rewards.clip import ClipEncoder, ClipReward
from ipgo_opt.rewards.custom import from_object, reward
from ipgo_opt.store import to_pil

PROMPTS = ["a fox", "two rockets on a purple background", "a fox and a rocket at night, neon"]
LAION = (768, 1024, 128, 64, 16, 1)


@pytest.mark.parametrize(
    ("spec", "terms"),
    [
        ("clip", [(1, "clip")]),
        ("  clip ", [(1, "clip")]),
        ("0.5*clip", [(0.5, "clip")]),
        (".5 * clip", [(0.5, "clip")]),
        ("clip+0.2*aesthetic", [(1, "clip"), (0.2, "aesthetic")]),
        ("aesthetic + 0.5*clip", [(1, "aesthetic"), (0.5, "clip")]),
        ("clip+-0.5*aesthetic", [(1, "clip"), (-0.5, "aesthetic")]),
        ("1e-3*clip", [(0.001, "clip")]),
        ("3*aesthetic+2*clip", [(3, "aesthetic"), (2, "clip")]),
        ("jpeg-compressibility+-2*clip", [(1, "jpeg-compressibility"), (-2, "clip")]),
        ("judge.py:score", [(1, "judge.py:score")]),
        ("clip + 0.5 * judge.py:score", [(1, "clip"), (0.5, "judge.py:score")]),
        ("a/my judge.py:score+b.c:d_1", [(1, "a/my judge.py:score"), (1, "b.c:d_1")]),
        (r"2*C:\rewards\judge.py:score+clip", [(2, r"C:\rewards\judge.py:score"), (1, "clip")]),
        ("/c++/judge.py:score+clip", [(1, "/c++/judge.py:score"), (1, "clip")]),
        ("clip+./a+b.py:score", [(1, "clip"), (1, "./a+b.py:score")]),
        ("clip+2*./c*+/judge.py:score", [(1, "clip"), (2, "./c*+/judge.py:score")]),
        ("judge.py:a+judge.py:b", [(1, "judge.py:a"), (1, "judge.py:b")]),
        ("klasse:größe", [(1, "klasse:größe")]),
    ],
)
def test_specifications_are_read(spec, terms):
    assert parse(spec) == tuple(Term(weight, name) for weight, name in terms)


@pytest.mark.parametrize(
    ("spec", "terms"),
    [
        ("http://h/score", [(1, "http://h/score", "http://h/score")]),
        (
            "0.3*http://127.0.0.1:80/s?x=1+clip",
            [(0.3, "http://127.0.0.1:80/s", "http://127.0.0.1:80/s?x=1"), (1, "clip", "")],
        ),
        (
            "clip+2*https://me:p%2B*w@h/a*b?2*key#f",
            [(1, "clip", ""), (2, "https://h/a*b", "https://me:p%2B*w@h/a*b?2*key#f")],
        ),
        (
            "http://[::1]:8000?a+http://[::1]:8000?b",
            [(1, "http://[::1]:8000", "http://[::1]:8000?a"), (1, "http://[::1]:8000#2", "http://[::1]:8000?b")],
        ),
    ],
)
def test_addresses_are_read(spec, terms):
    """Named without user, password and query, and told apart all the same."""
    assert parse(spec) == tuple(Term(*term) for term in terms)
    assert all(term.address not in repr(term) or term.address == term.name for term in parse(spec) if term.address)


def test_a_specification_is_shown_without_secrets():
    """As it was given where there are none."""
    for spec in ("clip + 0.5*judge.py:score", "object:Redness"):
        assert shown(spec) == spec
    assert shown("0.5*http://me:sesame@h/s?key=sesame + clip") == "0.5*http://h/s+clip"


@pytest.mark.parametrize("name", list(REWARDS))
def test_every_registered_reward_is_a_specification(name):
    assert parse(f"2*{name}") == (Term(2.0, name),)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "''"),
        ("+", "'+'"),
        ("clip+", "'clip.'"),
        ("0.5", "'0.5'"),
        ("0.5clip", "'0.5clip'"),
        ("clip*0.5", "'clip.0.5'"),
        ("clip-aesthetic", "'clip-aesthetic'"),
        ("clip clip", "'clip clip'"),
        ("nan*clip", "'nan.clip'"),
        ("inf*clip", "'inf.clip'"),
        ("1e999*clip", "inf"),
        ("0*clip", "0.0"),
        ("clip+clip", "'clip.clip'"),
        ("0.5*clip+2*clip", "once"),
        ("klip", "'klip'.*Did you mean 'clip'"),
        ("clip+beauty", "'beauty'"),
        ("judge", "'judge'"),
        ("judge.py", "file.py:function.*'judge.py'"),
        ("a/judge.py+clip", "'a/judge.py'|'a/judge.py.clip'"),
        ("judge.py:", "'judge.py:'"),
        ("judge.py:2nd", "'judge.py:2nd'"),
        ("judge.py:score*2", "'judge.py:score.2'"),
        ("judge.py:score+2*judge.py:score", "once"),
        (".judge:score", "'.judge:score'"),
        ("klip+judge.py:score", "'klip'.*Did you mean 'clip'"),
        ("object:Redness", "Python object"),
        ("clip+object:Redness", "Python object"),
        ("http://", "'http://'"),
        ("http:///score", "HOST.*'http:///score'"),
        ("http://h:port/", "HOST.*'http://h:port/'"),
        ("http://h:99999/", "HOST"),
        ("http://h/a b", "'http://h/a b'"),
        ("http://h?a=1+b", "%2B"),
        ("http://h?a+http://h?a", "once"),
        ("ftp://h/score", "'ftp://h/score'"),
    ],
)
def test_other_specifications_are_refused(spec, message):
    """In one line that shows what was received; the judge is no reward, so that it stays held out."""
    with pytest.raises(BadInput, match=message) as caught:
        parse(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spec",
    [
        "0*{}",
        "1e999*{}",
        "{}+{}",
        "{}+sesame",
        "klip+{}",
        "{} {}",
        "{}+./sesame",
        "http://u:sesame@:1/",
        "http://u:ses+ame@h",
    ],
)
def test_refusals_keep_secrets(spec):
    with pytest.raises(BadInput) as caught:
        parse(spec.replace("{}", "https://me:sesame@h/score?key=sesame&more=sesame"))
    assert "sesame" not in str(caught.value)
    assert "ame" not in str(caught.value).replace("name", "")


class Channel:
    """Mean of one colour channel, with or without a gradient; prompts count by their length."""

    def __init__(self, channel: int, differentiable: bool = True) -> None:
        self.channel, self.differentiable = channel, differentiable

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images[:, self.channel].mean((1, 2)) + torch.tensor([len(prompt) / 100 for prompt in prompts])


def test_a_weighted_sum_is_the_sum():
    """Against numpy; the parts stay unweighted; it is differentiable if every part is."""
    images = torch.rand(3, 3, 4, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    reward = WeightedSum([Term(1.0, "red"), Term(-0.5, "green"), Term(3.0, "blue")], [Channel(c) for c in range(3)])
    means = images.detach().numpy().mean((2, 3)) + np.array([[len(prompt) / 100] for prompt in PROMPTS])
    scores = reward(images, PROMPTS)
    np.testing.assert_allclose(scores.detach(), means @ [1, -0.5, 3], rtol=1e-6)
    parts = reward.parts(images, PROMPTS)
    assert list(parts) == ["red", "green", "blue"]
    np.testing.assert_allclose(parts["green"].detach(), means[:, 1], rtol=1e-6)
    np.testing.assert_allclose(reward.total(parts).detach(), scores.detach())
    (slope,) = torch.autograd.grad(scores.sum(), images)
    np.testing.assert_allclose(slope[1, :, 0, 0], np.array([1, -0.5, 3]) / 20, rtol=1e-6)
    assert reward.differentiable
    assert not WeightedSum([Term(1.0, "a"), Term(1.0, "b")], [Channel(0), Channel(1, False)]).differentiable


def test_the_head_has_the_published_shape():
    """LAION's state dict, sac+logos+ava1-l14-linearMSE: names and shapes."""
    published = {
        "layers.0": (1024, 768),
        "layers.2": (128, 1024),
        "layers.4": (64, 128),
        "layers.6": (16, 64),
        "layers.7": (1, 16),
    }
    expected = {f"{name}.weight": shape for name, shape in published.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in published.items()}
    state = AestheticHead(LAION).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected


@pytest.mark.parametrize("widths", [LAION, (12, 5, 4, 3, 2, 1), (12, 1), (12, 6, 1)], ids=str)
def test_a_head_is_read_from_its_file(widths, tmp_path):
    """Half-precision weights of any widths: a chain of affine maps without dropout, computed by numpy."""
    torch.manual_seed(0)
    head = AestheticHead(widths)
    path = tmp_path / "head.safetensors"
    save_file({name: tensor.half().contiguous() for name, tensor in head.state_dict().items()}, path)
    read = AestheticHead.from_file(path)
    assert not read.training
    assert not any(p.requires_grad for p in read.parameters())
    x = F.normalize(torch.randn(5, widths[0]), dim=-1)
    out = x.double().numpy()
    layers = sorted({int(name.split(".")[1]) for name in head.state_dict()})
    for i in layers:
        weight, bias = (head.state_dict()[f"layers.{i}.{part}"].half().double().numpy() for part in ("weight", "bias"))
        out = out @ weight.T + bias
    np.testing.assert_allclose(read(x), out[:, 0], atol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random CLIP for 16 × 16 images on disk."""
    return tiny.save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def encoder(folder) -> ClipEncoder:
    return ClipEncoder(folder)


def pictures(*size: int, n: int = 3, seed: int = 0) -> Tensor:
    """Smooth random images (n, 3, H, W) in 256 steps, as PNG files hold them."""
    coarse = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size, mode="bicubic", align_corners=False).clamp(0, 1).mul(255).round().div(255)


def unit(embeds: object) -> Tensor:
    """What transformers' get_…_features gives, normalized (an object with the embeddings in newer versions)."""
    tensor = getattr(embeds, "pooler_output", embeds)
    assert isinstance(tensor, Tensor)
    return F.normalize(tensor, dim=-1)


@torch.no_grad()
def reference(folder, images: list[Image.Image], prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Unit embeddings by transformers' own processor and model."""
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=prompts, images=images, return_tensors="pt", padding=True, truncation=True)
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return unit(model.get_image_features(inputs["pixel_values"])), unit(model.get_text_features(**texts))


def test_embeddings_are_transformers_own(folder, encoder):
    """On images of the model's size, exactly the published preprocessing; long texts are cut."""
    prompts = [*PROMPTS[:2], " ".join(["a fox"] * 100)]
    images = pictures(16, 16)
    seen, said = reference(folder, [to_pil(image) for image in images], prompts)
    torch.testing.assert_close(encoder.images(images), seen, rtol=0, atol=2e-6)
    torch.testing.assert_close(encoder.texts(prompts), said, rtol=0, atol=2e-6)
    cosine = ClipReward(encoder)(images, prompts)
    np.testing.assert_allclose(cosine, (seen * said).sum(1), atol=3e-6)
    assert cosine.std() > 1e-3


@pytest.mark.parametrize("size", [(16, 24), (24, 16), (40, 40), (8, 8), (33, 48)], ids=str)
def test_other_sizes_are_resized_and_cropped(folder, encoder, size):
    """Shorter side to the model's, centre crop, as the processor does on 8-bit images (hence the tolerance)."""
    images = pictures(*size)
    seen, _ = reference(folder, [to_pil(image) for image in images], PROMPTS)
    got = encoder.images(images)
    assert got.shape == seen.shape
    nearest = (got @ seen.T).argmax(1)
    assert nearest.tolist() == [0, 1, 2]
    apart = (seen[0] - seen[1]).norm()
    assert (got - seen).norm(dim=1).max() < 0.05 * apart


def test_gradients_reach_the_images(folder, encoder):
    """Of both rewards on one encoder, against a difference quotient, through resizing."""
    head = AestheticHead((12, 4, 3, 1)).eval().requires_grad_(False)
    reward = WeightedSum(
        [Term(1.0, "clip"), Term(0.5, "aesthetic")], [ClipReward(encoder), AestheticReward(encoder, head)]
    )
    encoder.model.double()
    head.double()
    images = pictures(20, 16, n=2).double().requires_grad_()
    (slope,) = torch.autograd.grad(reward(images, PROMPTS[:2]).sum(), images)
    assert (slope.abs().amax((1, 2, 3)) > 1e-5).all()
    step = 1e-6 * slope / slope.norm()
    with torch.no_grad():
        rise = reward(images + step, PROMPTS[:2]).sum() - reward(images - step, PROMPTS[:2]).sum()
    assert rise.item() / 2e-6 == pytest.approx(slope.norm().item(), rel=1e-3)
    assert all(p.grad is None and not p.requires_grad for p in encoder.model.parameters())


def test_a_batch_is_scored_one_by_one(encoder):
    images = pictures(16, 16)
    together = ClipReward(encoder)(images, PROMPTS)
    assert together.shape == (3,)
    for k, prompt in enumerate(PROMPTS):
        one = ClipReward(encoder)(images[k : k + 1], [prompt])
        torch.testing.assert_close(one, together[k : k + 1], rtol=0, atol=1e-6)


class Counter:
    """Counts how often a module runs."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.calls = 0
        module.register_forward_hook(self.count)

    def count(self, *args: object) -> None:
        self.calls += 1


def test_one_tensor_is_encoded_once(encoder):
    """Two rewards on one encoder share its work; equal values in another tensor do not count as the same."""
    vision, text = Counter(encoder.model.vision_model), Counter(encoder.model.text_model)
    images = pictures(16, 16)
    first = encoder.images(images)
    assert torch.equal(encoder.images(images), first)
    assert vision.calls == 1
    encoder.images(images.clone())
    assert vision.calls == 2
    encoder.texts([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    again = encoder.texts([PROMPTS[1], PROMPTS[0]])
    assert text.calls == 1
    assert torch.equal(again, encoder.texts(PROMPTS[:2]).flip(0))


def test_a_remembered_embedding_is_never_a_wrong_one(encoder):
    """Not one without the gradient that is asked for now, nor one of pixels that have changed since."""
    images = pictures(16, 16).requires_grad_()
    with torch.no_grad():
        before = encoder.images(images)
    after = encoder.images(images)
    assert after.requires_grad
    torch.testing.assert_close(after, before)
    with torch.no_grad():
        images.mul_(0.5)
    assert not torch.allclose(encoder.images(images), before, atol=1e-4)


def test_scores_stay_in_range(encoder):
    """Cosines, whatever the image."""
    for images in (torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16), pictures(16, 16, n=1)):
        score = ClipReward(encoder)(images, ["a fox"]).item()
        assert math.isfinite(score)
        assert -1 <= score <= 1


def darkness(image: Image.Image, prompt: str) -> float:
    """A reward of kind `image`: of the pixels and of the prompt."""
    return -float(np.asarray(image).mean()) / 255 - len(prompt) / 100


def darknesses(images: list[Image.Image], prompts: list[str]) -> list[float]:
    """The same of kind `images`; keeps nothing of its arguments as it was."""
    scores = [darkness(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    images.clear()
    prompts.clear()
    return scores


@reward("tensors")
def spoiling(images: Tensor, prompts: list[str]) -> Tensor:
    """The same of kind `tensors` without gradient; likewise."""
    scores = -images.mean((1, 2, 3)) - torch.tensor([len(prompt) / 100 for prompt in prompts])
    images.zero_()
    prompts.clear()
    return scores


@reward("tensors", differentiable=True)
def gently(images: Tensor, prompts: list[str]) -> Tensor:
    """The same with gradient."""
    scores = -images.mean((1, 2, 3)) - torch.tensor([len(prompt) / 100 for prompt in prompts])
    prompts.clear()
    return scores


CUSTOM = {"image": darkness, "images": darknesses, "tensors": spoiling, "gradient": gently, "object": tiny.Redness()}


OWN = [name for name, entry in REWARDS.items() if entry.target and not name.endswith(":NAME")]
"""Rewards whose weights, if they have any, are in the package."""


@pytest.fixture(scope="module", params=[*OWN, *CUSTOM])
def judged(request) -> Reward:
    """Every registered reward, and one of every kind that a user can write."""
    if request.param in CUSTOM:
        return from_object(CUSTOM[request.param])
    return REWARDS.load(request.param)("cpu")


def test_a_score_per_image(judged):
    """Finite, one by one as in a batch, and in the order of the images; the scores tell the images apart."""
    images = pictures(64, 64)
    scores = judged(images, PROMPTS)
    assert scores.shape == (3,)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert len(set(scores.tolist())) == 3
    for k, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(judged(images[k : k + 1], [prompt]), scores[k : k + 1], rtol=1e-5, atol=1e-5)
    order = [2, 0, 1]
    turned = judged(images[order], [PROMPTS[k] for k in order])
    torch.testing.assert_close(turned, scores[order], rtol=1e-5, atol=1e-5)


def test_what_is_scored_stays_as_it_is(judged):
    images, prompts = pictures(64, 64), list(PROMPTS)
    before = images.clone()
    judged(images, prompts)
    assert torch.equal(images, before)
    assert prompts == PROMPTS


def test_differentiable_means_what_it_says(judged):
    """A gradient for every image, uphill; or none at all."""
    images = pictures(64, 64).requires_grad_()
    scores = judged(images, PROMPTS)
    assert scores.requires_grad == judged.differentiable
    if judged.differentiable:
        (slope,) = torch.autograd.grad(scores.sum(), images)
        assert (slope.abs().amax((1, 2, 3)) > 0).all()
        with torch.no_grad():
            scale = slope.square().sum((1, 2, 3), keepdim=True)
            assert (judged(images + 1e-3 * slope / scale, PROMPTS) > judged(images, PROMPTS)).all()


@pytest.mark.parametrize("name", OWN)
def test_what_is_said_of_a_reward_before_it_is_loaded(name):
    """It decides whether `gradient` may start, so it must be what the loaded reward says."""
    assert prepare(name).differentiable == prepare(name).load("cpu").differentiable


def test_the_kinds_of_a_reward_agree():
    """Kind `image` as the yardstick, on 8-bit images."""
    images = pictures(16, 16)
    expected = [darkness(to_pil(image), prompt) for image, prompt in zip(images, PROMPTS, strict=True)]
    for name in ("image", "images", "tensors", "gradient"):
        np.testing.assert_allclose(from_object(CUSTOM[name])(images, PROMPTS).detach(), expected, rtol=1e-5)


def test_jpeg_size():
    """Against Pillow's bytes on disk; noise is larger than a plain image, and one reward is minus the other."""
    images = torch.cat([pictures(32, 48), torch.rand(1, 3, 32, 48), torch.full((1, 3, 32, 48), 0.5)])
    prompts = ["", "a fox", "a fox", "", ""]
    large = REWARDS.load("jpeg-incompressibility")("cpu")(images, prompts)
    expected = []
    for image in images:
        array = np.uint8(np.round(image.permute(1, 2, 0).numpy() * 255))
        with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
            Image.fromarray(array).save(file.name, quality=95)
            expected.append(Path(file.name).stat().st_size / 1000)
    np.testing.assert_allclose(large, expected, rtol=1e-6)
    assert large[3] > large[:3].max() > large[4]
    assert torch.equal(REWARDS.load("jpeg-compressibility")("cpu")(images, prompts), -large)
