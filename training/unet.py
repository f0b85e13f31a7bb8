"""Stage `unet`: the denoiser, trained by v-prediction on cached latents and text states.

    python -m training.unet --steps 7600
    torchrun --nproc-per-node 2 -m training.unet --steps 7600 --threads 1    # the same on two cores, a third faster

The learning rate is flat for 40 % of the steps, then falls along a cosine; what ships is an exponential moving
average of the weights.
"""

from __future__ import annotations

import argparse
import json
import os

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch.nn import functional as F

from training.checkpoint import WORK, Progress, cosine
from training.descent import descend
from training.muon import Muon

BATCH = 64
LEARNING_RATE = 5e-3
DROPPED = 0.1
"""Share of captions replaced by the empty one, for classifier-free guidance."""
SCHEDULE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "prediction_type": "v_prediction", "steps_offset": 1,
}  # fmt: skip


def build(width: int = 128) -> UNet2DConditionModel:
    """The untrained denoiser for 8 × 8 × 16 latents and text states of `width`."""
    torch.manual_seed(40)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(96, 160),
        layers_per_block=1,
        cross_attention_dim=width,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def timesteps(count: int, generator: torch.Generator) -> torch.Tensor:
    """Training times: 35 % uniform, 65 % logit-normal around the middle."""
    uniform = torch.rand(count, generator=generator)
    middle = torch.randn(count, generator=generator).sigmoid()
    return (torch.where(torch.rand(count, generator=generator) < 0.35, uniform, middle) * 1000).long().clamp(0, 999)


def main() -> None:
    """Trains and saves the folder `unet`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=7600)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        torch.distributed.init_process_group("gloo")
    mine = slice(rank, None, world)  # every process takes its share of the same batch
    latents = torch.load(WORK / "latents.pt", weights_only=True, mmap=True)
    states = torch.load(WORK / "text.pt", weights_only=True, mmap=True)
    pairs = torch.tensor(json.loads((WORK / "pairs.json").read_text()))

    model = build(states.shape[-1]).to(device, memory_format=torch.channels_last)
    model.set_attn_processor(AttnProcessor())  # on a CPU twice as fast to train as fused attention's backward
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    optimizer = Muon(model, lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(args.steps, warmup=100, flat=0.4, floor=0.01))
    progress = Progress("unet", every=100, model=model, average=average, optimizer=optimizer, schedule=schedule)
    noising = DDPMScheduler(**SCHEDULE)
    forward = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    while progress.step < args.steps:
        generator = torch.Generator().manual_seed(40_000_000 + progress.step)
        rng = np.random.default_rng(40_000_000 + progress.step)
        chosen = torch.from_numpy(rng.integers(0, len(latents), BATCH))
        text = pairs[chosen, torch.from_numpy(rng.integers(0, pairs.shape[1], BATCH))]
        text[torch.from_numpy(rng.random(BATCH) < DROPPED)] = 0
        noise = torch.randn(BATCH, *latents.shape[1:], generator=generator)[mine].to(device)
        t = timesteps(BATCH, generator)[mine].to(device)
        clean, context = latents[chosen[mine]].float().to(device), states[text[mine]].float().to(device)
        noisy, target = noising.add_noise(clean, noise, t), noising.get_velocity(clean, noise, t)
        with torch.autocast(device, torch.bfloat16):
            made = forward(noisy.contiguous(memory_format=torch.channels_last), t, context, return_dict=False)[0]
        loss = F.mse_loss(made.float(), target)
        descend(loss, model, optimizer, schedule)
        average.update_parameters(model)
        progress.tick(loss.item(), save=rank == 0)
    if rank == 0:
        progress.save()
        average.module.save_pretrained(WORK / "unet")


if __name__ == "__main__":
    main()
