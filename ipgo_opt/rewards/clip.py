"""Prompt alignment: the cosine of CLIP's image and text embeddings (Radford et al., arXiv 2103.00020)."""

from __future__ import annotations

import functools
import json
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

EMOJI = Path(__file__).parent / "emoji"
"""The rewards of the embedded model."""

MOST_TEXTS = 256
"""Prompts that the text tower reads at once."""


class Encoder(ABC):
    """Image and text embeddings of a CLIP, with a differentiable image side.

    Args:
        size: side of the images it sees, in pixels.
        mean, std: of its normalization, three numbers each.
        device: where it runs.
        squash: whether images are resized to a square; otherwise the shorter side is resized and the middle cut out.
        clamp: whether resized pixels are cut to [0, 1], as 8-bit images are (bicubic filters overshoot).

    """

    def __init__(
        self, size: int, mean: Sequence[float], std: Sequence[float], device: str, *, squash: bool = False,
        clamp: bool = True,
    ) -> None:  # fmt: skip
        self.size, self.device, self.squash, self.clamp = size, device, squash, clamp
        self.mean, self.std = (torch.tensor(list(values), device=device).view(3, 1, 1) for values in (mean, std))
        self._texts: dict[str, Tensor] = {}
        self._last: tuple[weakref.ref[Tensor], tuple[int, bool], Tensor] | None = None

    @abstractmethod
    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Embeddings (B, D) of normalized images (B, 3, size, size)."""

    @abstractmethod
    def embed_texts(self, prompts: list[str]) -> Tensor:
        """Embeddings (n, D) of prompts, cut to the encoder's length."""

    def margin(self, surplus: int) -> int:
        """How many of `surplus` rows or columns are cut before the middle; libraries round the half differently."""
        return surplus // 2

    def images(self, images: Tensor) -> Tensor:
        """Unit embeddings (B, D) of images (B, 3, H, W) in [0, 1], resized by bicubic filters with antialiasing.

        Asked twice in a row for the same tensor (two rewards on one encoder), it encodes once.
        """
        state = (images._version, torch.is_grad_enabled())
        if self._last is not None and self._last[0]() is images and self._last[1] == state:
            return self._last[2]
        pixels = self._resized(images.to(self.device))
        top, left = (self.margin(side - self.size) for side in pixels.shape[-2:])
        pixels = pixels[..., top : top + self.size, left : left + self.size]
        embeds = F.normalize(self.embed_pixels((pixels - self.mean) / self.std), dim=-1)
        self._last = (weakref.ref(images), state, embeds)
        return embeds

    def _resized(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        shape = (self.size * height // min(height, width), self.size * width // min(height, width))
        shape = (self.size, self.size) if self.squash else shape
        if shape == (height, width):
            return pixels
        pixels = F.interpolate(pixels, shape, mode="bicubic", antialias=True, align_corners=False)
        return pixels.clamp(0, 1) if self.clamp else pixels

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit embeddings (B, D) of prompts, cut to the encoder's length; each prompt is encoded once."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        for start in range(0, len(missing), MOST_TEXTS):
            part = missing[start : start + MOST_TEXTS]
            self._texts.update(zip(part, F.normalize(self.embed_texts(part), dim=-1), strict=True))
        return torch.stack([self._texts[prompt] for prompt in prompts])


class ClipEncoder(Encoder):
    """A transformers CLIP.

    Args:
        folder: where `save_pretrained` put the model.
        device: where it runs.
        processing: where it put tokenizer and image processor; by default in the same folder.

    """

    def __init__(self, folder: Path, device: str = "cpu", processing: Path | None = None) -> None:
        from transformers import CLIPModel, CLIPTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        beside = folder if processing is None else processing
        preprocessor = json.loads((beside / "preprocessor_config.json").read_text())
        model = CLIPModel.from_pretrained(str(folder), dtype=torch.float32)
        super().__init__(
            model.config.vision_config.image_size, preprocessor["image_mean"], preprocessor["image_std"], device
        )
        self.model = model.eval().requires_grad_(False).to(device)
        self.tokenizer = CLIPTokenizer.from_pretrained(str(beside))

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Embeddings (B, D) of normalized images (B, 3, size, size)."""
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)

    def embed_texts(self, prompts: list[str]) -> Tensor:
        """Embeddings (n, D) of prompts, cut to the encoder's length."""
        # the tower is causal and read at the first end token: what pads a prompt behind it changes nothing
        ids = self.tokenizer(prompts, truncation=True, padding=True, return_tensors="pt").input_ids.to(self.device)
        return self.model.text_projection(self.model.text_model(input_ids=ids).pooler_output)


class ClipReward:
    """Cosine (B,) in [−1, 1] of images and prompts; larger is better aligned."""

    differentiable = True

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) in [0, 1]."""
        return (self.encoder.images(images) * self.encoder.texts(prompts)).sum(-1)


class SphericalReward(ClipReward):
    """Minus DPO-Diff's spherical distance (B,) of images and prompts, in [−π²/2, 0]; larger is better aligned.

    The distance of unit embeddings x and y is `2·arcsin²(‖x − y‖ / 2)` (Wang et al., ICML 2024, section 5).
    """

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) in [0, 1]."""
        apart = (self.encoder.images(images) - self.encoder.texts(prompts)).norm(dim=-1)
        return -2 * (apart / 2).clamp(max=1).arcsin().square()


@functools.lru_cache(maxsize=4)
def encoder(name: str, device: str) -> ClipEncoder:
    """An embedded CLIP, loaded once per device and shared by the rewards that need it."""
    return ClipEncoder(EMOJI / name, device)


def load_clip(device: str) -> ClipReward:
    """The embedded alignment reward."""
    return ClipReward(encoder("clip", device))


def load_spherical(device: str) -> SphericalReward:
    """The embedded alignment reward as a spherical distance."""
    return SphericalReward(encoder("clip", device))


def load_judge(device: str) -> ClipReward:
    """The embedded held-out judge."""
    return ClipReward(encoder("judge", device))


def load_preference(device: str) -> ClipReward:
    """The embedded preference: a CLIP fine-tuned on choices between two pictures of a prompt, as HPS v2 is."""
    return ClipReward(encoder("preference", device))
