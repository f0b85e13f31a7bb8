"""Stage `clip`: a small CLIP trained on pictures and captions.

    python -m training.clip --name a        # the `clip` reward; its text tower conditions the image model
    python -m training.clip --name b        # the judge: other seed, size and half of the captions' variants

Half of the batches hold scenes of one background only, so that the background can't be used to tell them apart, and
each picture meets its own caption with one word changed, or its two objects swapped. `--freeze-text` trains the image
tower of a finished model further, with the text tower (and so the image model's conditioning) left as it is.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from training.checkpoint import WORK, Progress, cosine
from training.descent import descend
from training.muon import Muon
from training.scenes import load
from training.tokenizer import LENGTH, tokenizer
from training.world import BACKGROUNDS, DEFECTS, OBJECTS, RELATIONS, STYLES, Scene, caption

SHAPES = {
    "a": {"width": 128, "text_layers": 4, "vision_layers": 4, "seed": 10},
    "b": {"width": 96, "text_layers": 3, "vision_layers": 3, "seed": 20},
}
BATCH = 192
LEARNING_RATE = 3e-3
MOST_SCALE = math.log(60)
ATTRIBUTES = ("background", "style", "count", "relation")
"""What a caption's second negative changes; two objects get the relation as often as all others together."""
CHOICES: dict[str, tuple[Any, ...]] = {
    "background": BACKGROUNDS, "style": ("", *STYLES), "defect": ("", *DEFECTS), "count": (1, 2, 3, 4),
    "layout": tuple(RELATIONS),
}  # fmt: skip


def build(name: str) -> CLIPModel:
    """An untrained CLIP of the shape `name`."""
    shape, words = SHAPES[name], tokenizer()
    width = shape["width"]
    tower = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 32}
    text = tower | {
        "num_hidden_layers": shape["text_layers"], "vocab_size": len(words), "max_position_embeddings": LENGTH,
        "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id,
    }  # fmt: skip
    vision = tower | {"num_hidden_layers": shape["vision_layers"], "image_size": 64, "patch_size": 8}
    torch.manual_seed(shape["seed"])
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))


def processor() -> Any:
    """The image preprocessing shared by both models: 64 px, [0, 1] to [−1, 1]."""
    return CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size=64, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3
    )


def swapped(scene: Scene, attribute: str, rng: np.random.Generator) -> Scene:
    """The scene with one attribute changed to another value, or with its two objects swapped."""

    def other(values: Iterable[Any], *present: Any) -> Any:
        return rng.choice([value for value in values if value not in present])

    if attribute == "object":
        objects = list(scene.objects)
        objects[int(rng.integers(len(objects)))] = str(other(OBJECTS, *scene.objects))
        return replace(scene, objects=tuple(objects))
    if attribute == "relation" and len(scene.objects) == 2:
        return replace(scene, objects=scene.objects[::-1])
    if attribute == "count" and len(scene.objects) == 1:
        return replace(scene, count=int(other((1, 2, 3, 4), scene.count)), size="")
    if attribute == "style":
        return replace(scene, style=str(other(("", *STYLES), scene.style)))
    return replace(scene, background=str(other(BACKGROUNDS, scene.background)))


def captions_with_negatives(scenes: list[Scene], rng: np.random.Generator) -> list[list[str]]:
    """For each scene its caption, the same with another object, and the same with another attribute changed."""
    out = []
    for scene in scenes:
        weights = [1 / 6, 1 / 6, 1 / 6, 1 / 2] if len(scene.objects) == 2 else [1 / 3, 1 / 3, 1 / 3, 0]
        others = (scene, swapped(scene, "object", rng), swapped(scene, str(rng.choice(ATTRIBUTES, p=weights)), rng))
        seed = int(rng.integers(2**31))
        texts = [caption(made, np.random.default_rng(seed)) for made in others]
        if others[2].objects == scene.objects[::-1] and " and " in texts[0]:
            texts[2] = texts[0]  # "and" does not tell the order
        out.append(texts)
    return out


