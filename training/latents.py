"""Stage `latents`: encodes every clean scene and every caption once, for the image model's training.

python -m training.latents
"""

from __future__ import annotations

import json

import numpy as np
import torch
from diffusers import AutoencoderTiny
from transformers import CLIPTextModel

from training.checkpoint import WORK
from training.scenes import load
from training.tokenizer import LENGTH, tokenizer


@torch.no_grad()
def main() -> None:
    """Writes latents.pt (N, 16, 8, 8), scaled to unit variance, and text.pt (captions, 77, width), both fp16."""
    pictures, scenes, captions = load()
    clean = [i for i, scene in enumerate(scenes) if not scene.defect]
    vae = AutoencoderTiny.from_pretrained(WORK / "vae")
    latents = []
    for part in np.array_split(np.array(clean), len(clean) // 128):
        images = torch.from_numpy(pictures[part]).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        made = vae.encode(images.contiguous(memory_format=torch.channels_last)).latents
        latents.append((made * vae.config.scaling_factor).half())
    texts = ["", *sorted({text for i in clean for text in captions[i]})]
    index = {text: k for k, text in enumerate(texts)}
    encoder, words = CLIPTextModel.from_pretrained(WORK / "clip-a"), tokenizer()
    states = []
    for start in range(0, len(texts), 256):
        ids = words(texts[start : start + 256], padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
        states.append(encoder(ids).last_hidden_state.half())
    torch.save(torch.cat(latents), WORK / "latents.pt")
    torch.save(torch.cat(states), WORK / "text.pt")
    (WORK / "pairs.json").write_text(json.dumps([[index[text] for text in captions[i]] for i in clean]))
    print(f"{len(clean)} latents, {len(texts)} captions")


if __name__ == "__main__":
    main()
