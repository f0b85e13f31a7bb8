"""16 prompts optimized on their own: in one pass against one by one, in the same process with the same weights loaded.

python -m benchmarks.many --threads 2

Prints the seconds of both, their ratio, that of the CPU seconds (for a machine that others use as well) and the largest
difference between the rewards of the two histories.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

from ipgo_opt.prompt_files import read_prompts
from ipgo_opt.run import optimize


def largest_difference(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> float:
    """Between the rewards of two histories."""
    return max(abs(x["reward"] - y["reward"]) for x, y in zip(a, b, strict=True))


def measure(prompts: list[str], budget: int, settings: dict[str, Any], loaded: dict[Any, Any]) -> dict[str, Any]:
    """Seconds of both ways, one by one first."""
    begun, begun_cpu = time.perf_counter(), time.process_time()
    alone = [optimize(prompt, budget=budget, loaded=loaded, **settings) for prompt in prompts]
    middle, middle_cpu = time.perf_counter(), time.process_time()
    together = optimize(prompts=prompts, budget=budget, loaded=loaded, **settings)
    ended, ended_cpu = time.perf_counter(), time.process_time()
    return {
        "settings": settings,
        "one_by_one": middle - begun,
        "one_pass": ended - middle,
        "ratio": (middle - begun) / (ended - middle),
        "cpu_ratio": (middle_cpu - begun_cpu) / (ended_cpu - middle_cpu),
        "images_per_second": [len(prompts) * budget / (middle - begun), len(prompts) * budget / (ended - middle)],
        "largest_difference": max(
            largest_difference(a.history, b.history) for a, b in zip(alone, together, strict=True)
        ),
    }  # fmt: skip


def main() -> None:
    """Measures every number of search seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--budget", type=int, default=0, help="images of each prompt; 0 for the model's own")
    parser.add_argument("--search-seeds", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the runs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    prompts, loaded = read_prompts("animals")[: args.prompts], {}
    more = {name: json.loads(value) for name, value in (pair.split("=", 1) for pair in args.set)}
    optimize(prompts[0], loaded=loaded, **more | {"budget": 2, "search_seeds": 1, "held_out": 0})  # loads the weights
    for seeds in args.search_seeds:
        share = {"seed_share": 0.0} if seeds == 1 else {}
        settings = {"search_seeds": seeds, **share, **more}
        found = measure(prompts, args.budget or 100, settings, loaded)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
