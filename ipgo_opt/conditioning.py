"""What a diffusion pipeline is given in place of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


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

    """

    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    negative_mask: Tensor | None = None
    fixed_length: bool = False

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def repeat(self, times: int) -> Conditioning:
        """Every row `times` times in a row: (B · times, …)."""
        return self.map(lambda tensor: tensor.repeat_interleave(times, 0))

    def expand(self, size: int) -> Conditioning:
        """A batch of one, as a batch of `size` (no memory is copied)."""
        return self.map(lambda tensor: tensor.expand(size, *tensor.shape[1:]))

    def map(self, function) -> Conditioning:  # type: ignore[no-untyped-def]
        """Applies `function` to every tensor."""
        single = ("prompt_embeds", "negative_prompt_embeds", "mask", "negative_mask")
        present = {name: getattr(self, name) for name in single if getattr(self, name) is not None}
        return replace(
            self,
            extra={name: function(tensor) for name, tensor in self.extra.items()},
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
        return replace(
            self,
            prompt_embeds=_padded(self.prompt_embeds, length),
            negative_prompt_embeds=_padded(negative, length),
            mask=_lengthened(self.mask, length),
            negative_mask=_lengthened(self.negative_mask, length),
        )

    @staticmethod
    def stacked(parts: Sequence[Conditioning]) -> Conditioning:
        """The rows of several, one after the other; shorter sequences repeat their last state (padding)."""
        longest = max(part.prompt_embeds.shape[1] for part in parts)
        negatives = [part.negative_prompt_embeds for part in parts if part.negative_prompt_embeds is not None]
        longest_negative = max((negative.shape[1] for negative in negatives), default=0)
        masks = [_lengthened(part.mask, longest) for part in parts]
        negative_masks = [_lengthened(part.negative_mask, longest_negative) for part in parts]
        return replace(
            parts[0],
            prompt_embeds=torch.cat([_padded(part.prompt_embeds, longest) for part in parts]),
            negative_prompt_embeds=_joined([_padded(negative, longest_negative) for negative in negatives]),
            extra={name: torch.cat([part.extra[name] for part in parts]) for name in parts[0].extra},
            mask=_joined([mask for mask in masks if mask is not None]),
            negative_mask=_joined([mask for mask in negative_masks if mask is not None]),
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


def _joined(tensors: list[Tensor]) -> Tensor | None:
    return torch.cat(tensors) if tensors else None


def _lengthened(mask: Tensor | None, length: int) -> Tensor | None:
    return mask if mask is None else torch.nn.functional.pad(mask, (0, length - mask.shape[1]))
