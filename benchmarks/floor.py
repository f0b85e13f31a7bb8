"""How near one optimization step is to the bare work it can't do without.

    python -m benchmarks.floor --out docs/speed.md

Floor: T denoiser calls (guidance batched), the last one differentiated, decode, reward, one backward, written as a
plain loop. Ours: the whole step of a run (tokens, pipeline, gate, reward, judge, solver, history, checkpoint).
Notebook: every denoiser call in grad mode, its graph thrown away, as the released code of the paper does.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ipgo_opt.config import configure
from ipgo_opt.loop import Loop
from ipgo_opt.models import load, resolve
from ipgo_opt.objective import Objective
from ipgo_opt.rewards.base import WeightedSum, parse
from ipgo_opt.rewards.clip import load_clip, load_judge
from ipgo_opt.run import Silence
from ipgo_opt.spaces.tokens import TokenSpace
from ipgo_opt.store import Store
from ipgo_opt.strategies.base import Problem
from ipgo_opt.strategies.gradient import Gradient


def plain_loop(objective: Objective, x: torch.Tensor, steps: int, keep_graphs: bool) -> None:
    """The denoising loop by hand: encode tokens, T calls, decode, reward, backward."""
    pipeline, config = objective.sampler.pipeline, objective.config
    x = x.clone().requires_grad_()
    inputs = objective.applied(x, objective.encoded(config.prompt))[0].levelled()
    states = torch.cat([inputs.negative_prompt_embeds, inputs.prompt_embeds])
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(steps)
    latents = torch.randn(1, pipeline.unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = latents * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        last = i == steps - 1
        with torch.set_grad_enabled(last or keep_graphs):
            noisy = scheduler.scale_model_input(torch.cat([latents, latents]), t)
            negative, positive = pipeline.unet(noisy, t, states, return_dict=False)[0].chunk(2)
            guided = negative + config.guidance_scale * (positive - negative)
            if not last:
                guided = guided.detach()
            latents = scheduler.step(guided, t, latents, return_dict=False)[0]
    image = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
    reward = objective.reward((image / 2 + 0.5).clamp(0, 1), [config.prompt])
    reward.sum().backward()


def ours(loop: Loop, objective: Objective) -> None:
    """One round of `loop.drive`, with everything that a run does."""
    request = loop.next()
    assert request is not None
    loop.receive(request, objective([request])[0])
    loop.store.save_checkpoint(loop.state_dict())


def measure(steps: int, repeats: int) -> dict[str, np.ndarray]:
    """Seconds of `repeats` steps each, after two to warm up."""
    config = configure("a fox and a rocket", num_inference_steps=steps, search_seeds=1, seed_share=0.0)
    sampler = load(
        resolve("emoji"), config.sampler_settings, device="cpu", dtype="float32", scheduler="", chunk=config.chunk
    )
    reward = WeightedSum(parse("clip"), [load_clip("cpu")])
    space = TokenSpace(sampler.width, config.token_shape())
    objective = Objective(config, sampler, reward, load_judge("cpu"), space, True)
    start = space.coordinates(full=True)
    solver = Gradient(Problem(start.start, start.lower, start.upper, 1000), config.gradient_options())
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(config, Store(Path(folder)), Silence(), solver, 1000, config.chunk)
        while not loop.evaluation:
            ours(loop, objective)
        works: dict[str, Callable[[], None]] = {
            "floor": lambda: plain_loop(objective, solver.ask(), steps, False),
            "ours": lambda: ours(loop, objective),
            "notebook": lambda: plain_loop(objective, solver.ask(), steps, True),
        }
        times: dict[str, list[float]] = {name: [] for name in works}
        for repeat in range(repeats + 2):
            for name, work in works.items():
                begun = time.perf_counter()
                work()
                if repeat > 1:
                    times[name].append(time.perf_counter() - begun)
    return {name: np.array(values) for name, values in times.items()}


def main() -> None:
    """Times the three and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/speed.md"))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50])
    args = parser.parse_args()
    lines = [
        "# Speed: one optimization step against its floor",
        "",
        "Produced by `python -m benchmarks.floor` on the embedded model, "
        f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}. The three are interleaved in one process; "
        "the ratios are medians of the paired ratios.",
        "",
        "| sampler steps | floor, ms | ours, ms | ours / floor | notebook's way / floor |",
        "|---|---|---|---|---|",
    ]
    for steps in args.steps:
        times = measure(steps, args.repeats)
        ratio = {name: np.median(values / times["floor"]) for name, values in times.items()}
        lines.append(
            f"| {steps} | {np.median(times['floor']) * 1e3:.0f} | {np.median(times['ours']) * 1e3:.0f} | "
            f"{ratio['ours']:.2f} | {ratio['notebook']:.2f} |"
        )
    args.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
