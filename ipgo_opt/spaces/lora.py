"""Low-rank changes of the denoiser's linear layers, W + B A: what DRaFT and DDPO train.

Papers: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685; Clark et al., "Directly
Fine-Tuning Diffusion Models on Differentiable Rewards", arXiv 2309.17400 (DRaFT). Rank 6 on the attention's to_q and
to_v is the count of parameters that arXiv 2503.21812 gives for SD 1.5 in its Table 3, 597,888.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ipgo_opt.conditioning import Conditioning
from ipgo_opt.spaces.base import Coordinates, Space

if TYPE_CHECKING:
    from ipgo_opt.config import RunConfig
    from ipgo_opt.models.sampler import Sampler


class LoraSpace(Space):
    """All entries of A and B, layer by layer, without bounds.

    A starts uniform in ±1/√(width of the layer's input), as peft has it, and B at 0: the first image is the raw
    prompt's own. The factor on B A is 1 (peft's `lora_alpha` = rank).

    Args:
        layers: (outputs, inputs) of the layers, by name.
        rank: r, rows of A and columns of B.
        seed: fixes the first A.

    """

    bounded: ClassVar[bool] = False

    def __init__(self, layers: dict[str, tuple[int, int]], rank: int, seed: int = 0) -> None:
        self.layers, self.rank = layers, rank
        generator = torch.Generator().manual_seed(seed)
        start = []
        for outputs, inputs in layers.values():
            unit = torch.rand(rank * inputs, generator=generator) * 2 - 1
            start += [unit / math.sqrt(inputs), torch.zeros(outputs * rank)]
        self.start = torch.cat(start)

    @classmethod
    def made(cls, config: RunConfig, sampler: Sampler) -> LoraSpace:
        """The space on the layers of a sampler's denoiser whose names end as the configuration says."""
        return cls(sampler.linear_layers(config.layer_names()), config.rank, config.seed)

    def coordinates(self, *, full: bool) -> Coordinates:
        """The first A and B, and no bounds."""
        bound = torch.full_like(self.start, math.inf)
        return Coordinates(self.start, -bound, bound)

    def weights(self, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """A (q, r, inputs) and B (q, outputs, r) of vectors x (q, D), by layer."""
        sizes = [size for outputs, inputs in self.layers.values() for size in (self.rank * inputs, outputs * self.rank)]
        parts = iter(torch.split(x, sizes, dim=1))
        return {
            name: (next(parts).view(-1, self.rank, inputs), next(parts).view(-1, outputs, self.rank))
            for name, (outputs, inputs) in self.layers.items()
        }

    def apply(self, x: Tensor, conditioning: Conditioning, *, full: bool) -> tuple[Conditioning, Tensor]:
        """The conditioning with the weights of q candidates x (q, D), and no penalty."""
        rows = conditioning.expand(len(x))
        each = len(rows) // len(x)
        adapter = {
            name: (A.repeat_interleave(each, 0), B.repeat_interleave(each, 0))
            for name, (A, B) in self.weights(x.to(conditioning.prompt_embeds.device)).items()
        }
        return replace(rows, adapter=adapter), torch.zeros(len(rows))

    def learned(self, x: Tensor, *, full: bool) -> dict[str, Tensor]:
        """A "LAYER.lora_A" (r, inputs) and B "LAYER.lora_B" (outputs, r) of a point x (D,)."""
        out: dict[str, Tensor] = {}
        for name, (A, B) in self.weights(x[None]).items():
            out |= {f"{name}.lora_A": A[0], f"{name}.lora_B": B[0]}
        return out

    def state_dict(self) -> dict[str, Tensor]:
        """The first weights."""
        return {"start": self.start}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores `state_dict`."""
        self.start = state["start"].clone()
