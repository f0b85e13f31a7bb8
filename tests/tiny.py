"""Real diffusers and transformers classes, made tiny and random: pipelines, a CLIP folder, and a reward for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ipgo_opt.models.sampler import Sampler, SamplerSettings

LATENT, PIXELS, WIDTH = 4, 8, 16
"""Side of the latents, side of the images, width of the text encoder."""

RUN: dict[str, Any] = {
    "num_inference_steps": 3, "guidance_scale": 3.0, "scheduler": "", "prefix": 2, "suffix": 2, "basis_size": 4,
    "learning_rate": 0.1, "held_out": 2, "device": "cpu", "basis": "random", "seed_share": 0.0, "batch_size": 1,
}  # fmt: skip
"""Settings of `ipgo_opt.optimize` that suit the tiny pipeline."""


def tokenizer() -> Any:
    """A CLIP tokenizer of 830 tokens, on which the random weights here depend (the embedded model's may change)."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(Path(__file__).parent / "tokenizer"))


def text_config(words: Any, **changed: Any) -> Any:
    """A text tower of two layers."""
    from transformers import CLIPTextConfig

    shape: dict[str, Any] = {
        "vocab_size": len(words), "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }  # fmt: skip
    return CLIPTextConfig(**(shape | changed))


def vae() -> Any:
    """An AutoencoderKL that doubles the side."""
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8), latent_channels=4, norm_num_groups=2, sample_size=PIXELS,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def unet(**changed: Any) -> Any:
    """A UNet with cross-attention at both ends."""
    import diffusers

    shape: dict[str, Any] = {
        "sample_size": LATENT, "cross_attention_dim": WIDTH, "block_out_channels": (8, 16), "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 2, "layers_per_block": 1,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**(shape | changed))


def scheduler(name: str) -> Any:
    """A scheduler with Stable Diffusion's noise schedule."""
    import diffusers

    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    return getattr(diffusers, name).from_config(schedule | {"clip_sample": False, "set_alpha_to_one": False})


def pipeline(dtype: torch.dtype = torch.float32, schedule: str = "LMSDiscreteScheduler") -> Any:
    """A StableDiffusionPipeline with 8 × 8 images of 4 × 4 latents; the weights are the same in every process."""
    import diffusers
    from transformers import CLIPTextModel

    words = tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = diffusers.StableDiffusionPipeline(
            vae=vae(), text_encoder=CLIPTextModel(text_config(words)), tokenizer=words, unet=unet(),
            scheduler=scheduler(schedule), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made if dtype is torch.float32 else made.to(dtype)


def pipeline_xl() -> Any:
    """A StableDiffusionXLPipeline: two text encoders, pooled embeddings, zeros where no negative prompt is given."""
    import diffusers
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    words = tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = diffusers.StableDiffusionXLPipeline(
            vae=vae(), text_encoder=CLIPTextModel(text_config(words)), tokenizer=words, tokenizer_2=words,
            text_encoder_2=CLIPTextModelWithProjection(text_config(words, projection_dim=WIDTH)),
            unet=unet(
                cross_attention_dim=2 * WIDTH, addition_embed_type="text_time", addition_time_embed_dim=4,
                projection_class_embeddings_input_dim=WIDTH + 6 * 4,
            ),
            scheduler=scheduler("EulerDiscreteScheduler"), force_zeros_for_empty_prompt=True, add_watermarker=False,
        )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def settings(**changed: Any) -> SamplerSettings:
    """Few steps, small images."""
    few: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": PIXELS, "width": PIXELS}
    return SamplerSettings(**(few | changed))


def sampler(dtype: torch.dtype = torch.float32, schedule: str = "LMSDiscreteScheduler", **changed: Any) -> Sampler:
    """A sampler on the tiny pipeline."""
    return Sampler(pipeline(dtype, schedule), settings(**changed))


def save(folder: Path) -> Path:
    """The tiny pipeline as a folder on disk."""
    pipeline().save_pretrained(str(folder), safe_serialization=True)
    return folder


def save_clip(
    folder: Path, mean: Sequence[float] = (0.48, 0.46, 0.41), std: Sequence[float] = (0.27, 0.26, 0.28)
) -> Path:
    """A random CLIP for 16 × 16 images as a folder on disk: model, tokenizer and image processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    words = tokenizer()
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 4,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = CLIPModel(CLIPConfig(text_config=text_config(words).to_dict(), vision_config=vision, projection_dim=12))
    model.save_pretrained(str(folder))
    words.save_pretrained(str(folder))
    size: dict[str, Any] = {"size": {"shortest_edge": 16}, "crop_size": 16, "resample": 3}
    CLIPImageProcessor(image_mean=list(mean), image_std=list(std), **size).save_pretrained(str(folder))
    return folder


class Redness:
    """How much redder than green an image is, with a penalty on contrast so that the gradient is not constant."""

    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,)."""
        return images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2)) - images.square().mean((1, 2, 3))
