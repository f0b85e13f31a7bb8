"""The gate's gradient is K-step truncated backpropagation, exactly: against a denoising loop written out here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import tiny
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ipgo_opt.conditioning import Conditioning
from ipgo_opt.errors import BadInput
from ipgo_opt.models.interface import unsupported
from ipgo_opt.models.sampler import Sampler

T, GUIDANCE, SEEDS = 4, 3.0, (7, 11)
DOUBLE = torch.float64
LONG_PROMPT = " ".join(["a fox and a rocket on a purple background"] * 20)


@pytest.fixture(scope="module", params=["LMSDiscreteScheduler", "DDIMScheduler"])
def pipe(request: pytest.FixtureRequest) -> Any:
    """The tiny pipeline in float64."""
    return tiny.pipeline(DOUBLE, request.param)


@pytest.fixture(scope="module")
def lms() -> Any:
    """The tiny pipeline in float32."""
    return tiny.pipeline()


def states(rows: int = 2, length: int = 5, dtype: torch.dtype = DOUBLE, seed: int = 0) -> Conditioning:
    """Random text states with a negative half of its own."""
    generator = torch.Generator().manual_seed(seed)
    first, negative = (torch.randn(rows, length, tiny.WIDTH, generator=generator, dtype=dtype) for _ in range(2))
    return Conditioning(first, negative)


def weights(rows: int) -> Tensor:
    """Of the pixels in the scalar that is differentiated."""
    return torch.randn(rows, 3, tiny.PIXELS, tiny.PIXELS, generator=torch.Generator().manual_seed(9))


def explicit(
    pipe: Any, given: Conditioning, seeds: Sequence[int], *, K: int, guidance: float = GUIDANCE, steps: int = T
) -> Tensor:
    """Denoising by hand: the UNet builds a graph in the iterations of the last K steps only."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    shape = (1, 4, tiny.LATENT, tiny.LATENT)
    noise = [
        torch.randn(shape, generator=torch.Generator().manual_seed(s), dtype=given.prompt_embeds.dtype) for s in seeds
    ]
    latents = torch.cat(noise) * scheduler.init_noise_sigma
    first = scheduler.order * (steps - K)  # a second-order scheduler iterates twice per step, once in the last
    for i, t in enumerate(scheduler.timesteps):
        sample = scheduler.scale_model_input(latents, t)
        with torch.set_grad_enabled(i >= first):
            predicted = pipe.unet(sample, t, encoder_hidden_states=given.prompt_embeds).sample
            if guidance > 1:
                empty = pipe.unet(sample, t, encoder_hidden_states=given.negative_prompt_embeds).sample
                predicted = empty + guidance * (predicted - empty)
        latents = scheduler.step(predicted, t, latents).prev_sample
    return (pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


def gradients(images: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((images * weights(len(images))).sum(), inputs)


def assert_same(got: Tensor, slope: Tensor) -> None:
    """Equal but for rounding in float64, and not because both are zero."""
    largest = slope.abs().max().item()
    assert largest > 1e-6
    torch.testing.assert_close(got, slope, rtol=1e-9, atol=1e-10 * largest)


def leaves(given: Conditioning) -> Conditioning:
    return given.map(lambda tensor: tensor.clone().requires_grad_())


class Watch:
    """Stands where the denoiser's own forward is and writes down how each call is made."""

    def __init__(self, unet: Any) -> None:
        self.unet, self.own = unet, unet.forward
        self.calls: list[dict[str, Any]] = []

    def __enter__(self) -> Watch:
        self.unet.forward = self.forward
        return self

    def __exit__(self, *error: object) -> None:
        del self.unet.forward

    def forward(self, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        saved: list[int] = []
        with saved_tensors_hooks(lambda t: (saved.append(t.nbytes), t)[1], lambda t: t):
            out = self.own(sample, *args, **kwargs)
        graph = out[0].requires_grad
        self.calls.append({"sample": sample.detach().clone(), "graph": graph, "saved": sum(saved)})
        return out


@pytest.mark.parametrize("K", [1, 2, T])
def test_gradient_is_truncated_backpropagation(pipe, K):
    """Images and gradients of both halves, for a batch of two with a seed for each, twice in a row."""
    given = leaves(states())
    expected = explicit(pipe, given, SEEDS, K=K)
    slopes = gradients(expected, given.prompt_embeds, given.negative_prompt_embeds)
    sampler = Sampler(pipe, tiny.settings(grad_steps=K))
    for _ in range(2):  # the scheduler starts afresh in every run
        images = sampler.generate(given, SEEDS, gradient=True)
        torch.testing.assert_close(images, expected.float(), rtol=0, atol=1e-7)
        assert 0.05 < images.detach().std() < 0.5
        for got, slope in zip(
            gradients(images, given.prompt_embeds, given.negative_prompt_embeds), slopes, strict=True
        ):
            assert_same(got, slope)


@pytest.mark.parametrize("K", [1, 2, T])
def test_gradient_with_a_fixed_negative_half(pipe, K):
    """The same when only the prompt is searched, which is when the halves run apart."""
    given = states()
    leaf = given.prompt_embeds.clone().requires_grad_()
    searched = Conditioning(leaf, given.negative_prompt_embeds)
    (slope,) = gradients(explicit(pipe, searched, SEEDS, K=K), leaf)
    (got,) = gradients(Sampler(pipe, tiny.settings(grad_steps=K)).generate(searched, SEEDS, gradient=True), leaf)
    assert_same(got, slope)


def test_truncation_makes_a_difference(pipe):
    """So that agreement for K = 1, 2 and T is three promises and not one."""
    given = leaves(states())
    slopes = [
        gradients(
            Sampler(pipe, tiny.settings(grad_steps=K)).generate(given, SEEDS, gradient=True), given.prompt_embeds
        )[0]
        for K in (1, 2, T)
    ]
    for i, j in ((0, 1), (1, 2)):
        assert (slopes[i] - slopes[j]).norm() > 0.05 * slopes[j].norm()


def test_full_gradient_against_finite_differences(pipe):
    """K = T is the derivative of the image itself (that the explicit loop is right is checked here as well)."""
    given = states(1)
    leaf = given.prompt_embeds.clone().requires_grad_()
    sampler = Sampler(pipe, tiny.settings(grad_steps=T))
    searched = Conditioning(leaf, given.negative_prompt_embeds)
    (slope,) = gradients(sampler.generate(searched, [3], gradient=True), leaf)

    def value(states: Tensor) -> Tensor:
        made = explicit(pipe, Conditioning(states, given.negative_prompt_embeds), [3], K=0)
        return (made * weights(1)).sum()

    step = 1e-5 * slope / slope.norm()
    with torch.no_grad():
        rise = (value(leaf + step) - value(leaf - step)) / 2e-5
    assert rise.item() == pytest.approx(slope.norm().item(), rel=1e-5)


@pytest.mark.parametrize("K", [1, 2, T])
def test_steps_of_a_second_order_scheduler(K):
    """Heun calls the UNet twice per sampler step, once in the last: K steps are 2K − 1 calls with a graph."""
    pipe = tiny.pipeline(DOUBLE, "HeunDiscreteScheduler")
    given = leaves(states(1))
    sampler = Sampler(pipe, tiny.settings(grad_steps=K))
    with Watch(pipe.unet) as watch:
        images = sampler.generate(given, [5], gradient=True)
    graphs = [call["graph"] for call in watch.calls]
    assert graphs.count(True) == 2 * (2 * K - 1)  # each in two halves
    assert graphs.count(False) == 2 * (T - K)  # both halves together
    assert graphs == sorted(graphs)
    assert sampler.denoiser_calls == 2 * (2 * T - 1)
    expected = explicit(pipe, given, [5], K=K)
    torch.testing.assert_close(images, expected.float(), rtol=0, atol=1e-7)
    (slope,), (got,) = gradients(expected, given.prompt_embeds), gradients(images, given.prompt_embeds)
    assert_same(got, slope)


def test_the_unconditional_half_holds_nothing_where_it_needs_no_gradient(lms):
    """At K = 1 it saves no activations; at K = 2 its last call depends on the searched tokens and takes part."""
    given = states(2, dtype=torch.float32)
    searched = Conditioning(given.prompt_embeds.clone().requires_grad_(), given.negative_prompt_embeds)
    for K, unconditional in ((1, [False]), (2, [False, True])):
        with Watch(lms.unet) as watch:
            Sampler(lms, tiny.settings(grad_steps=K)).generate(searched, SEEDS, gradient=True)
        head, tail = watch.calls[: T - K], watch.calls[T - K :]
        assert [len(call["sample"]) for call in head] == [4] * (T - K)  # both halves at once
        assert [len(call["sample"]) for call in tail] == [2] * (2 * K)
        assert not any(call["graph"] or call["saved"] for call in head)
        assert [call["graph"] for call in tail[0::2]] == unconditional
        assert all((call["saved"] > 0) == call["graph"] for call in tail[0::2])
        assert all(call["graph"] and call["saved"] > 0 for call in tail[1::2])


def test_nothing_is_saved_without_a_gradient(lms):
    """Also when the conditioning carries one."""
    with Watch(lms.unet) as watch:
        images = Sampler(lms, tiny.settings()).generate(leaves(states(1, dtype=torch.float32)), [0])
    assert not images.requires_grad
    assert not any(call["graph"] or call["saved"] for call in watch.calls)


def test_a_negative_half_that_is_searched_gets_its_gradient(pipe):
    """When nothing else carries one."""
    given = states()
    leaf = given.negative_prompt_embeds.clone().requires_grad_()
    searched = Conditioning(given.prompt_embeds, leaf)
    (slope,) = gradients(explicit(pipe, searched, SEEDS, K=1), leaf)
    (got,) = gradients(Sampler(pipe, tiny.settings()).generate(searched, SEEDS, gradient=True), leaf)
    assert_same(got, slope)


@pytest.mark.parametrize("gradient", [False, True])
def test_the_denoiser_is_left_as_it_was(lms, gradient):
    """After success and after an exception; a forward that a hook has put there stays."""
    sampler = Sampler(lms, tiny.settings())
    given = states(1, dtype=torch.float32)
    broken = Conditioning(given.prompt_embeds[..., :3], given.negative_prompt_embeds[..., :3])
    for inputs in (given, broken):
        for hooked in (False, True):
            if hooked:
                lms.unet.forward = own = lms.unet.forward
            try:
                if inputs is broken:
                    with pytest.raises(RuntimeError):
                        sampler.generate(inputs, [0], gradient=gradient)
                else:
                    sampler.generate(inputs, [0], gradient=gradient)
                assert lms.unet.__dict__.get("forward") is (own if hooked else None)
            finally:
                lms.unet.__dict__.pop("forward", None)
    assert sampler.images == 2


def test_the_weights_need_no_gradient(lms):
    """The model is not touched: no parameter of it collects anything."""
    sampler = Sampler(lms, tiny.settings())
    given = leaves(states(1, dtype=torch.float32))
    sampler.generate(given, [0], gradient=True).sum().backward()
    assert given.prompt_embeds.grad is not None
    for part in (lms.unet, lms.vae, lms.text_encoder):
        assert not part.training
        assert all(p.grad is None and not p.requires_grad for p in part.parameters())


@pytest.mark.parametrize(("guidance", "each"), [(GUIDANCE, 2), (1.0, 1)])
@pytest.mark.parametrize("gradient", [False, True])
def test_calls_are_counted_per_image(lms, guidance, each, gradient):
    """Two per step with guidance, one without, whatever the chunks."""
    for chunk in (1, 2, 8):
        sampler = Sampler(lms, tiny.settings(guidance_scale=guidance, grad_steps=2), chunk)
        given = sampler.encode("a fox").expand(3)
        sampler.generate(given, [0, 1, 2], gradient=gradient)
        assert (sampler.images, sampler.denoiser_calls) == (3, 3 * T * each)
        sampler.generate(given.map(lambda t: t[:1]), [0])
        assert (sampler.images, sampler.denoiser_calls) == (4, 4 * T * each)


def test_without_guidance(pipe):
    """No negative half is encoded or run; images and gradients are those of the loop by hand."""
    sampler = Sampler(pipe, tiny.settings(guidance_scale=1.0, grad_steps=2))
    encoded = sampler.encode("a fox")
    assert encoded.negative_prompt_embeds is None
    given = leaves(encoded.repeat(2))
    with Watch(pipe.unet) as watch:
        images = sampler.generate(given, SEEDS, gradient=True)
    assert [call["graph"] for call in watch.calls] == [False, False, True, True]
    expected = explicit(pipe, given, SEEDS, K=2, guidance=1.0)
    torch.testing.assert_close(images, expected.float(), rtol=0, atol=1e-7)
    (slope,), (got,) = gradients(expected, given.prompt_embeds), gradients(images, given.prompt_embeds)
    assert_same(got, slope)


def test_images_do_not_depend_on_the_batch(lms):
    """Together, one by one and in chunks; a seed stands for the same noise in any position."""
    given = states(3, dtype=torch.float32)
    together = Sampler(lms, tiny.settings()).generate(given, [4, 5, 6])
    assert together.shape == (3, 3, tiny.PIXELS, tiny.PIXELS)
    assert together.dtype == torch.float32
    assert (together[0] - together[1]).abs().max() > 0.05
    torch.testing.assert_close(
        Sampler(lms, tiny.settings(), chunk=2).generate(given, [4, 5, 6]), together, rtol=0, atol=1e-5
    )
    for k, seed in enumerate([4, 5, 6]):
        one = Sampler(lms, tiny.settings()).generate(given.map(lambda t, k=k: t[k : k + 1]), [seed])
        torch.testing.assert_close(one, together[k : k + 1], rtol=0, atol=1e-5)
    starts = []
    for seeds in ([4], [4, 5, 6], [6, 4], [4, 4]):
        with Watch(lms.unet) as watch:
            Sampler(lms, tiny.settings()).generate(given.map(lambda t, seeds=seeds: t[: len(seeds)]), seeds)
        starts += [watch.calls[0]["sample"][i] for i, seed in enumerate(seeds) if seed == 4]
    assert len(starts) == 5
    assert all(torch.equal(start, starts[0]) for start in starts)


def test_gradients_do_not_depend_on_chunks(pipe):
    given = leaves(states(3))
    whole, parts = (
        gradients(
            Sampler(pipe, tiny.settings(grad_steps=2), chunk).generate(given, [1, 2, 3], gradient=True),
            given.prompt_embeds,
        )[0]
        for chunk in (8, 2)
    )
    assert_same(parts, whole)


@pytest.mark.parametrize("guidance", [GUIDANCE, 1.0])
@pytest.mark.parametrize("negative", ["", "a rocket"])
def test_without_tokens_it_is_the_pipelines_own_image(lms, guidance, negative):
    """Pixel for pixel what diffusers makes of the prompt and the seed."""
    plain = lms(
        "a fox", negative_prompt=negative, generator=torch.Generator("cpu").manual_seed(3), num_inference_steps=T,
        guidance_scale=guidance, height=tiny.PIXELS, width=tiny.PIXELS, output_type="pt",
    ).images  # fmt: skip
    sampler = Sampler(lms, tiny.settings(guidance_scale=guidance, negative_prompt=negative))
    assert torch.equal(sampler.generate(sampler.encode("a fox"), [3]), plain)


@pytest.fixture(scope="module")
def sdxl() -> Any:
    """A tiny SDXL: two encoders and pooled embeddings."""
    return tiny.pipeline_xl()


def test_sdxl_is_its_own_image_without_tokens(sdxl):
    """Which has zeros, not an encoded "", in the unconditional half when there is no negative prompt."""
    for negative in ("", "a rocket"):
        sampler = Sampler(sdxl, tiny.settings(negative_prompt=negative))
        plain = sdxl(
            "a fox", negative_prompt=negative or None, generator=torch.Generator("cpu").manual_seed(3),
            num_inference_steps=T, guidance_scale=GUIDANCE, height=tiny.PIXELS, width=tiny.PIXELS, output_type="pt",
        ).images  # fmt: skip
        assert torch.equal(sampler.generate(sampler.encode("a fox"), [3]), plain), f"negative prompt {negative!r}"


def test_sdxl_gradients_reach_every_embedding(sdxl):
    """Also a pooled negative one that is alone in needing a gradient."""
    sampler = Sampler(sdxl, tiny.settings(grad_steps=2))
    encoded = sampler.encode("a fox")
    assert encoded.prompt_embeds.shape == (1, 77, 2 * tiny.WIDTH)
    assert set(encoded.extra) == {"pooled_prompt_embeds", "negative_pooled_prompt_embeds"}
    given = leaves(encoded.repeat(2))
    with Watch(sdxl.unet) as watch:
        images = sampler.generate(given, SEEDS, gradient=True)
    assert [call["graph"] for call in watch.calls] == [False] * 2 + [True] * 4
    assert given.negative_prompt_embeds is not None
    inputs = given.prompt_embeds, given.negative_prompt_embeds, *given.extra.values()
    slopes = gradients(images, *inputs)
    assert all(slope.isfinite().all() and slope.abs().max() > 1e-6 for slope in slopes)
    pooled = given.extra["negative_pooled_prompt_embeds"]
    fixed = given.map(torch.Tensor.detach)
    alone = replace(fixed, extra=fixed.extra | {"negative_pooled_prompt_embeds": pooled})
    (got,) = gradients(sampler.generate(alone, SEEDS, gradient=True), pooled)
    torch.testing.assert_close(got, slopes[-1], rtol=1e-3, atol=1e-6)


def test_long_prompts_are_cut_as_the_pipeline_cuts_them(lms):
    """77 states whatever the prompt's length; inserted tokens make the sequence longer than 77 without harm."""
    sampler = Sampler(lms, tiny.settings())
    tokens, read = sampler.token_count(LONG_PROMPT)
    assert tokens > 77 == read
    encoded = sampler.encode(LONG_PROMPT)
    assert encoded.prompt_embeds.shape == (1, 77, tiny.WIDTH)
    more = torch.randn(1, 20, tiny.WIDTH, generator=torch.Generator().manual_seed(0))
    longer = Conditioning(torch.cat([encoded.prompt_embeds, more], 1), encoded.negative_prompt_embeds)
    images = sampler.generate(longer, [0])
    assert images.isfinite().all()
    assert not torch.equal(images, sampler.generate(encoded, [0]))


def test_levelled_pads_the_shorter_half_with_its_last_state():
    long, short = torch.randn(2, 5, 3), torch.randn(2, 2, 3)
    padded = torch.stack([short[:, 0], *[short[:, 1]] * 4], 1)
    for first, negative, expected in ((long, short, (long, padded)), (short, long, (padded, long))):
        given = Conditioning(first, negative, {"pooled": torch.ones(2, 1)})
        out = given.levelled()
        assert torch.equal(out.prompt_embeds, expected[0])
        assert torch.equal(out.negative_prompt_embeds, expected[1])
        assert out.extra is given.extra
        assert given.prompt_embeds is first
    alone = Conditioning(long)
    assert alone.levelled() is alone


def test_conditioning_repeats_and_expands_rows():
    given = Conditioning(torch.arange(4.0).view(2, 2, 1), None, {"pooled": torch.tensor([[1.0], [2.0]])})
    assert given.repeat(3).prompt_embeds[:, 0, 0].tolist() == [0, 0, 0, 2, 2, 2]
    assert given.repeat(3).extra["pooled"][:, 0].tolist() == [1, 1, 1, 2, 2, 2]
    assert len(given.map(lambda t: t[:1]).expand(4)) == 4


def test_one_seed_for_each_row(lms):
    with pytest.raises(BadInput, match="2 rows and 1 seeds"):
        Sampler(lms, tiny.settings()).generate(states(2, dtype=torch.float32), [0])


def test_pipelines_that_can_not_be_driven_are_refused(lms):
    """With the reason; the ones that are promised are not."""
    parts = {name: part for name, part in lms.components.items() if name != "image_encoder"}
    for pipeline_class in (diffusers.StableDiffusionImg2ImgPipeline, diffusers.StableDiffusionInpaintPipeline):
        other = pipeline_class(**parts, requires_safety_checker=False)
        with pytest.raises(BadInput, match="starts from an image") as caught:
            Sampler(other, tiny.settings())
        assert pipeline_class.__name__ in str(caught.value)
    assert unsupported(diffusers.DDPMPipeline) is not None
    assert unsupported(diffusers.StableDiffusionPipeline) is None
    assert unsupported(diffusers.StableDiffusionXLPipeline) is None
