"""ipgo-opt finds a better image for a prompt without touching the diffusion model.

>>> import ipgo_opt
>>> result = ipgo_opt.optimize("a fox and a rocket", budget=20)
>>> result.image.save("best.png")
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["BadInput", "Result", "RunFailed", "optimize", "resume"]

if TYPE_CHECKING:
    from ipgo_opt.errors import BadInput, RunFailed
    from ipgo_opt.run import Result, optimize, resume


def __getattr__(name: str) -> Any:
    """Imports the public names when they are first used: torch takes seconds."""
    if name in ("optimize", "resume", "Result"):
        from ipgo_opt import run

        return getattr(run, name)
    if name in ("BadInput", "RunFailed"):
        from ipgo_opt import errors

        return getattr(errors, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
