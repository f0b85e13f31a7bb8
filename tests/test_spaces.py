"""One contract for every space: shapes, the start, gradients, state, and a model that is left as it was."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from ipgo_opt.conditioning import Conditioning
from ipgo_opt.config import RunConfig
from ipgo_opt.models.sampler import Sampler
from ipgo_opt.objective import readable
from ipgo_opt.spaces import SPACES

T = 2
SEEDS = [3, 8]
RAW_AT_START = {"noise", "lora", "seeds", "words"}
"""Spaces whose first point changes nothing; the others insert tokens or words from the beginning."""

NAMES = [name for name in SPACES if name != "texts"]
"""All but the one whose points are numbers of texts that a strategy writes: tests/test_rewriting.py."""

WITHOUT_GRADIENT = {"seeds", "hard-tokens", "words"}
"""Nothing to move, and steps where a word gives way to another: tests/test_hard_tokens.py, test_words.py."""

LISTS = {"synonyms": {"fox": ["cat", "dog", "robot"]}, "negative": ["snow", "night"]}

every_space = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(tiny.pipeline(), tiny.settings(num_inference_steps=T, grad_steps=T))


@pytest.fixture(scope="module")
def double() -> Sampler:
    return Sampler(tiny.pipeline(torch.float64), tiny.settings(num_inference_steps=T, grad_steps=T))


def config(name: str, seed: int = 0) -> RunConfig:
    words = Path(tempfile.gettempdir()) / "ipgo-opt-test-words.json"
    words.write_text(json.dumps(LISTS))
    return RunConfig("a fox", space=name, prefix=2, suffix=1, basis_size=4, seed=seed, rank=2, words=str(words))


def make(name: str, sampler: Sampler, seed: int = 0) -> Any:
    return SPACES.load(name).made(config(name, seed), sampler)


def views(name: str) -> list[bool]:
    return [True, False] if SPACES.load(name).bounded else [True]


def given(made: Any, sampler: Sampler, seeds: list[int]) -> Conditioning:
    """What the objective passes to a space."""
    encoded = sampler.encode("a fox")
    return replace(encoded, noise=sampler.noise(seeds)[None]) if made.needs_noise else encoded


def points(made: Any, q: int, *, full: bool = True, size: float = 0.3) -> Tensor:
    """The start, and points at a random distance from it inside the bounds."""
    c = made.coordinates(full=full)
    size = 9.0 if made.one_prompt and made.bounded else size  # words: far enough for another choice
    steps = size * torch.randn(q, len(c), generator=torch.Generator().manual_seed(1 if size < 1 else 3))
    return (c.start + steps * (torch.arange(q) > 0)[:, None]).clamp(c.lower, c.upper)


@every_space
def test_coordinates_and_bounds(name, sampler):
    made = make(name, sampler)
    for full in views(name):
        c = made.coordinates(full=full)
        assert c.start.shape == c.lower.shape == c.upper.shape == (len(c),)
        assert c.start.dtype == torch.float32
        assert torch.equal(c.start, c.start.clamp(c.lower, c.upper))
        assert full or (c.upper - c.lower).isfinite().all()


@every_space
def test_shapes_of_what_is_applied(name, sampler):
    """q rows, q penalties that are not negative, noise only for a space that asked for it."""
    made = make(name, sampler)
    for full in views(name):
        out, penalty = made.apply(points(made, 3, full=full), given(made, sampler, SEEDS), full=full)
        assert len(out) == len(penalty) == 3
        assert (penalty >= 0).all()
        assert (out.noise is not None) == made.needs_noise
        if made.needs_noise:
            assert out.noise.shape == (3, 2, 4, tiny.LATENT, tiny.LATENT)
        assert out.repeat(2).prompt_embeds.shape[0] == 6


@every_space
def test_the_start(name, sampler):
    """Is the raw prompt's image, to the last bit, or documented not to be."""
    made = make(name, sampler)
    raw = sampler.generate(sampler.encode("a fox").expand(2), SEEDS)
    out, penalty = made.apply(points(made, 1), given(made, sampler, SEEDS), full=True)
    images = sampler.generate(out.repeat(2), SEEDS)
    assert torch.equal(images, raw) == (name in RAW_AT_START)
    if name in RAW_AT_START - {"noise"}:
        assert penalty.item() == 0


@every_space
def test_images_do_not_depend_on_the_batch(name, sampler):
    """Three candidates on two seeds together, one by one, and in chunks that cut through a candidate."""
    made = make(name, sampler)
    x = points(made, 3)
    out, penalty = made.apply(x, given(made, sampler, SEEDS), full=True)
    together = sampler.generate(out.repeat(2), SEEDS * 3)
    chunked = Sampler(sampler.pipeline, sampler.settings, chunk=4).generate(out.repeat(2), SEEDS * 3)
    torch.testing.assert_close(chunked, together, rtol=0, atol=1e-5)
    for k in range(3):
        for s, seed in enumerate(SEEDS):
            one, alone = made.apply(x[k : k + 1], given(made, sampler, [seed]), full=True)
            image = sampler.generate(one.repeat(1), [seed])
            torch.testing.assert_close(image, together[2 * k + s][None], rtol=0, atol=1e-5)
        if not made.needs_noise:
            torch.testing.assert_close(alone, penalty[k : k + 1])
    if name != "seeds":
        assert (together[0] - together[2]).abs().max() > 1e-4
        assert (together[2] - together[4]).abs().max() > 1e-4


