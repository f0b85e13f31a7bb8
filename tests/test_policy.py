"""DDPO: log-probabilities in closed form, clipping, and a policy gradient whose answer is known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.distributions import Normal

from ipgo_opt.conditioning import Conditioning
from ipgo_opt.config import RunConfig
from ipgo_opt.errors import BadInput
from ipgo_opt.models.policy import Trajectory, log_probability, replayed, sampled
from ipgo_opt.models.sampler import Sampler
from ipgo_opt.objective import Request
from ipgo_opt.policy import MOST_ADVANTAGE, PolicyObjective, advantages, surrogate
from ipgo_opt.rewards.base import Term, WeightedSum
from ipgo_opt.run import optimize
from ipgo_opt.spaces.lora import LoraSpace
from ipgo_opt.strategies.base import Problem
from ipgo_opt.strategies.gradient import GradientOptions
from ipgo_opt.strategies.policy import Policy

T = 3
SEEDS = [4, 5, 6]


def ddim(prediction: str = "epsilon", steps: int = T) -> Any:
    made = tiny.scheduler("DDIMScheduler")
    made = type(made).from_config(made.config, prediction_type=prediction)
    made.set_timesteps(steps)
    return made


def gaussian(scheduler: Any, output: Tensor, t: int, sample: Tensor, eta: float) -> Normal:
    """Equations (12) and (16) of DDIM (arXiv 2010.02502), written out."""
    bars = scheduler.alphas_cumprod.double()
    before = t - 1000 // scheduler.num_inference_steps
    now, then = bars[t], bars[before] if before >= 0 else bars[0]
    if scheduler.config.prediction_type == "epsilon":
        epsilon = output
        x0 = (sample - (1 - now).sqrt() * epsilon) / now.sqrt()
    else:
        x0 = now.sqrt() * sample - (1 - now).sqrt() * output
        epsilon = now.sqrt() * output + (1 - now).sqrt() * sample
    sigma = eta * ((1 - then) / (1 - now)).sqrt() * (1 - now / then).sqrt()
    return Normal(then.sqrt() * x0 + (1 - then - sigma**2).sqrt() * epsilon, sigma)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [1.0, 0.3])
def test_log_probabilities_in_closed_form(prediction, eta):
    """torch's Normal at the mean and deviation of DDIM's equations, averaged over the coordinates, at every step."""
    scheduler, generator = ddim(prediction), torch.Generator().manual_seed(0)
    for t in scheduler.timesteps:
        output, sample, noise = torch.randn(3, 2, 4, 8, 8, generator=generator)
        reached = scheduler.step(output, t, sample, eta=eta, variance_noise=noise).prev_sample
        got = log_probability(scheduler.step, output, t, sample, reached, eta)
        policy = gaussian(scheduler, output.double(), int(t), sample.double(), eta)
        expected = policy.log_prob(reached.double()).flatten(1).mean(1)
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close((reached - policy.mean) / policy.stddev, noise.double(), rtol=1e-3, atol=1e-2)


def test_a_step_without_fresh_noise_counts_nothing():
    """The last one, where the schedule ends at ᾱ = 1."""
    scheduler = ddim()
    scheduler = type(scheduler).from_config(scheduler.config, set_alpha_to_one=True, steps_offset=0)
    scheduler.set_timesteps(T)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    got = log_probability(scheduler.step, x, scheduler.timesteps[-1], x, x, 1.0)
    assert torch.equal(got, torch.zeros(2))


def sampler(chunk: int = 8) -> Sampler:
    return Sampler(tiny.pipeline(schedule="DDIMScheduler"), tiny.settings(num_inference_steps=T, eta=1.0), chunk)


def lora(made: Sampler) -> LoraSpace:
    return LoraSpace(made.linear_layers(["to_q", "to_v"]), 2)


def test_sampled_images_are_diffusers_own():
    """DDIM with η = 1 in an unmodified pipeline: the same seed, the same image; and each seed its own fresh noise."""
    made = sampler()
    images, _ = sampled(made, made.encode("a fox").expand(3), SEEDS)
    for k, seed in enumerate(SEEDS):
        plain = made.pipeline(
            "a fox", generator=torch.Generator().manual_seed(seed), num_inference_steps=T, guidance_scale=3.0, eta=1.0,
            output_type="pt",
        ).images  # fmt: skip
        torch.testing.assert_close(images[k][None], plain, rtol=0, atol=1e-5)
    calm = Sampler(made.pipeline, replace(made.settings, eta=0.0))
    assert (calm.generate(made.encode("a fox"), [4]) - images[0]).abs().max() > 1e-2


@pytest.mark.parametrize("chunk", [8, 2])
def test_a_replay_tells_the_probabilities(chunk):
    """The same weights: what they were, a ratio of 1. Other weights: the closed form with a UNet call written out."""
    made = sampler(chunk)
    space = lora(made)
    start = space.coordinates(full=True).start.expand(3, -1)
    encoded = made.encode("a fox")
    _, trajectories = sampled(made, space.apply(start, encoded, full=True)[0], SEEDS)
    assert [len(trajectory.seeds) for trajectory in trajectories] == ([3] if chunk == 8 else [2, 1])
    counted = made.images, made.denoiser_calls
    other = start + 0.3 * torch.randn(start.shape, generator=torch.Generator().manual_seed(0))
    first = 0
    for trajectory in trajectories:
        rows = slice(first, first + len(trajectory.seeds))
        first = rows.stop
        for x in (start, other):
            given = space.apply(x[rows], encoded, full=True)[0]
            told: list[tuple[Tensor, Tensor]] = []
            replayed(made, given, trajectory, lambda now, then, told=told: told.append((now, then)))
            assert len(told) == T
            for k, (now, then) in enumerate(told):
                assert torch.equal(then, trajectory.log_probability[k])
                if x is start:
                    torch.testing.assert_close(now, then, rtol=0, atol=2e-5)
                else:
                    assert (now - then).abs().min() > 1e-5
                    torch.testing.assert_close(
                        now.double(), by_hand(made, space, x[rows], encoded, trajectory, k), rtol=1e-3, atol=1e-3
                    )
    assert made.images == counted[0]
    assert made.denoiser_calls == counted[1] + 2 * 3 * T * 2


def by_hand(made: Sampler, space: LoraSpace, x: Tensor, encoded: Any, trajectory: Any, k: int) -> Tensor:
    """log p of step k ≥ 1 with weights merged into a copy of the UNet, W + B A."""
    if k == 0:
        generators = [torch.Generator().manual_seed(seed) for seed in trajectory.seeds]
        sample = torch.cat([torch.randn(1, 4, tiny.LATENT, tiny.LATENT, generator=g) for g in generators])
    else:
        sample = trajectory.reached[k - 1]
    out = []
    t = made.pipeline.scheduler.timesteps[k]
    for row in range(len(x)):
        unet = tiny.pipeline().unet
        for name, (A, B) in space.weights(x[row : row + 1]).items():
            unet.get_submodule(name).weight.data += B[0] @ A[0]
        halves = [
            unet(sample[row : row + 1], t, encoder_hidden_states=states).sample
            for states in (encoded.prompt_embeds, encoded.negative_prompt_embeds)
        ]
        predicted = halves[1] + 3.0 * (halves[0] - halves[1])
        policy = gaussian(made.pipeline.scheduler, predicted.double(), int(t), sample[row : row + 1].double(), 1.0)
        out.append(policy.log_prob(trajectory.reached[k][row : row + 1].double()).mean())
    return torch.stack(out).detach()


def test_advantages():
    """Deviations from the batch's mean; what has no score has none, and no say in the mean."""
    got = advantages(torch.tensor([1.0, 3.0, math.nan, 5.0]))
    torch.testing.assert_close(got, torch.tensor([-1.0, 0.0, 0.0, 1.0]) * math.sqrt(1.5))
    assert torch.equal(advantages(torch.full((4,), 2.0)), torch.zeros(4))
    outlier = torch.cat([torch.zeros(99), torch.ones(1)])
    assert advantages(outlier).max() == MOST_ADVANTAGE


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [
        (1.0, 2.0, 2.0), (1.3, 2.0, 0.0), (0.7, 2.0, 1.4), (1.0, -2.0, -2.0), (0.7, -2.0, 0.0), (1.3, -2.0, -2.6),
    ],
)  # fmt: skip
def test_the_clipped_objective(ratio, advantage, slope):
    """No further in the direction that paid once the ratio is out of range; always back. Slope by log p: ρ A or 0."""
    now = torch.tensor([math.log(ratio)], requires_grad=True)
    value = surrogate(now, torch.zeros(1), torch.tensor([advantage]), 0.2)
    assert value.item() == pytest.approx(min(ratio * advantage, max(min(ratio, 1.2), 0.8) * advantage), rel=1e-5)
    (got,) = torch.autograd.grad(value, now)
    assert got.item() == pytest.approx(slope, rel=1e-5)


