"""What a reward wants, in words that a language model is told."""

from __future__ import annotations

from ipgo_opt.rewards.base import parse, shown

GOALS = {
    "clip": "better aligned with the sentence",
    "clip-spherical": "better aligned with the sentence",
    "aesthetic": "more aesthetically pleasing",
    "preference": "more preferred by people",
    "hps": "more preferred by people",
    "pickscore": "more preferred by people",
    "imagereward": "more preferred by people",
}
"""By the first part of a reward's name, after the paper's three instructions (arXiv 2503.21812)."""


def goal(spec: str) -> str:
    """What an image should be by a reward specification, or by the `object:` of a passed reward."""
    names = [spec] if spec.startswith("object:") else [term.name for term in parse(spec) if term.weight > 0]
    wishes = [
        GOALS.get(name.split(":")[0], f"better by the measure {name.removeprefix('object:')}")
        for name in names or [shown(spec)]
    ]
    return " and ".join(dict.fromkeys(wishes))
