"""Names for strategies, spaces, rewards and models: one line each, imported when first used."""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from typing import Any

from ipgo_opt.errors import BadInput

MOST_LISTED = 30
"""Names that an error message spells out; of more it gives the number."""


def unknown(kind: str, name: str, known: list[str]) -> BadInput:
    """The error for a name that is not one of `known`, with the nearest ones as a hint (upper case or lower)."""
    lowered = {one.lower(): one for one in known}
    close = [repr(lowered[one]) for one in difflib.get_close_matches(name.lower(), lowered, 3)]
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    choice = ", ".join(known) if len(known) <= MOST_LISTED else f"{len(known)} names"
    return BadInput(f"{kind} must be one of {choice}, but got {name!r}.{hint}")


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
    """Entries by name.

    The key "PREFIX:NAME", with NAME as it stands, is a family: its target is a function that is given what follows
    the prefix and returns the implementation, or raises BadInput.
    """

    def __init__(self, kind: str, entries: dict[str, Entry]) -> None:
        super().__init__(entries)
        self.kind = kind

    def check(self, name: str) -> None:
        """Raises BadInput unless `name` is registered; the module is imported only to check a member of a family."""
        if name.partition(":")[0] + ":NAME" in self and ":" in name:
            self.load(name)
        elif name not in self:
            raise unknown(self.kind, name, list(self))

    def load(self, name: str) -> Any:
        """The implementation of `name`."""
        prefix, colon, member = name.partition(":")
        if colon and f"{prefix}:NAME" in self:
            return self[f"{prefix}:NAME"].load()(member)
        self.check(name)
        return self[name].load()
