"""The sampler: a thin adapter over an unmodified diffusers pipeline.

Prompts are encoded by the pipeline's own `__call__`, listened to as it encodes, and images are made by the same
`__call__` from embeddings, so that every scheduler works and an image without inserted tokens is the one that diffusers
gives for the prompt and the seed. What a pipeline takes and returns is read off its class (`interface.py`).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ipgo_opt.conditioning import Conditioning
from ipgo_opt.errors import BadInput
from ipgo_opt.models.adapter import Adapted, linear_layers
from ipgo_opt.models.gate import Gate, denoiser, first_input, shadowed, tensors, undecorated
from ipgo_opt.models.interface import Interface
from ipgo_opt.models.mixing import Mixed, mixing
from ipgo_opt.models.shortcut import Shortcut
from ipgo_opt.models.visit import Arrived, Follow, Visit


@dataclass(frozen=True)
class SamplerSettings:
    """How images are made.

    Attributes:
        num_inference_steps: sampler steps T.
        guidance_scale: weight of guidance; where it is classifier-free, 1 or less turns it off.
        height, width: image size in pixels; 0 for the pipeline's own.
        grad_steps: K, steps at the end that are differentiated when a gradient is asked for.
        negative_prompt: what the unconditional half sees.
        true_cfg_scale: weight of classifier-free guidance in pipelines whose `guidance_scale` is a distilled one.
        eta: η of DDIM, the share of fresh noise in every step, 0 to 1.

    """

    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int
    grad_steps: int = 1
    negative_prompt: str = ""
    true_cfg_scale: float = 1.0
    eta: float = 0.0


MOST_ENCODED = 1024
"""Encoded prompts that are kept."""

STATES = ("prompt_embeds", "negative_prompt_embeds")
"""The arguments that hold the sequences of the two halves."""

WORD = re.compile(r"(?P<start>[▁Ġ])?(?P<word>[a-z]{3,})(?(start)|</w>)")
"""Tokens of a vocabulary that are whole words: `word</w>` in CLIP's, `▁word` or `Ġword` in those of language models."""


class _Encoded(Exception):
    """Ends a pipeline call as soon as the prompt is encoded."""


