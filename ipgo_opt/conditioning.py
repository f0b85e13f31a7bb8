"""What a diffusion pipeline is given in place of a prompt."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts of a batch.

    Attributes:
        prompt_embeds: states of the text encoder, (B, L, d).
        negative_prompt_embeds: states for the unconditional half of guidance, (B, L', d), or None without guidance.
        extra: further tensors by the pipeline's own argument names (pooled embeddings), each (B, …).

    """

    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)

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
        negative = self.negative_prompt_embeds
        return Conditioning(
            function(self.prompt_embeds),
            None if negative is None else function(negative),
            {name: function(tensor) for name, tensor in self.extra.items()},
        )

    def levelled(self) -> Conditioning:
        """Both sequences equally long, as pipelines demand: the shorter one repeats its last state (padding)."""
        negative = self.negative_prompt_embeds
        if negative is None:
            return self
        length = max(self.prompt_embeds.shape[1], negative.shape[1])
        return replace(
            self, prompt_embeds=_padded(self.prompt_embeds, length), negative_prompt_embeds=_padded(negative, length)
        )


def _padded(states: Tensor, length: int) -> Tensor:
    missing = length - states.shape[1]
    return states if missing == 0 else torch.cat([states, states[:, -1:].expand(-1, missing, -1)], dim=1)
