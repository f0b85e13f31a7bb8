"""Stage `evaluate`: measures the exported model by the judge and paints the sheets for the eye.

    python -m training.evaluate --out docs

The judge is asked which of several captions fits, all alike but for one attribute: chance is 1/48 for objects, 1/15 for
backgrounds, 1/5 for styles, 1/4 for counts, 1/2 for relations. The same questions on rendered scenes show how far the
judge itself can be trusted; so does its choice between each rendered scene's caption and one that differs in a word.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ipgo_opt.models import load, resolve
from ipgo_opt.models.sampler import Sampler, SamplerSettings
from ipgo_opt.rewards.clip import ClipReward, load_clip, load_judge, load_preference
from ipgo_opt.store import to_pil
from training.clip import swapped
from training.world import (
    BACKGROUNDS,
    LANDSCAPES,
    OBJECTS,
    RELATIONS,
    STYLES,
    Scene,
    caption,
    positioned,
    render,
    sample_scene,
    shows_background,
)

FIRST_SEED = 20_000_000
"""Noise of the evaluation; neither training nor any search uses it."""
ASKED = (
    ("object", "single", "object"), ("background", "single", "background"), ("style", "styled", "style"),
    ("object, styled", "styled", "object"), ("both objects", "pairs", "both objects"),
    ("relation", "placed", "relation"), ("count", "several", "count"),
)  # fmt: skip
"""What is asked: its name in the table, of which scenes, about which attribute."""
SHOWN = 8
"""Most failures of a kind on the sheet of failures."""


def sampler(steps: int, guidance: float, scheduler: str) -> Sampler:
    """The embedded model with another scheduler of diffusers, or its own ("")."""
    return load(
        resolve("emoji"), lambda: SamplerSettings(steps, guidance, 0, 0), device="cpu", dtype="float32",
        scheduler=scheduler, chunk=25,
    )  # fmt: skip


def paint(model: Sampler, prompts: Sequence[str], first_seed: int) -> torch.Tensor:
    """One image per prompt, seeds counted up."""
    images = []
    for start in range(0, len(prompts), model.chunk):
        rows = [model.encode(prompt) for prompt in prompts[start : start + model.chunk]]
        batch = replace(
            rows[0],
            prompt_embeds=torch.cat([row.prompt_embeds for row in rows]),
            negative_prompt_embeds=torch.cat([row.negative_prompt_embeds for row in rows]),
        )
        images.append(model.generate(batch, range(first_seed + start, first_seed + start + len(rows))))
    return torch.cat(images)


def named(judge: ClipReward, images: torch.Tensor, scenes: Sequence[Scene], attribute: str) -> list[str]:
    """What the judge takes the attribute of each image to be."""
    values: dict[str, tuple[Any, ...]] = {
        "object": tuple((name,) for name in OBJECTS), "background": BACKGROUNDS, "style": ("", *STYLES),
        "count": (1, 2, 3, 4),
    }  # fmt: skip
    field = {"object": "objects"}.get(attribute, attribute)
    seen = judge.encoder.images(images)
    out = []
    for embedding, scene in zip(seen, scenes, strict=True):
        texts = [full(replace(scene, **{field: value})) for value in values[attribute]]
        best = values[attribute][int((judge.encoder.texts(texts) @ embedding).argmax())]
        out.append(best[0] if attribute == "object" else best)
    return out


def full(scene: Scene) -> str:
    """The complete caption of a scene."""
    return caption(scene, np.random.default_rng(0), full=True)


def right(judge: ClipReward, images: torch.Tensor, scenes: Sequence[Scene], attribute: str) -> list[bool]:
    """For each image, whether the judge names its attribute as the caption does."""
    if attribute == "both objects":
        return pairs_right(judge, images, scenes)
    if attribute == "relation":
        return relations_right(judge, images, scenes)
    truth = [scene.objects[0] if attribute == "object" else getattr(scene, attribute) for scene in scenes]
    return [a == b for a, b in zip(named(judge, images, scenes, attribute), truth, strict=True)]


def pairs_right(judge: ClipReward, images: torch.Tensor, scenes: Sequence[Scene]) -> list[bool]:
    """For each two-object image, whether the judge ranks the true pair above all one-object swaps."""
    seen = judge.encoder.images(images)
    right = []
    for embedding, scene in zip(seen, scenes, strict=True):
        first, second = scene.objects
        swaps = [(name, second) for name in OBJECTS if name != second]
        swaps += [(first, name) for name in OBJECTS if name not in (first, second)]
        swaps.sort(key=lambda pair: pair != (first, second))
        scores = judge.encoder.texts([full(replace(scene, objects=pair)) for pair in swaps]) @ embedding
        right.append(int(scores.argmax()) == 0)
    return right


def relations_right(judge: ClipReward, images: torch.Tensor, scenes: Sequence[Scene]) -> list[bool]:
    """For each two-object image, whether the judge finds it closer to its caption than to the same, objects swapped."""
    seen, right = judge.encoder.images(images), []
    for k, (embedding, scene) in enumerate(zip(seen, scenes, strict=True)):
        texts = [positioned(made, k % 2) for made in (scene, replace(scene, objects=scene.objects[::-1]))]
        right.append(int((judge.encoder.texts(texts) @ embedding).argmax()) == 0)
    return right


def one_word(judge: ClipReward, count: int = 1000) -> dict[str, float]:
    """Share of rendered scenes whose full caption beats the same with one word changed, by attribute."""
    rng = np.random.default_rng(62)
    scenes = [sample_scene(rng) for _ in range(count)]
    seen = judge.encoder.images(rendered(scenes, rng))
    pairs = [k for k, scene in enumerate(scenes) if len(scene.objects) == 2]
    placed = [scenes[k] for k in pairs]
    out = {"relation": float(np.mean(relations_right(judge, rendered(placed, rng), placed)))}
    for attribute in ("object", "background", "style", "count"):
        right = []
        for embedding, scene in zip(seen, scenes, strict=True):
            texts = [full(scene), full(swapped(scene, attribute, rng))]
            fits = shows_background(scene) or attribute != "background"
            if fits and texts[0] != texts[1] and (attribute != "count" or len(scene.objects) == 1):
                right.append(int((judge.encoder.texts(texts) @ embedding).argmax()) == 0)
        out[attribute] = float(np.mean(right))
    return out


def rendered(scenes: Sequence[Scene], rng: np.random.Generator) -> torch.Tensor:
    """The scenes as the world paints them, (B, 3, 64, 64) in [0, 1]."""
    pictures = np.stack([np.asarray(render(scene, rng)) for scene in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def seconds_per_image(model: Sampler, images: int = 8) -> float:
    """Median time of an image that is made alone, its decoding included."""
    took = []
    for seed in range(images):
        started = time.perf_counter()
        model.generate(model.encode("a cat in the snow"), [FIRST_SEED + 7000 + seed])
        took.append(time.perf_counter() - started)
    return float(np.median(took))


def sheet(images: torch.Tensor, columns: int, zoom: int = 2) -> Image.Image:
    """Images (B, 3, H, W) in rows, enlarged."""
    tiles = [to_pil(image) for image in images]
    side = tiles[0].width * zoom
    canvas = Image.new("RGB", (columns * (side + 4) - 4, -(-len(tiles) // columns) * (side + 4) - 4), "white")
    for i, tile in enumerate(tiles):
        big = tile.resize((side, side), Image.Resampling.BICUBIC)
        canvas.paste(big, (i % columns * (side + 4), i // columns * (side + 4)))
    return canvas


@torch.no_grad()
def main() -> None:
    """Writes quality.json and the sheets to `--out`: objects (unlabelled), styles, failures (with a list)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--scheduler", default="LMSDiscreteScheduler")
    parser.add_argument("--prompts", type=int, default=100)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model, rng = sampler(args.steps, args.guidance, args.scheduler), np.random.default_rng(60)
    names = list(OBJECTS)

    def single(i: int, style: str) -> Scene:
        return Scene((names[i % len(names)],), 1, "large", str(rng.choice(BACKGROUNDS)), style)

    singles = [single(i, "") for i in range(args.prompts)]
    styled = [
        replace(single(i, STYLES[i % 4]), background=str(rng.choice(list(LANDSCAPES)))) for i in range(args.prompts)
    ]
    pairs = [
        Scene(tuple(map(str, rng.choice(names, 2, replace=False))), 1, "", str(rng.choice(BACKGROUNDS)))
        for _ in range(args.prompts)
    ]
    placed = [replace(scene, layout=list(RELATIONS)[k // 2 % 2]) for k, scene in enumerate(pairs)]
    several = [replace(scene, count=2 + k % 3, size="") for k, scene in enumerate(singles)]
    groups = {"single": singles, "styled": styled, "pairs": pairs, "placed": placed, "several": several}
    prompts = {name: [full(scene) for scene in scenes] for name, scenes in groups.items()}
    prompts["placed"] = [positioned(scene, k % 2) for k, scene in enumerate(placed)]
    made = {name: paint(model, prompts[name], FIRST_SEED + 1000 * k) for k, name in enumerate(groups)}
    real = {name: rendered(scenes, rng) for name, scenes in groups.items()}
    table: dict[str, Any] = {
        "scheduler": args.scheduler or "the model's own", "num_inference_steps": args.steps,
        "guidance_scale": args.guidance, "n": args.prompts,
    }  # fmt: skip
    failures: list[tuple[str, torch.Tensor]] = []
    for who, load_reward in (("judge", load_judge), ("clip", load_clip)):
        judge = load_reward("cpu")
        for kind, images in (("generated", made), ("rendered", real)):
            row = table[f"{who}, {kind}"] = {}
            for label, group, attribute in ASKED:
                answers = right(judge, images[group], groups[group], attribute)
                row[label] = float(np.mean(answers))
                if (who, kind) == ("judge", "generated"):
                    wrong = [k for k, answer in enumerate(answers) if not answer][:SHOWN]
                    failures += [(f"{prompts[group][k]}: {label}", images[group][k]) for k in wrong]
    for who, load_reward in (("judge", load_judge), ("clip", load_clip), ("preference", load_preference)):
        table[f"{who}, rendered, one word changed"] = one_word(load_reward("cpu"))
    table["seconds per image, one at a time"] = seconds_per_image(model)
    (args.out / "quality.json").write_text(json.dumps(table, indent=1) + "\n")
    print(json.dumps(table, indent=1))
    (args.out / "failures.txt").write_text("".join(f"{label}\n" for label, _ in failures))
    if failures:
        sheet(torch.stack([image for _, image in failures]), 8).save(args.out / "failures.png")
    order = np.random.default_rng(61).permutation(names)
    (args.out / "objects.txt").write_text("\n".join(order) + "\n")
    sheet(paint(model, [f"a {name}" for name in order], FIRST_SEED + 5000), 8).save(args.out / "objects.png")
    grid = [full(Scene(("fox",), 1, "large", b, s)) for s in ("", *STYLES) for b in ("blue", *LANDSCAPES)]
    grid += ["a cat and a rocket", "a pizza left of a penguin", "a robot above a car", "a castle below a moon"]
    grid += ["two apples in a meadow", "three mushrooms on a blue background", "four cars at night", "a small house"]
    sheet(paint(model, grid, FIRST_SEED + 6000), 8).save(args.out / "styles.png")


if __name__ == "__main__":
    main()
