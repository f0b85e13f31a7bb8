"""Strategies that write texts: they add to a list, ask for the numbers of new ones and are told their values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from ipgo_opt.strategies.base import Exhausted, Problem, check_tell

MOST_REPEATS = 5
"""Times in a row that nothing new was written after which a search ends."""


class Rewriting(ABC):
    """A search over texts: the one that the list holds at the start first, then what `write` gives, each once.

    Args:
        problem: of one coordinate, the number of a text.
        texts: the list, shared with the space; it holds the raw prompt.

    Attributes:
        value: of the texts that were told, by number.

    """

    uses_gradient: ClassVar[bool] = False

    def __init__(self, problem: Problem, texts: list[str]) -> None:
        self.problem, self.texts = problem, texts
        self.asked = 0
        self.value: dict[int, float] = {}

    @abstractmethod
    def write(self) -> list[str]:
        """Some more texts; those that are in the list already do not count. Raises Exhausted if there can't be any."""

    def ask(self) -> Tensor:
        """Numbers of texts (q, 1), fewer than a batch if no more are written."""
        wanted, repeats = self.asked + self.problem.batch, 0
        try:
            while len(self.texts) < wanted:
                new = [text for text in dict.fromkeys(self.write()) if text not in self.texts]
                self.texts += new
                repeats = 0 if new else repeats + 1
                if repeats == MOST_REPEATS:
                    raise Exhausted(f"The last {repeats} answers held no new prompt.")
        except Exhausted:
            if len(self.texts) == self.asked:
                raise
        numbers = torch.arange(self.asked, min(wanted, len(self.texts)), dtype=self.problem.start.dtype)
        self.asked += len(numbers)
        return numbers[:, None]

    def tell(self, x: Tensor, value: Tensor, gradient: Tensor | None = None) -> None:
        """Values (q,) of the texts with numbers x (q, 1), larger is better."""
        check_tell(self.problem, x, value, gradient, False)
        self.value.update({int(number): float(one) for number, one in zip(x[:, 0], value, strict=True)})

    def ranked(self) -> list[tuple[float, str]]:
        """Values and texts that were told, the worst first."""
        return sorted((one, self.texts[number]) for number, one in self.value.items())

    def state_dict(self) -> dict[str, Any]:
        """The texts, how many of them were asked, and what was told."""
        return {
            "texts": list(self.texts), "asked": self.asked, "told": list(self.value),
            "value": torch.tensor(list(self.value.values()), dtype=torch.float64),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`, and the list that is shared with the space."""
        self.texts[:] = state["texts"]
        self.asked = state["asked"]
        self.value = dict(zip(state["told"], state["value"].tolist(), strict=True))
