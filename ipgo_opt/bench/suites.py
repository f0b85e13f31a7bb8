"""What the suites run: methods × prompt groups × rewards (table 1), and variants of one method (the ablations)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipgo_opt.comparison import Cell, plan, solver_settings
from ipgo_opt.config import CLIMBERS, configure
from ipgo_opt.errors import BadInput
from ipgo_opt.prompt_files import read_prompts
from ipgo_opt.registry import unknown
from ipgo_opt.store import slug

FACTORS = (0.1, 0.3, 1, 3, 10)
"""On the size of a step, on the noise's beside the tokens', and on the tokens' norm."""

LENGTHS = (0, 5, 10)
"""Tokens on each side in the paper's figure 7."""

ALL = "value,conformity,orthonormality"

ABLATIONS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "basis": ("N = 30", {f"N = {n}": {"basis_size": n} for n in (5, 10, 20, 30, 40)}),
    "lengths": ("10 + 10", {
        f"{before} + {after}": {"prefix": before, "suffix": after}
        for before in LENGTHS for after in LENGTHS if before + after
    }),
    "rotation": ("with rotation", {
        "with rotation": {}, "without rotation": {"rotation": False}, "free embeddings": {"space": "embedding"},
    }),
    "constraints": ("V + O + C", {
        "none": {"constraints": "none"}, "V": {"constraints": "value"}, "V + C": {"constraints": "value,conformity"},
        "V + O": {"constraints": "value,orthonormality"}, "V + O + C": {"constraints": ALL},
    }),
    "truncation": ("K = 1", {"K = 1": {}, "K = 2": {"grad_steps": 2}, "K = 4": {"grad_steps": 4},
                             "full": {"grad_steps": 0}}),
    "seeds": ("1 seed", {
        "1 seed": {}, **{f"{n} seeds": {"search_seeds": n} for n in (2, 4, 8)},
        "1 seed, chosen first": {"seed_share": 0.33}, "4 seeds, chosen first": {"search_seeds": 4, "seed_share": 0.33},
    }),
    "anchor": ("as in the paper", {
        "as in the paper": {"anchor": False, "scale": 1.0},
        "attending (IPGO+)": {"anchor": False, "scale": 1.0, "attend": True},
        "anchored": {"anchor": True, "scale": None},
        "anchored, scale 1": {"anchor": True, "scale": 1.0},
        "anchored, 10 + 10 tokens": {"anchor": True, "scale": None, "prefix": 10, "suffix": 10},
        "anchored, 4 seeds chosen first": {"anchor": True, "scale": None, "search_seeds": 4, "seed_share": 0.33},
    }),
    "norm": ("1 × scale", {f"{factor:g} × scale": {"scale": factor} for factor in FACTORS}),
    "learning-rate": (
        "1 × learning rate", {f"{factor:g} × learning rate": {"learning_rate": factor} for factor in FACTORS}
    ),
    "noise": ("1 × noise", {f"{factor:g} × noise": {"noise_unit": factor} for factor in FACTORS}),
}  # fmt: skip
"""The paper's ablations of IPGO: the variant that the others are compared with, and every variant's settings.

`constraints` are V(alue), C(onformity) and O(rthonormality); K counts the last denoising steps that are differentiated;
`seeds` spends the same images on fewer updates over more seeds, or on choosing the seeds first; `anchor` adds the
prompt's mean state to the tokens (a scale of None is the model's default for such tokens); of `norm`, `learning-rate`
and `noise` (how far the noise steps beside the tokens) the settings are factors on what the model's defaults are."""

OF_ANY_METHOD = ("seeds", "learning-rate")
"""Ablations that are not of the tokens alone."""

FACTORED = {"norm": "scale", "learning-rate": "learning_rate", "noise": "noise_unit"}
"""Ablations whose settings are factors, and of what."""

TOKENS = ("tokens", "tokens+noise")
"""Spaces that have tokens as IPGO makes them."""


@dataclass(frozen=True)
class Part:
    """One comparison of a suite: the same prompts and reward, several solvers."""

    group: str
    reward: str
    solvers: tuple[str, ...]
    cells: tuple[Cell, ...]


CATEGORIES = ("people", "rooms", "vehicles", "nature", "buildings")
"""The paper's five categories, as prompts of the embedded model's world."""


