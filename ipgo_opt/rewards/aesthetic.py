"""Aesthetic score in the form of LAION's predictor V2: linear layers on CLIP's normalized image embedding.

The published head has the widths 768, 1024, 128, 64, 16, 1, dropout between and no activation function
(github.com/christophschuhmann/improved-aesthetic-predictor); the embedded one has its own widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from ipgo_opt.errors import BadInput
from ipgo_opt.rewards.clip import EMOJI, Encoder, encoder
from ipgo_opt.rewards.weights import Loader, Weights, as_bad_input, read_tensors

LAION = Weights("aesthetic", "trl-lib/ddpo-aesthetic-predictor", ("aesthetic-model.pth",), "3.7 MB")
"""LAION's head sac+logos+ava1-l14-linearMSE as the hub has it."""

BACKBONE = ("ViT-L-14", "openai")
"""The CLIP on whose embeddings LAION's head was trained."""

BACKBONE_WEIGHTS = Weights(
    "clip:ViT-L-14/openai",
    "timm/vit_large_patch14_clip_224.openai",
    ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    "1.7 GB",
)
"""Its weights, as open_clip has them."""

LAION_WIDTH = 768
"""Width of those embeddings."""


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
        """The head whose weights (safetensors, .pth) are in `path`; the widths are read off them.

        Raises:
            BadInput: the file is broken, holds something else than tensors, or other layers.

        """
        with as_bad_input(path):
            weights = {name: tensor.float() for name, tensor in read_tensors(path).items()}
            matrices = [w for name, w in sorted(weights.items(), key=_layer) if name.endswith("weight")]
            if not matrices:
                raise ValueError("it has no layers")
            head = cls([matrices[0].shape[1], *(m.shape[0] for m in matrices)])
            head.load_state_dict(weights)
        return head.eval().requires_grad_(False)


def _layer(item: tuple[str, torch.Tensor]) -> int:
    kind, _, rest = item[0].partition(".")
    number = rest.partition(".")[0]
    if kind != "layers" or not number.isdecimal():
        raise ValueError(f"an aesthetic head has layers.0.weight, …, but here is {item[0]!r}")
    return int(number)


class AestheticReward:
    """Aesthetic score (B,), about 1 to 10, of images alone; prompts are not read."""

    differentiable = True

    def __init__(self, clip: Encoder, head: AestheticHead) -> None:
        self.clip, self.head = clip, head.to(clip.device)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) in [0, 1]."""
        return self.head(self.clip.images(images))


def load_aesthetic(device: str) -> AestheticReward:
    """The embedded aesthetic reward, on the same CLIP as the embedded `clip`."""
    return AestheticReward(encoder("clip", device), AestheticHead.from_file(EMOJI / "aesthetic.safetensors"))


def real(member: str) -> Loader:
    """The reward `aesthetic:MEMBER` for images of every model: "laion", or a file with a head for ViT-L/14.

    Raises:
        BadInput: a file is missing or is no such head.

    """
    from ipgo_opt.rewards import open_clip

    path = LAION.require() if member == "laion" else Path(member).expanduser()
    if not path.is_file():
        raise BadInput(f"the head of an aesthetic reward must be laion or a file, but got {member!r}.")
    head = AestheticHead.from_file(path)
    width = head.layers[0].in_features
    if width != LAION_WIDTH:
        raise BadInput(f"an aesthetic head must read {LAION_WIDTH} numbers, but {str(path)!r} reads {width}.")
    clip = BACKBONE_WEIGHTS.require()
    return lambda device: AestheticReward(open_clip.encoder(*BACKBONE, clip, device), head)
