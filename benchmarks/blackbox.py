"""Black boxes at 100 images: solvers on 10 prompts; bases of the tokens and shares for seeds on 8 others.

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
"""What solvers are judged on."""
TUNING = (
    "a robot in a meadow", "a bathtub at night", "a bus at sunset", "a mushroom on a red background",
    "a castle in the snow", "a penguin on a beach", "a clown and a car in the snow", "a tree right of a house",
)  # fmt: skip
"""What bases and shares are chosen on: none of the prompts that solvers are judged on."""
REWARDS = {
    "solvers": ("aesthetic", "jpeg-incompressibility"),
    "bases": ("aesthetic", "jpeg-incompressibility", "clip"),
    "shares": ("aesthetic", "jpeg-incompressibility"),
}
SOLVERS = ("bayes", "cma", "random", "seeds")
LEARNED = "learned"
BASES = {
    "random, scale 4": {"basis": "random", "scale": 4.0},
    "random, scale 8": {"basis": "random", "scale": 8.0},
    "states, scale 2": {"basis": "states", "scale": 2.0},
    "states, scale 4": {"basis": "states", "scale": 4.0},
    "states, scale 8": {"basis": "states", "scale": 8.0},
    "states, scale 4, N = 16": {"basis": "states", "scale": 4.0, "basis_size": 16},
    "learned on the aesthetic reward, scale 4": {"basis": LEARNED, "scale": 4.0},
}
"""Settings of the tokens; the learned basis costs a gradient run of 51 images beforehand."""
SHARES = (0.0, 0.16, 0.33, 0.5, 0.75)
PARTS: dict[str, dict[str, Any]] = {"solvers": {}, "bases": {"held_out": 0}, "shares": {"held_out": 0}}
"""What is measured, and its settings: bases and shares are chosen by the search reward."""
REFERENCES = {"solvers": "random", "bases": "random, scale 4", "shares": "seed share 0.0"}
"""Which row of a part the others are compared with."""


def variants(part: str, reward: str) -> Iterator[tuple[str, tuple[str, ...], dict[str, Any]]]:
    """What is compared: a label, the solvers and the settings."""
    if part == "solvers":
        yield "", (*SOLVERS, "gradient") if reward == "aesthetic" else SOLVERS, {}
    elif part == "bases":
        for label, settings in BASES.items():
            yield label, ("bayes",), settings
    else:
        for share in SHARES:
            yield f"seed share {share}", ("bayes",), {"seed_share": share}


def one(folder: Path, prompt: str, solvers: tuple[str, ...], settings: dict[str, Any]) -> dict[str, Any]:
    """One comparison on one thread."""
    import torch

    from ipgo_opt.comparison import compare

    torch.set_num_threads(1)
    if settings.get("basis") == LEARNED:
        settings = settings | {"basis": str(learned(folder.with_name(f"{folder.name}-learned"), prompt))}
    return compare([prompt], solvers, out=folder, reference=solvers[0], budget=100, **settings)


def learned(folder: Path, prompt: str) -> Path:
    """A finished gradient run on the aesthetic reward, with the shape of tokens that black boxes have."""
    from ipgo_opt.config import BLACK_BOX_DEFAULTS
    from ipgo_opt.run import optimize, resume

    shape = {name: BLACK_BOX_DEFAULTS[name] for name in ("prefix", "suffix", "basis_size")}
    if (folder / "run.json").exists():
        resume(folder)
    else:
        search = {"budget": 51, "search_seeds": 1, "seed_share": 0.0, "held_out": 0}
        optimize(prompt, strategy="gradient", reward="aesthetic", out=folder, **search, **shape)
    return folder


def judged(run: dict[str, Any]) -> dict[str, float | None]:
    """The held-out judge of raw.png and best.png, the images that the search saw."""
    import json

    lines = [json.loads(line) for line in Path(run["folder"], "history.jsonl").read_text().splitlines()]
    best = max((line for line in lines if line["reward"] is not None), key=lambda line: line["reward"])
    return {"judge_raw_png": lines[0]["judge"], "judge_best_png": best["judge"]}


def number(value: float | None, digits: int = 3) -> str:
    """A number of a table, or a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def main() -> None:
    """Runs one part and writes its page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--runs", type=Path, default=Path("runs/blackbox"))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="at most: of the first of them")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    from ipgo_opt.comparison import paired
    from ipgo_opt.display import difference

    prompts = (PROMPTS if args.part == "solvers" else TUNING)[: args.prompts]
    cells = [
        (reward, label, args.runs / args.part / reward / f"{label or 'all'}-{k}", prompt, solvers, settings)
        for reward in REWARDS[args.part]
        for label, solvers, settings in variants(args.part, reward)
        for k, prompt in enumerate(prompts)
    ]
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        done = [
            pool.submit(one, folder, prompt, solvers, PARTS[args.part] | settings | {"reward": reward})
            for reward, _, folder, prompt, solvers, settings in cells
        ]
        made = [future.result() for future in done]
    reference = REFERENCES[args.part]
    lines = [
        f"<!-- python -m benchmarks.blackbox {args.part} --prompts {len(prompts)} -->",
        f"{len(prompts)} prompts, 100 images each; means over prompts, differences to `{reference}` paired by prompt, "
        "with 95 % bootstrap intervals over the prompts. Held out: 8 fresh seeds.",
    ]
    for reward in REWARDS[args.part]:
        lines += [
            "", f"## {reward}", "",
            f"| | raw | after the seeds | best at 25 | at 50 | at 100 | minus {reference} | held out, raw | held out | "
            "judge, raw | judge | judge of raw.png | of best.png | seconds |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        runs = [
            run | judged(run) | {"solver": label or run["solver"]}
            for (of, label, *_), result in zip(cells, made, strict=True) if of == reward
            for run in result["runs"]
        ]  # fmt: skip
        for name in dict.fromkeys(run["solver"] for run in runs):
            own = [run for run in runs if run["solver"] == name]

            def mean(field: str, own: list[dict[str, Any]] = own) -> float | None:
                values = [run[field] for run in own if run[field] is not None]
                return sum(values) / len(values) if values else None

            gap = "–" if name == reference else difference(paired(runs, name, reference, "best"), 3)
            cells_of_row = [
                name, number(mean("raw")), number(mean("seed_reward")),
                *(number(mean(f"best_at_{share}")) for share in ("25%", "50%", "100%")), gap,
                number(mean("held_out_raw")), number(mean("held_out")), number(mean("judge_raw")),
                number(mean("judge")), number(mean("judge_raw_png")), number(mean("judge_best_png")),
                number(mean("seconds"), 0),
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells_of_row) + " |")
        if args.part == "solvers":
            gaps = {name: paired(runs, name, "seeds", "best") for name in ("bayes", "cma", "random")}
            said = "; ".join(f"{name} {difference(gap, 3)}" for name, gap in gaps.items())
            lines += ["", f"Minus best-of-100 seeds: {said}."]
    page = args.out / f"blackbox-{args.part}.md"
    page.write_text("\n".join(lines) + "\n")
    print(page.read_text())


if __name__ == "__main__":
    main()
