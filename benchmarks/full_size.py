"""Seconds and peak memory of an optimization step at full size, against its floor, and what each memory lever saves.

python -m benchmarks.full_size [--model sd15|sdxl] [--device cuda] [--quick]

The pipelines have the published configurations and random weights, which cost the same time and memory as trained ones.
Every measurement runs in a process of its own, so that peaks do not mix. `floor` is the least that K = 1 can do: the
denoiser calls, one backward through the last of them, the decoder and the reward, written out; `detached` is the same
loop the way the published notebook runs it, with every denoiser call in gradient mode and its output detached. The
reward is CLIP's vision tower (ViT-B/32's shape; ViT-L/14's for the larger models) with random weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ipgo_opt.conditioning import Conditioning
from ipgo_opt.models import memory
from ipgo_opt.models.gate import denoiser
from ipgo_opt.models.sampler import Sampler, SamplerSettings
from ipgo_opt.spaces.tokens import TokenShape, TokenSpace

RESULTS = Path(__file__).parent / "results"
GUIDANCE = 7.5


@dataclass(frozen=True)
class Size:
    """A pipeline to build: shapes of its parts, side of its images, sampler steps and the reward's vision tower."""

    side: int
    steps: int
    channels: tuple[int, ...]
    vae_channels: tuple[int, ...]
    text: dict[str, int]
    vision: dict[str, int]
    larger: bool = False


CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
VIT_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES = {
    "sd15": Size(512, 50, (320, 640, 1280, 1280), (128, 256, 512, 512), CLIP_L, VIT_L | {"patch_size": 14}),
    "sdxl": Size(1024, 50, (320, 640, 1280), (128, 256, 512, 512), CLIP_L, VIT_L | {"patch_size": 14}, True),
    "quick": Size(256, 4, (64, 128, 128, 128), (32, 32, 64, 64), TINY, TINY | {"patch_size": 32}),
}
"""The first two are the published ones; `quick` runs in a minute on a CPU."""

WAYS: dict[str, tuple[str, ...]] = {
    "floor": (), "detached": (), "plain": (), "checkpoint": ("checkpoint",), "slicing": ("slicing",),
    "tiling": ("tiling",), "low-memory": memory.LOW[:2],
}  # fmt: skip
"""What is measured: the two bare loops, a run's own step, and that with levers pulled."""


