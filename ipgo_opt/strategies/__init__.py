"""Who searches: ask/tell state machines that see vectors and scores, never a diffusion model."""

from ipgo_opt.registry import Entry, Registry

STRATEGIES = Registry(
    "strategy",
    {
        "gradient": Entry("ipgo_opt.strategies.gradient:Gradient", "Adam with the paper's schedule (needs a gradient)"),
        "random": Entry("ipgo_opt.strategies.random:Random", "uniform over the bounded coordinates (any reward)"),
    },
)
