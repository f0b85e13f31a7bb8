"""Published methods by name: each is a space, a strategy and the settings of its paper, in one line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ipgo_opt.registry import unknown


@dataclass(frozen=True)
class Method:
    """A method: what it is, in one line, and the settings (fields of RunConfig) that make it."""

    summary: str
    settings: dict[str, Any] = field(default_factory=dict)


METHODS = {
    "ipgo": Method(
        "IPGO by the paper's equations (arXiv 2503.21812): tokens × gradient",
        {"space": "tokens", "strategy": "gradient", "anchor": False, "scale": 1.0},
    ),
    "ipgo-anchored": Method(
        "IPGO whose tokens stand on the prompt's mean state: tokens × gradient",
        {"space": "tokens", "strategy": "gradient", "anchor": True},
    ),
    "embedding": Method(
        "free tokens, the ablation of arXiv 2503.21812: embedding × gradient",
        {"space": "embedding", "strategy": "gradient"},
    ),
    "draft-1": Method(
        "DRaFT-K with K = 1 (arXiv 2309.17400): lora × gradient",
        {"space": "lora", "strategy": "gradient", "grad_steps": 1},
    ),
    "draft-lv": Method(
        "DRaFT-LV with n = 2 (arXiv 2309.17400): lora × gradient",
        {"space": "lora", "strategy": "gradient", "grad_steps": 1, "lv_samples": 2},
    ),
    "ddpo": Method(
        "DDPO (arXiv 2305.13301): lora × policy", {"space": "lora", "strategy": "policy", "search_seeds": 1}
    ),
    "reno": Method("ReNO (arXiv 2406.04312): noise × gradient", {"space": "noise", "strategy": "gradient"}),
    "reno+ipgo": Method(
        "ReNO and IPGO together: tokens+noise × gradient", {"space": "tokens+noise", "strategy": "gradient"}
    ),
    "pez": Method("PEZ (arXiv 2302.03668): hard-tokens × gradient", {"space": "hard-tokens", "strategy": "gradient"}),
    "dpo-diff": Method(
        "DPO-Diff (ICML 2024): words × hybrid, a gradient on distributions over words, then evolution",
        {"space": "words", "strategy": "hybrid"},
    ),
    "gpo": Method("DPO-Diff by its gradient alone: words × gpo", {"space": "words", "strategy": "gpo"}),
    "epo": Method("DPO-Diff by evolution alone: words × evolution", {"space": "words", "strategy": "evolution"}),
    "promptist": Method(
        "Promptist (NeurIPS 2023): a tuned language model rephrases", {"space": "texts", "strategy": "promptist"}
    ),
    "llm": Method(
        "a language model rewrites by one instruction (arXiv 2503.21812's ChatGPT-4o)",
        {"space": "texts", "strategy": "llm", "llm_mode": "single"},
    ),
    "opt2i": Method(
        "a language model sees its rewrites with their scores, after OPT2I (arXiv 2403.17804)",
        {"space": "texts", "strategy": "llm", "llm_mode": "history"},
    ),
    "best-of-n": Method("the best of n seeds: seeds × random", {"space": "seeds", "strategy": "random"}),
}
"""What `--method`, `compare --strategies` and the benchmarks may name."""


def method_settings(name: str) -> dict[str, Any]:
    """The settings of the method `name`; BadInput if there is none."""
    if name not in METHODS:
        raise unknown("method", name, list(METHODS))
    return dict(METHODS[name].settings)
