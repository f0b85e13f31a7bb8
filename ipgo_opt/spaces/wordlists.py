"""Which words may stand for which: from a JSON file, the embedded model's vocabulary, WordNet or a language model.

The file is one object with any of three members:

    {"synonyms": {"fox": ["vixen", "red fox"]},     choices beside a word or phrase of the prompt
     "additions": [["at dawn", "at night"]],        each list: one of its choices, or nothing, after the prompt
     "negative": ["blurry", ["cat", "dog"]]}        each entry: one of its choices, or nothing, in the negative prompt
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipgo_opt.errors import BadInput
from ipgo_opt.spaces.wordnet import WordNet, installed

if TYPE_CHECKING:
    from ipgo_opt.llm import Chat

SOURCES = {
    "vocabulary": "the embedded model's own words",
    "wordnet": "WordNet's synonyms and antonyms, where it is installed",
    "llm": "lists that a language model writes for the prompt",
}
"""What `words` may name; "" is the first that is there, and anything else a JSON file."""

LIBRARY = (
    "blurry", "low quality", "distorted", "deformed", "watermark", "text", "cropped", "out of frame", "overexposed",
    "duplicate", "extra limbs", "ugly",
)  # fmt: skip
"""A negative-prompt library for models of photographs and paintings, beside WordNet's antonyms."""

WORD = re.compile(r"[^\W\d_]+")
"""Letters in a row."""

LONGEST = 200
"""Characters of a choice."""

ASKED = """For the text-to-image prompt below, list words that may replace its words, and words for a negative prompt.
Answer with one JSON object and nothing else:
{{"synonyms": {{"WORD OF THE PROMPT": ["synonym", ...], ...}}, "negative": [["antonym or opposite", ...], ...]}}
Give up to 5 synonyms for each noun, verb and adjective; they must fit into the sentence where the word stands. Give one
list of up to 5 opposites for each of them under "negative".
Prompt: {prompt}"""
"""What a language model is asked, after the description of the lists in DPO-Diff."""

ATTEMPTS = 3
"""How often a language model is asked until its answer holds lists."""


@dataclass(frozen=True)
class WordLists:
    """Choices as a source gives them; see the module's description.

    Attributes:
        synonyms: choices for words and phrases of the prompt, without the words themselves.
        additions: choices for what may follow the prompt, list by list.
        negative: choices for what may be in the negative prompt, list by list.

    """

    synonyms: dict[str, tuple[str, ...]]
    additions: tuple[tuple[str, ...], ...] = ()
    negative: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def read(cls, value: Any, where: str) -> WordLists:
        """The lists that a JSON value holds; BadInput, which names `where` it is from, if it does not."""
        members = ("synonyms", "additions", "negative")
        if not isinstance(value, dict) or not set(value) <= set(members):
            got = f"the members {', '.join(map(repr, value))}" if isinstance(value, dict) else type(value).__name__
            raise BadInput(f"{where} must be an object with members among {', '.join(members)}, but got {got}.")
        synonyms = value.get("synonyms", {})
        if not isinstance(synonyms, dict):
            raise BadInput(f"`synonyms` of {where} must be an object of lists, but got {_short(synonyms)}.")
        lists: dict[str, tuple[tuple[str, ...], ...]] = {}
        for name in members[1:]:
            entries = value.get(name, [])
            if not isinstance(entries, list):
                raise BadInput(f"`{name}` of {where} must be a list, but got {_short(entries)}.")
            lists[name] = tuple(_choices(one if isinstance(one, list) else [one], name, where) for one in entries)
        return cls({word: _choices(found, word, where) for word, found in synonyms.items()}, **lists)

    def json(self) -> str:
        """What `read` reads."""
        return json.dumps(
            {"synonyms": self.synonyms, "additions": self.additions, "negative": self.negative}, ensure_ascii=False
        )  # fmt: skip


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _choices(value: Any, name: str, where: str) -> tuple[str, ...]:
    """A list of choices, each once and without surrounding space; the empty word comes in by the task."""
    if not isinstance(value, list) or not all(isinstance(one, str) and len(one) <= LONGEST for one in value):
        raise BadInput(
            f"the choices for {name!r} of {where} must be a list of texts of at most {LONGEST} characters, but got "
            f"{_short(value)}."
        )
    return tuple(dict.fromkeys(word for one in value if (word := " ".join(one.split()))))


