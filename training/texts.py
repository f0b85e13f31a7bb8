"""Stage `texts`: encodes the captions of the image model's scenes once.

python -m training.texts
"""

from __future__ import annotations

import json

import torch
from transformers import CLIPTextModel

from training.checkpoint import WORK
from training.latents import SCENES
from training.scenes import clean, load
from training.tokenizer import LENGTH, tokenizer

CAPTIONS = 2
"""Captions used of each scene."""


@torch.no_grad()
def main() -> None:
    """Writes text.pt (captions, 77, width), fp16, the empty caption first, and which captions belong to each scene."""
    _, scenes, captions = load()
    chosen = clean(scenes)[:SCENES]
    texts = ["", *sorted({text for i in chosen for text in captions[i][:CAPTIONS]})]
    index = {text: k for k, text in enumerate(texts)}
    encoder, words = CLIPTextModel.from_pretrained(WORK / "clip-a"), tokenizer()
    states = []
    for start in range(0, len(texts), 256):
        ids = words(texts[start : start + 256], padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
        with torch.autocast("cpu", torch.bfloat16):
            states.append(encoder(ids).last_hidden_state.half())
    torch.save(torch.cat(states), WORK / "text.pt")
    (WORK / "pairs.json").write_text(json.dumps([[index[text] for text in captions[i][:CAPTIONS]] for i in chosen]))
    print(f"{len(texts)} captions")


if __name__ == "__main__":
    main()
