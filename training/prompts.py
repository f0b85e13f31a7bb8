"""Stage `prompts`: the prompt sets in ipgo_opt/prompts, none of which occurs whole in a training caption.

    python -m training.prompts

Sixty prompts for each of the paper's five categories, sixty with animals (its category for transfer) and sixty
"complex" ones with two objects. They describe scenes that `training.world.held_out` keeps from training.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from training.scenes import load
from training.world import BACKGROUNDS, CATEGORIES, OBJECTS, RELATIONS, STYLES, Scene, caption, held_out, positioned

COUNT = 60
FOLDER = Path(__file__).parent.parent / "ipgo_opt" / "prompts"


def singles(category: str, rng: np.random.Generator) -> list[str]:
    """COUNT prompts of one object each, its category's objects in turn."""
    kept: dict[str, list[str]] = {}
    for name in CATEGORIES[category]:
        scenes = [Scene((name,), 1, "large", ground, style) for ground in BACKGROUNDS for style in ("", *STYLES)]
        texts = [caption(scene, rng, full=True) for scene in scenes if held_out(scene)]
        kept[name] = list(rng.permutation(texts))
    turns = [texts.pop() for _ in range(COUNT) for texts in kept.values() if texts]
    return turns[:COUNT]


def pairs(rng: np.random.Generator) -> list[str]:
    """COUNT prompts of two objects each, joined by "and" or by their relation."""
    out: list[str] = []
    while len(out) < COUNT:
        first, second = map(str, rng.choice(list(OBJECTS), 2, replace=False))
        scene = Scene((first, second), 1, "", str(rng.choice(BACKGROUNDS)), layout=str(rng.choice(list(RELATIONS))))
        if held_out(scene):
            named = positioned(scene, int(rng.integers(2)))
            out.append(named if len(out) % 2 else caption(scene, rng, full=True))
    return out


def main() -> None:
    """Writes FOLDER/CATEGORY.txt and checks every prompt against every training caption."""
    rng = np.random.default_rng(70)
    sets = {name: singles(name, rng) for name in ("people", "rooms", "vehicles", "nature", "buildings", "animals")}
    sets["complex"] = pairs(rng)
    trained = {text for texts in load()[2] for text in texts}
    FOLDER.mkdir(exist_ok=True)
    for name, prompts in sets.items():
        seen = sorted(set(prompts) & trained)
        if seen or len(set(prompts)) != COUNT:
            raise SystemExit(f"{name}: {len(set(prompts))} different prompts, of which training has seen {seen}")
        (FOLDER / f"{name}.txt").write_text("\n".join(prompts) + "\n")
    print(f"{len(sets)} sets of {COUNT}; none of the prompts is one of the {len(trained)} training captions")


if __name__ == "__main__":
    main()
