"""Do shared tokens carry over to prompts of a kind that they were not learned on?

    python -m benchmarks.transfer

Tokens are learned with the aesthetic reward on every shipped set of prompts but the animals, 1,000 images each, and
applied to the animals on fresh seeds. Tokens are chosen by the validation prompts; the guard that keeps them to what
the prompts say there is the embedded `clip`, so that the judge of the result takes no part in the search. Every
setting is a run directory; finished ones, and their images, are not made again. Writes docs/transfer.md and pictures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

TRAINING = ("buildings", "complex", "nature", "people", "rooms", "vehicles")
UNSEEN = "animals"
FRESH = 20_000_000
"""Seed of the unseen prompts' images: of no search, validation or verdict."""
BUDGET = 1000
IMAGES_APART = 40
"""Training images between two validations."""
LEARNING_RATE = 5e-3
DRAFT_RATES = (1e-2, 1e-3)
"""For single prompts, and slower: the first leaves the prompts within the first validation."""

TOLERANCE = 0.05
"""Share by which `clip` may fall on the validation prompts."""
STRIP = (0, 7, 14, 21, 28, 35)
"""Animals in the picture strip."""


def rows() -> dict[str, dict[str, Any]]:
    """What is compared: settings by name."""
    from ipgo_opt.methods import METHODS

    found: dict[str, dict[str, Any]] = {
        "IPGO, batch 4": {"prompt_batch": 4, "learning_rate": LEARNING_RATE},
        "IPGO, batch 10": {"prompt_batch": 10, "learning_rate": LEARNING_RATE},
        "IPGO+, batch 4": {"prompt_batch": 4, "learning_rate": LEARNING_RATE, "attend": True},
    }
    own = METHODS["draft-1"].settings
    return found | {f"DRaFT-1, lr {rate:g}": {"prompt_batch": 4, **own, "learning_rate": rate} for rate in DRAFT_RATES}


def learn(folder: Path, settings: dict[str, Any], budget: int) -> None:
    """One training run on one thread: started, continued or left as it is."""
    import torch

    from ipgo_opt.prompt_files import read_prompts
    from ipgo_opt.run import optimize, resume

    torch.set_num_threads(1)
    if (folder / "run.json").exists():
        resume(folder)
        return
    prompts = [prompt for name in TRAINING for prompt in read_prompts(name)]
    validation = prompts[::36]
    optimize(
        prompts=[prompt for prompt in prompts if prompt not in validation], validation=validation, shared=True,
        reward="aesthetic", judge="clip", judge_tolerance=TOLERANCE, budget=budget, patience=0, out=folder,
        validate_every=IMAGES_APART // settings["prompt_batch"], **settings,
    )  # fmt: skip


def transfer(folder: Path, prompts: int) -> dict[str, Any]:
    """The learned tokens on the unseen prompts, raw beside them."""
    import torch

    from ipgo_opt.apply import apply
    from ipgo_opt.prompt_files import read_prompts

    torch.set_num_threads(1)
    home = folder / f"{UNSEEN}-{prompts}"
    if not (home / "apply.json").exists():
        apply(folder, read_prompts(UNSEEN)[:prompts], seeds=[FRESH], reward="aesthetic", judge="judge", out=home)
    return json.loads((home / "apply.json").read_text())


def one(folder: Path, settings: dict[str, Any], budget: int, prompts: int) -> dict[str, Any] | None:
    """Learning and transfer of one row; None if nothing better than the raw prompts was found."""
    from safetensors import safe_open

    learn(folder, settings, budget)
    with safe_open(folder / "best.safetensors", "pt") as file:
        found = "x" in set(file.keys())
    return transfer(folder, prompts) if found else None


def validations(folder: Path) -> list[tuple[int, float, float]]:
    """Images so far, mean reward and mean guard of every validation."""
    records = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    out = []
    for evaluation in dict.fromkeys(r["evaluation"] for r in records if r["part"] == "validation"):
        own = [r for r in records if r["evaluation"] == evaluation]
        out.append((
            own[-1]["image"] + 1, sum(r["reward"] for r in own) / len(own), sum(r["judge"] for r in own) / len(own)
        ))  # fmt: skip
    return out


