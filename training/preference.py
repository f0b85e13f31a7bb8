"""Stage `preference`: CLIP a, fine-tuned on choices between two pictures of a prompt, as HPS v2 is (arXiv 2306.09341).

    python -m training.preference

The choices are synthetic. A picture's worth for a prompt is the sum of

- alignment: −3 if an object that the prompt names is another one, −1.5 if another attribute that it names is another
  (background, style, count, relation);
- sharpness: −2 if the picture is blurry, noisy or broken (decoded from disturbed latents, as a search that leaves the
  image model's world makes them);
- composition: −0.25 for a medium and −0.75 for a small subject of which the prompt does not tell the size, −1 if the
  picture is shifted so that its subject may be cut off;

and the first of two pictures is chosen with probability σ((worth₁ − worth₂) / 0.5). The model learns to predict that
probability from its scaled difference of cosines, and to tell an aligned picture's prompt from the others of the batch,
so that it does not forget them. Half of the pictures have been through the autoencoder and back.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import numpy as np
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel

from training.checkpoint import WORK, Progress, cosine
from training.clip import processor, swapped
from training.descent import descend
from training.muon import Muon
from training.tokenizer import tokenizer
from training.world import Scene, apply_defect, caption, render, sample_scene

BATCH = 64
LEARNING_RATE = 6e-4
TEMPERATURE = 0.5
WRONG_OBJECT, WRONG_ATTRIBUTE, FLAWED, SHIFTED = -3.0, -1.5, -2.0, -1.0
SIZES = {"large": 0.0, "medium": -0.25, "small": -0.75}
FLAWS = ("blurry", "noisy", "broken")


@dataclass(frozen=True)
class Shown:
    """A picture of a pair.

    Attributes:
        pixels: (64, 64, 3) uint8.
        broken: whether its latents are to be disturbed.
        alignment, sharpness, composition: what its worth is the sum of.

    """

    pixels: np.ndarray
    broken: bool
    alignment: float
    sharpness: float
    composition: float

    @property
    def worth(self) -> float:
        """How good the picture is for its prompt; larger is better."""
        return self.alignment + self.sharpness + self.composition


def show(scene: Scene, text: str, words: int, rng: np.random.Generator) -> Shown:
    """One picture for the caption `text` that `words` seeded: true or with one attribute changed, flawed or not."""
    shown, alignment, composition = scene, 0.0, 0.0
    if rng.random() < 0.5:
        attribute = str(
            rng.choice(("object", "background", "style", "relation" if len(scene.objects) == 2 else "count"))
        )
        shown = swapped(scene, attribute, rng)
        ordered = shown.objects != scene.objects[::-1] or " and " not in text  # "and" does not tell the order
        if ordered and caption(shown, np.random.default_rng(words)) != text:
            alignment = WRONG_OBJECT if attribute == "object" else WRONG_ATTRIBUTE
    if len(shown.objects) == shown.count == 1 and not any(size in text for size in SIZES):
        size = str(rng.choice(list(SIZES), p=[0.6, 0.2, 0.2]))
        shown, composition = replace(shown, size=size), SIZES[size]
    picture = render(shown, rng)
    if rng.random() < 0.15:
        across, down = rng.integers(8, 20, 2) * rng.choice((-1, 1), 2)
        picture = Image.fromarray(shifted(np.asarray(picture), int(across), int(down)))
        composition += SHIFTED
    flaw = str(rng.choice(("", *FLAWS), p=[0.55, 0.15, 0.1, 0.2]))
    pixels = np.asarray(apply_defect(picture, flaw if flaw != "broken" else "", rng))
    return Shown(pixels, flaw == "broken", alignment, FLAWED if flaw else 0.0, composition)


def shifted(pixels: np.ndarray, across: int, down: int) -> np.ndarray:
    """The picture moved by so many pixels, its border drawn out."""
    height, width = pixels.shape[:2]
    rows, columns = np.arange(height) - down, np.arange(width) - across
    return pixels[rows.clip(0, height - 1)][:, columns.clip(0, width - 1)]


def pairs(count: int, rng: np.random.Generator) -> tuple[list[str], list[tuple[Shown, Shown]]]:
    """Prompts and two pictures for each."""
    texts, shown = [], []
    for _ in range(count):
        scene, words = sample_scene(rng), int(rng.integers(2**31))
        texts.append(caption(scene, np.random.default_rng(words)))
        shown.append((show(scene, texts[-1], words, rng), show(scene, texts[-1], words, rng)))
    return texts, shown


@torch.no_grad()
def finished(shown: list[Shown], vae: AutoencoderTiny, generator: torch.Generator) -> Tensor:
    """The pictures (B, 3, 64, 64) in [−1, 1], half of them and all broken ones through the autoencoder."""
    images = torch.from_numpy(np.stack([one.pixels for one in shown])).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    broken = torch.tensor([one.broken for one in shown])
    through = broken | (torch.rand(len(shown), generator=generator) < 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        latents = vae.encode(images[through]).latents.float()
    disturbed = torch.stack([disturbance(latents[0], generator) for _ in latents])
    amount = torch.where(broken[through], 0.25 + torch.rand(len(latents), generator=generator), 0.0)
    latents = latents + amount.view(-1, 1, 1, 1) * disturbed * latents.std()
    with torch.autocast("cpu", torch.bfloat16):
        images[through] = vae.decode(latents).sample.float().clamp(-1, 1)
    return images


def disturbance(like: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of unit variance like (C, H, W) latents, from one value per channel to one per position."""
    side = 2 ** int(torch.randint(0, 4, (1,), generator=generator))
    coarse = torch.randn(1, like.shape[0], side, side, generator=generator)
    return F.interpolate(coarse, like.shape[-2:], mode="nearest")[0]


