"""The conditioning file: what a run found, in one safetensors file that other tools can load without this package.

Tensors: every argument that the pipeline is given in place of a prompt, by the pipeline's own names (prompt_embeds,
negative_prompt_embeds, pooled embeddings and masks where the model has them); of a token space also the tokens
`prefix` and `suffix` (M, d) alone and their bases; `x`, the point of the space; `encoder` (d,), the mean state of a
fixed text, by which another encoder is recognized. Metadata: see `write_conditioning`.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ipgo_opt import __version__
from ipgo_opt.errors import BadInput
from ipgo_opt.models.adapter import peft_files
from ipgo_opt.objective import readable
from ipgo_opt.rewards.base import shown
from ipgo_opt.store import read_tensors, to_pil, write_tensors

if TYPE_CHECKING:
    from PIL.Image import Image

    from ipgo_opt.loop import Search
    from ipgo_opt.models.sampler import Sampler

FORMAT = "ipgo-opt conditioning 1"

PROBE = "a"
"""The text whose mean state identifies an encoder."""

LEAST_SIMILARITY = 0.99
"""Cosine of the mean states of PROBE from which two encoders count as the same (in another dtype, say)."""

PACKAGES = ("torch", "diffusers", "transformers")


def versions() -> dict[str, str]:
    """Of Python and the libraries that make the image."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


@torch.no_grad()
def fingerprint(sampler: Sampler) -> Tensor:
    """The mean state (d,) that the model's text encoder gives for PROBE."""
    return sampler.encode(PROBE).mean()[0].float().cpu()


@torch.no_grad()
def write_conditioning(search: Search, sampler: Sampler, space: Any, *, full: bool) -> None:
    """best.safetensors and, made from it alone, best.png; of adapter weights also adapter/, as peft saves them."""
    config, (prompt, seed) = search.config, search.shown()
    raw = (config.prompt, config.negative_prompt)
    conditioning, learned = sampler.encode(prompt), {}
    if search.best_x is not None:
        if space.needs_noise:
            conditioning = replace(conditioning, noise=sampler.noise([seed])[None])
        conditioning, _ = space.apply(search.best_x[None], conditioning, full=full)
        learned = {"x": search.best_x, **space.learned(search.best_x, full=full)}
    image = sampler.generate(conditioning, [seed])[0]
    search.store.write_image("best.png", image)
    settings = sampler.settings
    metadata = {
        "format": FORMAT,
        "prompt": prompt,
        "negative_prompt": config.negative_prompt,
        **{f"optimized_{name}": text for name, text in readable(space, raw, search.best_x, full=full).items()},
        "length": conditioning.prompt_embeds.shape[1],
        "attend": int(config.attend and config.space == "tokens"),
        "anchor": int(config.anchor and config.space == "tokens"),
        "model": config.model,
        "revision": config.revision,
        "pipeline": type(sampler.pipeline).__name__,
        "scheduler": type(sampler.pipeline.scheduler).__name__,
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "true_cfg_scale": settings.true_cfg_scale,
        "height": sampler.size[0],
        "width": sampler.size[1],
        "eta": settings.eta,
        "seed": seed,
        "space": config.space,
        "reward": shown(config.reward),
        "ipgo_opt": __version__,
        **versions(),
    }
    for name, data in (peft_files(conditioning.adapter, config.model) if conditioning.adapter else {}).items():
        (search.store.folder / "adapter").mkdir(exist_ok=True)
        search.store.write_bytes(f"adapter/{name}", data)
    tensors = sampler.tensors(conditioning) | learned | {"encoder": fingerprint(sampler)}
    search.store.write_tensors("best.safetensors", tensors, {key: str(value) for key, value in metadata.items()})


