"""Human Preference Score v2 (Wu et al., arXiv 2306.09341): the cosine of a CLIP ViT-H/14 fine-tuned on choices.

Preprocessing as in hpsv2's own code: the image as a tensor in [0, 1], bicubic to the shorter side, middle cut out,
OpenAI's normalization; no clamping. The checkpoints hold the state dict of open_clip's ViT-H-14.
"""

from __future__ import annotations

from ipgo_opt.registry import unknown
from ipgo_opt.rewards.clip import ClipReward
from ipgo_opt.rewards.weights import Loader, Weights

ARCHITECTURE = "ViT-H-14"

VERSIONS = {
    "v2.0": Weights("hps:v2.0", "xswu/HPSv2", ("HPS_v2_compressed.pt",), "1.97 GB"),
    "v2.1": Weights("hps:v2.1", "xswu/HPSv2", ("HPS_v2.1_compressed.pt",), "1.97 GB"),
}
"""The two published checkpoints; the paper that this package follows reports v2.0."""


def real(member: str) -> Loader:
    """The reward `hps:VERSION`: cosine, about 0.2 to 0.35; BadInput if its weights are missing."""
    from ipgo_opt.rewards.open_clip import OpenClipEncoder, load_model

    if member not in VERSIONS:
        raise unknown("the version of HPS", member, list(VERSIONS))
    path = VERSIONS[member].require()
    return lambda device: ClipReward(
        OpenClipEncoder(load_model(ARCHITECTURE, "", path), ARCHITECTURE, device, clamp=False)
    )
