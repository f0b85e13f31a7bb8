"""Table 1 of the paper (arXiv 2503.21812): mean best reward on Stable Diffusion 1.5, on one seed per prompt."""

from __future__ import annotations

METHODS = ("ipgo", "raw", "draft-1", "ddpo", "dpo-diff", "promptist", "llm")
"""The columns, by the names that methods have here; the paper's language model was ChatGPT-4o."""

GROUPS = ("person", "room", "vehicle", "natural scenes", "buildings", "diffusiondb", "pick-a-pic")
"""The rows: five categories of COCO (60 prompts each), DiffusionDB and Pick-a-Pic (300 each)."""

SETS = {"people": "person", "rooms": "room", "vehicles": "vehicle", "nature": "natural scenes"}
"""The sets of prompts that ship with the package and stand for a category of the paper under another name."""

TABLE = {
    "clip": (
        (0.32, 0.26, 0.31, 0.29, 0.29, 0.26, 0.26),
        (0.29, 0.25, 0.28, 0.26, 0.28, 0.24, 0.24),
        (0.30, 0.25, 0.29, 0.28, 0.29, 0.25, 0.25),
        (0.29, 0.25, 0.28, 0.26, 0.28, 0.23, 0.24),
        (0.28, 0.24, 0.29, 0.27, 0.28, 0.24, 0.24),
        (0.32, 0.28, 0.32, 0.32, 0.29, 0.28, 0.27),
        (0.31, 0.27, 0.31, 0.29, 0.30, 0.26, 0.26),
    ),
    "aesthetic": (
        (6.22, 5.24, 5.78, 5.58, 4.29, 5.94, 5.23),
        (5.75, 5.09, 5.44, 5.37, 4.16, 5.60, 5.24),
        (5.86, 4.96, 5.51, 5.42, 4.02, 5.56, 5.08),
        (5.93, 5.06, 5.62, 5.51, 4.30, 5.65, 5.16),
        (5.80, 5.03, 5.43, 5.35, 4.28, 5.64, 5.19),
        (6.35, 5.50, 6.11, 5.96, 4.44, 5.63, 5.60),
        (6.27, 5.32, 5.90, 5.75, 4.36, 5.70, 5.41),
    ),
    "hps": (
        (0.29, 0.28, 0.28, 0.28, 0.25, 0.27, 0.27),
        (0.28, 0.27, 0.26, 0.27, 0.24, 0.26, 0.27),
        (0.29, 0.28, 0.28, 0.28, 0.25, 0.27, 0.27),
        (0.28, 0.27, 0.27, 0.27, 0.25, 0.26, 0.27),
        (0.28, 0.27, 0.27, 0.28, 0.26, 0.26, 0.27),
        (0.27, 0.26, 0.26, 0.26, 0.25, 0.26, 0.26),
        (0.28, 0.26, 0.26, 0.27, 0.25, 0.26, 0.26),
    ),
}


def published(reward: str, group: str, method: str) -> float | None:
    """The paper's figure for a cell, or None if it has no such row or column."""
    name, row = reward.partition(":")[0], SETS.get(group.lower(), group.lower())
    if name not in TABLE or row not in GROUPS or method not in METHODS:
        return None
    return TABLE[name][GROUPS.index(row)][METHODS.index(method)]
