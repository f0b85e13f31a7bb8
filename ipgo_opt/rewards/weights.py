"""Where the weights of real rewards are, and what to do about those that are not there."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipgo_opt.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """A file of a repository on the Hugging Face hub, looked for in the local cache only.

    Attributes:
        reward: what needs it.
        repository: the hub id.
        files: names of which one is enough, the preferred one first.
        size: for people, for example "1.7 GB".

    """

    reward: str
    repository: str
    files: tuple[str, ...]
    size: str

    @property
    def get(self) -> str:
        """The command that fetches it."""
        return f"hf download {self.repository} {self.files[0]}"

    def find(self) -> Path | None:
        """The cached file, or None."""
        from huggingface_hub import try_to_load_from_cache

        found = (try_to_load_from_cache(self.repository, name) for name in self.files)
        return next((Path(path) for path in found if isinstance(path, str)), None)

    def require(self) -> Path:
        """The cached file; BadInput says what is missing, how large it is, how to get it and where it belongs."""
        path = self.find()
        if path is None:
            from huggingface_hub.constants import HF_HUB_CACHE

            raise BadInput(
                f"reward {self.reward!r} needs {self.files[0]} of {self.repository} ({self.size}), which is not in "
                f"{HF_HUB_CACHE}; get it with: {self.get}"
            )
        return path


@contextmanager
def as_bad_input(path: Path) -> Iterator[None]:
    """Turns what goes wrong while a checkpoint is read into one line: it is broken, holds code, or does not fit."""
    from safetensors import SafetensorError

    try:
        yield
    except (pickle.UnpicklingError, SafetensorError, EOFError, OSError) as error:
        raise BadInput(f"{str(path)!r} is no whole checkpoint of tensors alone: {_reason(error)}") from None
    except (RuntimeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadInput(f"{str(path)!r} does not fit: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[1] if len(lines) > 1 and "Error(s) in loading" in lines[0] else lines[0]) if lines else repr(error)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors, .pth or .pt file, of which nothing is executed; to be called in `as_bad_input`."""
    import torch
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        return dict(load_file(str(path)))
    return dict(torch.load(str(path), map_location="cpu", weights_only=True))


Loader = Callable[[str], Any]
"""Makes a reward on a device."""