def groups(sources: Sequence[str] | None, limit: int = 0) -> dict[str, list[str]]:
    """Prompts by the name of their group, from FILE or NAME=FILE; the first `limit` of each if that is not 0."""
    if limit < 0:
        raise BadInput(f"`limit >= 0` must hold, but got limit={limit}.")
    out: dict[str, list[str]] = {}
    for source in sources or CATEGORIES:
        name, equals, file = source.rpartition("=")
        label = name if equals else Path(file).stem
        if label in out:
            raise BadInput(f"each group of prompts needs a name of its own, but {label!r} came twice.")
        prompts = read_prompts(file)
        out[label] = prompts[:limit] if limit else prompts
    return out


def numbers(text: str) -> list[float]:
    """Numbers between 0 and 1, separated by commas."""
    try:
        found = [float(one) for one in text.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 <= one <= 1 for one in found):
        raise BadInput(f"shares must be numbers from 0 to 1, separated by commas, but got {text!r}.")
    return found


def differentiable(reward: str, model: str) -> bool:
    """Whether a reward has a gradient."""
    from ipgo_opt.models import EMBEDDED
    from ipgo_opt.rewards.base import prepare

    return prepare(reward, model in EMBEDDED).differentiable


def needs_gradient(settings: Mapping[str, Any]) -> bool:
    """Whether a solver can only use rewards that have one."""
    return settings.get("strategy", "gradient") in CLIMBERS


def with_shares(methods: Sequence[str], shares: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Settings of every method with every share of the budget for the choice of the seed, by label.

    Best-of-n and policies have none to choose: each of their images has a seed of its own.
    """
    out: dict[str, dict[str, Any]] = {}
    for method in methods:
        settings = solver_settings(method)
        if settings.get("space") == "seeds" or settings.get("strategy") == "policy":
            out[method] = settings
            continue
        for share in shares:
            out[method if len(shares) == 1 else f"{method} ({share:g} for seeds)"] = settings | {"seed_share": share}
    return out


def table1(
    groups: Mapping[str, Sequence[str]],
    rewards: Sequence[str],
    methods: Sequence[str],
    out: Path,
    *,
    seed_shares: Sequence[float] = (0.0,),
    **settings: Any,
) -> list[Part]:
    """Every method on every prompt of every group for every reward; a method that needs a gradient skips others.

    Raises BadInput before anything is loaded or written.
    """
    if not groups or not rewards or not methods:
        raise BadInput("table 1 needs at least one group of prompts, one reward and one method.")
    solvers = with_shares(methods, seed_shares)
    model = settings.get("model", "emoji")
    parts = []
    for reward in rewards:
        slope = differentiable(reward, model)
        able = {name: own for name, own in solvers.items() if slope or not needs_gradient(own)}
        for group, prompts in groups.items():
            folder = out / slug(reward) / slug(group)
            cells = plan(prompts, able, folder, reward=reward, **settings) if able else []
            parts.append(Part(group, reward, tuple(able), tuple(cells)))
    return parts


def ablation(
    what: str, prompts: Sequence[str], *, folder: Path, reward: str, repeats: int = 1, **settings: Any
) -> Part:
    """Every variant of one ablation on every prompt; BadInput for a variant that the model or method cannot have.

    Args:
        what: one of ABLATIONS.
        prompts: what the images should show.
        folder: where everything is kept.
        reward: a specification.
        repeats: runs per prompt and variant.
        settings: any other field of RunConfig; space and strategy are IPGO's without them.

    """
    if what not in ABLATIONS:
        raise unknown("ablation", what, list(ABLATIONS))
    usual = configure(prompts[0], reward=reward, **settings)
    if what not in OF_ANY_METHOD and usual.space not in TOKENS:
        raise BadInput(f"the ablation {what!r} is of the spaces {', '.join(TOKENS)}, but got space={usual.space!r}.")
    if what == "noise" and usual.space != "tokens+noise":
        raise BadInput(f"the ablation 'noise' is of the space tokens+noise, but got space={usual.space!r}.")
    if what == "learning-rate" and usual.strategy not in ("gradient", "policy"):
        raise BadInput(f"the strategies gradient and policy have a learning rate, but got {usual.strategy!r}.")
    variants = {label: dict(own) for label, own in ABLATIONS[what][1].items()}
    if "full" in variants:
        steps = usual.num_inference_steps
        variants["full"] = {"grad_steps": steps}
        variants = {name: own for name, own in variants.items() if own.get("grad_steps", 1) <= steps}
    if what in FACTORED:
        name = FACTORED[what]
        variants = {label: {name: own[name] * getattr(usual, name)} for label, own in variants.items()}
    settings = {"seed_share": 0.0} | settings
    cells = plan(prompts, variants, folder / slug(reward), reward=reward, repeats=repeats, **settings)
    return Part(what, reward, tuple(variants), tuple(cells))
