"""Words mixed before the text encoder: the relaxation of DPO-Diff (Wang et al., ICML 2024, section 4.2).

In the places of some words of a text, the encoder reads `Σ p_i e(w_i)` over the input embeddings e of several choices.
Words are one or more tokens long; the text that is written out decides how many tokens each place has, choices are
mixed token by token, and a choice that has no token in a place adds nothing there (the empty word makes the others
fainter). With all weight on the words that are written out, the result is the plain text's, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ipgo_opt.errors import BadInput
from ipgo_opt.models.gate import shadowed


@dataclass(frozen=True)
class Slot:
    """A stretch of a text where words are mixed.

    Attributes:
        start, stop: its characters; equal where the written choice is the empty word, and nothing is mixed then.
        words: the choices, n of them.
        weights: of the choices, (n,), sum 1.

    """

    start: int
    stop: int
    words: tuple[str, ...]
    weights: Tensor


@dataclass(frozen=True)
class Mixed:
    """A text as it is written out, and the slots in it."""

    text: str
    slots: tuple[Slot, ...] = ()

    @property
    def mixes(self) -> bool:
        """Whether any slot holds a token."""
        return any(slot.stop > slot.start for slot in self.slots)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids) if text else []


class _Reader:
    """One text encoder's input embedding while texts are mixed: each text is found in what it reads, once."""

    def __init__(self, tokenizer: Any, texts: Sequence[Mixed]) -> None:
        self.tokenizer = tokenizer
        self.waiting = [(text, _tokens(tokenizer, text.text)) for text in texts if text.mixes]

    def reading(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The embedding's `forward`, with mixtures in the slots of the texts that it is given."""

        def read(ids: Tensor) -> Tensor:
            states: Tensor = forward(ids)
            if not self.waiting or ids.ndim != 2:
                return states
            rows = [self._mixed(forward, row, state) for row, state in zip(ids, states, strict=True)]
            return torch.stack(rows)

        return read

    def _mixed(self, forward: Callable[..., Any], ids: Tensor, states: Tensor) -> Tensor:
        row = ids.tolist()
        for n, (text, tokens) in enumerate(self.waiting):
            first = _place(row, tokens)
            if first is not None:
                del self.waiting[n]
                states = states.clone()
                for slot in text.slots:
                    self._fill(forward, states, first, text.text, slot, ids.device)
                return states
        return states

    def _fill(self, forward: Any, states: Tensor, first: int, text: str, slot: Slot, device: torch.device) -> None:
        before, behind = (len(_tokens(self.tokenizer, text[:end].rstrip())) for end in (slot.start, slot.stop))
        start, stop = first + before, min(first + behind, len(states))
        if stop <= start:
            return
        mixture = torch.zeros_like(states[start:stop])
        for word, weight in zip(slot.words, slot.weights, strict=True):
            tokens = torch.tensor(_tokens(self.tokenizer, word)[: stop - start], dtype=torch.long, device=device)
            if len(tokens):
                mixture[: len(tokens)] += weight.to(states) * forward(tokens)
        states[start:stop] = mixture


def _place(row: list[int], tokens: list[int]) -> int | None:
    """Where tokens begin in a row of an encoder's input, cut to its length if need be; None if they are not there."""
    for length in (len(tokens), len(row) - 1, len(row) - 2):  # a text that is too long loses its end to special tokens
        if 0 < length <= len(tokens):
            for first in range(len(row) - length + 1):
                if row[first : first + length] == tokens[:length]:
                    return first
    return None


@contextmanager
def mixing(pipeline: Any, texts: Sequence[Mixed]) -> Iterator[None]:
    """While open, the pipeline's text encoders read mixtures where these texts say so.

    Raises:
        BadInput: a text encoder has no tokenizer beside it, or a text was not found in what the encoders read.

    """
    readers = []
    with ExitStack() as stack:
        for name, encoder in pipeline.components.items():
            if not name.startswith("text_encoder") or encoder is None:
                continue
            tokenizer = getattr(pipeline, name.replace("text_encoder", "tokenizer"), None)
            if tokenizer is None:
                raise BadInput(f"words can't be mixed in {type(pipeline).__name__}: its {name} has no tokenizer.")
            reader = _Reader(tokenizer, texts)
            readers.append(reader)
            weight = encoder.get_input_embeddings().weight
            for module in encoder.modules():
                if isinstance(module, torch.nn.Embedding) and module.weight is weight:
                    stack.enter_context(shadowed(module, "forward", reader.reading))
        yield
    if any(reader.waiting for reader in readers):
        lost = next(text.text for reader in readers for text, _ in reader.waiting)
        raise BadInput(f"words can't be mixed in {type(pipeline).__name__}: its encoders did not read {lost!r}.")
