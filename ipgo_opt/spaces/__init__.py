"""What may change: spaces map the sampler's inputs to changed inputs. Pure torch, no diffusers, no solvers."""

from ipgo_opt.registry import Entry, Registry

SPACES = Registry(
    "space",
    {
        "tokens": Entry("ipgo_opt.spaces.tokens:TokenSpace", "IPGO's prefix and suffix tokens V = R2(θ2) R1(θ1) E Z"),
        "embedding": Entry(
            "ipgo_opt.spaces.embedding:EmbeddingSpace", "free tokens, without E, Z and θ (the ablation)"
        ),
        "noise": Entry("ipgo_opt.spaces.noise:NoiseSpace", "the starting noise, its norm kept (ReNO)"),
        "tokens+noise": Entry("ipgo_opt.spaces.product:TokensNoise", "IPGO's tokens and the starting noise together"),
        "hard-tokens": Entry("ipgo_opt.spaces.hard_tokens:HardTokenSpace", "words around the prompt (PEZ)"),
        "lora": Entry("ipgo_opt.spaces.lora:LoraSpace", "low-rank changes of the denoiser's attention (DRaFT, DDPO)"),
        "words": Entry(
            "ipgo_opt.spaces.words:WordSpace", "DPO-Diff's choices of words: a readable prompt and negative one"
        ),
        "texts": Entry("ipgo_opt.spaces.texts:TextSpace", "prompts that a language model writes"),
        "seeds": Entry("ipgo_opt.spaces.seeds:SeedSpace", "nothing but the seed of the noise: best-of-n"),
    },
)

BASES = {
    "random": "a random orthonormal basis (the paper's start)",
    "states": "principal directions of the text encoder's states of its own words",
}
"""What `basis` may name; anything else is the folder of a finished run, whose learned tokens come first."""
