"""Who searches: ask/tell state machines that see vectors and scores, never a diffusion model."""

from ipgo_opt.registry import Entry, Registry

STRATEGIES = Registry(
    "strategy",
    {
        "gradient": Entry("ipgo_opt.strategies.gradient:Gradient", "Adam with the paper's schedule (needs a gradient)"),
        "policy": Entry("ipgo_opt.strategies.policy:Policy", "DDPO's policy gradient (any reward; lora or tokens)"),
        "bayes": Entry("ipgo_opt.strategies.bayes:Bayes", "Bayesian optimization with BoTorch (any reward)"),
        "cma": Entry("ipgo_opt.strategies.nevergrad:Cma", "CMA-ES, an evolution strategy (any reward)"),
        "nevergrad:NAME": Entry(
            "ipgo_opt.strategies.nevergrad:named", "Nevergrad's optimizer NAME, such as TBPSA or DE (any reward)"
        ),
        "random": Entry("ipgo_opt.strategies.random:Random", "uniform over the bounded coordinates (any reward)"),
    },
)
