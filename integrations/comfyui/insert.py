"""Inserting learned tokens into a ComfyUI conditioning. Needs torch and safetensors, neither ComfyUI nor ipgo_opt."""

from __future__ import annotations

import math
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

FORMAT = "ipgo-opt conditioning 1"


def read_tokens(path: str) -> tuple[dict[str, Tensor], dict[str, bool]]:
    """The tokens (M, d) of an ipgo-opt conditioning file, by side, and how they are inserted.

    "attend" is whether they attend to the prompt (IPGO+), "anchor" whether the prompt's mean state is added to them.
    """
    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
        tokens = {side: file.get_tensor(side) for side in ("prefix", "suffix") if side in set(file.keys())}
    if about.get("format") != FORMAT:
        raise ValueError(f"{path} is no conditioning file of ipgo-opt.")
    if not tokens:
        raise ValueError(f"{path} holds no learned tokens.")
    return tokens, {name: about.get(name, "0") == "1" for name in ("attend", "anchor")}


def insert(
    conditioning: list[list[Any]], tokens: dict[str, Tensor], strength: float, *, attend: bool, anchor: bool
) -> list[list[Any]]:
    """A conditioning, [[states (B, L, d), options], …], with the tokens around the states of every entry.

    Pooled outputs and other options pass through; an `attention_mask` (B, L) grows by ones.
    """
    out = []
    for states, options in conditioning:
        width = next(iter(tokens.values())).shape[-1]
        if states.shape[-1] != width:
            raise ValueError(f"the tokens are {width} wide, but this model's conditioning is {states.shape[-1]} wide.")
        mask = options.get("attention_mask")
        placed = {}
        for side, token in tokens.items():
            V = token.to(states).expand(len(states), -1, -1)
            if attend:
                logits = V @ states.mT / math.sqrt(width)
                if mask is not None:
                    logits = logits.masked_fill(mask.to(states.device)[:, None] == 0, -math.inf)
                V = V + logits.softmax(-1) @ states
            placed[side] = strength * V
            if anchor:
                read = torch.ones_like(states[..., :1]) if mask is None else (mask != 0).to(states)[..., None]
                placed[side] = placed[side] + (states * read).sum(1, keepdim=True) / read.sum(1, keepdim=True)
        pieces = [placed.get("prefix"), states, placed.get("suffix")]
        options = dict(options)
        if mask is not None:
            ones = [None if piece is None else mask.new_ones(piece.shape[:2]) for piece in pieces]
            options["attention_mask"] = torch.cat([one for one in (ones[0], mask, ones[2]) if one is not None], dim=1)
        out.append([torch.cat([piece for piece in pieces if piece is not None], dim=1), options])
    return out
