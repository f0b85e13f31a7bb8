"""ReNO: the noise of a seed is the pipeline's own, its penalty is the chi distribution's, its result is diffusers'."""

from __future__ import annotations

import math
from dataclasses import replace

import diffusers
import families
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors import safe_open
from scipy import stats

from ipgo_opt.errors import BadInput
from ipgo_opt.models.sampler import Sampler
from ipgo_opt.run import optimize
from ipgo_opt.spaces.noise import NoiseSpace, norm_penalty


@pytest.mark.parametrize("schedule", ["LMSDiscreteScheduler", "DDIMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_noise_that_is_given_back_makes_the_same_image(schedule, dtype):
    """To the last bit, whatever the scheduler scales it by."""
    sampler = tiny.sampler(dtype, schedule)
    encoded, seeds = sampler.encode("a fox").expand(3), [0, 7, 7]
    noise = sampler.noise(seeds)
    assert noise.shape == (3, 4, tiny.LATENT, tiny.LATENT)
    assert noise.dtype == dtype
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(noise[1], torch.randn(1, *noise.shape[1:], generator=generator, dtype=dtype)[0])
    given = replace(encoded, noise=noise[:, None])
    assert torch.equal(sampler.generate(given, seeds), sampler.generate(encoded, seeds))


@pytest.mark.parametrize("family", ["stable_diffusion_xl", "stable_diffusion_3", "flux"])
def test_noise_of_other_families(family, tmp_path):
    """SDXL scales it, SD3 does not, Flux packs it."""
    sampler = Sampler(families.FAMILIES[family](), replace(tiny.settings(num_inference_steps=2), height=0, width=0))
    encoded = sampler.encode("a fox")
    given = replace(encoded, noise=sampler.noise([4])[None])
    assert torch.equal(sampler.generate(given, [4]), sampler.generate(encoded, [4]))
    leaf = given.noise.clone().requires_grad_()
    full = Sampler(sampler.pipeline, replace(sampler.settings, grad_steps=2))
    images = full.generate(replace(encoded, noise=leaf), [4], gradient=True)
    assert torch.autograd.grad(images.square().sum(), leaf)[0].abs().max() > 1e-6


@pytest.mark.parametrize("n", [2, 64, 4 * 64 * 64])
def test_the_penalty_is_the_chi_distributions(n):
    """−log p(‖ε‖), up to the constant that makes its least value 0, which it has at √(n − 1)."""
    mode = math.sqrt(n - 1)
    norms = np.array([0.5, 0.9, 1.0, 1.05, 2.0]) * mode
    direction = torch.nn.functional.normalize(
        torch.randn(n, generator=torch.Generator().manual_seed(0)).double(), dim=0
    )
    noise = torch.tensor(norms)[:, None, None] * direction
    got = norm_penalty(noise)[:, 0]
    expected = stats.chi.logpdf(mode, n) - stats.chi.logpdf(norms, n)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7 * n)
    assert got.argmin() == 2
    leaf = noise[2:3].clone().requires_grad_()
    (slope,) = torch.autograd.grad(norm_penalty(leaf).sum(), leaf)
    assert slope.abs().max() < 1e-5


def test_one_change_serves_all_seeds():
    """ε = noise(seed) + δ, where δ is the vector times its unit; the penalty is the mean over the seeds."""
    sampler = tiny.sampler()
    made = NoiseSpace((4, tiny.LATENT, tiny.LATENT), weight=3.0, unit=0.5)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    noise = sampler.noise([1, 2, 3])
    out, penalty = made.apply(x, replace(sampler.encode("a fox"), noise=noise[None]), full=True)
    for k in range(2):
        change = x[k].view(4, tiny.LATENT, tiny.LATENT) / 2
        changed = noise + change
        assert torch.equal(made.learned(x[k], full=True)["noise"], change)
        assert torch.equal(out.noise[k], changed)
        torch.testing.assert_close(penalty[k], 3 * norm_penalty(changed[None]).mean())


@pytest.mark.parametrize("steps", [1, 3])
def test_it_climbs_on_one_step_and_on_several(tiny_folder, tmp_path, steps):
    """The norm stays where Gaussian noise has it, and the file that is left makes the best image in plain diffusers."""
    settings = tiny.RUN | {
        "num_inference_steps": steps, "learning_rate": 5.0, "held_out": 0, "budget": 12, "guidance_scale": 1.0,
    }  # fmt: skip
    result = optimize("a fox", reward=tiny.Redness(), model=str(tiny_folder), space="noise", out=tmp_path, **settings)
    assert result.history[1]["reward"] == result.raw_reward  # δ starts at 0
    assert result.reward > result.raw_reward + 0.01
    with safe_open(tmp_path / "best.safetensors", "pt") as file:
        found = {key: file.get_tensor(key) for key in ("latents", "prompt_embeds", "noise")}
    assert abs(found["latents"].norm().item() / math.sqrt(63) - 1) < 0.25
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    image = pipe(
        prompt_embeds=found["prompt_embeds"], latents=found["latents"], num_inference_steps=steps, guidance_scale=1.0
    ).images[0]
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(tmp_path / "best.png")))


def test_all_steps_are_differentiated(tiny_folder):
    """By default; fewer are refused."""
    settings = tiny.RUN | {"budget": 4, "held_out": 0}
    with pytest.raises(BadInput, match="grad_steps=1, num_inference_steps=3"):
        optimize("a fox", reward=tiny.Redness(), model=str(tiny_folder), space="noise", grad_steps=1, **settings)


def test_a_search_without_a_gradient_is_refused(tiny_folder):
    for space in ("noise", "lora", "embedding", "hard-tokens", "tokens+noise"):
        with pytest.raises(BadInput, match="no bounds"):
            optimize("a fox", reward=tiny.Redness(), model=str(tiny_folder), space=space, strategy="random")
