"""What is good: images (B, 3, H, W) in [0, 1] and raw prompts in, scores (B,) out, larger is better."""

import re
from dataclasses import dataclass
from pathlib import Path

from ipgo_opt.registry import Entry, Registry


@dataclass(frozen=True)
class RewardEntry(Entry):
    """A registered reward, with what has to be known of it before it is loaded.

    Attributes:
        differentiable: whether gradients flow from the scores to the images.
        any_model: whether it makes sense for the images of every model, not only for the embedded one's.
        real: the reward that the name stands for with other models than the embedded one, and with that one too if it
            has no such reward of its own (no target); "" for itself.

    """

    differentiable: bool = True
    any_model: bool = False
    real: str = ""


MEMBER = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?", re.ASCII)
"""NAME or NAME/NAME."""

REWARDS = Registry(
    "reward",
    {
        "clip": RewardEntry(
            "ipgo_opt.rewards.clip:load_clip", "prompt alignment: cosine of CLIP's image and text embeddings",
            real="clip:ViT-L-14/openai",
        ),
        "clip-spherical": RewardEntry(
            "ipgo_opt.rewards.clip:load_spherical", "minus DPO-Diff's spherical distance of CLIP's embeddings",
            real="clip-spherical:ViT-L-14/openai",
        ),
        "aesthetic": RewardEntry(
            "ipgo_opt.rewards.aesthetic:load_aesthetic", "aesthetic score, about 1 to 10", real="aesthetic:laion"
        ),
        "preference": RewardEntry(
            "ipgo_opt.rewards.clip:load_preference",
            "which picture of a prompt is preferred: alignment, sharpness, composition (in HPS's shape)",
            real="hps:v2.0",
        ),
        "hps": RewardEntry("", "human preference score, about 0.2 to 0.35", real="hps:v2.0"),
        "pickscore": RewardEntry("", "preference score of Pick-a-Pic, about 17 to 24", real="pickscore:v1"),
        "imagereward": RewardEntry("", "ImageReward, about -2 to 2 (needs imscore)", real="imscore:imagereward"),
        "clip:NAME": RewardEntry(
            "ipgo_opt.rewards.open_clip:real",
            "cosine of a CLIP: ARCHITECTURE/CHECKPOINT of open_clip, a hub id or a folder", any_model=True,
        ),
        "clip-spherical:NAME": RewardEntry(
            "ipgo_opt.rewards.open_clip:spherical", "minus the spherical distance of a CLIP, named as for clip:NAME",
            any_model=True,
        ),
        "aesthetic:NAME": RewardEntry(
            "ipgo_opt.rewards.aesthetic:real", "LAION's aesthetic head on ViT-L/14: laion or a file", any_model=True,
        ),
        "hps:NAME": RewardEntry("ipgo_opt.rewards.hps:real", "human preference score: v2.0 or v2.1", any_model=True),
        "pickscore:NAME": RewardEntry("ipgo_opt.rewards.pickscore:real", "PickScore: v1", any_model=True),
        "imscore:NAME": RewardEntry("ipgo_opt.rewards.imscore:real", "a scorer of imscore", any_model=True),
        "jpeg-compressibility": RewardEntry(
            "ipgo_opt.rewards.jpeg:load_compressibility", "minus the size in kB as JPEG of quality 95 (no gradient)",
            differentiable=False, any_model=True,
        ),
        "jpeg-incompressibility": RewardEntry(
            "ipgo_opt.rewards.jpeg:load_incompressibility", "size in kB as JPEG of quality 95 (no gradient)",
            differentiable=False, any_model=True,
        ),
    },
)  # fmt: skip

JUDGES = Registry(
    "judge",
    {"judge": Entry("ipgo_opt.rewards.clip:load_judge", "held-out alignment: a second CLIP that is never optimized")},
)

IN_PACKAGE = [name for name, entry in REWARDS.items() if entry.target and not name.endswith(":NAME")]
"""Rewards whose weights, if they have any, are in the package."""


def stands_for(name: str, embedded: bool) -> str:
    """The registered reward that a name means, with the embedded model or with another one."""
    entry = REWARDS.get(name)
    real = getattr(entry, "real", "")
    return real if entry is not None and real and not (embedded and entry.target) else name


def entry_of(name: str) -> RewardEntry:
    """What is registered of a name or of the family that it is a member of."""
    entry = REWARDS[name] if name in REWARDS else REWARDS[f"{name.partition(':')[0]}:NAME"]
    assert isinstance(entry, RewardEntry)
    return entry


def is_member(name: str) -> bool:
    """Whether a name is a member of a registered family, as far as can be seen without looking for it."""
    prefix, colon, member = name.partition(":")
    if not colon or f"{prefix}:NAME" not in REWARDS:
        return False
    path = Path(member).expanduser()
    return MEMBER.fullmatch(member) is not None or path.is_dir() or path.suffix in (".pth", ".pt", ".safetensors")
