"""PickScore (Kirstain et al., arXiv 2305.01569): a CLIP ViT-H/14 fine-tuned on the choices of Pick-a-Pic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ipgo_opt.registry import unknown
from ipgo_opt.rewards.clip import ClipEncoder, ClipReward
from ipgo_opt.rewards.weights import Loader, Weights

MODEL = Weights("pickscore", "yuvalkirstain/PickScore_v1", ("model.safetensors",), "3.9 GB")
CONFIG = Weights("pickscore", MODEL.repository, ("config.json",), "5 kB")
PROCESSOR = [
    Weights("pickscore", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", (file,), size)
    for file, size in (("preprocessor_config.json", "1 kB"), ("tokenizer.json", "2 MB"))
]
"""Its authors take tokenizer and image processor from the model that they fine-tuned."""


class PickScore(ClipReward):
    """exp(logit_scale) times the cosine (B,): about 17 to 24, larger is better."""

    def __init__(self, clip: ClipEncoder) -> None:
        super().__init__(clip)
        self.scale = float(clip.model.logit_scale.exp())

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) in [0, 1]."""
        return self.scale * super().__call__(images, prompts)


def real(member: str) -> Loader:
    """The reward `pickscore:v1`; BadInput if its weights are missing."""
    if member != "v1":
        raise unknown("the version of PickScore", member, ["v1"])
    folder: Path = MODEL.require().parent
    CONFIG.require()
    beside = PROCESSOR[0].require().parent
    PROCESSOR[1].require()
    return lambda device: PickScore(ClipEncoder(folder, device, beside))
