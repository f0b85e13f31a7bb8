"""20 prompts × rewards `clip`, `aesthetic` and the default `clip+preference`: search, held-out and judge.

    python -m benchmarks.first_light --runs runs/first-light --jobs 2

Each cell is a run directory; finished ones are not done again. Writes docs/first-light.md.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

PROMPTS = (
    "a cat", "a fox in a meadow", "a robot on a purple background", "a castle at sunset", "a rocket at night",
    "a small turtle on a beach", "an umbrella on a yellow background", "a snowman in the snow", "a sailboat, vivid",
    "a lion, pencil sketch", "a mushroom in a meadow, vivid", "a heart at night, neon", "a fox and a rocket",
    "a cat and a pizza", "a penguin and a snowman in the snow", "a dog and a car on a beach",
    "a fish and a turtle underwater", "a tree and a house in a meadow, vivid", "an apple and a banana, pencil sketch",
    "two frogs on a blue background",
)  # fmt: skip
"""Single objects and pairs, with and without style and background."""

REWARDS = ("clip", "aesthetic", "clip+preference")


def cell(folder: Path, prompt: str, reward: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One run; resumed if it was stopped, read if it is finished."""
    import torch

    from ipgo_opt.run import optimize, resume

    torch.set_num_threads(1)
    if (folder / "run.json").exists():
        return resume(folder).summary
    return optimize(prompt, reward=reward, out=folder, **settings).summary


def main() -> None:
    """Runs the grid and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/first-light"))
    parser.add_argument("--out", type=Path, default=Path("docs/first-light.md"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--rewards", nargs="+", default=list(REWARDS))
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the runs")
    args = parser.parse_args()
    from ipgo_opt.comparison import interval
    from ipgo_opt.display import difference

    started = time.time()
    settings = {name: json.loads(value) for name, value in (pair.split("=", 1) for pair in args.set)}
    cells = [(reward, i) for i in range(args.prompts) for reward in args.rewards]
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        pending = {
            (reward, i): pool.submit(
                cell, args.runs / f"{reward.replace('*', 'x')}-{i:02d}", PROMPTS[i], reward, settings
            )
            for reward, i in cells
        }
        results = {key: work.result() for key, work in pending.items()}
    one = results[cells[0]]
    extra = f" --rewards {' '.join(args.rewards)}" if args.rewards != list(REWARDS) else ""
    extra += f" --set {' '.join(args.set)}" if args.set else ""
    lines = [
        "# First light: does it work?",
        "",
        f"Produced by `python -m benchmarks.first_light{extra}` (defaults otherwise: "
        f"{one['images']} images per search, seed 0; {one['held_out']['n']} fresh seeds with the same tokens).",
        "",
        "`search` is the best reward on the searched seeds (raw: on the first ones), `held-out` the mean over fresh "
        "seeds, `judge` the alignment that a second CLIP, never optimized against, gives on the same fresh seeds. "
        "Differences are optimized − raw, paired by prompt, with 95 % bootstrap intervals over the prompts.",
        "",
        "| reward | search rises | search: raw → best | held-out rises | held-out: raw → optimized | difference | "
        "judge: raw → optimized | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for reward in args.rewards:
        rows = [results[reward, i] for i in range(args.prompts)]
        raw, best = (np.array([row[k] for row in rows]) for k in ("raw_reward", "search_reward"))
        before, after = (np.array([row["held_out"][k] for row in rows]) for k in ("raw_mean", "mean"))
        was, now = (np.array([row["judge"][k] for row in rows]) for k in ("raw", "optimized"))
        lines.append(
            f"| `{reward}` | {int((best > raw).sum())} of {len(rows)} | {raw.mean():.3f} → {best.mean():.3f} | "
            f"{int((after > before).sum())} of {len(rows)} | {before.mean():.3f} → {after.mean():.3f} | "
            f"{difference(interval(after - before), 3)} | {was.mean():.3f} → {now.mean():.3f} | "
            f"{difference(interval(now - was), 3)} |"
        )
    lines += ["", "## Every run", "", "| prompt | reward | raw | best | held-out raw | held-out | judge raw | judge |",
              "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for (reward, i), row in sorted(results.items(), key=lambda item: (args.rewards.index(item[0][0]), item[0][1])):
        held_out, judge = row["held_out"], row["judge"]
        lines.append(
            f"| {PROMPTS[i]} | `{reward}` | {row['raw_reward']:.3f} | {row['search_reward']:.3f} | "
            f"{held_out['raw_mean']:.3f} ± {held_out['raw_sd']:.3f} | {held_out['mean']:.3f} ± {held_out['sd']:.3f} | "
            f"{judge['raw']:.3f} | {judge['optimized']:.3f} |"
        )
    args.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines[:14]))
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