def test_the_policy_gradient_approaches_the_analytic_one():
    """One DDIM step of a denoiser that answers x everywhere, reward linear in the result: E[R] has a known slope."""
    scheduler, n = ddim(steps=1), 40_000
    t, generator = scheduler.timesteps[0], torch.Generator().manual_seed(0)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0])
    x = torch.tensor([0.3, -0.1, 0.2, 0.5], requires_grad=True)
    sample = torch.zeros(1, 4, 1, 1)

    def output() -> Tensor:
        return x.view(1, 4, 1, 1).expand(n, -1, -1, -1)

    with torch.no_grad():
        reached = scheduler.step(
            output(), t, sample.expand(n, -1, -1, -1), eta=1.0,
            variance_noise=torch.randn(n, 4, 1, 1, generator=generator),
        ).prev_sample  # fmt: skip
        then = log_probability(scheduler.step, output(), t, sample.expand(n, -1, -1, -1), reached, 1.0)
    reward = (reached.flatten(1) * weights).sum(1)
    now = log_probability(scheduler.step, output(), t, sample.expand(n, -1, -1, -1), reached, 1.0)
    (estimate,) = torch.autograd.grad(surrogate(now, then, advantages(reward), 1e-4).mean(), x)
    policy = gaussian(scheduler, x.double().view(1, 4, 1, 1), int(t), sample.double(), 1.0)
    (analytic,) = torch.autograd.grad((policy.mean.flatten() * weights.double()).sum(), x)
    estimate = estimate * reward.std() * 4  # advantages are in deviations, log-probabilities are means of 4
    assert (estimate - analytic).norm() < 0.03 * analytic.norm()


