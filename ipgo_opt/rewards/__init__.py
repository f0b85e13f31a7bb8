"""What is good: images (B, 3, H, W) in [0, 1] and raw prompts in, scores (B,) out, larger is better."""

from dataclasses import dataclass

from ipgo_opt.registry import Entry, Registry


@dataclass(frozen=True)
class RewardEntry(Entry):
    """A registered reward, with what has to be known of it before it is loaded.

    Attributes:
        differentiable: whether gradients flow from the scores to the images.
        any_model: whether it makes sense for the images of every model, not only for the embedded one's.

    """

    differentiable: bool = True
    any_model: bool = False


REWARDS = Registry(
    "reward",
    {
        "clip": RewardEntry(
            "ipgo_opt.rewards.clip:load_clip", "prompt alignment: cosine of CLIP's image and text embeddings"
        ),
        "aesthetic": RewardEntry("ipgo_opt.rewards.aesthetic:load_aesthetic", "aesthetic score, about 1 to 10"),
        "preference": RewardEntry(
            "ipgo_opt.rewards.clip:load_preference",
            "which picture of a prompt is preferred: alignment, sharpness, composition (in HPS's shape)",
        ),
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