class Attributes(nn.Module):
    """Reads a scene's attributes off the image tower; helps it to learn and is thrown away afterwards."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = [len(OBJECTS), len(OBJECTS), *map(len, CHOICES.values())]
        self.read = nn.Linear(width, sum(self.sizes))

    def forward(self, pooled: torch.Tensor, scenes: list[Scene]) -> torch.Tensor:
        """The loss of reading `scenes` off `pooled` (B, width)."""
        objects, first, *rest = self.read(pooled).split(self.sizes, dim=1)
        names = list(OBJECTS)
        present = torch.tensor([[float(name in scene.objects) for name in names] for scene in scenes])
        loss = F.binary_cross_entropy_with_logits(objects, present) * 8
        loss = loss + 0.3 * F.cross_entropy(first, torch.tensor([names.index(scene.objects[0]) for scene in scenes]))
        for logits, (name, values) in zip(rest, CHOICES.items(), strict=True):
            target = torch.tensor([values.index(getattr(scene, name)) for scene in scenes])
            loss = loss + (1.0 if name == "defect" else 0.3) * F.cross_entropy(logits, target)
        return loss


def softened(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A third of the images (B, 3, 64, 64) slightly blurred, as an autoencoder leaves them."""
    weight = torch.rand(len(images), 1, 1, 1, generator=generator)
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).div(16).expand(3, 1, 3, 3)
    soft = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    return torch.where(weight < 0.33, soft, images)


def main() -> None:
    """Trains and saves the folder `clip-NAME`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", choices=SHAPES, required=True)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--freeze-text", action="store_true", help="train the image tower only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pictures, scenes, _ = load()
    half = len(scenes) // 2  # the judge sees the other half of the scenes
    usable = np.arange(half) if args.name == "a" else np.arange(half, len(scenes))
    by_background: dict[str, list[int]] = {}
    for i in usable:
        by_background.setdefault(scenes[i].background, []).append(i)
    groups = [np.array(group) for group in by_background.values()]

    model, words = build(args.name), tokenizer()
    model.set_attn_implementation("eager")  # on a CPU twice as fast to train as fused attention's backward
    attributes = Attributes(SHAPES[args.name]["width"])
    if args.freeze_text:
        model.text_model.requires_grad_(False)
        model.text_projection.requires_grad_(False)
    both = nn.ModuleList([model, attributes])
    optimizer = Muon(both, lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(args.steps))
    name = f"clip-{args.name}" + ("-images" if args.freeze_text else "")
    if args.freeze_text:
        model.load_state_dict(CLIPModel.from_pretrained(WORK / f"clip-{args.name}").state_dict())
    progress = Progress(name, model=model, attributes=attributes, optimizer=optimizer, schedule=schedule)
    while progress.step < args.steps:
        seed = SHAPES[args.name]["seed"] * 1_000_003 + progress.step
        rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        pool = groups[rng.integers(len(groups))] if rng.random() < 0.5 else usable
        chosen = np.sort(rng.choice(pool, BATCH, replace=False))
        batch = [scenes[i] for i in chosen]
        images = torch.from_numpy(pictures[chosen]).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        texts = captions_with_negatives(batch, rng)
        ids = words([text for three in texts for text in three], padding="longest", return_tensors="pt").input_ids
        with torch.autocast("cpu", torch.bfloat16):
            with torch.set_grad_enabled(not args.freeze_text):
                said = model.text_projection(model.text_model(input_ids=ids).pooler_output)
            pooled = model.vision_model(pixel_values=softened(images, generator)).pooler_output
            seen = model.visual_projection(pooled)
        seen = F.normalize(seen.float(), dim=-1)
        said = F.normalize(said.float(), dim=-1).view(BATCH, 3, -1)
        scale = model.logit_scale.exp()
        every = scale * seen @ said[:, 0].T
        own = scale * torch.einsum("bd,bkd->bk", seen, said[:, 1:])
        first = ids.view(BATCH, 3, -1)
        same = (first[:, None, 0] == first[None, :, 0]).all(-1).fill_diagonal_(False)
        untold = (first[:, 1:] == first[:, :1]).all(-1)  # the changed attribute is not mentioned
        every, own = every.masked_fill(same, -1e4), own.masked_fill(untold, -1e4)
        target = torch.arange(BATCH)
        contrast = F.cross_entropy(torch.cat([every, own], 1), target) + F.cross_entropy(every.T, target)
        loss = contrast / 2 + attributes(pooled.float(), batch)
        descend(loss, both, optimizer, schedule)
        model.logit_scale.data.clamp_(max=MOST_SCALE)
        progress.tick(contrast.item() / 2)
    progress.save()
    folder = WORK / f"clip-{args.name}"
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    processor().save_pretrained(folder)


if __name__ == "__main__":
    main()