def curve(folders: dict[str, Path], out: Path) -> None:
    """Reward and guard on the validation prompts against images; the points that were chosen are marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    reward, guard = figure.subplots(1, 2)
    for name, folder in folders.items():
        points = validations(folder)
        best = json.loads((folder / "run.json").read_text())["result"]["search_reward"]
        at = min(range(len(points)), key=lambda k: abs(points[k][1] - best))
        for axes, which in ((reward, 1), (guard, 2)):
            (line,) = axes.plot([p[0] for p in points], [p[which] for p in points], label=name)
            axes.plot(points[at][0], points[at][which], "o", color=line.get_color())
    reward.set(xlabel="images", ylabel="aesthetic score, validation prompts")
    guard.set(xlabel="images", ylabel="alignment (clip), validation prompts")
    reward.legend(frameon=False)
    figure.savefig(out, dpi=110)


def strip(made: dict[str, Any], folders: dict[str, Path], prompts: int, out: Path) -> None:
    """Raw and every row's images of some unseen prompts, same seed."""
    from PIL import Image

    from ipgo_opt.grid import grid

    names = [name for name in folders if made[name] is not None]
    count = len(made[names[0]]["images"]) // 2
    table, labels = [], []
    for number in (n for n in STRIP if n < count):
        entries = [made[names[0]]["images"][number], *(made[name]["images"][count + number] for name in names)]
        homes = [folders[name] / f"{UNSEEN}-{prompts}" for name in (names[0], *names)]
        table.append([Image.open(home / entry["file"]) for home, entry in zip(homes, entries, strict=True)])
        labels.append(entries[0]["prompt"])
    grid(table, ["raw", *names], labels).save(out)


def table(made: dict[str, Any], folders: dict[str, Path]) -> Sequence[str]:
    """A line for each row."""
    from ipgo_opt.display import difference

    lines = [
        "| tokens | images | chosen after | validation: raw → chosen | animals: raw → applied | difference | "
        "judge: raw → applied | difference | change |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, folder in folders.items():
        result = json.loads((folder / "run.json").read_text())["result"]
        points = validations(folder)
        chosen = min(points, key=lambda point: abs(point[1] - result["search_reward"]))
        start = f"| {name} | {result['images']} | {chosen[0]} | "
        start += f"{result['raw_reward']:.3f} → {result['search_reward']:.3f} | "
        if made[name] is None:
            lines.append(f"{start}nothing better was found | | | | |")
            continue
        both = made[name]["differences"][0]
        reward, judge = both["reward"], both["judge"]
        lines.append(
            f"{start}{reward['raw']:.3f} → {reward['mean']:.3f} | {difference(reward['difference'], 3)} | "
            f"{judge['raw']:.3f} → {judge['mean']:.3f} | {difference(judge['difference'], 3)} | "
            f"{100 * (judge['mean'] / judge['raw'] - 1):+.1f} % |"
        )
    return lines


def main() -> None:
    """Learns, applies, and writes the page and its pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--budget", type=int, default=BUDGET, help="images of each run, validations included")
    parser.add_argument("--prompts", type=int, default=60, help="unseen prompts: the first of them")
    parser.add_argument("--rows", nargs="+", choices=list(rows()), help="only these")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    settings = {name: own for name, own in rows().items() if args.rows is None or name in args.rows}
    folders = {name: args.runs / "".join(c if c.isalnum() or c == "+" else "-" for c in name) for name in settings}
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        pending = {
            name: pool.submit(one, folder, settings[name], args.budget, args.prompts)
            for name, folder in folders.items()
        }
        made = {name: work.result() for name, work in pending.items()}
    curve(folders, args.out / "transfer-curve.png")
    if any(found is not None for found in made.values()):
        strip(made, folders, args.prompts, args.out / "transfer-strip.png")
    given = [f"--budget {args.budget}"] * (args.budget != BUDGET) + [f"--prompts {args.prompts}"] * (args.prompts != 60)
    given += [f"--rows {' '.join(map(repr, args.rows))}"] if args.rows else []
    text = "\n".join([
        "# Do shared tokens carry over to prompts of another kind?", "",
        f"Produced by `{' '.join(['python -m benchmarks.transfer', *given])}` on the embedded model: one set of "
        f"tokens is learned with the reward `aesthetic` on {', '.join(TRAINING)} (350 prompts, 10 more for "
        f"validation), {args.budget} images in all, and applied to {args.prompts} prompts of {UNSEEN}, one fresh seed. "
        f"Validation every {IMAGES_APART} images; the tokens that are kept are the best there as long as the alignment "
        f"by `clip` has not fallen by more than {TOLERANCE:.0%}. The `judge` is another CLIP that takes no part in the "
        "search. Differences are paired by prompt, with 95 % bootstrap intervals over the prompts.", "",
        *table(made, folders), "",
        "Dots: the tokens that were kept. Training goes on after them to show what climbing for longer does.", "",
        "![aesthetic score and alignment on the validation prompts against images](transfer-curve.png)", "",
        "![raw and optimized images of unseen prompts](transfer-strip.png)",
    ])  # fmt: skip
    (args.out / "transfer.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
