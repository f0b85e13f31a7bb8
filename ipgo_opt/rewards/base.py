"""The contract of a reward, and the weighted sum in which a specification like `aesthetic+0.5*clip` results."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ipgo_opt.errors import BadInput
from ipgo_opt.rewards import REWARDS

if TYPE_CHECKING:
    from torch import Tensor


class Reward(Protocol):
    """A judge of images.

    `differentiable` says whether gradients flow from the scores to the images.
    """

    differentiable: bool

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), larger is better, of images (B, 3, H, W) in [0, 1] against their raw prompts."""
        ...


@dataclass(frozen=True)
class Term:
    """One weighted reward of a specification."""

    weight: float
    name: str


TERM = re.compile(r"(?:(?P<weight>[+-]?\s*\d*\.?\d+(?:e[+-]?\d+)?)\s*\*\s*)?(?P<name>[A-Za-z_][\w:-]*)", re.ASCII)


def parse(spec: str) -> tuple[Term, ...]:
    """The terms of a reward specification: `name`, `0.5*name`, joined by `+`. BadInput for anything else."""
    terms = []
    for part in spec.split("+"):
        match = TERM.fullmatch(part.strip())
        if not match:
            raise BadInput(
                f"reward must be a name or a weighted sum such as aesthetic+0.5*clip, but got {spec!r} ({part!r})."
            )
        weight = float((match["weight"] or "1").replace(" ", ""))
        REWARDS.check(match["name"])
        if weight == 0 or not math.isfinite(weight):
            raise BadInput(f"the weight of a reward must be finite and not 0, but got {weight} in {spec!r}.")
        terms.append(Term(weight, match["name"]))
    names = [term.name for term in terms]
    if len(set(names)) < len(names):
        raise BadInput(f"each reward may stand once in a sum, but got {spec!r}.")
    return tuple(terms)


class WeightedSum:
    """A sum of rewards; the parts stay visible.

    Args:
        terms: weights and names.
        rewards: the reward of each term.

    """

    def __init__(self, terms: Sequence[Term], rewards: Sequence[Reward]) -> None:
        self.terms, self.rewards = terms, rewards
        self.differentiable = all(reward.differentiable for reward in rewards)

    def parts(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Unweighted scores (B,) by reward name."""
        return {term.name: reward(images, prompts) for term, reward in zip(self.terms, self.rewards, strict=True)}

    def total(self, parts: dict[str, Tensor]) -> Tensor:
        """The weighted sum (B,) of what `parts` gave."""
        weighted = [term.weight * parts[term.name] for term in self.terms]
        return sum(weighted[1:], weighted[0])

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The weighted sum (B,) of the scores."""
        return self.total(self.parts(images, prompts))
