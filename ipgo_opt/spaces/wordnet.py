"""Synonyms and antonyms from the files of WordNet 3 (Miller 1995), as Debian's package `wordnet-base` installs them.

The format is that of wndb(5WN): `index.POS` names the synsets of a lemma by their offsets in `data.POS`, the most
frequent sense first; a line of `data.POS` lists the words of a synset and its pointers, of which `!` is the antonym.
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path

from ipgo_opt.errors import BadInput

FOLDER = "/usr/share/wordnet"
"""Where Debian has it; the environment variable WNSEARCHDIR, WordNet's own, names another place."""

KINDS = ("noun", "verb", "adj", "adv")

SENSES = 3
"""Senses of a word that count, of its most frequent part of speech."""

SHORTEST = 3
"""Letters of the shortest word that is looked up: the entries of shorter ones (a, at, in) are units and elements."""


def installed() -> Path | None:
    """The folder of WordNet's files, or None."""
    folder = Path(os.environ.get("WNSEARCHDIR") or FOLDER)
    return folder if (folder / "data.noun").is_file() and (folder / "index.noun").is_file() else None


class WordNet:
    """A folder of WordNet's files.

    Args:
        folder: where they are; BadInput if one is missing.

    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for kind in KINDS:
            for name in (f"index.{kind}", f"data.{kind}"):
                if not (folder / name).is_file():
                    raise BadInput(f"a folder of WordNet must hold {name}, but {str(folder)!r} does not.")

    @cached_property
    def _files(self) -> dict[str, bytes]:
        return {
            name: (self.folder / name).read_bytes() for kind in KINDS for name in (f"index.{kind}", f"data.{kind}")
        }  # fmt: skip

    def synonyms(self, word: str) -> tuple[str, ...]:
        """Other words of the synsets of a word, the most frequent sense first; () for a word that it does not know."""
        kind, offsets = self._senses(word)
        found = [other for offset in offsets for other in self._synset(kind, offset)[0]]
        return tuple(dict.fromkeys(other for other in found if other.lower() != word.lower()))

    def antonyms(self, word: str) -> tuple[str, ...]:
        """Words that a word is opposed to, likewise."""
        kind, offsets = self._senses(word)
        found: list[str] = []
        for offset in offsets:
            words, pointers = self._synset(kind, offset)
            lowered = [one.lower() for one in words]
            for symbol, target, source, number in pointers:
                if symbol == "!" and source and lowered[source - 1] == word.lower():
                    found.append(self._synset(kind, target)[0][number - 1])
        return tuple(dict.fromkeys(found))

    def _senses(self, word: str) -> tuple[str, list[int]]:
        """The part of speech of which most senses are used in WordNet's tagged texts, and the offsets of its senses."""
        best: tuple[int, str, list[int]] = (-1, KINDS[0], [])
        for kind in KINDS if len(word) >= SHORTEST else ():
            index = self._files[f"index.{kind}"]
            start = index.find(b"\n" + word.lower().replace(" ", "_").encode() + b" ")
            if start < 0:
                continue
            fields = index[start + 1 : index.index(b"\n", start + 1)].split()
            senses = int(fields[2])
            offsets = [int(offset) for offset in fields[-senses:]]
            used = int(fields[-senses - 1])
            best = max(best, (used, kind, offsets[:SENSES]), key=lambda entry: entry[0])
        return best[1], best[2]

    def _synset(self, kind: str, offset: int) -> tuple[list[str], list[tuple[str, int, int, int]]]:
        """The words of a synset and its pointers within the part of speech: symbol, offset, numbers of the words."""
        data = self._files[f"data.{kind}"]
        fields = data[offset : data.index(b"\n", offset)].decode().split(" | ")[0].split()
        count = int(fields[3], 16)
        words = [field.split("(")[0].replace("_", " ") for field in fields[4 : 4 + 2 * count : 2]]
        rest = fields[4 + 2 * count :]
        pointers = [
            (rest[i], int(rest[i + 1]), int(rest[i + 3][:2], 16), int(rest[i + 3][2:], 16))
            for i in range(1, 1 + 4 * int(rest[0]), 4)
        ]
        return words, pointers