@dataclass(frozen=True)
class ConditioningFile:
    """A conditioning file in memory.

    Attributes:
        path: where it is.
        tensors: by name.
        metadata: strings by name.

    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @property
    def tokens(self) -> dict[str, Tensor]:
        """The tokens (1, M, d) by side; BadInput if the file has none."""
        sides: tuple[str, ...] = ("prefix", "suffix")
        found = {name: self.tensors[name][None] for name in sides if name in self.tensors}
        if not found:
            raise BadInput(
                f"{str(self.path)!r} holds no tokens: its best image is the raw prompt's, or of another space."
            )
        return found

    @property
    def attend(self) -> bool:
        """Whether the tokens attend to the prompt before they are inserted."""
        return self.metadata.get("attend", "0") == "1"

    @property
    def anchor(self) -> bool:
        """Whether the prompt's mean state is added to the tokens."""
        return self.metadata.get("anchor", "0") == "1"

    def check_encoder(self, sampler: Sampler) -> None:
        """Raises BadInput unless the file was made with the text encoder of this sampler's model."""
        made, model = self.metadata.get("model", "?"), type(sampler.pipeline).__name__
        learned = self.tensors.get("encoder", self.tensors["prompt_embeds"][0, 0])
        if learned.shape[-1] != sampler.width:
            raise BadInput(
                f"{str(self.path)!r} was made for the model {made!r}, whose encoder is {learned.shape[-1]} wide, but "
                f"this {model}'s is {sampler.width} wide."
            )
        if "encoder" in self.tensors:
            similarity = torch.cosine_similarity(self.tensors["encoder"], fingerprint(sampler), dim=0).item()
            if not similarity >= LEAST_SIMILARITY:
                raise BadInput(
                    f"{str(self.path)!r} was made for the model {made!r}, but this {model} has another text encoder "
                    f"(similarity {similarity:.2f} for the same text)."
                )

    def to_pipeline(self, pipe: Any) -> dict[str, Any]:
        """The arguments with which a diffusers pipeline makes the file's image: `pipe(**file.to_pipeline(pipe))`.

        Raises:
            BadInput: the pipeline is of another class or encoder, or needs a tensor that the file lacks.

        """
        from ipgo_opt.models.sampler import Sampler, SamplerSettings

        about = self.metadata
        if any(name.endswith(".lora_A") for name in self.tensors):
            raise BadInput(
                f"{str(self.path)!r} is of adapter weights, not of a conditioning: load the run's adapter/ with "
                "load_lora_weights."
            )
        made_by, given = about.get("pipeline", type(pipe).__name__), type(pipe).__name__
        if made_by != given:
            raise BadInput(f"{str(self.path)!r} is for a {made_by}, but got a {given}.")
        shown_progress = dict(getattr(pipe, "_progress_bar_config", {}))
        settings = SamplerSettings(
            int(about["num_inference_steps"]), float(about["guidance_scale"]), int(about["height"]),
            int(about["width"]), negative_prompt=about.get("negative_prompt", ""),
            true_cfg_scale=float(about.get("true_cfg_scale", 1.0)), eta=float(about.get("eta", 0.0)),
        )  # fmt: skip
        sampler = Sampler(pipe, settings)
        pipe.set_progress_bar_config(**{"disable": False} | shown_progress)
        self.check_encoder(sampler)
        needed = sampler.tensors(sampler.encode(PROBE))
        missing = [name for name in needed if name not in self.tensors]
        if missing:
            raise BadInput(f"a {given} needs {missing[0]!r}, which {str(self.path)!r} lacks.")
        tensors = {name: self.tensors[name].to(like) for name, like in needed.items()}
        if "latents" in self.tensors:
            tensors["latents"] = self.tensors["latents"].to(needed["prompt_embeds"])
        return (
            sampler.packed(tensors)
            | sampler.arguments([int(about["seed"])])
            | {"output_type": "pil", "return_dict": True}
        )

    def image(self, pipe: Any) -> Image:
        """The file's image, made by a diffusers pipeline."""
        given = self.to_pipeline(pipe) | {"output_type": "pt"}
        made = pipe(**given).images
        if not hasattr(pipe, "image_processor"):
            made = (made / 2 + 0.5).clamp(0, 1)
        image: Image = to_pil(made[0])
        return image


def load_conditioning(path: str | Path) -> ConditioningFile:
    """Reads a conditioning file, or the one of a run directory.

    >>> import ipgo_opt
    >>> image = pipe(**ipgo_opt.load_conditioning("runs/fox").to_pipeline(pipe)).images[0]

    Raises:
        BadInput: it is missing, damaged or something else.

    """
    file = Path(path)
    if file.is_dir():
        file = file / "best.safetensors"
    if not file.is_file():
        raise BadInput(f"a conditioning file, or the folder of a finished run, is needed, but got {str(path)!r}.")
    tensors, metadata = read_tensors(file)
    if metadata.get("format") != FORMAT or "prompt_embeds" not in tensors:
        raise BadInput(f"{str(file)!r} is no conditioning file of layout {FORMAT!r}.")
    return ConditioningFile(file, tensors, metadata)


def write_comfyui(file: ConditioningFile, out: Path) -> list[Path]:
    """Writes the prompt's half to `out` and the negative half, if there is one, beside it; returns both paths.

    The keys are those of the conditioning files that ComfyUI nodes read: `conditioning_data_0` (1, L, d), and where the
    model has them `attention_mask_0` and `option_0_pooled_output`. A file is one conditioning, hence two files.
    """
    written = []
    for half, path in (("", out), ("negative_", out.with_name(f"{out.stem}.negative{out.suffix}"))):
        states = file.tensors.get(f"{half}prompt_embeds")
        if states is None:
            continue
        names = {
            f"{half}prompt_attention_mask": "attention_mask_0", f"{half}prompt_embeds_mask": "attention_mask_0",
            f"{half}pooled_prompt_embeds": "option_0_pooled_output",
        }  # fmt: skip
        more = {key: file.tensors[name] for name, key in names.items() if name in file.tensors}
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {
            "num_conditionings": "1",
            "dtype": str(states.dtype).removeprefix("torch."),
            "prompt": file.metadata["prompt"],
        }
        write_tensors(path, {"conditioning_data_0": states, **more}, about)
        written.append(path)
    return written
