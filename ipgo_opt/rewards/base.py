"""The contract of a reward, and what a specification like `aesthetic+0.5*clip` stands for."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from ipgo_opt.errors import BadInput, RunFailed
from ipgo_opt.rewards import REWARDS, entry_of, is_member, stands_for

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


class RewardFailed(RunFailed):
    """A reward raised, or gave something that is no score.

    Args:
        message: what happened, in one line.
        details: what the user needs to mend it (the traceback of the user's code, the answer of a service), or "".
        image: the image (3, H, W) that was being scored; the first one if it was a batch.

    """

    def __init__(self, message: str, details: str = "", image: Tensor | None = None) -> None:
        super().__init__(message)
        self.details, self.image = details, image


@dataclass(frozen=True)
class Term:
    """One weighted reward of a specification.

    Attributes:
        weight: its factor.
        name: what it is called in results; an address without what may be secret in it.
        address: the whole address, if the reward is one.

    """

    weight: float
    name: str
    address: str = field(default="", repr=False)


WEIGHTED = re.compile(r"(?:(?P<weight>[+-]?\s*[0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*\*\s*)?(?P<name>.+)", re.DOTALL)
NAME = re.compile(r"[A-Za-z_][\w-]*", re.ASCII)
FUNCTION = re.compile(r"(?:.+\.py|[^\W\d]\w*(?:\.[^\W\d]\w*)*):[^\W\d]\w*")
ADDRESS = re.compile(r"https?://[!-~]+", re.IGNORECASE)


def parse(spec: str) -> tuple[Term, ...]:
    """The terms of a reward specification; imports and loads nothing.

    A specification is a sum of terms, `TERM+TERM+…`, and a term is `REWARD` or `NUMBER*REWARD`, where REWARD is a
    registered name, a member of a registered family (`clip:ViT-L-14/openai`), `path/to/file.py:function`,
    `package.module:function` or an address `http://…`, `https://…`.

    A weight ends at the first `*`; later ones belong to the path or address. A `+` separates terms, with one exception:
    if what stands before it has a slash or backslash and is not a reward yet, it belongs to a path
    (`./c++/judge.py:score`). In an address, `+` is written `%2B`.

    Raises:
        BadInput: for anything else, a name that is not registered, a weight of 0, a term that stands twice.

    """
    terms: list[Term] = []
    for weight, name in _split(spec):
        address = ""
        if ADDRESS.fullmatch(name):
            address, name = name, _public_address(name)
            same = sum(term.name.split("#")[0] == name for term in terms)
            name += f"#{same + 1}" if same else ""
        elif name.startswith("object:"):
            raise BadInput(
                f"`object:` stands for a reward that was passed as a Python object, but got {_public(spec)!r}."
            )
        elif ":" not in name:
            if name not in REWARDS and any(term.address for term in terms):
                raise BadInput(f"a + in an address must be written %2B, but got {_public(spec)!r}.")
            REWARDS.check(name)
        if weight == 0 or not math.isfinite(weight):
            raise BadInput(f"the weight of a reward must be finite and not 0, but got {weight} in {_public(spec)!r}.")
        terms.append(Term(weight, name, address))
    if len({term.address or term.name for term in terms}) < len(terms):
        raise BadInput(f"each reward may stand once in a sum, but got {_public(spec)!r}.")
    return tuple(terms)


def _split(spec: str) -> list[tuple[float, str]]:
    """Weight and reward of each term."""
    found = []
    pieces = spec.split("+")
    while pieces:
        part = pieces.pop(0)
        term = _term(part)
        while term is None and pieces and ("/" in part or "\\" in part):
            part += "+" + pieces.pop(0)
            term = _term(part)
        if term is None:
            got = repr(_public(spec)) if "://" in spec else f"{spec!r} ({part.strip()!r})"
            raise BadInput(
                "reward must be a name, file.py:function, package.module:function, an http address or a weighted sum "
                f"such as aesthetic+0.5*clip, but got {got}."
            )
        found.append(term)
    return found


def _term(text: str) -> tuple[float, str] | None:
    match = WEIGHTED.fullmatch(text.strip())
    if match is None:
        return None
    if not is_member(match["name"]) and not any(kind.fullmatch(match["name"]) for kind in (ADDRESS, FUNCTION, NAME)):
        return None
    return float((match["weight"] or "1").replace(" ", "")), match["name"]


def shown(spec: str) -> str:
    """A valid specification (or the `object:` of a passed one) as results show it: no secrets of addresses in it."""
    if "://" not in spec:
        return spec
    return "+".join(term.name if term.weight == 1 else f"{term.weight:g}*{term.name}" for term in parse(spec))


def _public(spec: str) -> str:
    """A specification without what may be secret in its addresses, even where they are malformed."""
    spec = re.sub(r"(https?://)\S*@", r"\1", spec, flags=re.IGNORECASE)
    return re.sub(r"(://[^?#]*)[?#].*", r"\1?…", spec, flags=re.DOTALL)


def _public_address(address: str) -> str:
    """An address without user, password, query and fragment; BadInput if it has no host or a wrong port."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host:
        raise BadInput(f"an address must be http://HOST[:PORT][/PATH], but got {_public(address)!r}.")
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{f':{port}' if port else ''}{parts.path}"


@dataclass(frozen=True)
class Prepared:
    """A specification of which everything is settled that needs no weights.

    Attributes:
        terms: weights and names.
        rewards: the reward of each term; None for a registered one, which is loaded later.
        embedded: whether the images are the embedded model's, for which some names mean a reward of its own.

    """

    terms: tuple[Term, ...]
    rewards: tuple[Reward | None, ...]
    embedded: bool = True

    @property
    def differentiable(self) -> bool:
        """Whether gradients flow from the weighted sum to the images."""
        return all(
            entry_of(term.name).differentiable if reward is None else reward.differentiable
            for term, reward in zip(self.terms, self.rewards, strict=True)
        )

    @property
    def strangers(self) -> list[str]:
        """The terms that make no sense for these images: rewards of the embedded model's world, under another model."""
        return [
            term.name
            for term, reward in zip(self.terms, self.rewards, strict=True)
            if reward is None and not self.embedded and not entry_of(stands_for(term.name, False)).any_model
        ]

    def load(self, device: str) -> WeightedSum:
        """The weighted sum, its weights on `device`."""
        rewards = [
            REWARDS.load(stands_for(term.name, self.embedded))(device) if reward is None else reward
            for term, reward in zip(self.terms, self.rewards, strict=True)
        ]
        return WeightedSum(self.terms, rewards)


def prepare(spec: str, embedded: bool = True) -> Prepared:
    """Reads a specification, imports the user's functions in it, settles their kinds and finds weights; loads none.

    An unchanged file is imported once per process, however often it is prepared.

    Args:
        spec: the specification.
        embedded: whether the images will be the embedded model's.

    Raises:
        BadInput: `parse` refuses it, weights are missing, or a function can't be found, imported or called as a reward.

    """
    terms = parse(spec)
    return Prepared(terms, tuple(_settled(term, embedded) for term in terms), embedded)


def _settled(term: Term, embedded: bool) -> Reward | None:
    if term.address:
        from ipgo_opt.rewards.http import HttpReward

        return HttpReward(term.address)
    meant = stands_for(term.name, embedded)
    if is_member(meant):
        REWARDS.load(meant)  # complains about missing weights
        return None
    if ":" in term.name:
        from ipgo_opt.rewards.custom import find

        return find(term.name)
    return None


class WeightedSum:
    """A sum of rewards; the parts stay visible.

    Args:
        terms: weights and names.
        rewards: the reward of each term.

    """

    def __init__(self, terms: Sequence[Term], rewards: Sequence[Reward]) -> None:
        self.terms, self.rewards = terms, rewards
        self.differentiable = all(reward.differentiable for reward in rewards)

    def negated(self) -> WeightedSum:
        """The same rewards with the opposite weights: what an attack maximizes."""
        return WeightedSum([replace(term, weight=-term.weight) for term in self.terms], self.rewards)

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
