"""The benchmark suites: the paper's table 1 and its ablations for any model and prompts, one run directory per cell."""
