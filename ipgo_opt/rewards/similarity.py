"""How similar two sentences are: the cosine of their embeddings by a CLIP's text encoder or a user's function."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ipgo_opt.errors import BadInput, RunFailed
from ipgo_opt.rewards import is_member
from ipgo_opt.rewards.base import FUNCTION, prepare
from ipgo_opt.rewards.custom import located

Embed = Callable[[list[str]], Any]
"""Embeddings (n, D) of n texts: a tensor, an array or lists of numbers."""


def prepare_similarity(spec: str, embedded: bool) -> Callable[[str], Embed]:
    """What makes, on a device, the embedding that `spec` names; loads no weights.

    Args:
        spec: "clip" (the embedded model's, or ViT-L-14/openai), `clip:NAME`, or a function as file.py:function or
            package.module:function.
        embedded: whether the model is the embedded one.

    Raises:
        BadInput: it is something else, weights are missing, or there is no such function.

    """
    if spec == "clip" or (spec.startswith("clip:") and is_member(spec)):
        prepared = prepare(spec, embedded)
        return lambda device: _text_tower(prepared.load(device).rewards[0])
    if not FUNCTION.fullmatch(spec):
        raise BadInput(f"similarity must be clip, clip:NAME, file.py:function or module:function, but got {spec!r}.")
    value, _ = located(spec, "similarity")
    if not callable(value):
        raise BadInput(f"a similarity must be a function of a list of texts, but {spec} is a {type(value).__name__}.")
    return lambda device: partial(_checked, value, spec)


def _text_tower(reward: Any) -> Embed:
    embed: Embed = reward.encoder.texts
    return embed


def _checked(function: Callable[[list[str]], Any], name: str, texts: list[str]) -> Tensor:
    """What the user's function returns, as embeddings."""
    try:
        found = torch.as_tensor(function(list(texts)), dtype=torch.float32)
    except Exception as error:
        raise RunFailed(f"similarity {name} raised {type(error).__name__}: {error}") from error
    if found.ndim != 2 or len(found) != len(texts) or not bool(found.isfinite().all()):
        raise RunFailed(
            f"similarity {name} must return finite embeddings ({len(texts)}, D), but they are of shape "
            f"{tuple(found.shape)} or not finite."
        )
    return found


def similarity(embed: Embed, texts: list[str], prompt: str) -> Tensor:
    """Cosines (n,) in [−1, 1] between texts and a prompt."""
    embeddings = torch.nn.functional.normalize(embed([*texts, prompt]).float(), dim=-1)
    return embeddings[:-1] @ embeddings[-1]
