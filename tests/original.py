"""The tiny Stable Diffusion under the names of the original checkpoints, as they come in one file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import tiny
from safetensors.torch import save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op", "down_blocks.1.resnets.0": "input_blocks.3.0",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2", "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.resnets.1": "output_blocks.1.0", "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0", "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.resnets.1": "output_blocks.3.0", "up_blocks.1.attentions.1": "output_blocks.3.1",
}  # fmt: skip
"""Parts of `tiny.unet` and where they stand in the original's numbering."""


def _unet(name: str) -> str:
    part = max((part for part in UNET if name.startswith(f"{part}.")), key=len)
    rest = name.removeprefix(part)
    if ".resnets." in part:
        rest = re.sub(r"^\.(\w+)\.", lambda match: f".{RESNET[match[1]]}.", rest)
    return f"model.diffusion_model.{UNET[part]}{rest}"


def _vae(name: str) -> str:
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{1 - int(m[1])}.block.{m[2]}", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{1 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    for ours, original in {
        "mid_block.attentions.0": "mid.attn_1", "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out",
        "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
    }.items():  # fmt: skip
        name = name.replace(ours, original)
    return f"first_stage_model.{name}"


def save(path: Path) -> Any:
    """Writes the file and returns the pipeline whose weights it holds."""
    pipeline = tiny.pipeline()
    state: dict[str, Tensor] = {_unet(name): tensor for name, tensor in pipeline.unet.state_dict().items()}
    for name, tensor in pipeline.vae.state_dict().items():
        square = re.search(r"mid_block.attentions.0.to_\w+(\.0)?\.weight", name)  # convolutions of one pixel there
        state[_vae(name)] = tensor[..., None, None] if square else tensor
    for name, tensor in pipeline.text_encoder.state_dict().items():
        state[f"cond_stage_model.transformer.{'' if name.startswith('text_model.') else 'text_model.'}{name}"] = tensor
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return pipeline