def from_file(path: Path) -> WordLists:
    """The lists of a JSON file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadInput(f"words must be a JSON file, but {str(path)!r} can't be read: {reason}.") from None
    return WordLists.read(value, repr(str(path)))


def from_wordnet(prompt: str, wordnet: WordNet) -> WordLists:
    """Synonyms of the prompt's words; antonyms of them, where there are some, and a library for the negative prompt."""
    words = dict.fromkeys(WORD.findall(prompt.lower()))
    synonyms = {word: found for word in words if (found := wordnet.synonyms(word))}
    opposed = tuple(found for word in words if (found := wordnet.antonyms(word)))
    return WordLists(synonyms, (), opposed + tuple((entry,) for entry in LIBRARY) if synonyms or opposed else ())


def from_vocabulary(prompt: str, path: Path, attack: bool) -> WordLists:
    """What the embedded model can say instead of the prompt's words, and beside them.

    To improve: the size of a thing, the relation of two, a place if the prompt names none; for the negative prompt
    other things of the same kinds and other places. To attack: other things of the same kind, other places, styles and
    relations.
    """
    world = json.loads(path.read_text())
    said = f" {' '.join(WORD.findall(prompt.lower()))} "

    def named(phrases: list[str]) -> list[str]:
        return [phrase for phrase in phrases if f" {phrase} " in said]

    def others(phrases: list[str]) -> tuple[str, ...]:
        return tuple(phrase for phrase in phrases if phrase not in named(phrases))

    relations = {one: others(world["relations"]) for one in named(world["relations"])}
    kinds = [things for things in world["things"].values() if named(things)]
    if attack:
        groups = [*kinds, world["places"], world["styles"]]
        exchanged = {one: others(phrases) for phrases in groups for one in named(phrases)}
        return WordLists(exchanged | relations)
    sizes = {
        thing: tuple(f"{size} {thing}" for size in world["sizes"])
        for things in kinds
        for thing in named(things)
        if not named([f"{size} {thing}" for size in world["sizes"]])
    }
    places = () if named(world["places"]) else (tuple(world["places"]),)
    return WordLists(sizes | relations, places, (*(others(things) for things in kinds), others(world["places"])))


def from_llm(prompt: str, chat: Chat) -> WordLists:
    """The lists that a language model writes; RunFailed if it answers something else again and again."""
    attempt = 1
    while True:
        answer = chat.ask([{"role": "user", "content": ASKED.format(prompt=prompt)}])
        try:
            return WordLists.read(json.loads(answer[answer.find("{") : answer.rfind("}") + 1]), "its answer")
        except (ValueError, RecursionError) as error:  # BadInput is a ValueError
            if attempt == ATTEMPTS:
                raise chat.failed(f"gave no word lists in {attempt} answers ({error}); the last was", answer) from None
        attempt += 1


def source_of(words: str, vocabulary: Path | None, endpoint: bool) -> str:
    """Where the lists come from, one of SOURCES or a file; BadInput if there is nothing.

    Args:
        words: the setting; "" takes the first of the embedded model's vocabulary, WordNet and a language model.
        vocabulary: the embedded model's words, None with another model.
        endpoint: whether the environment names an endpoint of a language model.

    """
    there = {"vocabulary": vocabulary is not None, "wordnet": installed() is not None, "llm": endpoint}
    if words in SOURCES:
        if not there[words]:
            raise BadInput(f"words {words!r} was asked for, but {MISSING[words]}.")
        return words
    if words:
        return words
    found = [name for name, present in there.items() if present]
    if not found:
        raise BadInput(
            "the space of words needs word lists, but there is no source: name a JSON file (--words FILE), install "
            "WordNet (Debian: apt-get install wordnet-base) or set OPENAI_BASE_URL."
        )
    return found[0]


MISSING = {
    "vocabulary": "only the embedded model has a vocabulary of its own",
    "wordnet": "WordNet is not installed (Debian: apt-get install wordnet-base; elsewhere set WNSEARCHDIR)",
    "llm": "neither OPENAI_BASE_URL nor OPENAI_API_KEY is set",
}
"""Why a source is not there."""


def gather(
    source: str, prompt: str, *, attack: bool, vocabulary: Path | None, chat: Callable[[], Chat]
) -> WordLists:  # fmt: skip
    """The lists of a source that `source_of` gave."""
    if source == "vocabulary" and vocabulary is not None:
        return from_vocabulary(prompt, vocabulary, attack)
    if source == "wordnet":
        folder = installed()
        assert folder is not None  # source_of has seen it
        return from_wordnet(prompt, WordNet(folder))
    if source == "llm":
        return from_llm(prompt, chat())
    return from_file(Path(source))
