"""Aesthetic score in the form of LAION's predictor V2: linear layers on CLIP's normalized image embedding.

The published head has the widths 768, 1024, 128, 64, 16, 1, dropout between and no activation function
(github.com/christophschuhmann/improved-aesthetic-predictor); the embedded one has its own widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ipgo_opt.rewards.clip import EMOJI, ClipEncoder, encoder


class AestheticHead(nn.Module):
    """Linear layers of the given widths, dropout before all but the last two of them, as in LAION's."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (inner, outer) in enumerate(pairwise(widths)):
            layers.append(nn.Linear(inner, outer))
            if i < len(widths) - 3:
                layers.append(nn.Dropout(0.2 if i < 2 else 0.1))
        self.layers = nn.Sequential(*layers)

    def forward(self, embeds: Tensor) -> Tensor:
        """Scores (B,) of unit embeddings (B, D)."""
        out: Tensor = self.layers(embeds)
        return out[:, 0]

    @classmethod
    def from_file(cls, path: Path) -> AestheticHead:
        """The head whose weights (safetensors) are in `path`; the widths are read off them."""
        weights = {name: tensor.float() for name, tensor in load_file(str(path)).items()}
        matrices = [w for name, w in sorted(weights.items(), key=_layer) if name.endswith("weight")]
        head = cls([matrices[0].shape[1], *(m.shape[0] for m in matrices)])
        head.load_state_dict(weights)
        return head.eval().requires_grad_(False)


def _layer(item: tuple[str, torch.Tensor]) -> int:
    return int(item[0].split(".")[1])


class AestheticReward:
    """Aesthetic score (B,), about 1 to 10, of images alone; prompts are not read."""

    differentiable = True

    def __init__(self, clip: ClipEncoder, head: AestheticHead) -> None:
        self.clip, self.head = clip, head.to(clip.device)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) in [0, 1]."""
        return self.head(self.clip.images(images))


def load_aesthetic(device: str) -> AestheticReward:
    """The embedded aesthetic reward, on the same CLIP as the embedded `clip`."""
    return AestheticReward(encoder("clip", device), AestheticHead.from_file(EMOJI / "aesthetic.safetensors"))
