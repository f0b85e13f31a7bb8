"""What inserted tokens cost before anything is learned: images with tokens of zeros, of padding, of the mean state.

    python -m benchmarks.insertion

The first prompts of the five categories on a few seeds; every row is the same prompts and noise. Prints a table.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from ipgo_opt.bench.suites import groups
from ipgo_opt.comparison import interval
from ipgo_opt.conditioning import Conditioning
from ipgo_opt.config import configure
from ipgo_opt.display import difference
from ipgo_opt.models import load_pipeline, make_sampler
from ipgo_opt.rewards import JUDGES
from ipgo_opt.rewards.base import prepare
from ipgo_opt.spaces.tokens import TokenSpace


def surrounded(given: Conditioning, token: Tensor, tokens: int) -> Conditioning:
    """Each row with `tokens` copies of its token (B, d) before and after it."""
    side = token[:, None].expand(-1, tokens, -1)
    return given.insert(side, side)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=10, help="of each category")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2, 10], help="on each side")
    args = parser.parse_args()
    config = configure("a fox", num_inference_steps=args.steps, reward="clip", anchor=False)
    pipeline = load_pipeline(config.model_source(), "cpu", "float32", ())
    sampler = make_sampler(pipeline, config.sampler_settings, scheduler=config.scheduler, chunk=25)
    reward, judge = prepare("clip", True).load("cpu"), JUDGES.load("judge")("cpu")
    prompts = [prompt for own in groups(None, args.prompts).values() for prompt in own]
    texts = [prompt for prompt in prompts for _ in range(args.seeds)]
    seeds = list(range(args.seeds)) * len(prompts)
    given = Conditioning.stack([sampler.encode(prompt) for prompt in prompts]).repeat(args.seeds)
    space = TokenSpace.made(config, sampler)
    learned = space.tokens(space.coordinates(full=True).start[None], full=True)
    kinds = {
        "zeros": torch.zeros_like(given.mean()),
        "one of the search's first": learned["prefix"][0, :1].expand(len(given), -1),
        "padding (the last state)": given.prompt_embeds[:, -1],
        "the mean state": given.mean(),
    }
    rows = {"raw prompt": given}
    for tokens in args.tokens:
        rows |= {f"{tokens} + {tokens}, {name}": surrounded(given, one, tokens) for name, one in kinds.items()}
    norms = given.prompt_embeds.norm(dim=-1)
    print(f"norm of the states {norms.mean():.2f}, of the first tokens {learned['prefix'].norm(dim=-1).mean():.2f}\n")
    print("| inserted | clip | minus raw | judge | minus raw | pixels moved (rms) |\n|---|---|---|---|---|---|")
    first: tuple[Tensor, Tensor, Tensor] | None = None
    for name, conditioning in rows.items():
        with torch.no_grad():
            images = sampler.generate(conditioning, seeds)
            found = reward(images, texts), judge(images, texts), images
        first = first or found
        cells = [name]
        for now, raw in zip(found[:2], first[:2], strict=True):
            gaps = (now - raw).view(len(prompts), -1).mean(1).tolist()
            cells += [f"{now.mean():.3f}", "–" if found is first else difference(interval(gaps), 3)]
        moved = (images - first[2]).square().mean().sqrt()
        print("| " + " | ".join([*cells, f"{moved:.3f}"]) + " |", flush=True)


if __name__ == "__main__":
    main()
