"""What may change: spaces map the sampler's inputs to changed inputs. Pure torch, no diffusers, no solvers."""

from ipgo_opt.registry import Entry, Registry

SPACES = Registry(
    "space",
    {
        "tokens": Entry("ipgo_opt.spaces.tokens:TokenSpace", "IPGO's prefix and suffix tokens V = R2(θ2) R1(θ1) E Z"),
    },
)
