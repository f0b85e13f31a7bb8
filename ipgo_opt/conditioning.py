"""What a diffusion pipeline is given in place of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

SINGLE = ("prompt_embeds", "negative_prompt_embeds", "mask", "negative_mask", "noise")
"""The tensors that are no part of `extra`."""


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts of a batch.

    Attributes:
        prompt_embeds: states of the text encoder, (B, L, d).
        negative_prompt_embeds: states for the unconditional half of guidance, (B, L', d), or None without guidance.
        extra: further tensors by the pipeline's own argument names (pooled embeddings, a second sequence and its
            mask), each (B, …).
        mask: which states of the prompt the denoiser reads, (B, L), not 0 where it does, in one run per row; None: all.
        negative_mask: the same of the unconditional half, (B, L').
        fixed_length: whether the denoiser reads exactly L states, so that inserted ones take the place of the last.
        noise: starting noise of each row on each of S seeds, (B, S, …), as the pipeline takes it under `latents`; None:
            the pipeline draws that of the seed.
        adapter: weights that are added to linear layers of the denoiser, by the layer's name: A (B, r, in) and
            B (B, out, r), of which each row adds B A; empty: the model as it is.

    """

    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    negative_mask: Tensor | None = None
    fixed_length: bool = False
    noise: Tensor | None = None
    adapter: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def repeat(self, times: int) -> Conditioning:
        """Every row `times` times in a row, (B · times, …); noise for that many seeds becomes (B · times, 1, …)."""
        repeated = replace(self, noise=None).map(lambda tensor: tensor.repeat_interleave(times, 0))
        if self.noise is None:
            return repeated
        seeds = self.noise.expand(-1, times, *self.noise.shape[2:])
        return replace(repeated, noise=seeds.flatten(0, 1)[:, None])

    def expand(self, size: int) -> Conditioning:
        """A batch of one, as a batch of `size` (no memory is copied); a multiple of `size` rows stay as they are."""
        if len(self) > 1 and len(self) % size == 0:
            return self
        return self.map(lambda tensor: tensor.expand(size, *tensor.shape[1:]))

    @classmethod
    def stack(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """The rows of several, one after the other; shorter sequences repeat their last state (padding)."""
        longest = max(part.prompt_embeds.shape[1] for part in parts)
        negatives = [part.negative_prompt_embeds for part in parts if part.negative_prompt_embeds is not None]
        longest_negative = max((negative.shape[1] for negative in negatives), default=0)
        tensors = [part.lengthened(longest, longest_negative).tensors() for part in parts]
        joined: dict[str, Any] = {name: torch.cat([one[name] for one in tensors]) for name in tensors[0]}
        extra = {name: joined.pop(name) for name in parts[0].extra}
        return replace(parts[0], extra=extra, **joined)

    @property
    def shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Name and shape, without the batch, of every tensor: what two conditionings must share to be one batch."""
        return tuple((name, tuple(tensor.shape[1:])) for name, tensor in self.tensors().items())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, those of `extra` last."""
        own = {name: getattr(self, name) for name in SINGLE}
        return {name: tensor for name, tensor in own.items() if tensor is not None} | self.extra

    def map(self, function) -> Conditioning:  # type: ignore[no-untyped-def]
        """Applies `function` to every tensor."""
        present = {name: getattr(self, name) for name in SINGLE if getattr(self, name) is not None}
        return replace(
            self,
            extra={name: function(tensor) for name, tensor in self.extra.items()},
            adapter={name: (function(A), function(B)) for name, (A, B) in self.adapter.items()},
            **{name: function(tensor) for name, tensor in present.items()},
        )

    def mean(self) -> Tensor:
        """The mean state (B, d) of those that the denoiser reads."""
        if self.mask is None:
            return self.prompt_embeds.mean(1)
        read = (self.mask != 0).to(self.prompt_embeds)[..., None]
        return (self.prompt_embeds * read).sum(1) / read.sum(1).clamp(min=1)

    def insert(self, prefix: Tensor | None, suffix: Tensor | None) -> Conditioning:
        """With `prefix` (B, M, d) before and `suffix` (B, M', d) after the states that the denoiser reads.

        Padding stays outside, and the mask says that the inserted states are read. Of a fixed length L, the last
        M + M' states make room: padding, if there is that much of it.
        """
        sides = [side for side in (prefix, suffix) if side is not None]
        states, mask = self.prompt_embeds, self.mask
        if self.fixed_length:
            kept = states.shape[1] - sum(side.shape[1] for side in sides)
            states, mask = states[:, :kept], None if mask is None else mask[:, :kept]
        pieces = [piece for piece in (prefix, states, suffix) if piece is not None]
        T = torch.cat(pieces, dim=1)
        if mask is None:
            return replace(self, prompt_embeds=T)
        grown = torch.cat([mask if piece is states else mask.new_ones(piece.shape[:2]) for piece in pieces], dim=1)
        place = _places(mask, 0 if prefix is None else prefix.shape[1], 0 if suffix is None else suffix.shape[1])
        return replace(
            self, prompt_embeds=T.gather(1, place[..., None].expand_as(T)), mask=grown.gather(1, place)
        )  # fmt: skip

    def levelled(self) -> Conditioning:
        """Both sequences equally long, as many pipelines demand: the shorter one repeats its last state (padding)."""
        negative = self.negative_prompt_embeds
        if negative is None:
            return self
        length = max(self.prompt_embeds.shape[1], negative.shape[1])
        return self.lengthened(length, length)

    def lengthened(self, length: int, negative_length: int) -> Conditioning:
        """Sequences of so many states: the last one is repeated (padding, which masks leave out)."""
        negative = self.negative_prompt_embeds
        return replace(
            self,
            prompt_embeds=_padded(self.prompt_embeds, length),
            negative_prompt_embeds=None if negative is None else _padded(negative, negative_length),
            mask=_lengthened(self.mask, length),
            negative_mask=_lengthened(self.negative_mask, negative_length),
        )


def _places(mask: Tensor, before: int, after: int) -> Tensor:
    """Which of (prefix, states, suffix) stands at each place, (B, M + L + M'), so that padding stays outside."""
    rows, length = mask.shape
    number = torch.arange(length, device=mask.device).expand(rows, -1)
    read = mask != 0
    first = torch.where(read, number, length).amin(1, keepdim=True).clamp(max=length - 1)
    last = torch.where(read, number, -1).amax(1, keepdim=True)
    key = torch.cat([(first - 0.5).expand(-1, before), number, (last + 0.5).expand(-1, after)], dim=1)
    return key.argsort(dim=1, stable=True)


def _padded(states: Tensor, length: int) -> Tensor:
    missing = length - states.shape[1]
    return states if missing == 0 else torch.cat([states, states[:, -1:].expand(-1, missing, -1)], dim=1)


def _lengthened(mask: Tensor | None, length: int) -> Tensor | None:
    return mask if mask is None else torch.nn.functional.pad(mask, (0, length - mask.shape[1]))
