"""PEZ: words around the prompt, found by projected gradient steps.

Paper: Wen et al., "Hard Prompts Made Easy: Gradient-Based Discrete Optimization for Prompt Tuning and Discovery",
NeurIPS 2023, arXiv 2302.03668, algorithm 1. The vector P is continuous, in the text encoder's input embeddings; the
image is made from the nearest words Proj(P), and the gradient there moves P.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ipgo_opt.conditioning import Conditioning
from ipgo_opt.spaces.base import Coordinates, Space

if TYPE_CHECKING:
    from ipgo_opt.config import RunConfig
    from ipgo_opt.models.sampler import Sampler


class HardTokenSpace(Space):
    """Words before and after the prompt: the vector is their continuous embeddings, row by row, without bounds.

    They start as words drawn from the vocabulary, so that the first image is not the raw prompt's.

    Args:
        words: the vocabulary, n words.
        vectors: their embeddings, (n, d).
        encode: encodes the prompt with embeddings (q, M, d) as its first and last words, differentiably.
        prompt: the prompt.
        before, after: numbers of words before and after it, M in all.
        seed: of the first words.

    """

    bounded: ClassVar[bool] = False
    one_prompt: ClassVar[bool] = True

    def __init__(
        self,
        words: list[str],
        vectors: Tensor,
        encode: Callable[[Tensor], Conditioning],
        prompt: str,
        before: int,
        after: int,
        seed: int = 0,
    ) -> None:
        self.words, self.vectors, self.encode = words, vectors.float().cpu(), encode
        self.prompt, self.before, self.tokens = prompt, before, before + after
        self.directions = torch.nn.functional.normalize(self.vectors, dim=-1)
        drawn = torch.randint(len(words), (self.tokens,), generator=torch.Generator().manual_seed(seed))
        self.start = self.vectors[drawn].flatten()

    @classmethod
    def made(cls, config: RunConfig, sampler: Sampler) -> HardTokenSpace:
        """The space of words that a sampler's text encoder knows, as many as the token space has tokens."""
        from ipgo_opt.models.words import WordEncoder

        encoder = WordEncoder(sampler, config.prompt, config.prefix, config.suffix)
        return cls(
            encoder.words, encoder.vectors, encoder.encode, config.prompt, config.prefix, config.suffix, config.seed
        )

    def coordinates(self, *, full: bool) -> Coordinates:
        """The embeddings of the first words, and no bounds."""
        bound = torch.full_like(self.start, math.inf)
        return Coordinates(self.start, -bound, bound)

    def nearest(self, x: Tensor) -> Tensor:
        """Numbers (q, M) of the words nearest to points x (q, D), by the cosine, as the paper's code measures it."""
        P = torch.nn.functional.normalize(x.detach().view(len(x), self.tokens, -1), dim=-1)
        return (P @ self.directions.to(P).T).argmax(-1)

    def projected(self, x: Tensor) -> Tensor:
        """Proj(P) (q, M, d) of points x (q, D): the nearest words' embeddings, whose gradient goes to P as it is."""
        P = x.view(len(x), self.tokens, -1)
        return self.vectors.to(P)[self.nearest(x)] + (P - P.detach())

    def apply(self, x: Tensor, conditioning: Conditioning, *, full: bool) -> tuple[Conditioning, Tensor]:
        """The prompt encoded with the words nearest to q points x (q, D), and no penalty."""
        encoded = self.encode(self.projected(x))
        return replace(encoded, noise=conditioning.expand(len(x)).noise), torch.zeros(len(x))

    def learned(self, x: Tensor, *, full: bool) -> dict[str, Tensor]:
        """The numbers "words" (M,) of the words in the vocabulary and their embeddings "embeddings" (M, d)."""
        number = self.nearest(x[None])[0]
        return {"words": number, "embeddings": self.vectors[number]}

    def readable(self, x: Tensor, *, full: bool) -> dict[str, str]:
        """The prompt with the words of a point x (D,) around it."""
        words = [self.words[int(number)] for number in self.nearest(x[None])[0]]
        return {"prompt": " ".join([*words[: self.before], self.prompt, *words[self.before :]])}

    def state_dict(self) -> dict[str, Tensor]:
        """The embeddings of the first words."""
        return {"start": self.start}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores `state_dict`."""
        self.start = state["start"].clone()
