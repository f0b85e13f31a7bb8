"""Black boxes on 10 prompts × 2 rewards at 100 images: solvers, bases of the tokens, shares of the budget for seeds.

    python -m benchmarks.blackbox solvers
    python -m benchmarks.blackbox bases
    python -m benchmarks.blackbox shares

Every run is kept under `--runs` and finished ones are not done again. Writes docs/blackbox-PART.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

PROMPTS = (
    "a clown on a blue background", "a couch in a meadow", "a train in the snow", "a sunflower at night",
    "a church at sunset", "a panda on a beach", "a wizard and a castle at night", "a cat left of a pizza",
    "a rocket above a tree", "two foxes in a meadow",
)  # fmt: skip
REWARDS = ("aesthetic", "jpeg-incompressibility")
SOLVERS = ("bayes", "cma", "random", "seeds")
BASES = {
    "random, scale 1": {"basis": "random", "scale": 1.0},
    "random, scale 4": {"basis": "random", "scale": 4.0},
    "states, scale 2": {"basis": "states", "scale": 2.0},
    "states, scale 4": {"basis": "states", "scale": 4.0},
    "states, scale 8": {"basis": "states", "scale": 8.0},
    "states, scale 4, N = 4": {"basis": "states", "scale": 4.0, "basis_size": 4},
    "states, scale 4, N = 16": {"basis": "states", "scale": 4.0, "basis_size": 16},
}
SHARES = (0.0, 0.16, 0.33, 0.5, 0.75)


def variants(part: str, reward: str) -> Iterator[tuple[str, tuple[str, ...], dict[str, Any]]]:
    """What is compared: a label, the solvers and the settings."""
    if part == "solvers":
        yield "", (*SOLVERS, "gradient") if reward == "aesthetic" else SOLVERS, {}
    elif part == "bases":
        for label, settings in BASES.items():
            yield label, ("cma", "random"), settings
    else:
        for share in SHARES:
            yield f"seed share {share}", ("bayes", "cma", "random"), {"seed_share": share}


def one(folder: Path, prompts: tuple[str, ...], solvers: tuple[str, ...], settings: dict[str, Any]) -> dict[str, Any]:
    """One comparison on one thread."""
    import torch

    from ipgo_opt.comparison import compare

    torch.set_num_threads(1)
    return compare(prompts, solvers, out=folder, reference="random", budget=100, **settings)


def number(value: float | None, digits: int = 3) -> str:
    """A number of a table, or a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def difference(value: dict[str, Any] | None) -> str:
    """A paired difference with its interval."""
    if value is None or value["mean"] is None:
        return "–"
    return f"{value['mean']:+.3f}" + (" [{:+.3f}, {:+.3f}]".format(*value["interval"]) if value["interval"] else "")


def main() -> None:
    """Runs one part and writes its page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("solvers", "bases", "shares"))
    parser.add_argument("--runs", type=Path, default=Path("runs/blackbox"))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    from ipgo_opt.comparison import paired

    cells = [
        (reward, label, args.runs / args.part / reward / f"{label or 'all'}-{k}", (prompt,), solvers, settings)
        for reward in REWARDS
        for label, solvers, settings in variants(args.part, reward)
        for k, prompt in enumerate(PROMPTS[: args.prompts])
    ]
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        done = [
            pool.submit(one, folder, prompts, solvers, {"reward": reward, **settings})
            for reward, _, folder, prompts, solvers, settings in cells
        ]
        made = [future.result() for future in done]
    lines = [
        f"<!-- python -m benchmarks.blackbox {args.part} --prompts {args.prompts} -->",
        f"{args.prompts} prompts, 100 images each, held out on 8 fresh seeds; means over prompts, differences to "
        "random search over the same coordinates (for `seeds`: the same) with 95 % bootstrap intervals over prompts.",
    ]
    for reward in REWARDS:
        lines += [
            "", f"## {reward}", "",
            "| setting | solver | raw | after the seeds | best at 25 | at 50 | at 100 | minus random | held out, raw | "
            "held out | judge, raw | judge | seconds |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for label, solvers, _ in variants(args.part, reward):
            runs = [
                run for cell, result in zip(cells, made, strict=True) if cell[:2] == (reward, label)
                for run in result["runs"]
            ]  # fmt: skip
            for solver in solvers:
                own = [run for run in runs if run["solver"] == solver]

                def mean(name: str, own: list[dict[str, Any]] = own) -> float | None:
                    values = [run[name] for run in own if run[name] is not None]
                    return sum(values) / len(values) if values else None

                gap = None if solver == "random" else paired(runs, solver, "random", "best")
                cells_of_row = [
                    label or "default", solver, number(mean("raw")), number(mean("seed_reward")),
                    *(number(mean(f"best_at_{share}")) for share in ("25%", "50%", "100%")), difference(gap),
                    number(mean("held_out_raw")), number(mean("held_out")), number(mean("judge_raw")),
                    number(mean("judge")), number(mean("seconds"), 0),
                ]  # fmt: skip
                lines.append("| " + " | ".join(cells_of_row) + " |")
        if args.part == "solvers":
            runs = [
                run for cell, result in zip(cells, made, strict=True) if cell[0] == reward for run in result["runs"]
            ]
            lines += ["", "Minus best-of-100 seeds: " + "; ".join(
                f"{solver} {difference(paired(runs, solver, 'seeds', 'best'))}" for solver in ("bayes", "cma", "random")
            ) + "."]  # fmt: skip
    page = args.out / f"blackbox-{args.part}.md"
    page.write_text("\n".join(lines) + "\n")
    print(page.read_text())


if __name__ == "__main__":
    main()
