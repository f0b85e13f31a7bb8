"""Every family of pipelines is driven by the same adapter: real classes, tiny, saved, loaded, searched, reproduced."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks

from ipgo_opt import optimize
from ipgo_opt.conditioning import Conditioning
from ipgo_opt.models import load_pipeline, resolve
from ipgo_opt.models.gate import denoiser, shadowed
from ipgo_opt.models.interface import support_matrix, text_to_image, unsupported
from ipgo_opt.models.sampler import STATES, Sampler, SamplerSettings
from ipgo_opt.spaces.tokens import TokenShape, TokenSpace

T, SEED, PROMPT = 3, 5, "a fox"
MASKED = {"pixart_sigma", "sana", "lumina_2", "chroma", "aura_flow", "hunyuan_dit", "kandinsky_3", "prx", "krea_2"}


@pytest.fixture(scope="module", params=list(families.FAMILIES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline of the family on disk."""
    if name in families.NEEDS:
        pytest.importorskip(families.NEEDS[name])
    where = tmp_path_factory.mktemp("families") / name
    families.FAMILIES[name]().save_pretrained(str(where), safe_serialization=True)
    return where


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    """The same, loaded."""
    return load_pipeline(resolve(str(folder)), "cpu", "float32")


def sampler(pipeline: Any, name: str, grad_steps: int = 1) -> Sampler:
    side = families.SIZES.get(name, 16)
    return Sampler(pipeline, SamplerSettings(T, 3.0, side, side, grad_steps))


def own_image(pipeline: Any, made: Sampler, seed: int = SEED, **given: Any) -> torch.Tensor:
    """What diffusers makes by itself, of the same noise, in [0, 1]."""
    image = pipeline(**given, **made.arguments([seed]))[0].float()
    return image if hasattr(pipeline, "image_processor") else (image / 2 + 0.5).clamp(0, 1)


def test_without_tokens_it_is_the_pipelines_own_image(pipeline, name):
    made = sampler(pipeline, name)
    negative = {"negative_prompt": ""} if made.interface.guidance == "true_cfg_scale" else {}
    plain = own_image(pipeline, made, prompt=PROMPT, **negative)
    image = made.generate(made.encode(PROMPT), [SEED])
    torch.testing.assert_close(image, plain, rtol=0, atol=1e-5)
    assert image.std() > 0.01
    assert made.size == tuple(image.shape[-2:])


def test_steps_of_the_gradient(pipeline, name):
    """Only the last K sampler steps build a graph, and in them no call that the searched tokens do not enter."""
    made = sampler(pipeline, name)
    encoded = made.encode(PROMPT)
    guided = encoded.negative_prompt_embeds is not None
    slopes = []
    for K in (1, 2):
        calls: list[tuple[bool, int]] = []

        def watching(forward: Any, calls: list[tuple[bool, int]] = calls) -> Any:
            def watched(*args: Any, **kwargs: Any) -> Any:
                saved: list[int] = []
                with saved_tensors_hooks(lambda t: (saved.append(t.nbytes), t)[1], lambda t: t):
                    out = forward(*args, **kwargs)
                first = out[0][0]
                calls.append((first.requires_grad, sum(saved)))
                return out

            return watched

        leaf = encoded.prompt_embeds.clone().requires_grad_()
        made = sampler(pipeline, name, K)
        with shadowed(denoiser(pipeline), "forward", watching):
            image = made.generate(replace(encoded, prompt_embeds=leaf), [SEED], gradient=True)
        slopes.append(torch.autograd.grad(image.square().sum(), leaf)[0])
        together = made._heard.batch == 3  # perturbed attention: the batch can't be taken apart
        per_step = 1 if together or not guided else 2
        tail = calls[-K * per_step :]
        assert not any(graph or saved for graph, saved in calls[: -K * per_step]), f"K = {K}: {calls}"
        assert len(calls) - len(tail) in ((T - K) * per_step, T - K)
        expected = {1: 1, 2: 3}[K] if per_step == 2 else K  # the last unconditional call depends on the one before
        assert sum(graph for graph, _ in tail) == expected, f"K = {K}: {calls}"
        assert made.denoiser_calls == T * (3 if together else 2 if guided else 1)
    assert all(slope.isfinite().all() and slope.abs().max() > 1e-8 for slope in slopes)
    assert (slopes[0] - slopes[1]).norm() > 1e-3 * slopes[1].norm()


def test_inserted_tokens_are_read(pipeline, name):
    """Every one of them reaches the image; masks grow with them, and padding stays outside."""
    made = sampler(pipeline, name)
    encoded = made.encode(PROMPT)
    generator = torch.Generator().manual_seed(0)
    size = encoded.prompt_embeds.std()
    prefix, suffix = (torch.randn(1, 2, made.width, generator=generator) * size for _ in range(2))
    prefix.requires_grad_()
    suffix.requires_grad_()
    longer = encoded.insert(prefix, suffix)
    assert (encoded.mask is not None) == (name in MASKED)
    assert longer.prompt_embeds.shape[1] == encoded.prompt_embeds.shape[1] + 4 * (not encoded.fixed_length)
    if encoded.mask is not None:
        assert int((longer.mask != 0).sum()) == int((encoded.mask != 0).sum()) + 4
        read = longer.prompt_embeds[0][longer.mask[0] != 0]
        assert torch.equal(read[:2], prefix[0])
        assert torch.equal(read[-2:], suffix[0])
    image = made.generate(longer, [SEED], gradient=True)
    for tokens in torch.autograd.grad(image.square().sum(), [prefix, suffix]):
        assert (tokens.abs().amax(-1) > 0).all()