@dataclass
class _Heard:
    """What a pipeline did with a prompt before its first denoiser call.

    Attributes:
        outputs: what each call of `encode_prompt` returned.
        batch: images in the first denoiser call for a prompt of one image.
        noise: what its latents were prepared to be, if the pipeline says so.

    """

    outputs: list[Any] = field(default_factory=list)
    batch: int = 1
    noise: Tensor | None = None

    def listening(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        """`encode_prompt`, overheard."""

        def overheard(*args: Any, **kwargs: Any) -> Any:
            self.outputs.append(encode(*args, **kwargs))
            return self.outputs[-1]

        return overheard

    def preparing(self, prepare: Callable[..., Any]) -> Callable[..., Any]:
        """`prepare_latents`, overheard."""

        def overheard(*args: Any, **kwargs: Any) -> Any:
            prepared = prepare(*args, **kwargs)
            self.noise = next(tensors(prepared))
            return prepared

        return overheard

    def stopping(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The denoiser's `forward`, which ends the pipeline call."""

        def stop(*args: Any, **kwargs: Any) -> Any:
            self.batch = len(first_input(forward, args, kwargs))
            raise _Encoded

        return stop


@dataclass(frozen=True)
class _Packing:
    """How a pipeline holds prompt_embeds: in how many nested lists, and of which shape (…) each state is."""

    lists: int
    state: tuple[int, ...]

    @classmethod
    def of(cls, value: Any) -> _Packing:
        lists = 0
        while isinstance(value, list):
            value, lists = value[0], lists + 1
        return cls(lists, tuple(value.shape[1 if lists else 2 :]))

    def opened(self, value: Any) -> Tensor | None:
        """Embeddings of one prompt as (1, L, d); None for an empty list."""
        for _ in range(self.lists):
            if not value:
                return None
            value = value[0]
        return (value[None] if self.lists else value).flatten(2)

    def closed(self, states: Tensor) -> Any:
        """Embeddings (B, L, d) as the pipeline takes them."""
        states = states.view(*states.shape[:2], *self.state)
        if not self.lists:
            return states
        rows: list[Any] = list(states.unbind())
        for _ in range(self.lists - 1):
            rows = [[row] for row in rows]
        return rows


def _per_state(mask: Tensor | None, states: Tensor | None) -> Tensor | None:
    """A mask with one entry per state (B, L); AuraFlow's has one per coordinate of a state, (B, L · d)."""
    if mask is None or states is None:
        return None
    return mask.reshape(*states.shape[:2], -1)[..., 0]


class Sampler:
    """Encodes prompts and generates images, with gradients on request.

    Args:
        pipeline: a diffusers text-to-image pipeline on its device.
        settings: how images are made.
        chunk: most images per pipeline call.

    Attributes:
        interface: what the pipeline takes and returns.
        images: images generated so far.
        denoiser_calls: images × denoiser evaluations so far, unconditional halves included.
        size: (height, width) of the last images in pixels.
        latents: what the last images were decoded from, (B, …).
        encode: the conditioning of a prompt (batch 1), exactly as the pipeline itself encodes it, and of a second text
            that stands in the unconditional half instead of the settings' negative prompt, if one is given; the
            latest are remembered.

    """

    def __init__(self, pipeline: Any, settings: SamplerSettings, chunk: int = 8) -> None:
        self.interface = Interface.of(type(pipeline))
        self.interface.check_guidance(settings.negative_prompt, settings.true_cfg_scale)
        self.interface.check_eta(settings.eta)
        self.pipeline, self.settings, self.chunk = pipeline, settings, chunk if self.interface.batches else 1
        undecorated: Any = type(pipeline).__call__
        self.call = undecorated.__wrapped__
        self.images = self.denoiser_calls = 0
        self.size = (settings.height, settings.width)
        self.latents = torch.zeros(0)
        self.drawn: dict[int, Tensor] = {}
        self.encode = functools.lru_cache(MOST_ENCODED)(self._encode)
        pipeline.set_progress_bar_config(disable=True)
        for component in pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                component.requires_grad_(False).eval()

    @property
    def width(self) -> int:
        """Width d of the encoded prompt."""
        return math.prod(self._packing.state)

    @torch.no_grad()
    def _encode(self, prompt: str, negative_prompt: str | None = None) -> Conditioning:
        """`encode`, each time anew."""
        return self.encoded(prompt, negative_prompt)

    def encode_mixed(self, prompt: Mixed, negative_prompt: Mixed) -> Conditioning:
        """The conditioning of texts in which words are mixed, differentiable with respect to the weights.

        Raises:
            BadInput: the pipeline's encoders can't read mixtures, or let no gradient through.

        """
        with mixing(self.pipeline, [prompt, negative_prompt]):
            conditioning = self.encoded(prompt.text, negative_prompt.text)
        wanted = torch.is_grad_enabled() and any(slot.weights.requires_grad for slot in prompt.slots)
        if wanted and prompt.mixes and not conditioning.prompt_embeds.requires_grad:
            raise BadInput(f"{type(self.pipeline).__name__} encodes prompts without a gradient.")
        return conditioning

    def reads_negative(self) -> bool:
        """Whether a negative prompt changes the image: whether the pipeline, as it is set, encodes one."""
        named = self._named(self._heard)
        return "negative_prompt_embeds" in named and self._packing.opened(named["negative_prompt_embeds"]) is not None

    def encoded(self, prompt: str, negative_prompt: str | None = None) -> Conditioning:
        """The same, differentiable with respect to what a hook puts into the text encoder."""
        named = self._named(self._listen(prompt, negative_prompt=negative_prompt))
        packing = self._packing
        states = packing.opened(named.pop("prompt_embeds"))
        if states is None:
            raise BadInput(f"{type(self.pipeline).__name__} encoded {prompt!r} into nothing.")
        negative = named.pop("negative_prompt_embeds", None)
        negative = None if negative is None else packing.opened(negative)
        return Conditioning(
            states,
            negative,
            mask=_per_state(named.pop(self.interface.mask, None), states),
            negative_mask=_per_state(named.pop(f"negative_{self.interface.mask}", None), negative),
            extra={name: value for name, value in named.items() if isinstance(value, Tensor)},
            fixed_length=hasattr(denoiser(self.pipeline).config, "text_len"),
        )

    def linear_layers(self, endings: Sequence[str]) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of the denoiser's linear layers whose names end so, by name; BadInput if there is none."""
        return linear_layers(denoiser(self.pipeline), endings)

    @torch.no_grad()
    def noise(self, seeds: Sequence[int]) -> Tensor:
        """The noise (S, …) that the pipeline draws for each seed, as it takes it under `latents`: the same image.

        Raises:
            BadInput: the pipeline takes none, or changes what it is given.

        """
        for seed in seeds:
            if seed not in self.drawn:
                self.drawn[seed] = self._noise(seed)
        return torch.cat([self.drawn[seed] for seed in seeds])

    def _noise(self, seed: int) -> Tensor:
        prepared = self._listen("a", seed).noise if "latents" in self.interface.arguments else None
        if prepared is None:
            raise BadInput(f"{type(self.pipeline).__name__} takes no starting noise.")
        generator = torch.Generator("cpu").manual_seed(seed)
        raw = torch.randn(prepared.shape, generator=generator, dtype=prepared.dtype).to(prepared.device)
        for given in (raw, prepared):  # which is scaled by the scheduler or packed by the pipeline in some, not in all
            again = self._listen("a", seed, latents=given).noise
            if again is not None and torch.equal(again, prepared):
                return given
        raise BadInput(f"{type(self.pipeline).__name__} makes other noise of what it is given as starting noise.")

    def _listen(self, prompt: str, seed: int = 0, *, negative_prompt: str | None = None, **given: Tensor) -> _Heard:
        """Runs the pipeline on a prompt until its first denoiser call."""
        heard, settings = _Heard(), self.settings
        texts = {"prompt": prompt}
        negative = settings.negative_prompt if negative_prompt is None else negative_prompt
        true_cfg = self.interface.guidance == "true_cfg_scale" or settings.true_cfg_scale > 1
        if negative or true_cfg:  # which some pipelines take for off until they are given a prompt
            texts["negative_prompt"] = negative
        prepares = hasattr(self.pipeline, "prepare_latents")
        with (
            shadowed(
                self.pipeline, "encode_prompt", lambda encode: heard.listening(undecorated(self.pipeline, encode))
            ),
            shadowed(self.pipeline, "prepare_latents", heard.preparing) if prepares else nullcontext(),
            shadowed(denoiser(self.pipeline), "forward", heard.stopping),
        ):
            try:
                self.call(self.pipeline, **texts, **given, **self.arguments([seed]))
            except _Encoded:
                for hook in getattr(self.pipeline, "text_hooks", ()):
                    hook.offload()
                return heard
        raise BadInput(f"{type(self.pipeline).__name__} made an image without calling its denoiser.")

    def _named(self, heard: _Heard) -> dict[str, Any]:
        named: dict[str, Any] = {}
        for n, output in enumerate(heard.outputs):
            named |= self.interface.named(output, n)
        return named

    @functools.cached_property
    def _heard(self) -> _Heard:
        """What the pipeline does with any prompt."""
        with torch.no_grad():
            return self._listen("a")

    @functools.cached_property
    def _packing(self) -> _Packing:
        return _Packing.of(self._named(self._heard)["prompt_embeds"])

    def arguments(self, seeds: Sequence[int]) -> dict[str, Any]:
        """Everything that the pipeline is given beside texts or embeddings."""
        settings = self.settings
        wanted = {
            "true_cfg_scale": settings.true_cfg_scale,
            self.interface.guidance: settings.guidance_scale,
            "generator": [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds],
            "num_inference_steps": settings.num_inference_steps,
            "eta": settings.eta or None,
            "height": settings.height or None,
            "width": settings.width or None,
            "use_resolution_binning": False,  # the size that was asked for
            "output_type": "pt",
            "return_dict": False,
        }
        return {
            name: value for name, value in wanted.items() if value is not None and name in self.interface.arguments
        }  # fmt: skip

    @functools.cached_property
    def tokenizer(self) -> Any:
        """Of the text encoders that the pipeline has, the tokenizer of the one that reads most."""
        found = [
            getattr(self.pipeline, name, None) for name in ("tokenizer", "tokenizer_2", "tokenizer_3", "processor")
        ]
        tokenizers = [one if hasattr(one, "model_max_length") else one.tokenizer for one in found if one is not None]
        return max(tokenizers, key=self._reads)

    @property
    def reads(self) -> int:
        """Tokens that the text encoder reads, begin and end included."""
        return self._reads(self.tokenizer)

    def _reads(self, tokenizer: Any) -> int:
        return int(min(tokenizer.model_max_length, self.interface.reads, 2**31))

    def token_count(self, prompt: str) -> tuple[int, int]:
        """Tokens of the prompt, begin and end included, and how many the text encoder reads."""
        return len(self.tokenizer(prompt).input_ids), self.reads

    def whole_words(self) -> list[str]:
        """The whole words of the tokenizer's vocabulary, three letters or more, in alphabetical order."""
        matches = [match for token in self.tokenizer.get_vocab() if (match := WORD.fullmatch(token))]
        return sorted({match["word"] for match in matches})

    def vocabulary(self, words: int = 512) -> list[str]:
        """At most `words` whole words of the tokenizer's own vocabulary, spread evenly over the alphabet."""
        whole = self.whole_words()
        if not whole:
            raise BadInput("words need a vocabulary with whole words, but this model's tokenizer has none.")
        return whole[:: max(1, len(whole) // words)][:words]

    def word_states(self, words: int = 512) -> Tensor:
        """Encoder states (n, d), float32 on the CPU, of the words of `vocabulary(words)`.

        They are encoded many to a prompt; states of begin, end and padding are left out.
        """
        tokenizer, chosen = self.tokenizer, self.vocabulary(words)
        per_prompt = max(1, min(75, self._reads(tokenizer) - 2))
        begins = int(tokenizer("a").input_ids[0] == tokenizer.bos_token_id)
        states = []
        for start in range(0, len(chosen), per_prompt):
            part = chosen[start : start + per_prompt]
            encoded = self.encode(" ".join(part))
            read = encoded.prompt_embeds[0] if encoded.mask is None else encoded.prompt_embeds[0][encoded.mask[0] != 0]
            states.append(read[begins : begins + len(part)].float().cpu())
        return torch.cat(states)

    def generate(
        self, conditioning: Conditioning, seeds: Sequence[int], *, gradient: bool = False, shortcut: int | None = None
    ) -> Tensor:
        """One image per row of `conditioning` and seed: (B, 3, H, W) in [0, 1], float32.

        The noise of a seed is the same whatever the batch and the device (drawn on the CPU). With `gradient`, the
        result is differentiable with respect to the conditioning through the last `grad_steps` steps; with `shortcut`,
        through that sampler step (from 0) alone, and it is what the clean image is estimated to be at that step.
        """
        if len(conditioning) != len(seeds):
            raise BadInput(f"one seed per row is needed, but got {len(conditioning)} rows and {len(seeds)} seeds.")
        images, latents = [], []
        for rows in self.chunks(len(seeds)):
            part = conditioning.map(lambda t, rows=rows: t[rows])
            images.append(self._generate(part, seeds[rows], gradient, shortcut))
            latents.append(self.latents)
        self.latents = torch.cat(latents)
        return images[0] if len(images) == 1 else torch.cat(images)

    def chunks(self, rows: int) -> list[slice]:
        """The parts in which that many rows are given to the pipeline."""
        return [slice(start, start + self.chunk) for start in range(0, rows, self.chunk)]

    def revisit(self, conditioning: Conditioning, seeds: Sequence[int], follow: Follow, *, steps: int) -> Tensor | None:
        """A pipeline call, with gradients, whose steps lead where `follow` says; see `Visit`.

        Args:
            conditioning: B rows, at most `chunk`.
            seeds: of each row; they fix the first noisy images.
            follow: where each step leads; None ends the call.
            steps: sampler steps at the end in which the denoiser runs.

        Returns:
            The images (B, 3, H, W), float32, which are not counted, or None if `follow` ended the call.

        """
        packed = self.packed(self.tensors(conditioning))
        visit = Visit(self.pipeline, steps, len(seeds), self._searched(packed), bool(conditioning.adapter), follow)
        images = None
        with Adapted(denoiser(self.pipeline), conditioning.adapter), visit, suppress(Arrived), torch.enable_grad():
            images = self._finished(self.call(self.pipeline, **packed, **self.arguments(seeds))[0])
        self.denoiser_calls += visit.calls
        return images

    def tensors(self, conditioning: Conditioning) -> dict[str, Tensor]:
        """The conditioning by the names of the pipeline's arguments; both halves equally long where they have to be."""
        in_one_tensor = self._heard.batch > 1 and not self._packing.lists
        if self.interface.equal_lengths or in_one_tensor or conditioning.mask is not None:  # masked padding is not read
            conditioning = conditioning.levelled()
        named = {
            "prompt_embeds": conditioning.prompt_embeds,
            "negative_prompt_embeds": conditioning.negative_prompt_embeds,
            self.interface.mask: conditioning.mask,
            f"negative_{self.interface.mask}": conditioning.negative_mask,
            **conditioning.extra,
            "latents": None if conditioning.noise is None else conditioning.noise[:, 0],
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def packed(self, named: dict[str, Tensor]) -> dict[str, Any]:
        """What `tensors` gave as the pipeline takes it."""
        packed = {name: self._packing.closed(tensor) if name in STATES else tensor for name, tensor in named.items()}
        if "negative_prompt" in self.interface.arguments:
            packed["negative_prompt"] = None  # "" by default in some pipelines
        return packed

    @staticmethod
    def _searched(packed: dict[str, Any]) -> list[Tensor]:
        return [tensor for tensor in tensors(packed) if tensor.requires_grad]

    def _generate(
        self, conditioning: Conditioning, seeds: Sequence[int], gradient: bool, shortcut: int | None
    ) -> Tensor:
        packed = self.packed(self.tensors(conditioning))
        searched, steps = self._searched(packed), self.settings.grad_steps if gradient else 0
        gate = (
            Gate(self.pipeline, steps, len(seeds), searched, bool(conditioning.adapter))
            if shortcut is None
            else Shortcut(self.pipeline, shortcut, len(seeds), searched)
        )
        with (
            Adapted(denoiser(self.pipeline), conditioning.adapter),
            gate,
            nullcontext() if gradient else torch.no_grad(),
        ):
            images = self.call(self.pipeline, **packed, **self.arguments(seeds))[0]
        self.images, self.size = self.images + len(seeds), (images.shape[-2], images.shape[-1])
        self.denoiser_calls += gate.calls
        self.latents = gate.latents
        return self._finished(images)

    def _finished(self, images: Tensor) -> Tensor:
        if not hasattr(self.pipeline, "image_processor"):  # which is what turns [−1, 1] into [0, 1]
            images = (images / 2 + 0.5).clamp(0, 1)
        return images.float()
