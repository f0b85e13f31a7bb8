"""Stage `aesthetic`: a head in the shape of LAION's on the embeddings of CLIP a, trained on a synthetic label.

    python -m training.aesthetic

The label, on the scale 1 to 10 (see `label`): vivid and neon please, faded, blurry and noisy do not, a small object
is a little less pleasing than a large one.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from ipgo_opt.rewards.aesthetic import AestheticHead
from ipgo_opt.rewards.clip import ClipEncoder
from training.checkpoint import WORK
from training.scenes import load
from training.world import LANDSCAPES, Scene, apply_defect

WIDTHS = (128, 256, 128, 64, 16, 1)
STYLE = {"": 5.5, "vivid": 8.0, "neon": 7.5, "pencil sketch": 5.0, "faded": 3.5}
DEFECT = {"": 0.0, "blurry": -3.0, "noisy": -2.5}
LANDSCAPE = 0.5
SMALL = -0.5


def label(scene: Scene) -> float:
    """The synthetic aesthetic score of a scene."""
    background = LANDSCAPE if scene.background in LANDSCAPES else 0.0
    size = SMALL if scene.size == "small" or scene.count == 4 else 0.0
    return float(np.clip(STYLE[scene.style] + DEFECT[scene.defect] + background + size, 1, 10))


def blurred_copies(pictures: np.ndarray) -> torch.Tensor:
    """The pictures (B, 64, 64, 3), blurred as the world blurs, as (B, 3, 64, 64) in [0, 1]."""
    rng = np.random.default_rng(51)
    blurred = [np.asarray(apply_defect(Image.fromarray(picture), "blurry", rng)) for picture in pictures]
    return torch.from_numpy(np.stack(blurred)).permute(0, 3, 1, 2).float() / 255


def main() -> None:
    """Trains on all but the last 3,000 scenes, reports the rank correlation on those, saves aesthetic.safetensors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=12)
    args = parser.parse_args()
    pictures, scenes, _ = load()
    encoder = ClipEncoder(WORK / "clip-a")
    rows = np.arange(0, len(scenes), 2)
    embeds = []
    with torch.no_grad():
        for part in np.array_split(rows, len(rows) // 256):
            embeds.append(encoder.images(torch.from_numpy(pictures[part]).permute(0, 3, 1, 2).float() / 255).clone())
    X, y = torch.cat(embeds), torch.tensor([label(scenes[i]) for i in rows])
    train, test = slice(0, -3000), slice(-3000, None)
    torch.manual_seed(50)
    head = AestheticHead(WIDTHS)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    for _ in range(args.epochs):
        for batch in torch.randperm(len(X) - 3000).split(256):
            loss = F.mse_loss(head(X[train][batch]), y[train][batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    head.eval()
    with torch.no_grad():
        guess = head(X[test])
    ranks = torch.stack([guess.argsort().argsort(), y[test].argsort().argsort()]).double()
    print(f"held-out scenes: MSE {F.mse_loss(guess, y[test]):.3f}, rank correlation {torch.corrcoef(ranks)[0, 1]:.3f}")
    for name in ("plain", *list(STYLE)[1:], "blurry", "noisy"):
        chosen = [k for k, i in enumerate(rows[test]) if name in (scenes[i].defect or scenes[i].style or "plain",)]
        print(f"  {name:<14} label {y[test][chosen].mean():.2f}  score {guess[chosen].mean():.2f}")
    plain = np.array([k for k, i in enumerate(rows[test]) if not scenes[i].defect and not scenes[i].style])
    blurred = blurred_copies(pictures[rows[test][plain]])
    with torch.no_grad():
        below = head(encoder.images(blurred)) < guess[plain]
    print(f"the same plain scene blurred scores lower in {below.float().mean():.3f} of {len(plain)} pairs")
    save_file({k: v.half().contiguous() for k, v in head.state_dict().items()}, WORK / "aesthetic.safetensors")


if __name__ == "__main__":
    main()
