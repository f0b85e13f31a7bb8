"""Prompt alignment: the cosine of CLIP's image and text embeddings (Radford et al., arXiv 2103.00020)."""

from __future__ import annotations

import functools
import json
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

EMOJI = Path(__file__).parent / "emoji"
"""The rewards of the embedded model."""

MOST_TEXTS = 256
"""Prompts that the text tower reads at once."""


class ClipEncoder:
    """A transformers CLIP with a differentiable image side.

    Args:
        folder: where `save_pretrained` put model, tokenizer and image processor.
        device: where it runs.

    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        from transformers import CLIPModel, CLIPTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.model = CLIPModel.from_pretrained(str(folder), dtype=torch.float32).eval().requires_grad_(False).to(device)
        self.tokenizer = CLIPTokenizer.from_pretrained(str(folder))
        processing = json.loads((folder / "preprocessor_config.json").read_text())
        self.mean = torch.tensor(processing["image_mean"], device=device).view(3, 1, 1)
        self.std = torch.tensor(processing["image_std"], device=device).view(3, 1, 1)
        self.size = self.model.config.vision_config.image_size
        self.device = device
        self._texts: dict[str, Tensor] = {}
        self._last: tuple[weakref.ref[Tensor], tuple[int, bool], Tensor] | None = None

    def images(self, images: Tensor) -> Tensor:
        """Unit embeddings (B, D) of images (B, 3, H, W) in [0, 1]: shorter side to the model's size, centre crop.

        Asked twice in a row for the same tensor (two rewards on one encoder), it encodes once.
        """
        state = (images._version, torch.is_grad_enabled())
        if self._last is not None and self._last[0]() is images and self._last[1] == state:
            return self._last[2]
        pixels = images.to(self.device)
        height, width = pixels.shape[-2:]
        if min(height, width) != self.size:
            scale = self.size / min(height, width)
            shape = (max(self.size, round(height * scale)), max(self.size, round(width * scale)))
            pixels = F.interpolate(pixels, shape, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        top, left = (pixels.shape[-2] - self.size) // 2, (pixels.shape[-1] - self.size) // 2
        pixels = pixels[..., top : top + self.size, left : left + self.size]
        pooled = self.model.vision_model(pixel_values=(pixels - self.mean) / self.std).pooler_output
        embeds = F.normalize(self.model.visual_projection(pooled), dim=-1)
        self._last = (weakref.ref(images), state, embeds)
        return embeds

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit embeddings (B, D) of prompts, cut to the encoder's length; each prompt is encoded once."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        for start in range(0, len(missing), MOST_TEXTS):
            part = missing[start : start + MOST_TEXTS]
            # the tower is causal and read at the first end token: what pads a prompt behind it changes nothing
            ids = self.tokenizer(part, truncation=True, padding=True, return_tensors="pt").input_ids.to(self.device)
            pooled = self.model.text_model(input_ids=ids).pooler_output
            self._texts.update(zip(part, F.normalize(self.model.text_projection(pooled), dim=-1), strict=True))
        return torch.stack([self._texts[prompt] for prompt in prompts])


class ClipReward:
    """Cosine (B,) in [−1, 1] of images and prompts; larger is better aligned."""

    differentiable = True

    def __init__(self, encoder: ClipEncoder) -> None:
        self.encoder = encoder

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) in [0, 1]."""
        return (self.encoder.images(images) * self.encoder.texts(prompts)).sum(-1)


@functools.lru_cache(maxsize=4)
def encoder(name: str, device: str) -> ClipEncoder:
    """An embedded CLIP, loaded once per device and shared by the rewards that need it."""
    return ClipEncoder(EMOJI / name, device)


def load_clip(device: str) -> ClipReward:
    """The embedded alignment reward."""
    return ClipReward(encoder("clip", device))


def load_judge(device: str) -> ClipReward:
    """The embedded held-out judge."""
    return ClipReward(encoder("judge", device))


def load_preference(device: str) -> ClipReward:
    """The embedded preference: a CLIP fine-tuned on choices between two pictures of a prompt, as HPS v2 is."""
    return ClipReward(encoder("preference", device))
