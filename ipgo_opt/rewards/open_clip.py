"""CLIPs of open_clip: an encoder, and the reward `clip:ARCHITECTURE/CHECKPOINT`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from torch import Tensor

from ipgo_opt.errors import BadInput
from ipgo_opt.registry import unknown
from ipgo_opt.rewards.clip import ClipEncoder, ClipReward, Encoder, SphericalReward
from ipgo_opt.rewards.weights import Loader, Weights, as_bad_input

SIZES = {"ViT-B-32": "0.6 GB", "ViT-B-16": "0.6 GB", "ViT-L-14": "1.7 GB", "ViT-H-14": "3.9 GB", "ViT-g-14": "5.5 GB"}
"""Of the checkpoints, by architecture, for people."""


class OpenClipEncoder(Encoder):
    """A CLIP of open_clip, in float32.

    Args:
        model: made by open_clip.
        architecture: its name there, which decides on the tokenizer.
        device: where it runs.
        clamp: as in `Encoder`.

    """

    def __init__(self, model: Any, architecture: str, device: str = "cpu", *, clamp: bool = True) -> None:
        import open_clip

        config = open_clip.get_model_preprocess_cfg(model)
        size = config["size"] if isinstance(config["size"], int) else config["size"][0]
        if config["resize_mode"] not in ("shortest", "squash") or config["interpolation"] != "bicubic":
            raise BadInput(
                f"{architecture} wants images resized by {config['interpolation']} to {config['resize_mode']}; bicubic "
                "to shortest or squash is known."
            )
        squash = config["resize_mode"] == "squash"
        super().__init__(size, config["mean"], config["std"], device, squash=squash, clamp=clamp)
        self.model = model.eval().requires_grad_(False).to(device)
        self.tokenizer = open_clip.get_tokenizer(architecture)

    def margin(self, surplus: int) -> int:
        """As torchvision's CenterCrop rounds."""
        return round(surplus / 2)

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Embeddings (B, D) of normalized images (B, 3, size, size)."""
        return self.model.encode_image(pixels)

    def embed_texts(self, prompts: list[str]) -> Tensor:
        """Embeddings (n, D) of prompts, cut to the encoder's length."""
        return self.model.encode_text(self.tokenizer(prompts).to(self.device))


def checkpoint(architecture: str, tag: str, reward: str) -> Weights:
    """The weights of an open_clip checkpoint; BadInput if open_clip knows no such one."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not tags:
        raise unknown("the architecture of a CLIP", architecture, open_clip.list_models())
    if tag not in tags:
        raise unknown(f"the checkpoint of {architecture}", tag, tags)
    repository, _, file = open_clip.get_pretrained_cfg(architecture, tag).get("hf_hub", "").rpartition("/")
    if not repository:
        raise BadInput(f"the checkpoint {tag!r} of {architecture} is not on the Hugging Face hub.")
    files = (file,) if file else ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    return Weights(reward, repository, files, SIZES.get(architecture, "size as its page says"))


def load_model(architecture: str, tag: str, path: Path) -> Any:
    """An architecture of open_clip with the weights of `path`, on the CPU.

    Preprocessing and activation are those of the checkpoint `tag`; the architecture's own if it is "".

    Raises:
        BadInput: the file is broken, holds something else than tensors, or does not fit.

    """
    import open_clip

    known = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    wanted = {name: known[name] for name in ("mean", "std", "interpolation", "resize_mode") if name in known}
    with as_bad_input(path):
        return open_clip.create_model(
            architecture, pretrained=str(path), weights_only=True,
            force_quick_gelu=bool(known.get("quick_gelu")), force_preprocess_cfg=wanted,
        )  # fmt: skip


@functools.lru_cache(maxsize=4)
def encoder(architecture: str, tag: str, path: Path, device: str) -> OpenClipEncoder:
    """An encoder, loaded once per device and shared by the rewards that need it."""
    return OpenClipEncoder(load_model(architecture, tag, path), architecture, device)


@functools.lru_cache(maxsize=4)
def transformers_encoder(folder: Path, device: str) -> ClipEncoder:
    """A transformers CLIP, likewise."""
    return ClipEncoder(folder, device)


def real(member: str) -> Loader:
    """The reward `clip:MEMBER`: ARCHITECTURE/CHECKPOINT of open_clip, or a folder or hub id of a transformers CLIP."""
    return _loader(member, ClipReward)


def spherical(member: str) -> Loader:
    """The reward `clip-spherical:MEMBER`, likewise."""
    return _loader(member, SphericalReward)


def _loader(member: str, made: type[ClipReward]) -> Loader:
    import open_clip

    architecture, _, tag = member.partition("/")
    if Path(member).expanduser().is_dir():
        folder = Path(member).expanduser()
        return lambda device: made(transformers_encoder(folder, device))
    if tag and not open_clip.list_pretrained_tags_by_model(architecture):
        folder = Weights(f"clip:{member}", member, ("model.safetensors",), "size as its page says").require().parent
        return lambda device: made(transformers_encoder(folder, device))
    path = checkpoint(architecture, tag, f"clip:{member}").require()
    return lambda device: made(encoder(architecture, tag, path, device))
