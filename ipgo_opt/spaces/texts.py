"""The space of texts: prompts that a strategy writes. A coordinate is the number of a text in a list that grows."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ipgo_opt.conditioning import Conditioning
from ipgo_opt.spaces.base import Coordinates, Space

if TYPE_CHECKING:
    from ipgo_opt.config import RunConfig
    from ipgo_opt.models.sampler import Sampler


class TextSpace(Space):
    """Texts by their number; 0 is the raw prompt.

    The list is shared with the strategy, which adds to it and keeps it in its own state.

    Args:
        prompt: the raw prompt.
        negative_prompt: what is in the unconditional half of all of them.
        sampler: encodes texts.
        most: numbers that there can be.

    """

    one_prompt: ClassVar[bool] = True

    def __init__(self, prompt: str, negative_prompt: str, sampler: Sampler, most: int) -> None:
        self.texts = [prompt]
        self.negative_prompt, self.sampler, self.most = negative_prompt, sampler, most

    @classmethod
    def made(cls, config: RunConfig, sampler: Sampler) -> TextSpace:
        """The space that a configuration describes: no more texts than images."""
        return cls(config.prompt, config.negative_prompt, sampler, config.budget)

    def coordinates(self, *, full: bool) -> Coordinates:
        """One coordinate, the number of a text, that starts at the raw prompt."""
        return Coordinates(torch.zeros(1), torch.zeros(1), torch.full((1,), float(self.most)))

    def apply(self, x: Tensor, conditioning: Conditioning, *, full: bool) -> tuple[Conditioning, Tensor]:
        """The texts of x (q, 1), encoded, and no penalty."""
        return Conditioning.stack([self.sampler.encode(self._text(row)) for row in x]), torch.zeros(len(x))

    def _text(self, x: Tensor) -> str:
        return self.texts[int(x[0])]

    def readable(self, x: Tensor, *, full: bool) -> dict[str, str]:
        """The text of a point x (1,), and the negative prompt."""
        return {"prompt": self._text(x), "negative_prompt": self.negative_prompt}

    def learned(self, x: Tensor, *, full: bool) -> dict[str, Tensor]:
        """Nothing beside the embeddings of the text."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing: the texts are the strategy's."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing."""
