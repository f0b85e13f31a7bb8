"""Stage `decoder`: a deeper decoder for the finished autoencoder, its encoder (and so every latent) left as it is.

    python -m training.decoder

The new blocks start as the identity, so that training goes on from what the shallow decoder knows.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch.nn import functional as F

from training.autoencoder import NOISE, crops, gradient_loss
from training.checkpoint import WORK, Progress
from training.scenes import load

SHALLOW, DEEP = (3, 2, 1, 0), (5, 4, 2, 0)


def deepened(old: AutoencoderTiny) -> AutoencoderTiny:
    """The autoencoder with DEEP decoder blocks that does what `old` does."""
    new = AutoencoderTiny.from_config({**old.config, "num_decoder_blocks": DEEP})
    new.encoder.load_state_dict(old.encoder.state_dict())
    source, target, layers = 2, 2, [(0, 0), (1, 1)]  # the first convolution and its activation
    for before, after in zip(SHALLOW, DEEP, strict=True):
        layers += [(source + i, target + i) for i in range(before)]
        tail = 1 if before == 0 else 2  # upsampling and convolution; the last level has a convolution only
        for i in range(after - before):
            torch.nn.init.zeros_(new.decoder.layers[target + before + i].conv[-1].weight)
            torch.nn.init.zeros_(new.decoder.layers[target + before + i].conv[-1].bias)
        layers += [(source + before + i, target + after + i) for i in range(tail)]
        source, target = source + before + tail, target + after + tail
    for a, b in layers:
        new.decoder.layers[b].load_state_dict(old.decoder.layers[a].state_dict())
    return new


def main() -> None:
    """Trains the deeper decoder and saves the folder `vae-deep`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pictures, scenes, _ = load()
    pictures = pictures[np.array([i for i, scene in enumerate(scenes) if not scene.defect])[:30_000]]
    torch.manual_seed(31)
    model = deepened(AutoencoderTiny.from_pretrained(WORK / "vae")).to(memory_format=torch.channels_last)
    model.encoder.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.decoder.parameters(), lr=1.2e-3, weight_decay=0.0, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, i / 50) * (0.02 + 0.98 * (1 + math.cos(math.pi * min(1, i / args.steps))) / 2)
    )
    progress = Progress("decoder", every=500, model=model, optimizer=optimizer, schedule=schedule)
    while progress.step < args.steps:
        rng = np.random.default_rng(31_000_000 + progress.step)
        torch.manual_seed(31_000_000 + progress.step)
        images = crops(pictures, rng).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = model.encode(images).latents
            made = model.decode(latents + NOISE * torch.randn_like(latents)).sample
        made = made.float()
        loss = F.l1_loss(made, images) + gradient_loss(made, images) + 0.2 * F.mse_loss(made, images)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.decoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.tick(F.mse_loss(made, images).item())
    progress.save()
    model.save_pretrained(WORK / "vae-deep")


if __name__ == "__main__":
    main()
