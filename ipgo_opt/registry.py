"""Names for strategies, spaces, rewards and models: one line each, imported when first used."""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from typing import Any

from ipgo_opt.errors import BadInput


def unknown(kind: str, name: str, known: list[str]) -> BadInput:
    """The error for a name that is not one of `known`, with the nearest one as a hint."""
    close = difflib.get_close_matches(name, known, 1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return BadInput(f"{kind} must be one of {', '.join(known)}, but got {name!r}.{hint}")


@dataclass(frozen=True)
class Entry:
    """Where something is implemented ("module:attribute") and what it is, in one line."""

    target: str
    summary: str

    def load(self) -> Any:
        """Imports the module and returns the attribute."""
        module, attribute = self.target.split(":")
        return getattr(importlib.import_module(module), attribute)


class Registry(dict[str, Entry]):
    """Entries by name."""

    def __init__(self, kind: str, entries: dict[str, Entry]) -> None:
        super().__init__(entries)
        self.kind = kind

    def check(self, name: str) -> None:
        """Raises BadInput unless `name` is registered."""
        if name not in self:
            raise unknown(self.kind, name, list(self))

    def load(self, name: str) -> Any:
        """The implementation of `name`."""
        self.check(name)
        return self[name].load()
