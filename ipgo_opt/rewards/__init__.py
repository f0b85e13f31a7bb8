"""What is good: images (B, 3, H, W) in [0, 1] and raw prompts in, scores (B,) out, larger is better."""

from ipgo_opt.registry import Entry, Registry

REWARDS = Registry(
    "reward",
    {
        "clip": Entry(
            "ipgo_opt.rewards.clip:load_clip", "prompt alignment: cosine of CLIP's image and text embeddings"
        ),
        "aesthetic": Entry("ipgo_opt.rewards.aesthetic:load_aesthetic", "aesthetic score, about 1 to 10"),
    },
)

JUDGES = Registry(
    "judge",
    {"judge": Entry("ipgo_opt.rewards.clip:load_judge", "held-out alignment: a second CLIP that is never optimized")},
)
