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
        "evolution": Entry(
            "ipgo_opt.strategies.evolution:Evolution", "DPO-Diff's genetic search over choices (any reward)"
        ),
        "hybrid": Entry(
            "ipgo_opt.strategies.hybrid:Hybrid",
            "RMSprop on distributions over words, then evolution (needs a gradient)",
        ),
        "gpo": Entry(
            "ipgo_opt.strategies.hybrid:Gpo", "RMSprop on distributions over words, then draws (needs a gradient)"
        ),
        "llm": Entry(
            "ipgo_opt.strategies.llm:Llm", "a language model rewrites the prompt (OPENAI_BASE_URL, any reward)"
        ),
        "promptist": Entry(
            "ipgo_opt.strategies.promptist:Promptist", "a local language model rephrases the prompt (any reward)"
        ),
        "random": Entry("ipgo_opt.strategies.random:Random", "uniform over the bounded coordinates (any reward)"),
    },
)