def build(size: Size, dtype: torch.dtype) -> Any:
    """A Stable Diffusion (XL) pipeline of that size with random weights, without tokenizers."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    def text(**changed: int) -> Any:
        return CLIPTextModel(CLIPTextConfig(vocab_size=49408, **size.text, **changed))

    cross = tuple(["CrossAttnDownBlock2D"] * (len(size.channels) - 1) + ["DownBlock2D"])
    shape: dict[str, Any] = {
        "down_block_types": cross,
        "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * (len(cross) - 1)),
    }
    if size.larger:
        shape = {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        }  # fmt: skip
    width = 2048 if size.larger else size.text["hidden_size"]
    unet = diffusers.UNet2DConditionModel(
        sample_size=size.side // 8, block_out_channels=size.channels, cross_attention_dim=width, **shape
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=size.vae_channels, latent_channels=4, layers_per_block=2, sample_size=size.side,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    schedule = diffusers.LMSDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    if size.larger:
        made = diffusers.StableDiffusionXLPipeline(
            vae, None, None, None, None, unet, schedule, add_watermarker=False
        )  # fmt: skip
    else:
        made = diffusers.StableDiffusionPipeline(
            vae, text(), None, unet, schedule, None, None, requires_safety_checker=False
        )
    return made if dtype is torch.float32 else made.to(dtype)


def conditioning(size: Size, device: str, dtype: torch.dtype) -> Conditioning:
    """Random states of 77 tokens for both halves, and what a larger pipeline takes beside them."""
    generator = torch.Generator().manual_seed(0)
    width = 2048 if size.larger else size.text["hidden_size"]
    first, negative = (torch.randn(1, 77, width, generator=generator).to(device, dtype) for _ in range(2))
    names = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds") if size.larger else ()
    return Conditioning(
        first, negative, {name: torch.randn(1, 1280, generator=generator).to(device, dtype) for name in names}
    )


class Sight:
    """A reward in the shape of CLIP's: one coordinate of the vision tower's embedding, differentiable."""

    def __init__(self, shape: dict[str, int], device: str) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        model = CLIPVisionModel(CLIPVisionConfig(image_size=224, **shape))
        self.model = model.eval().requires_grad_(False).to(device)

    def __call__(self, images: Tensor) -> Tensor:
        """Scores (B,) of images (B, 3, H, W)."""
        pixels = F.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True)
        return self.model(pixel_values=pixels).pooler_output[:, 0]


def bare_step(sampler: Sampler, given: Conditioning, tokens: Callable[[], Tensor], reward: Sight, detach: bool) -> None:
    """K = 1 written out; with `detach` every denoiser call is in gradient mode and its output cut off."""
    pipeline, settings = sampler.pipeline, sampler.settings
    states = torch.cat([tokens(), given.prompt_embeds], 1)
    inputs = Conditioning(states, given.negative_prompt_embeds, given.extra).levelled()
    both = torch.cat([inputs.negative_prompt_embeds, inputs.prompt_embeds])
    added = None
    if given.extra:
        side = float(settings.height)
        ids = torch.tensor([[side, side, 0, 0, side, side]] * 2, device=both.device, dtype=both.dtype)
        pooled = torch.cat([given.extra["negative_pooled_prompt_embeds"], given.extra["pooled_prompt_embeds"]])
        added = {"text_embeds": pooled, "time_ids": ids}
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(settings.num_inference_steps, device=both.device)
    noise = torch.randn(1, 4, settings.height // 8, settings.width // 8, generator=torch.Generator().manual_seed(0))
    latents = noise.to(both) * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        last = i == len(scheduler.timesteps) - 1
        with torch.set_grad_enabled(last or detach):
            noisy = scheduler.scale_model_input(torch.cat([latents] * 2), t)
            out = pipeline.unet(noisy, t, both, added_cond_kwargs=added, return_dict=False)[0]
            negative, positive = out.chunk(2)
            guided = negative + settings.guidance_scale * (positive - negative)
            latents = scheduler.step(guided if last else guided.detach(), t, latents, return_dict=False)[0]
    image = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
    reward((image / 2 + 0.5).clamp(0, 1)).sum().backward()


def own_step(sampler: Sampler, given: Conditioning, space: TokenSpace, reward: Sight) -> None:
    """The same as a run does it: the token space, the pipeline behind the gate, the reward, the gradient."""
    x = space.coordinates(full=True).start[None].requires_grad_()
    inserted, penalty = space.apply(x, given, full=True)
    image = sampler.generate(inserted, [0], gradient=True)
    torch.autograd.grad((reward(image) - 1e-3 * penalty.to(image)).sum(), x)


def peak(device: str) -> float:
    """Peak memory in GiB: the allocator's on a GPU, the process's on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(model: str, way: str, device: str, dtype: str, repeats: int, side: int, steps: int) -> dict[str, Any]:
    """Builds, warms up and times one way."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    size, kind = SIZES[model], getattr(torch, dtype)
    torch.manual_seed(0)
    pipeline = memory.pull(build(size, kind), device, WAYS[way])
    settings = SamplerSettings(steps, GUIDANCE, side, side)
    sampler = Sampler(pipeline, settings)
    sampler.__dict__["_heard"], sampler.__dict__["_packing"] = _known(size)
    given, reward = conditioning(size, device, kind), Sight(size.vision, device)
    space = TokenSpace(given.prompt_embeds.shape[-1], TokenShape())
    leaf = torch.zeros(1, 20, given.prompt_embeds.shape[-1], device=device, dtype=kind, requires_grad=True)
    works: dict[str, Callable[[], None]] = {
        "floor": lambda: bare_step(sampler, given, lambda: leaf, reward, False),
        "detached": lambda: bare_step(sampler, given, lambda: leaf, reward, True),
    }
    work = works.get(way, lambda: own_step(sampler, given, space, reward))
    gpu = device.startswith("cuda")
    before, seconds = peak(device), []
    work()  # loads and chooses kernels
    if gpu:
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
    clock = time.perf_counter if gpu else time.process_time  # of a CPU that others use as well, our own share
    for _ in range(repeats):
        begun = clock()
        work()
        if gpu:
            torch.cuda.synchronize()
        seconds.append(clock() - begun)
    parameters = sum(p.numel() for p in denoiser(pipeline).parameters())
    return {
        "model": model, "way": way, "seconds": sorted(seconds)[len(seconds) // 2], "peak_gib": peak(device),
        "weights_gib": before if not gpu else torch.cuda.memory_allocated() / 2**30, "denoiser_parameters": parameters,
    }  # fmt: skip


def _known(size: Size) -> tuple[Any, Any]:
    """What a sampler finds out by encoding a prompt, for a pipeline without tokenizers."""
    from ipgo_opt.models.sampler import _Heard, _Packing

    width = 2048 if size.larger else size.text["hidden_size"]
    return _Heard(batch=2), _Packing(0, (width,))


def device_name(device: str) -> str:
    """For people."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"


