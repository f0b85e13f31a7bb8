"""PEZ: straight-through projected gradient, on words of the pipeline's own vocabulary, read as it reads them."""

from __future__ import annotations

from dataclasses import replace

import families
import pytest
import tiny
import torch
from torch import Tensor

from ipgo_opt.conditioning import Conditioning
from ipgo_opt.errors import BadInput
from ipgo_opt.models.sampler import Sampler
from ipgo_opt.models.words import WordEncoder
from ipgo_opt.run import optimize
from ipgo_opt.spaces.hard_tokens import HardTokenSpace
from ipgo_opt.strategies.base import Problem
from ipgo_opt.strategies.gradient import Gradient, GradientOptions

PROMPT = "a fox"


def toy(tokens: int = 2, words: int = 50) -> HardTokenSpace:
    """Random words whose encoding is their embeddings."""
    vectors = torch.randn(words, 8, generator=torch.Generator().manual_seed(0))
    return HardTokenSpace([f"w{k}" for k in range(words)], vectors, Conditioning, PROMPT, 0, tokens, seed=3)


def test_it_finds_planted_words():
    """Value: how near the projected embeddings are to those of words 17 and 42; from other words."""
    made = toy()
    target = made.vectors[[17, 42]]
    c = made.coordinates(full=True)
    assert made.nearest(c.start[None])[0].tolist() != [17, 42]
    solver = Gradient(Problem(c.start, c.lower, c.upper, 400), GradientOptions(0.05, 1.0, max_grad_norm=100.0))
    for _ in range(400):
        x = solver.ask().requires_grad_()
        embeddings = made.apply(x, Conditioning(target[None]), full=True)[0].prompt_embeds
        value = -(embeddings - target).square().sum((1, 2))
        (slope,) = torch.autograd.grad(value.sum(), x)
        solver.tell(x.detach(), value.detach(), slope)
    assert made.nearest(x)[0].tolist() == [17, 42]
    assert made.readable(x[0], full=True) == {"prompt": "a fox w17 w42"}


def test_projection_is_to_the_nearest_word_and_straight_through():
    """By the cosine, against a search word by word; the gradient at the projection goes to the point as it is."""
    made = toy(tokens=3)
    x = torch.randn(2, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
    projected = made.projected(x)
    for k in range(2):
        for j in range(3):
            P = x[k].view(3, 8)[j].detach()
            cosines = [float(torch.dot(P, v) / (P.norm() * v.norm())) for v in made.vectors]
            best = cosines.index(max(cosines))
            assert made.nearest(x)[k, j] == best
            torch.testing.assert_close(projected[k, j], made.vectors[best])
    weights = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2))
    (slope,) = torch.autograd.grad((projected * weights).sum() + projected.square().sum(), x)
    torch.testing.assert_close(slope, (weights + 2 * projected.detach()).flatten(1))


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(tiny.pipeline(), tiny.settings(grad_steps=2))


def made_for(sampler: Sampler, before: int, after: int) -> HardTokenSpace:
    encoder = WordEncoder(sampler, PROMPT, before, after)
    return HardTokenSpace(encoder.words, encoder.vectors, encoder.encode, PROMPT, before, after, seed=1)


def test_every_word_is_one_token_that_reads_as_it_is_written(sampler):
    """Whatever stands beside it."""
    encoder = WordEncoder(sampler, PROMPT, 0, 1)
    tokenizer = sampler.tokenizer
    assert len(encoder.words) > 30
    assert all(word.isalpha() and word.islower() for word in encoder.words)
    for start in range(0, len(encoder.words), 20):
        part = encoder.words[start : start + 20]
        ids = tokenizer(" ".join(part)).input_ids[1:-1]
        assert len(ids) == len(part)
        weights = sampler.pipeline.text_encoder.get_input_embeddings().weight
        assert torch.equal(weights[ids], encoder.vectors[start : start + 20])


@pytest.mark.parametrize(("before", "after"), [(0, 3), (2, 0), (1, 2)])
def test_the_words_are_encoded_as_the_pipeline_encodes_their_text(sampler, before, after):
    """To the last bit, both halves: what is found can be typed."""
    made = made_for(sampler, before, after)
    x = made.coordinates(full=True).start[None]
    out, _ = made.apply(x, sampler.encode(PROMPT), full=True)
    text = made.readable(x[0], full=True)["prompt"]
    assert text.split()[before : before + 2] == PROMPT.split()
    assert len(text.split()) == 2 + before + after
    typed = sampler.encode(text)
    assert torch.equal(out.prompt_embeds, typed.prompt_embeds)
    assert torch.equal(out.negative_prompt_embeds, typed.negative_prompt_embeds)


def test_gradients_come_through_the_text_encoder(sampler):
    """Against a difference quotient in the embeddings that the encoder is given."""
    encoder = WordEncoder(sampler, PROMPT, 1, 2)
    start = encoder.vectors[[3, 5, 7]][None]

    def value(embeddings: Tensor) -> Tensor:
        return tiny.Redness()(sampler.generate(encoder.encode(embeddings), [0], gradient=True), []).sum()

    leaf = start.clone().requires_grad_()
    (slope,) = torch.autograd.grad(value(leaf), leaf)
    assert (slope.abs().amax(-1) > 0).all()
    full = Sampler(sampler.pipeline, replace(sampler.settings, grad_steps=4))
    sampler, (slope,) = (
        full,
        torch.autograd.grad(tiny.Redness()(full.generate(encoder.encode(leaf), [0], gradient=True), []).sum(), leaf),
    )
    step = 0.02 * slope / slope.norm()
    with torch.no_grad():
        rise = (value(start + step) - value(start - step)) / 0.04
    assert rise.item() == pytest.approx(slope.norm().item(), rel=0.05)


def test_pipelines_that_can_not_are_refused():
    for family in ("stable_diffusion_xl", "flux"):
        other = Sampler(families.FAMILIES[family](), replace(tiny.settings(), height=0, width=0))
        with pytest.raises(BadInput, match=r"one text encoder, but .* has [23]"):
            WordEncoder(other, PROMPT, 0, 2)


def test_more_words_than_the_encoder_reads_are_refused(sampler):
    with pytest.raises(BadInput, match=r"at most 77 tokens.*they have"):
        WordEncoder(sampler, PROMPT, 0, 80)


def test_a_run_ends_in_words(tiny_folder, tmp_path):
    """Kept in run.json; a plain pipeline that is given them makes the best image's score."""
    settings = tiny.RUN | {"budget": 8, "prefix": 0, "suffix": 3, "learning_rate": 0.5, "held_out": 0}
    result = optimize(
        PROMPT, reward=tiny.Redness(), model=str(tiny_folder), space="hard-tokens", out=tmp_path, **settings
    )
    assert result.reward > result.raw_reward
    found = result.summary["optimized"]["prompt"]
    assert found.startswith(f"{PROMPT} ")
    assert len(found.split()) == len(PROMPT.split()) + 3
    assert len({record["reward"] for record in result.history}) > 3  # the words changed on the way
    pipe = tiny.pipeline()
    image = pipe(
        found, generator=torch.Generator().manual_seed(0), num_inference_steps=3,
        guidance_scale=3.0, output_type="pt",
    ).images  # fmt: skip
    assert tiny.Redness()(image, []).item() == pytest.approx(result.reward, abs=1e-6)
