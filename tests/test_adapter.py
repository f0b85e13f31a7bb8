"""DRaFT: the adapter is peft's, its gradient that of a loop by hand; DRaFT-LV's copies are the paper's last step."""

from __future__ import annotations

import functools
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import families
import numpy as np
import peft
import pytest
import test_gate
import tiny
import torch
from accelerate import init_empty_weights
from PIL import Image
from torch import Tensor

from ipgo_opt.config import RunConfig
from ipgo_opt.errors import BadInput
from ipgo_opt.models.adapter import Adapted, linear_layers
from ipgo_opt.models.renoised import renoised
from ipgo_opt.models.sampler import Sampler
from ipgo_opt.objective import Objective, Request
from ipgo_opt.rewards.base import Term, WeightedSum
from ipgo_opt.run import optimize
from ipgo_opt.spaces.lora import LoraSpace

DOUBLE = torch.float64
QV, QKVO = ("to_q", "to_v"), ("to_q", "to_k", "to_v", "to_out.0")
SEEDS = [7, 11]


def make(sampler: Sampler, rank: int = 3, endings: tuple[str, ...] = QKVO) -> LoraSpace:
    return LoraSpace(sampler.linear_layers(endings), rank)


def point(made: LoraSpace, q: int = 1) -> Tensor:
    """Weights with a B that is not 0."""
    start = made.coordinates(full=True).start
    return start + 0.2 * torch.randn(q, len(start), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("endings", "count"), [(QV, 597_888), (QKVO, 1_195_776)], ids=["papers", "all-attention"])
def test_parameter_counts_at_full_size(endings, count):
    """Stable Diffusion 1.5's UNet, no weights allocated: rank 6 on to_q and to_v is table 3's count."""
    with init_empty_weights():
        unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964
    assert len(LoraSpace(linear_layers(unet, endings), 6).coordinates(full=True)) == count
    config = RunConfig("a fox")
    assert (config.rank, tuple(config.layer_names())) == (6, QV)


def test_a_target_that_matches_nothing():
    """One line that names what there is, also from the command line's way in."""
    sampler = tiny.sampler()
    with pytest.raises(BadInput, match=r"'to_x' ends none; its attention has .*to_out\.0, to_q") as caught:
        sampler.linear_layers(["to_q", "to_x"])
    assert "\n" not in str(caught.value)


def explicit(x: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Images and the gradient of their weighted sum, with peft's own layers and a denoising loop written out."""
    pipe = tiny.pipeline(DOUBLE, "DDIMScheduler")
    sampler = Sampler(tiny.pipeline(DOUBLE, "DDIMScheduler"), tiny.settings())
    given = sampler.encode("a fox").expand(2)
    made = make(sampler)
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=list(QKVO))
    pipe.unet = peft.get_peft_model(pipe.unet, config).double()
    parameters = []
    for name, (A, B) in made.weights(x).items():
        layer = pipe.unet.base_model.model.get_submodule(name)
        for part, value in ((layer.lora_A, A), (layer.lora_B, B)):
            part["default"].weight.data.copy_(value[0])
            parameters.append(part["default"].weight)
    images = test_gate.explicit(pipe, given, SEEDS, K=K)
    slopes = torch.autograd.grad((images * test_gate.weights(2)).sum(), parameters)
    return images.detach(), torch.cat([slope.flatten() for slope in slopes])


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_that_of_a_peft_model(K, checkpointing):
    """DRaFT-K, both halves of guidance; also with gradient checkpointing, whose second pass is later."""
    sampler = Sampler(tiny.pipeline(DOUBLE, "DDIMScheduler"), tiny.settings(grad_steps=K))
    if checkpointing:
        sampler.pipeline.unet.enable_gradient_checkpointing()
    made = make(sampler)
    x = point(made).double()
    expected, slope = explicit(x, K)
    leaf = x.clone().requires_grad_()
    out, _ = made.apply(leaf, sampler.encode("a fox"), full=True)
    images = sampler.generate(out.repeat(2), SEEDS, gradient=True)
    torch.testing.assert_close(images, expected.float(), rtol=0, atol=1e-6)
    (got,) = test_gate.gradients(images, leaf)
    test_gate.assert_same(got[0], slope)
    assert (slope != 0).float().mean() > 0.9
    assert not any(module._forward_hooks for module in sampler.pipeline.unet.modules())


