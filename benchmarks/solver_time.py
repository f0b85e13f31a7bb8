"""Seconds that the black-box solvers themselves take, without images: 100 evaluations in 40 dimensions.

python -m benchmarks.solver_time
"""

from __future__ import annotations

import argparse
import time

import torch

from ipgo_opt.strategies import STRATEGIES
from ipgo_opt.strategies.base import Problem


def seconds(name: str, dimensions: int, budget: int, batch: int) -> list[float]:
    """Of `ask` and `tell` together, batch by batch, on a quadratic."""
    bound = torch.ones(dimensions)
    solver = STRATEGIES.load(name)(Problem(torch.zeros(dimensions), -bound, bound, budget, batch, 0))
    out = []
    for _ in range(budget // batch):
        begun = time.perf_counter()
        x = solver.ask()
        asked = time.perf_counter()
        value = -(x - 0.3).square().sum(1)
        told = time.perf_counter()
        solver.tell(x, value)
        out.append(asked - begun + time.perf_counter() - told)
    return out


def main() -> None:
    """Prints a line for each solver."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimensions", type=int, default=40)
    parser.add_argument("--budget", type=int, default=100)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in ("bayes", "cma", "random"):
        for batch in args.batch:
            found = seconds(name, args.dimensions, args.budget, batch)
            print(f"{name}, batches of {batch}: mean {sum(found) / len(found):.3f} s, largest {max(found):.3f} s")


if __name__ == "__main__":
    main()
