"""Size as a JPEG file: the rewards without gradient of the DDPO paper (Black et al., arXiv 2305.13301).

As in its released code (github.com/kvablack/ddpo-pytorch, rewards.py): Pillow's JPEG at quality 95, 1 kB = 1000 bytes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from torch import Tensor

from ipgo_opt.store import to_pil

QUALITY = 95


class JpegSize:
    """`sign` times the size in kB; prompts are not read."""

    differentiable = False

    def __init__(self, sign: int) -> None:
        self.sign = sign

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) in [0, 1]."""
        sizes = []
        for image in images:
            file = io.BytesIO()
            to_pil(image).save(file, "JPEG", quality=QUALITY)
            sizes.append(self.sign * file.tell() / 1000)
        return torch.tensor(sizes, device=images.device)


def load_compressibility(device: str) -> JpegSize:
    """Smaller files are better: minus the size in kB, below 0."""
    return JpegSize(-1)


def load_incompressibility(device: str) -> JpegSize:
    """Larger files are better: the size in kB, above 0."""
    return JpegSize(1)
