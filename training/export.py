"""Stage `export`: puts what was trained into the package, in fp16 safetensors.

    python -m training.export

Writes the StableDiffusionPipeline folder ipgo_opt/models/emoji and the rewards in ipgo_opt/rewards/emoji.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel

from training.checkpoint import WORK
from training.clip import processor
from training.tokenizer import tokenizer
from training.unet import SCHEDULE

PACKAGE = Path(__file__).parent.parent / "ipgo_opt"
MOST_FILE, MOST_ALL = 16 * 2**20, 30 * 2**20


def classic_vocabulary(folder: Path) -> None:
    """vocab.json and merges.txt beside tokenizer.json, for readers that want CLIP's older files."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")


def unclipped(folder: Path) -> None:
    """Tells the schedulers that clip to [−1, 1] unless told otherwise (DDIM, DDPM) not to, should a user choose one."""
    path = folder / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clip_sample": False}, indent=2) + "\n")


def forget_origin(folder: Path) -> None:
    """Takes out of every configuration the path that its part was loaded from."""
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Exports and checks the sizes."""
    target = PACKAGE / "models" / "emoji"
    card = (target / "README.md").read_bytes() if (target / "README.md").exists() else None
    shutil.rmtree(target, ignore_errors=True)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderTiny.from_pretrained(WORK / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(WORK / "clip-a"),
        tokenizer=tokenizer(),
        unet=UNet2DConditionModel.from_pretrained(WORK / "unet"),
        scheduler=DPMSolverMultistepScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16)
    pipeline.save_pretrained(target, safe_serialization=True)
    classic_vocabulary(target / "tokenizer")
    unclipped(target / "scheduler")
    forget_origin(target)
    if card is not None:
        (target / "README.md").write_bytes(card)
    rewards = PACKAGE / "rewards" / "emoji"
    shutil.rmtree(rewards, ignore_errors=True)
    rewards.mkdir(parents=True)
    for name, folder in (("clip", "clip-a"), ("judge", "clip-b"), ("preference", "preference")):
        CLIPModel.from_pretrained(WORK / folder).half().save_pretrained(rewards / name)
        tokenizer().save_pretrained(rewards / name)
        classic_vocabulary(rewards / name)
        processor().save_pretrained(rewards / name)
    shutil.copy(WORK / "aesthetic.safetensors", rewards)
    sizes = {path: path.stat().st_size for root in (target, rewards) for path in root.rglob("*") if path.is_file()}
    largest = max(sizes, key=lambda path: sizes[path])
    print(f"{sum(sizes.values()) / 2**20:.1f} MiB in all, largest {largest.name} {sizes[largest] / 2**20:.1f} MiB")
    if sizes[largest] > MOST_FILE or sum(sizes.values()) > MOST_ALL:
        raise SystemExit("too large for the package")


if __name__ == "__main__":
    main()