def doubled(made: Any) -> Any:
    """The orthogonal parametrization of tokens in float64."""
    for part in getattr(made, "spaces", {"": made}).values():
        for side in getattr(part, "sides", {}).values():
            side.parametrization.double()
            side.start_basis = side.start_basis.double()
    return made


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITHOUT_GRADIENT])
def test_gradients_against_finite_differences(name, double):
    """Of images and penalty, with all steps differentiated, along the gradient and half along a random direction."""
    made = doubled(make(name, double))
    x = points(made, 2, size=0.1)[1:].double()
    prompt = given(made, double, SEEDS)
    weights = torch.randn(2, 3, tiny.PIXELS, tiny.PIXELS, generator=torch.Generator().manual_seed(4))

    def value(x: Tensor, gradient: bool = False) -> Tensor:
        out, penalty = made.apply(x, prompt, full=True)
        images = double.generate(out.repeat(2), SEEDS, gradient=gradient)
        return (images * weights).double().sum() + 10 * penalty.double().sum()

    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(value(leaf, True), leaf)
    uphill = slope / slope.norm()
    random = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).double()
    for direction in (uphill, torch.nn.functional.normalize(uphill + random / random.norm(), dim=1)):
        with torch.no_grad():
            rise = (value(x + 1e-2 * direction) - value(x - 1e-2 * direction)) / 2e-2
        expected = (slope * direction).sum()
        assert expected > 1e-2  # images are float32: below that the quotient is rounding
        assert rise.item() == pytest.approx(expected.item(), rel=2e-2)


@every_space
def test_state_and_learned_survive_a_round_trip(name, sampler):
    """A vector means the same in a space of another seed that has loaded the state."""
    made, other = make(name, sampler), make(name, sampler, seed=5)
    state = {key: tensor.clone() for key, tensor in made.state_dict().items()}
    other.load_state_dict(state)
    for tensor in state.values():
        tensor.zero_()  # what was loaded is a copy
    assert torch.equal(made.coordinates(full=True).start, other.coordinates(full=True).start)
    x = points(made, 2)[1]
    first, second = made.learned(x, full=True), other.learned(x, full=True)
    assert set(first) == set(second)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert bool(first) == (name not in ("seeds", "words"))
    assert readable(made, config(name), x, full=True) == readable(other, config(name), x, full=True)


@every_space
@pytest.mark.parametrize("broken", [False, True])
def test_the_model_is_left_as_it_was(name, sampler, broken):
    """After images with a gradient, and after an exception in the middle of one."""
    made, pipe = make(name, sampler), sampler.pipeline
    raw = sampler.generate(sampler.encode("a fox"), [0])
    before = [
        {key: value.clone() for key, value in part.state_dict().items()} for part in (pipe.unet, pipe.text_encoder)
    ]
    x = points(made, 2)[1:].requires_grad_()
    out, _ = made.apply(x, given(made, sampler, [0]), full=True)
    if broken:
        out = replace(out, negative_prompt_embeds=out.negative_prompt_embeds[..., :3])
        with pytest.raises(RuntimeError):
            sampler.generate(out.repeat(1), [0], gradient=True)
    else:
        images = sampler.generate(out.repeat(1), [0], gradient=True)
        assert images.requires_grad == (name != "seeds")
    for part, was in zip((pipe.unet, pipe.text_encoder), before, strict=True):
        assert all(torch.equal(value, was[key]) for key, value in part.state_dict().items())
        assert not any(module._forward_hooks for module in part.modules())
        assert not any(parameter.requires_grad for parameter in part.parameters())
    assert torch.equal(sampler.generate(sampler.encode("a fox"), [0]), raw)


def test_the_gradient_of_free_tokens_is_that_of_ipgos_by_the_chain_rule(sampler):
    """dL/dx = (dV/dx)ᵀ dL/dV at the tokens where both begin."""
    tokens, free = make("tokens", sampler), make("embedding", sampler)
    slopes = []
    for made in (tokens, free):
        leaf = made.coordinates(full=True).start[None].requires_grad_()
        out, penalty = made.apply(leaf, sampler.encode("a fox"), full=True)
        value = tiny.Redness()(sampler.generate(out, [0], gradient=True), ["a fox"]).sum() - penalty.sum()
        slopes.append(torch.autograd.grad(value, leaf)[0])
    x = tokens.coordinates(full=True).start[None].requires_grad_()
    V = torch.cat([side.flatten() for side in tokens.tokens(x, full=True).values()])
    torch.testing.assert_close(V.detach(), free.coordinates(full=True).start)
    (chained,) = torch.autograd.grad(V, x, slopes[1][0])
    assert slopes[0].abs().max() > 1e-4
    torch.testing.assert_close(slopes[0], chained, rtol=1e-3, atol=1e-6)


def test_a_product_is_its_factors_one_after_the_other(sampler):
    """Coordinates side by side, penalties added, names with the factor's before them."""
    made, tokens, noise = (make(name, sampler) for name in ("tokens+noise", "tokens", "noise"))
    x = points(made, 2)
    split = len(tokens.coordinates(full=True))
    prompt = given(made, sampler, SEEDS)
    out, penalty = made.apply(x, prompt, full=True)
    first, p_conf = tokens.apply(x[:, :split], prompt, full=True)
    second, p_norm = noise.apply(x[:, split:], prompt, full=True)
    assert torch.equal(out.prompt_embeds, first.prompt_embeds)
    assert torch.equal(out.noise, second.noise)
    torch.testing.assert_close(penalty, p_conf + p_norm)
    assert (p_conf > 0).all()
    assert (p_norm > 0).all()
    names = {f"tokens.{key}" for key in tokens.learned(x[0, :split], full=True)} | {"noise.noise"}
    assert set(made.learned(x[0], full=True)) == names
    assert set(made.state_dict()) == {f"tokens.{key}" for key in tokens.state_dict()}
