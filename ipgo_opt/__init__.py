"""ipgo-opt finds a better image for a prompt without touching the diffusion model.

>>> import ipgo_opt
>>> result = ipgo_opt.optimize("a fox and a rocket", budget=20)
>>> result.image.save("best.png")
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["BadInput", "Result", "RunFailed", "compare", "load_conditioning", "optimize", "resume", "reward"]

if TYPE_CHECKING:
    from ipgo_opt.artefact import load_conditioning
    from ipgo_opt.comparison import compare
    from ipgo_opt.errors import BadInput, RunFailed
    from ipgo_opt.rewards.custom import reward
    from ipgo_opt.run import Result, optimize, resume

HOMES = {
    "optimize": "run", "resume": "run", "Result": "run", "BadInput": "errors", "RunFailed": "errors",
    "compare": "comparison", "reward": "rewards.custom",
    "load_conditioning": "artefact",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports the public names when they are first used: torch takes seconds."""
    if name in HOMES:
        return getattr(importlib.import_module(f"ipgo_opt.{HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
