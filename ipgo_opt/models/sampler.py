"""The sampler: a thin adapter over an unmodified diffusers pipeline.

Prompts are encoded by the pipeline's own `encode_prompt` and images are made by its own `__call__`, so that every
scheduler works and an image without inserted tokens is the one that diffusers gives for the prompt and the seed.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ipgo_opt.conditioning import Conditioning
from ipgo_opt.errors import BadInput
from ipgo_opt.models.gate import Gate


@dataclass(frozen=True)
class SamplerSettings:
    """How images are made.

    Attributes:
        num_inference_steps: sampler steps T.
        guidance_scale: weight of classifier-free guidance; 1 or less turns it off.
        height, width: image size in pixels.
        grad_steps: K, steps at the end that are differentiated when a gradient is asked for.
        negative_prompt: what the unconditional half sees.

    """

    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int
    grad_steps: int = 1
    negative_prompt: str = ""


ENCODED = {
    2: ("prompt_embeds", "negative_prompt_embeds"),
    4: ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
}
"""What `encode_prompt` returns, by its number of outputs (SD 1.x and 2.x; SDXL)."""


WORD = re.compile(r"[a-z]{3,}</w>")
"""Tokens of a CLIP vocabulary that are whole words."""


def unsupported(pipeline_class: type) -> str | None:
    """Why a pipeline class can't be driven by prompt embeddings through the gate, or None if it can."""
    call = getattr(pipeline_class.__call__, "__wrapped__", None)
    if call is None:
        return "its __call__ can't be run with gradients"
    arguments = inspect.signature(call).parameters
    if "image" in arguments:
        return "it starts from an image, not from text"
    for needed in ("prompt_embeds", "negative_prompt_embeds", "callback_on_step_end", "guidance_scale"):
        if needed not in arguments:
            return f"its __call__ takes no {needed}"
    extra = {"prompt_embeds_2", "prompt_attention_mask", "prompt_embeds_mask"} & set(arguments)
    if extra:
        return f"this version does not fill its argument {sorted(extra)[0]}"
    if not hasattr(pipeline_class, "encode_prompt"):
        return "it has no encode_prompt"
    return None


class Sampler:
    """Encodes prompts and generates images, with gradients on request.

    Args:
        pipeline: a diffusers text-to-image pipeline on its device.
        settings: how images are made.
        chunk: most images per pipeline call.

    Attributes:
        images: images generated so far.
        denoiser_calls: images × denoiser evaluations so far, unconditional halves included.

    """

    def __init__(self, pipeline: Any, settings: SamplerSettings, chunk: int = 8) -> None:
        reason = unsupported(type(pipeline))
        if reason:
            raise BadInput(f"{type(pipeline).__name__} is not supported: {reason}.")
        self.pipeline, self.settings, self.chunk = pipeline, settings, chunk
        undecorated: Any = type(pipeline).__call__
        self.call = undecorated.__wrapped__
        self.images = self.denoiser_calls = 0
        pipeline.set_progress_bar_config(disable=True)
        for component in pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                component.requires_grad_(False).eval()

    @property
    def width(self) -> int:
        """Width d of the encoded prompt."""
        return int(self.encode("").prompt_embeds.shape[-1])

    @torch.no_grad()
    def encode(self, prompt: str) -> Conditioning:
        """The conditioning of one prompt (batch 1), exactly as the pipeline itself encodes it."""
        arguments: dict[str, Any] = {
            "prompt": prompt,
            "device": self.pipeline._execution_device,
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": self.settings.guidance_scale > 1,
            "negative_prompt": self.settings.negative_prompt or None,
        }
        out = self.pipeline.encode_prompt(**arguments)
        if len(out) not in ENCODED:
            raise BadInput(
                f"{type(self.pipeline).__name__} encodes prompts into {len(out)} parts; 2 or 4 are supported."
            )
        named = dict(zip(ENCODED[len(out)], out, strict=True))
        first, negative = named.pop("prompt_embeds"), named.pop("negative_prompt_embeds")
        return Conditioning(first, negative, {name: value for name, value in named.items() if value is not None})

    def token_count(self, prompt: str) -> tuple[int, int]:
        """Tokens of the prompt, begin and end included, and how many the text encoder reads."""
        tokenizer = self.pipeline.tokenizer
        return len(tokenizer(prompt).input_ids), int(tokenizer.model_max_length)

    def word_states(self, words: int = 512) -> Tensor:
        """Encoder states (n, d), float32 on the CPU, of `words` words of the tokenizer's own vocabulary.

        The words are spread evenly over the vocabulary and encoded many to a prompt; states of begin, end and padding
        are left out.
        """
        tokenizer = self.pipeline.tokenizer
        whole = sorted(token[:-4] for token in tokenizer.get_vocab() if WORD.fullmatch(token))
        if not whole:
            raise BadInput("basis 'states' needs a vocabulary with whole words, but this model's tokenizer has none.")
        chosen = whole[:: max(1, len(whole) // words)][:words]
        per_prompt = max(1, int(tokenizer.model_max_length) - 2)
        states = []
        for start in range(0, len(chosen), per_prompt):
            part = chosen[start : start + per_prompt]
            states.append(self.encode(" ".join(part)).prompt_embeds[0, 1 : 1 + len(part)].float().cpu())
        return torch.cat(states)

    def generate(self, conditioning: Conditioning, seeds: Sequence[int], *, gradient: bool = False) -> Tensor:
        """One image per row of `conditioning` and seed: (B, 3, H, W) in [0, 1], float32.

        The noise of a seed is the same whatever the batch and the device (drawn on the CPU). With `gradient`, the
        result is differentiable with respect to the conditioning through the last `grad_steps` steps.
        """
        if len(conditioning) != len(seeds):
            raise BadInput(f"one seed per row is needed, but got {len(conditioning)} rows and {len(seeds)} seeds.")
        images = []
        for start in range(0, len(seeds), self.chunk):
            rows = slice(start, start + self.chunk)
            images.append(self._generate(conditioning.map(lambda t, rows=rows: t[rows]), seeds[rows], gradient))
        return images[0] if len(images) == 1 else torch.cat(images)

    def _generate(self, conditioning: Conditioning, seeds: Sequence[int], gradient: bool) -> Tensor:
        inputs, settings = conditioning.levelled(), self.settings
        negative = inputs.negative_prompt_embeds
        unconditional = [negative, *(tensor for name, tensor in inputs.extra.items() if name.startswith("negative"))]
        gate = Gate(
            self.pipeline,
            settings.grad_steps if gradient else 0,
            any(tensor is not None and tensor.requires_grad for tensor in unconditional),
        )
        with gate, nullcontext() if gradient else torch.no_grad():
            images = self.call(
                self.pipeline,
                prompt_embeds=inputs.prompt_embeds,
                negative_prompt_embeds=negative,
                **inputs.extra,
                generator=[torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds],
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                height=settings.height,
                width=settings.width,
                output_type="pt",
                return_dict=False,
                callback_on_step_end=gate.on_step_end,
            )[0]
        self.images += len(seeds)
        self.denoiser_calls += gate.calls
        return images.float()
