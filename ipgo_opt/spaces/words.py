"""The space of words: DPO-Diff's choices of words in the prompt and in the negative prompt (Wang et al., ICML 2024).

Every position has a short list of choices, of which the first is what stands there at the start: a word of the prompt,
or nothing. The low-dimensional coordinates are the numbers of the choices; the full vector holds the log-coefficients
of a categorical distribution per position, in [0, 3], 1 for the first choice and 0 for the others at the start.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ipgo_opt.conditioning import Conditioning
from ipgo_opt.errors import BadInput
from ipgo_opt.models.mixing import Mixed, Slot
from ipgo_opt.spaces.base import Coordinates, Space
from ipgo_opt.spaces.wordlists import WordLists

if TYPE_CHECKING:
    from ipgo_opt.config import RunConfig
    from ipgo_opt.models.sampler import Sampler

HIGHEST = 3.0
"""Greatest log-coefficient."""


@dataclass(frozen=True)
class Position:
    """A place in a text: characters `start` to `stop` of it, and what may stand there, what does first.

    An empty stretch is a place for something new, set off by `glue`.
    """

    start: int
    stop: int
    choices: tuple[str, ...]
    glue: str = " "


@dataclass(frozen=True)
class Template:
    """A text and its positions, in order."""

    text: str
    positions: tuple[Position, ...] = ()

    def write(self, chosen: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
        """The text with these choices, and the characters that each of them takes; all 0 gives the text itself."""
        text, spans, last = "", [], 0
        for position, k in zip(self.positions, chosen, strict=True):
            text += self.text[last : position.start]
            word, last = position.choices[k], position.stop
            if not word:
                spans.append((len(text), len(text)))
                left_out = position.stop > position.start and (not text or text.endswith(" "))
                last += int(left_out and self.text[last : last + 1] == " ")
                continue
            if position.start == position.stop and text:
                text += "" if word.startswith(",") else position.glue
            spans.append((len(text), len(text) + len(word)))
            text += word
        text += self.text[last:]
        return text if len(text) == len(self.text) else text.rstrip(), spans

    def mixed(self, weights: Sequence[Tensor]) -> Mixed:
        """The text of the heaviest choices, with all choices mixed by their weights, one vector per position."""
        text, spans = self.write([int(one.argmax()) for one in weights])
        slots = [
            Slot(start, stop, position.choices, one)
            for (start, stop), position, one in zip(spans, self.positions, weights, strict=True)
        ]
        return Mixed(text, tuple(slots))


def prompt_template(prompt: str, lists: WordLists, *, attack: bool) -> Template:
    """The prompt with its positions: where a word or phrase of the lists stands, the longest first, and at its end.

    To improve a prompt, a word may also go, and something may be added; to attack it, words are exchanged only.
    """
    taken: list[Position] = []
    for word in sorted(lists.synonyms, key=len, reverse=True):
        pattern = rf"(?<!\w){re.escape(word)}(?!\w)"
        for match in re.finditer(pattern, prompt, re.IGNORECASE) if word else ():
            start, stop = match.span()
            others = [one for one in lists.synonyms[word] if one.lower() != match[0].lower()]
            free = all(stop <= other.start or other.stop <= start for other in taken)
            if free and others:
                taken.append(Position(start, stop, (match[0], *others, *([] if attack else [""]))))
    added = [
        Position(len(prompt), len(prompt), ("", *choices)) for choices in lists.additions if choices and not attack
    ]
    return Template(prompt, (*sorted(taken, key=lambda position: position.start), *added))


def negative_template(negative_prompt: str, lists: WordLists) -> Template:
    """The negative prompt with a position at its end for each list of the negative ones."""
    end = len(negative_prompt)
    return Template(
        negative_prompt, tuple(Position(end, end, ("", *choices), ", ") for choices in lists.negative if choices)
    )  # fmt: skip


class WordSpace(Space):
    """Choices of words for a prompt and its negative prompt.

    A point that needs a gradient is a distribution over texts and is drawn from: `softmax(x + g)` with Gumbel noise g
    (temperature 1) mixes the choices of each position before the text encoder. The noise is a function of the seed,
    the point (to two decimals) and its row in the batch, so that the same point is the same mixture on every
    occasion. A point that needs none is a text: the one of the choices with the largest coefficients, or with those
    numbers.

    Args:
        prompt: the raw prompt.
        negative_prompt: what is in the unconditional half at the start.
        sampler: encodes texts and mixtures.
        lists: gives the word lists when they are first needed.
        attack: whether words are exchanged in the prompt only (see `prompt_template`).
        seed: of the Gumbel noise.

    """

    one_prompt: ClassVar[bool] = True

    def __init__(
        self, prompt: str, negative_prompt: str, sampler: Sampler, lists: Callable[[], WordLists], *,
        attack: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        self.prompt, self.negative_prompt, self.sampler = prompt, negative_prompt, sampler
        self.attack, self.seed = attack, seed
        self._gather = lists
        self._similar: Callable[[list[str]], Tensor] | None = None
        self._floor = 0.0

    @classmethod
    def made(cls, config: RunConfig, sampler: Sampler) -> WordSpace:
        """The space that a configuration describes."""
        return cls(
            config.prompt, config.negative_prompt, sampler, config.word_lists, attack=config.task == "attack",
            seed=config.seed,
        )  # fmt: skip

    def keep_similar(self, similarity: Callable[[list[str]], Tensor], floor: float) -> None:
        """From now on, texts whose similarity (n,) to the prompt is below `floor` take words back until it is not."""
        self._similar, self._floor = similarity, floor

    @cached_property
    def lists(self) -> WordLists:
        """The word lists."""
        return self._gather()

    @cached_property
    def templates(self) -> tuple[Template, Template]:
        """Of the prompt and of the negative prompt; BadInput if neither has a position."""
        reads_negative = self.sampler.reads_negative()
        return templates(
            self.prompt, self.negative_prompt, self.lists, attack=self.attack, reads_negative=reads_negative
        )

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of choices at each position, the prompt's first."""
        return tuple(len(position.choices) for template in self.templates for position in template.positions)

    def coordinates(self, *, full: bool) -> Coordinates:
        """Log-coefficients in groups of one position each, or the numbers of the choices."""
        if not full:
            last = torch.tensor(self.sizes, dtype=torch.float32) - 1
            return Coordinates(torch.zeros(len(last)), torch.zeros(len(last)), last)
        start = torch.cat([torch.eye(n)[0] for n in self.sizes])
        return Coordinates(start, torch.zeros(len(start)), torch.full((len(start),), HIGHEST), self.sizes)

    def apply(self, x: Tensor, conditioning: Conditioning, *, full: bool) -> tuple[Conditioning, Tensor]:
        """Texts, or mixtures of them, of q candidates x (q, D), encoded; and no penalty."""
        if x.requires_grad:
            rows = [self._relaxed(row, k) for k, row in enumerate(x)]
        else:
            rows = [self.sampler.encode(*self.texts(row, full=full)) for row in x]
        nothing = 0 * x.sum(1)  # a mixture of nothing but empty words depends on x all the same
        return Conditioning.stack(rows), nothing

    def _relaxed(self, x: Tensor, row: int) -> Conditioning:
        about = (x.detach().float().cpu() * 100).round().short()  # the same after rounding in another batch
        known = zlib.crc32(about.numpy().tobytes(), zlib.crc32(f"{self.seed} {row}".encode()))
        generator = torch.Generator().manual_seed(known)
        noise = -torch.empty(len(x)).exponential_(generator=generator).log().to(x)
        weights = [one.softmax(0) for one in torch.split(x + noise, list(self.sizes))]
        first = len(self.templates[0].positions)
        return self.sampler.encode_mixed(
            self.templates[0].mixed(weights[:first]), self.templates[1].mixed(weights[first:])
        )  # fmt: skip

    def texts(self, x: Tensor, *, full: bool) -> tuple[str, str]:
        """The prompt and the negative prompt of a point x (D,)."""
        if full:
            chosen = [int(one.argmax()) for one in torch.split(x, list(self.sizes))]
        else:
            chosen = [min(max(round(float(k)), 0), n - 1) for k, n in zip(x, self.sizes, strict=True)]
        first = len(self.templates[0].positions)
        own = self._near(chosen[:first])
        return self.templates[0].write(own)[0], self.templates[1].write(chosen[first:])[0]

    def _near(self, chosen: list[int]) -> list[int]:
        """The choices for the prompt without those that take it below the floor, the one that takes most first."""
        if self._similar is None:
            return chosen
        write = self.templates[0].write
        while any(chosen) and float(self._similar([write(chosen)[0]])[0]) < self._floor:
            fewer = [[0 if n == k else one for n, one in enumerate(chosen)] for k in range(len(chosen)) if chosen[k]]
            closest = self._similar([write(one)[0] for one in fewer]).argmax()
            chosen = fewer[int(closest)]
        return chosen

    def readable(self, x: Tensor, *, full: bool) -> dict[str, str]:
        """The prompt and the negative prompt of a point x (D,), by name."""
        prompt, negative_prompt = self.texts(x, full=full)
        return {"prompt": prompt, "negative_prompt": negative_prompt}

    def learned(self, x: Tensor, *, full: bool) -> dict[str, Tensor]:
        """Nothing beside the embeddings of the texts."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """The word lists, as the bytes of their JSON."""
        return {"lists": torch.frombuffer(bytearray(self.lists.json().encode()), dtype=torch.uint8).clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores `state_dict`; no source is asked."""
        kept = bytes(state["lists"].tolist())
        self._gather = lambda: WordLists.read(json.loads(kept), "the run's word lists")
        for name in ("lists", "templates", "sizes"):
            self.__dict__.pop(name, None)


def templates(
    prompt: str, negative_prompt: str, lists: WordLists, *, attack: bool, reads_negative: bool
) -> tuple[Template, Template]:
    """The prompt and the negative prompt with their positions; BadInput if there are none.

    An attack leaves the negative prompt alone, and so does a model that does not read it.
    """
    own = prompt_template(prompt, lists, attack=attack)
    other = Template(negative_prompt)
    if reads_negative and not attack:
        other = negative_template(negative_prompt, lists)
    if not own.positions and not other.positions:
        raise BadInput(f"the word lists must hold a choice for a word of the prompt, but for {prompt!r} there is none.")
    return own, other
