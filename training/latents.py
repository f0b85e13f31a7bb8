"""Stage `latents`: encodes the image model's scenes once.

python -m training.latents
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderTiny

from training.checkpoint import WORK
from training.scenes import clean, load

SCENES = 48_000
"""Scenes that the image model is trained on: the first ones without a defect."""


@torch.no_grad()
def main() -> None:
    """Writes latents.pt (SCENES, 16, 8, 8), scaled to unit variance, fp16."""
    pictures, scenes, _ = load()
    vae = AutoencoderTiny.from_pretrained(WORK / "vae").to(memory_format=torch.channels_last)
    latents = []
    for part in np.array_split(np.array(clean(scenes)[:SCENES]), SCENES // 128):
        images = torch.from_numpy(pictures[part]).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        with torch.autocast("cpu", torch.bfloat16):
            made = vae.encode(images.contiguous(memory_format=torch.channels_last)).latents
        latents.append((made.float() * vae.config.scaling_factor).half())
    torch.save(torch.cat(latents), WORK / "latents.pt")
    print(f"{sum(map(len, latents))} latents")


if __name__ == "__main__":
    main()
