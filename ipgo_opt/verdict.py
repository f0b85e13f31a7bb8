"""The verdict: held-out reward and judge beside the search reward, on seeds that no search used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ipgo_opt.loop import Reporter, Search, finite
from ipgo_opt.objective import Evaluation, Objective, Request


def give_verdicts(searches: Sequence[Search], objective: Objective, reporter: Reporter) -> None:
    """Compares raw and best of every search, all in one pass, and leaves the verdicts in `held_out` and `judged`."""
    asked = [search for search in searches if search.config.held_out]
    requests = []
    for search in asked:
        prompts, seeds = search.fresh()
        best_x = None if search.best_x is None else search.best_x[None]
        requests += [Request(x, prompts, seeds, images=False, space=search.space) for x in (None, best_x)]
    done, total = 0, sum(len(seeds) for request in requests for seeds in request.seeds)

    def progress(images: int) -> None:
        nonlocal done
        done += images
        reporter.judging(done, total)

    made = objective(requests, progress) if requests else []
    for search, raw, best in zip(asked, made[::2], made[1::2], strict=True):
        search.held_out, search.judged = held_out(raw, best), judged(search.config.judge, raw, best)


def held_out(raw: Evaluation, best: Evaluation) -> dict[str, Any]:
    """n, mean, sd of the reward, raw_mean, raw_sd, and the means of its parts."""
    out: dict[str, Any] = {"n": best.scores.numel()}
    for prefix, side in (("", best), ("raw_", raw)):
        out[f"{prefix}mean"] = finite(side.scores.mean())
        out[f"{prefix}sd"] = finite(side.scores.std()) if side.scores.numel() > 1 else 0.0
    out["parts"] = {
        f"{prefix}{name}": finite(part.mean())
        for prefix, side in (("", best), ("raw_", raw))
        for name, part in side.parts.items()
    }
    return out


def judged(name: str, raw: Evaluation, best: Evaluation) -> dict[str, Any] | None:
    """What the judge says of both, or None without one."""
    if raw.judge is None or best.judge is None:
        return None
    return {"name": name, "raw": _mean(raw.judge), "optimized": _mean(best.judge)}


def _mean(scores: Tensor) -> float:
    return float(scores.mean())