def objective(**changed: Any) -> PolicyObjective:
    made = sampler()
    config = RunConfig("a fox", space="lora", strategy="policy", **({"clip_range": 1e-4, "inner_updates": 3} | changed))
    reward = WeightedSum([Term(1, "redness")], [tiny.Redness()])
    return PolicyObjective(config, made, reward, None, lora(made), True)


def samples(x: Tensor) -> Request:
    """An update of a policy at x (1, D): one sample on each of SEEDS."""
    return Request(x, ("a fox",) * len(SEEDS), tuple((seed,) for seed in SEEDS), gradient=True)


def retaken(made: PolicyObjective, x: Tensor, then: Tensor) -> tuple[list[Tensor], Trajectory]:
    """The log-probabilities at x, with their graphs, of what is sampled at `then`, both (1, D)."""
    given = Conditioning.stack([made.encoded("a fox")] * len(SEEDS))
    _, (trajectory,) = sampled(made.sampler, made.space.apply(then, given, full=True)[0], SEEDS)
    total: list[Tensor] = []
    replayed(made.sampler, made.space.apply(x, given, full=True)[0], trajectory, lambda now, _: total.append(now))
    return total, trajectory


def test_gradients_of_an_evaluation():
    """At the sampling weights it is the mean over images and steps of A ∇ log p, whatever the clipping."""
    made = objective()
    x = made.space.coordinates(full=True).start[None]
    (result,) = made([samples(x)])
    assert result.scores.shape == (1, 3)
    assert result.gradient.shape == x.shape
    torch.testing.assert_close(result.value, result.scores.mean(1))
    leaf = x.clone().requires_grad_()
    total, _ = retaken(made, leaf, x)
    (expected,) = torch.autograd.grad((torch.stack(total).mean(0) * advantages(result.scores[0])).mean(), leaf)
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(result.gradient, expected, rtol=1e-3, atol=1e-5)


