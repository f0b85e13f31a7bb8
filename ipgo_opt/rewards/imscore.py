"""Scorers of the package imscore (optional: pip install imscore), which are differentiable on pixels in [0, 1].

Its ports differ from the originals by about 1 %, as its authors say.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from ipgo_opt.errors import BadInput
from ipgo_opt.registry import unknown
from ipgo_opt.rewards.weights import Loader, Weights

SCORERS = {
    "aesthetic-shadow": ("aesthetic.model:ShadowAesthetic", "RE-N-Y/aesthetic-shadow-v2"),
    "clipscore": ("preference.model:CLIPScore", "RE-N-Y/clipscore-vit-large-patch14"),
    "cyclereward": ("cyclereward.model:CycleReward", "NagaSaiAbhinay/CycleReward-Combo"),
    "evalmuse": ("evalmuse.model:EvalMuse", "RE-N-Y/evalmuse"),
    "hpsv2": ("hps.model:HPSv2", "RE-N-Y/hpsv21"),
    "imagereward": ("imreward.model:ImageReward", "RE-N-Y/ImageReward"),
    "laion-aesthetic": ("aesthetic.model:LAIONAestheticScorer", "RE-N-Y/laion-aesthetic"),
    "pickscore": ("pickscore.model:PickScorer", "RE-N-Y/pickscore"),
    "pickscore-siglip": ("preference.model:SiglipPreferenceScorer", "RE-N-Y/pickscore-siglip"),
    "vqascore": ("vqascore.model:VQAScore", "RE-N-Y/clip-t5-xxl"),
}
"""Its scorers that load without remote code, by name: class and hub id of the weights."""


class ImscoreReward:
    """What `scorer.score(pixels, prompts)` gives, (B,); larger is better."""

    differentiable = True

    def __init__(self, scorer: Any, device: str) -> None:
        self.scorer, self.device = scorer.eval().requires_grad_(False).to(device), device

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) in [0, 1]."""
        scores: Tensor = self.scorer.score(images.to(self.device), list(prompts))
        return scores.reshape(len(images))


def real(member: str) -> Loader:
    """The reward `imscore:NAME`; BadInput if the package or the weights are missing."""
    if member not in SCORERS:
        raise unknown("the scorer of imscore", member, list(SCORERS))
    if find_spec("imscore") is None:
        raise BadInput(f"reward 'imscore:{member}' needs the package imscore: pip install imscore.")
    target, repository = SCORERS[member]
    Weights(f"imscore:{member}", repository, ("model.safetensors",), "size as its page says").require()
    module, _, name = target.partition(":")

    def load(device: str) -> ImscoreReward:
        scorer = getattr(importlib.import_module(f"imscore.{module}"), name)
        return ImscoreReward(scorer.from_pretrained(repository), device)

    return load