def test_every_row_has_weights_of_its_own():
    """Two candidates in one batch, with guidance, are the two alone; gradients do not mix."""
    sampler = tiny.sampler(DOUBLE)
    made = make(sampler)
    x = point(made, 2).double().requires_grad_()
    out, _ = made.apply(x, sampler.encode("a fox"), full=True)
    images = sampler.generate(out, SEEDS, gradient=True)
    (slope,) = torch.autograd.grad(images[0].square().sum(), x)
    assert slope[0].abs().max() > 1e-6
    assert (slope[1] == 0).all()
    for k in range(2):
        alone, _ = made.apply(x[k : k + 1].detach(), sampler.encode("a fox"), full=True)
        torch.testing.assert_close(sampler.generate(alone, SEEDS[k : k + 1])[0], images[k].detach())
    assert (images[0] - images[1]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["stable_diffusion_xl", "stable_diffusion_3", "flux"])
def test_other_families(family):
    """A transformer's attention is found by the same names: the start is the raw image, gradients arrive everywhere."""
    sampler = Sampler(families.FAMILIES[family](), replace(tiny.settings(num_inference_steps=2), height=0, width=0))
    made = make(sampler, 2, QV)
    encoded = sampler.encode("a fox")
    start = made.coordinates(full=True).start[None]
    raw = sampler.generate(encoded, [0])
    assert torch.equal(sampler.generate(made.apply(start, encoded, full=True)[0], [0]), raw)
    leaf = point(made).requires_grad_()
    images = sampler.generate(made.apply(leaf, encoded, full=True)[0], [0], gradient=True)
    (slope,) = torch.autograd.grad(images.square().sum(), leaf)
    per_layer = [torch.cat([A.flatten(), B.flatten()]).abs().max() for A, B in made.weights(slope).values()]
    assert min(per_layer) > 0
    assert torch.equal(sampler.generate(encoded, [0]), raw)


def test_rows_that_do_not_fit_are_refused():
    layer = torch.nn.Sequential(torch.nn.Linear(3, 3))
    with Adapted(layer, {"0": (torch.ones(2, 1, 3), torch.ones(2, 3, 1))}), pytest.raises(BadInput, match="3 rows"):
        layer(torch.ones(3, 1, 3))
    assert not layer[0]._forward_hooks