def test_inner_updates_leave_the_sampling_weights():
    """Ratios differ from 1 after the first update, some are clipped, and no image is made for it."""
    made = objective(clip_range=1e-3)
    start = made.space.coordinates(full=True).start
    bound = torch.full_like(start, math.inf)
    solver = Policy(Problem(start, -bound, bound, 9, batch=3), GradientOptions(learning_rate=0.01, decay=1.0))
    x = solver.ask()
    (result,) = made([samples(x[:1])])
    images, scores = made.sampler.images, result.scores[0]
    solver.tell(x, scores, result.gradient.expand(3, -1))
    for _ in range(2):
        now = solver.ask()
        solver.tell(now, scores, result.again(now[:1]).expand(3, -1))
    assert made.sampler.images == images == 3
    point = solver.ask()[:1]
    total, trajectory = retaken(made, point, x[:1])
    ratios = torch.stack([
        (now - then).exp().detach() for now, then in zip(total, trajectory.log_probability, strict=True)
    ])  # fmt: skip
    assert ((ratios - 1).abs() > 1e-4).float().mean() > 0.9
    assert ((ratios - 1) * advantages(scores)).mean() > 0  # what scored well has become more likely
    clipped = result.again(point)
    made.config = replace(made.config, clip_range=10.0)
    assert (clipped - result.again(point)).norm() > 0.1 * clipped.norm()


class Opaque(tiny.Redness):
    """A reward without a gradient."""

    differentiable = False

    def __call__(self, images: Tensor, prompts: Any) -> Tensor:
        return torch.tensor([float(score) for score in super().__call__(images.detach(), prompts)])


SETTINGS: dict[str, Any] = tiny.RUN | {
    "space": "lora", "strategy": "policy", "scheduler": "DDIMScheduler", "eta": 1.0, "batch_size": 4, "rank": 2,
    "learning_rate": 0.02, "held_out": 0,
}  # fmt: skip


def test_a_black_box_reward_is_enough(tiny_folder):
    """Every update samples on seeds of its own; the budget counts every image; the best is one of them."""
    result = optimize("a fox", reward=Opaque(), model=str(tiny_folder), budget=11, **SETTINGS)
    assert [record["seed"] for record in result.history] == [0, *range(1, 9)]
    assert [record["evaluation"] for record in result.history] == [0, 1, 1, 1, 1, 2, 2, 2, 2]
    best = max(result.history, key=lambda record: record["reward"])
    assert result.reward == best["reward"]
    assert result.summary["seeds"] == [best["seed"]]
    assert result.summary["images"] == 9


def test_it_learns(tiny_folder):
    """Mean score on fresh seeds, before and after 12 updates of 8 images."""
    settings = SETTINGS | {"batch_size": 8, "held_out": 16, "inner_updates": 2, "clip_range": 0.1}
    result = optimize("a fox", reward=Opaque(), model=str(tiny_folder), budget=97, **settings)
    batches = [[r["reward"] for r in result.history if r["evaluation"] == k] for k in range(1, 13)]
    means = [sum(batch) / len(batch) for batch in batches]
    assert sum(means[-3:]) / 3 > sum(means[:3]) / 3


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"eta": 0.0}, "eta=0.0"),
        ({"batch_size": 1}, "batch_size=1"),
        ({"search_seeds": 2}, "search_seeds=2"),
        ({"scheduler": "LMSDiscreteScheduler"}, "'LMSDiscreteScheduler'"),
        ({"space": "seeds"}, "strategy='policy'"),
        ({"space": "noise"}, "'noise'"),
        ({"clip_range": 0.0}, "clip_range=0.0"),
        ({"seed": 9_999_995}, "seed=9999995"),
    ],
)
def test_what_does_not_go_together_is_refused(tiny_folder, tmp_path, wrong, rule):
    with pytest.raises(BadInput, match=rule) as caught:
        optimize(
            "a fox",
            reward=Opaque(),
            model=str(tiny_folder),
            out=tmp_path / "run",
            **({"budget": 20} | SETTINGS | wrong),
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