def scores(model: CLIPModel, ids: Tensor, images: Tensor) -> Tensor:
    """Cosines (B, 2, B) of the two pictures of each prompt (2·B, 3, 64, 64), in a row, with all prompts (B, L)."""
    said = F.normalize(model.text_projection(model.text_model(input_ids=ids).pooler_output).float(), dim=-1)
    pooled = model.vision_model(pixel_values=images).pooler_output
    seen = F.normalize(model.visual_projection(pooled).float(), dim=-1)
    return (seen @ said.T).view(len(said), 2, -1)


@torch.no_grad()
def agreement(model: CLIPModel, vae: AutoencoderTiny, count: int = 2000) -> dict[str, float]:
    """Share of fresh pairs in which the model prefers the worthier picture: all, and those with one difference."""
    rng, generator, words = np.random.default_rng(71), torch.Generator().manual_seed(71), tokenizer()
    texts, shown = pairs(count, rng)
    right: dict[str, list[bool]] = {"all": [], "alignment": [], "sharpness": [], "composition": []}
    for start in range(0, count, 100):
        part = shown[start : start + 100]
        images = finished([one for pair in part for one in pair], vae, generator)
        ids = words(texts[start : start + 100], padding="longest", return_tensors="pt").input_ids
        for (a, b), cosines in zip(part, scores(model, ids, images).diagonal(dim1=0, dim2=2).T, strict=True):
            if a.worth == b.worth:
                continue
            agrees = bool((cosines[0] > cosines[1]) == (a.worth > b.worth))
            right["all"].append(agrees)
            differing = [kind for kind in list(right)[1:] if getattr(a, kind) != getattr(b, kind)]
            if len(differing) == 1:
                right[differing[0]].append(agrees)
    return {kind: round(float(np.mean(values)), 3) for kind, values in right.items()}


def main() -> None:
    """Trains and saves the folder `preference`; prints the agreement before and after."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, words = CLIPModel.from_pretrained(WORK / "clip-a"), tokenizer()
    vae = AutoencoderTiny.from_pretrained(WORK / "vae").requires_grad_(False)
    model.set_attn_implementation("eager")  # on a CPU twice as fast to train as fused attention's backward
    model.logit_scale.requires_grad_(False)
    print("before:", agreement(model, vae), flush=True)
    optimizer = Muon(model, lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(args.steps, warmup=20))
    progress = Progress("preference", model=model, optimizer=optimizer, schedule=schedule)
    while progress.step < args.steps:
        seed = 70_000_000 + progress.step
        rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        texts, shown = pairs(BATCH, rng)
        images = finished([one for pair in shown for one in pair], vae, generator)
        gap = torch.tensor([a.worth - b.worth for a, b in shown]) / TEMPERATURE
        ids = words(texts, padding="longest", return_tensors="pt").input_ids
        with torch.autocast("cpu", torch.bfloat16):
            logits = model.logit_scale.exp() * scores(model, ids, images)
        own = logits.diagonal(dim1=0, dim2=2)
        loss = F.binary_cross_entropy_with_logits(own[0] - own[1], gap.sigmoid())
        aligned = torch.tensor([not one.alignment for pair in shown for one in pair])
        prompts = torch.arange(BATCH).repeat_interleave(2)
        loss = loss + F.cross_entropy(logits.flatten(0, 1)[aligned], prompts[aligned]) / 2
        descend(loss, model, optimizer, schedule)
        progress.tick(loss.item())
    progress.save()
    print("after:", agreement(model.eval(), vae))
    model.save_pretrained(WORK / "preference")
    words.save_pretrained(WORK / "preference")
    processor().save_pretrained(WORK / "preference")


if __name__ == "__main__":
    main()