def test_a_batch_is_made_one_by_one(pipeline, name):
    """Rows do not mix, with tokens of their own and noise of their own."""
    made = sampler(pipeline, name)
    encoded = made.encode(PROMPT)
    space = TokenSpace(made.width, TokenShape(2, 2, 4))
    x = space.coordinates(full=False).start
    both, _ = space.apply(torch.stack([x, -x]), encoded, full=False)
    together = made.generate(both, [SEED, 8])
    for k, seed in enumerate((SEED, 8)):
        alone = made.generate(both.map(lambda t, k=k: t[k : k + 1]), [seed])
        torch.testing.assert_close(alone[0], together[k], rtol=0, atol=2e-4)


@pytest.mark.parametrize("strategy", ["gradient", "random"])
def test_it_is_searched(folder, pipeline, name, strategy, tmp_path):
    """From disk, by Python's front door; the file that is left gives the best image to diffusers itself."""
    side = families.SIZES.get(name, 16)
    result = optimize(
        PROMPT, reward=tiny.Redness(), model=str(folder), strategy=strategy, budget=3, out=tmp_path / "run",
        **tiny.RUN | {"held_out": 0, "height": side, "width": side},
    )  # fmt: skip
    assert len(result.history) == 3
    assert result.reward >= result.raw_reward
    made = sampler(pipeline, name)
    arguments = made.interface.arguments
    given = {key: value for key, value in load_file(tmp_path / "run" / "best.safetensors").items() if key in arguments}
    given |= {key: made._packing.closed(given[key]) for key in STATES if key in given}
    if "negative_prompt" in arguments:
        given["negative_prompt"] = None
    image = own_image(pipeline, made, result.summary["seeds"][0], **given)
    best = np.asarray(Image.open(tmp_path / "run" / "best.png"), dtype=float)
    np.testing.assert_allclose(image[0].permute(1, 2, 0).numpy() * 255, best, atol=0.6)


def test_the_support_matrix_says_what_is_tested(capsys):
    """Every class of diffusers' mapping is in it; the families here are accepted; a refusal is one line."""
    rows = {row["pipeline"]: row for row in support_matrix()}
    assert set(rows) == {pipeline_class.__name__ for pipeline_class in text_to_image().values()}
    accepted = {pipeline for pipeline, row in rows.items() if "refused" not in row}
    assert len(accepted) >= 34
    assert all("\n" not in row.get("refused", "") for row in rows.values())
    made = {type(build()).__name__ for build in (families.FAMILIES["flux"], families.FAMILIES["hunyuan_dit"])}
    assert made <= accepted
    assert rows["HunyuanDiTPipeline"]["kept"] == "prompt_attention_mask_2, prompt_embeds_2"
    assert unsupported(text_to_image()["stable-diffusion-controlnet"]) == "it needs a control image beside the text"


def test_true_guidance_of_a_distilled_model():
    """Flux runs its second, unconditional call when asked to, and not before."""
    pipeline = families.FAMILIES["flux"]()
    for scale, calls in ((1.0, T), (2.0, 2 * T)):
        made = Sampler(pipeline, SamplerSettings(T, 3.0, 16, 16, true_cfg_scale=scale))
        encoded = made.encode(PROMPT)
        assert (encoded.negative_prompt_embeds is not None) == (scale > 1)
        made.generate(encoded, [SEED])
        assert made.denoiser_calls == calls


def test_a_fixed_length_makes_room():
    """Padding gives way first, then the end of the prompt; the mask stays as long as it was."""
    states = torch.arange(6.0).view(1, 6, 1).expand(1, 6, 2)
    new = torch.full((1, 1, 2), 9.0)
    for read, expected, kept in ((3, [9, 0, 1, 2, 9, 3], 5), (6, [9, 0, 1, 2, 3, 9], 6)):
        mask = (torch.arange(6) < read).long()[None]
        longer = Conditioning(states, mask=mask, fixed_length=True).insert(new, new)
        assert longer.prompt_embeds[0, :, 0].tolist() == expected
        assert int(longer.mask.sum()) == kept


def test_padding_on_the_left_stays_there():
    states = torch.arange(5.0).view(1, 5, 1)
    given = Conditioning(states, mask=torch.tensor([[0, 0, 1, 1, 1]]))
    longer = given.insert(torch.tensor([[[7.0]]]), torch.tensor([[[8.0]]]))
    assert longer.prompt_embeds.flatten().tolist() == [0, 1, 7, 2, 3, 4, 8]
    assert longer.mask.tolist() == [[0, 0, 1, 1, 1, 1, 1]]
    assert given.mean().item() == 3
    assert longer.mean().item() == pytest.approx((7 + 2 + 3 + 4 + 8) / 5)