def table(rows: Sequence[dict[str, Any]], command: str, device: str, about: str) -> str:
    """The Markdown table of one model."""
    floor = next((row["seconds"] for row in rows if row["way"] == "floor"), float("nan"))
    unit = "CPU seconds" if device.startswith("CPU") else "seconds"
    lines = [
        f"Produced by `{command}` on {device}, torch {torch.__version__}: {about}.",
        "",
        f"| way | {unit} per step | × floor | peak memory, GiB | of it weights and libraries |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['way']} | {row['seconds']:.2f} | {row['seconds'] / floor:.2f} | {row['peak_gib']:.2f} | "
        f"{row['weights_gib']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures every way in a process of its own, writes a JSON file and a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SIZES), default="sd15")
    parser.add_argument("--quick", action="store_true", help="a small pipeline and few steps, for a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="", help="float32 on a CPU, float16 elsewhere")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--side", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", choices=list(WAYS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    model = "quick" if args.quick else args.model
    dtype = args.dtype or ("float32" if args.device == "cpu" else "float16")
    side, steps = args.side or SIZES[model].side, args.steps or SIZES[model].steps
    if args.one:
        print(json.dumps(measure(model, args.one, args.device, dtype, args.repeats, side, steps)))
        return
    given = ["--model", model, "--device", args.device, "--dtype", dtype, "--repeats", str(args.repeats)]
    given += ["--side", str(side), "--steps", str(steps)]
    rows = []
    for way in args.ways:
        line = [sys.executable, "-m", "benchmarks.full_size", *given, "--one", way]
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, env=os.environ, check=False)
        if done.returncode:
            print(f"{way}: failed with exit code {done.returncode}", file=sys.stderr)
            continue
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), file=sys.stderr)
    name = device_name(args.device)
    about = (
        f"{model}, {rows[0]['denoiser_parameters'] / 1e6:.0f} M parameters in the denoiser, random weights, {dtype}, "
        f"{side} × {side}, {steps} steps, guidance {GUIDANCE}, K = 1"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    shown = f"python -m benchmarks.full_size {'--quick' if args.quick else f'--model {model}'} --device {args.device}"
    size = SIZES[model]
    changed = (("side", side, size.side), ("steps", steps, size.steps), ("repeats", args.repeats, 3))
    shown += "".join(f" --{name} {value}" for name, value, usual in changed if value != usual)
    if args.ways != list(WAYS):
        shown += f" --ways {' '.join(args.ways)}"
    stem = f"{model}-{args.device.partition(':')[0]}"
    (args.out / f"{stem}.json").write_text(json.dumps({"device": name, "about": about, "rows": rows}, indent=1) + "\n")
    text = table(rows, shown, name, about)
    (args.out / f"{stem}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