def test_the_best_adapter_is_saved_as_peft_saves_it(tiny_folder, tmp_path):
    """Loaded by peft and by diffusers into a plain pipeline, it makes the best image, every pixel."""
    settings = tiny.RUN | {"budget": 6, "learning_rate": 0.05, "held_out": 0, "rank": 2}
    result = optimize("a fox", reward=tiny.Redness(), model=str(tiny_folder), space="lora", out=tmp_path, **settings)
    assert result.reward > result.raw_reward + 1e-3
    folder = tmp_path / "adapter"
    assert {path.name for path in folder.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    best = np.asarray(Image.open(tmp_path / "best.png")).astype(int)
    assert np.abs(best - np.asarray(Image.open(tmp_path / "raw.png"))).max() > 2
    for loaded in (with_peft, with_diffusers):
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
        loaded(pipe, folder)
        generator = torch.Generator().manual_seed(0)
        image = pipe("a fox", generator=generator, num_inference_steps=3, guidance_scale=3.0).images[0]
        assert np.abs(np.asarray(image).astype(int) - best).max() <= 1  # sums in another order


def with_peft(pipe: Any, folder: Path) -> None:
    pipe.unet = peft.PeftModel.from_pretrained(pipe.unet, str(folder))


def with_diffusers(pipe: Any, folder: Path) -> None:
    pipe.unet.load_lora_adapter(str(folder), prefix="base_model.model", weight_name="adapter_model.safetensors")


def last_step(pipe: Any, prompt: Any, finished: Tensor, noise: Tensor) -> Tensor:
    """Images of x̂_0 = (x_1 − s ε̂) / a with x_1 = a x_0 + s ε, by hand, for a model of noise or of velocity."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(4)
    t = scheduler.timesteps[-1]
    alpha = scheduler.alphas_cumprod[int(t)].double().sqrt()
    sigma = (1 - alpha**2).sqrt()
    if type(scheduler).__name__ in ("LMSDiscreteScheduler", "EulerDiscreteScheduler"):
        a, s = torch.ones(()).double(), scheduler.sigmas[-2].double()
    else:
        a, s = alpha, sigma
    x = a * finished + s * noise
    sample = x / (a**2 + s**2).sqrt()  # of variance 1
    halves = [pipe.unet(sample, t, encoder_hidden_states=states).sample for states in prompt]
    out = halves[1] + 3.0 * (halves[0] - halves[1])
    if scheduler.config.prediction_type == "epsilon":
        x0 = (x - s * out) / a
    else:
        x0 = (a * sample - s * out) / (a**2 + s**2).sqrt()
    return (pipe.vae.decode(x0 / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "schedule", ["DDIMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_a_copy_is_the_last_step_from_noisier_latents(schedule, prediction):
    """Images and gradients, with guidance, in chunks; only the last step calls the denoiser."""
    pipe = tiny.pipeline(DOUBLE, schedule)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type=prediction)
    sampler = Sampler(pipe, tiny.settings(), chunk=2)
    given = sampler.encode("a fox").expand(3)
    leaf = given.prompt_embeds.clone().requires_grad_()
    given = replace(given, prompt_embeds=leaf)
    images = sampler.generate(given, [1, 2, 3])
    finished, calls = sampler.latents, sampler.denoiser_calls
    decoded = (pipe.vae.decode(finished / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decoded.float(), images)
    noise = torch.randn(finished.shape, generator=torch.Generator().manual_seed(0)).double()
    copies = renoised(sampler, given, [1, 2, 3], finished, noise)
    assert sampler.images == 3
    assert sampler.denoiser_calls == calls + 3 * 2
    expected = last_step(pipe, (leaf, given.negative_prompt_embeds), finished, noise)
    torch.testing.assert_close(copies, expected.float(), rtol=0, atol=1e-5)
    assert (copies - images).abs().max() > 1e-3
    (got,), (slope,) = (torch.autograd.grad(made.square().sum(), leaf) for made in (copies, expected))
    torch.testing.assert_close(got, slope, rtol=1e-4, atol=1e-4 * slope.abs().max().item())


@pytest.mark.parametrize("family", ["stable_diffusion_3", "flux"])
def test_copies_of_flow_models(family):
    """The denoiser sees (1 − s) x_0 + s ε, once, and an image comes of it."""
    sampler = Sampler(families.FAMILIES[family](), replace(tiny.settings(num_inference_steps=3), height=0, width=0))
    encoded = sampler.encode("a fox")
    images = sampler.generate(encoded, [0])
    seen: list[Tensor] = []
    inner = sampler.pipeline.transformer.forward

    @functools.wraps(inner)
    def watch(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["hidden_states"])
        return inner(*args, **kwargs)

    sampler.pipeline.transformer.forward = watch
    copies = renoised(sampler, encoded, [0], sampler.latents, torch.ones_like(sampler.latents))
    sigma = sampler.pipeline.scheduler.sigmas[-2]
    for row in seen[-1]:
        torch.testing.assert_close(row, ((1 - sigma) * sampler.latents + sigma)[0])
    assert copies.shape == images.shape
    assert copies.isfinite().all()


def test_lower_variance_is_the_mean_over_image_and_copies(tiny_folder):
    """Value and scores stay those of the image; the gradient is the mean; the same copies again after a resume."""
    slopes = {}
    for n in (0, 2):
        sampler = Sampler(tiny.pipeline(), tiny.settings())
        config = RunConfig("a fox", space="lora", lv_samples=n, rank=2, gamma=0.0)
        made = make(sampler, 2)
        reward = WeightedSum([Term(1, "redness")], [tiny.Redness()])
        objective = Objective(config, sampler, reward, None, made, True)
        x = point(made)
        request = Request(x, ("a fox",), (tuple(SEEDS),), gradient=True, update=4)
        (first,) = objective([request])
        slopes[n] = first.gradient
        finished = sampler.latents
        assert torch.equal(objective([request])[0].gradient, first.gradient)
        if n == 0:
            scores = first.scores
    torch.testing.assert_close(first.scores, scores)
    total = slopes[0].clone()
    for copy in range(2):
        leaf = x.clone().requires_grad_()
        generators = [torch.Generator().manual_seed((seed * 1_000_003 + 4) * 1_009 + copy) for seed in SEEDS]
        noise = torch.stack([torch.randn(finished.shape[1:], generator=generator) for generator in generators])
        rows = made.apply(leaf, sampler.encode("a fox"), full=True)[0].repeat(2)
        copies = renoised(sampler, rows, SEEDS, finished, noise)
        total += torch.autograd.grad(tiny.Redness()(copies, []).mean(), leaf)[0]
    assert (slopes[2] - slopes[0]).norm() > 1e-3 * slopes[0].norm()
    torch.testing.assert_close(slopes[2], total / 3, rtol=1e-3, atol=1e-6)


def test_the_model_keeps_no_peft(tiny_folder):
    """Two runs that share the loaded model: the second one's raw image is that of a fresh model."""
    loaded: dict[Any, Any] = {}
    settings = tiny.RUN | {"budget": 3, "learning_rate": 0.05, "held_out": 0, "rank": 2}
    results = [
        optimize("a fox", reward=tiny.Redness(), model=str(tiny_folder), space=space, loaded=loaded, **settings)
        for space in ("tokens", "lora", "tokens")
    ]
    first, lora, again = results
    assert lora.history[1]["reward"] == first.raw_reward
    assert [record["reward"] for record in again.history] == [record["reward"] for record in first.history]
    (pipeline,) = (value for key, value in loaded.items() if hasattr(value, "unet"))
    assert not any("lora" in name for name, _ in deepcopy(pipeline.unet).named_modules())
