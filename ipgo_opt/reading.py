"""Reading learned tokens: which words of the model's own vocabulary are near them, and how they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ipgo_opt.errors import BadInput
from ipgo_opt.reopened import reopened
from ipgo_opt.spaces.tokens import TokenSpace
from ipgo_opt.store import read_history, read_tensors
from ipgo_opt.strategies import STRATEGIES


@torch.no_grad()
def read_tokens(folder: str | Path, *, words: int = 512, nearest: int = 5) -> dict[str, Any]:
    """What the tokens of a finished run are near to.

    Similarity is the cosine between a token and a word's state, both in the text encoder's output space.

    Args:
        folder: the run directory.
        words: words of the model's vocabulary that are compared with.
        nearest: how many of them are named for each token.

    Returns:
        `tokens`: for each its side, place, norm and nearest words with similarity; `word_norm`: mean norm of the words'
        states; `angles`: θ1 and θ2 by side, in radians; `conformity`: p_conf, equation (11), of the best image's
        prompt; `rewards`: the history's finite rewards, in order.

    """
    for name, value in (("words", words), ("nearest", nearest)):
        if value < 1:
            raise BadInput(f"`{name} >= 1` must hold, but got {name}={value}.")
    home = Path(folder)
    config, file, sampler = reopened(home)
    tokens = file.tokens
    if config.space != "tokens":
        raise BadInput(f"only runs of the space tokens can be read, but {str(folder)!r} is of {config.space!r}.")
    vocabulary, states = sampler.vocabulary(words), sampler.word_states(words)
    space = TokenSpace.made(config, sampler)
    space.load_state_dict(read_tensors(home / "space.safetensors")[0])
    full, x = STRATEGIES.load(config.strategy).uses_gradient, file.tensors["x"][None]
    _, p_conf = space.apply(x, sampler.encode(file.metadata["prompt"]), full=full)
    found = []
    for side, V in tokens.items():
        similarity = torch.cosine_similarity(V[0].float()[:, None], states[None], dim=-1)
        best = similarity.topk(min(nearest, len(vocabulary)))
        for place in range(V.shape[1]):
            found.append({
                "side": side, "place": place, "norm": float(V[0, place].norm()),
                "nearest": [
                    {"word": vocabulary[int(n)], "similarity": float(value)}
                    for value, n in zip(best.values[place], best.indices[place], strict=True)
                ],
            })  # fmt: skip
    return {
        "prompt": file.metadata["prompt"],
        "attend": file.attend,
        "anchor": file.anchor,
        "tokens": found,
        "word_norm": float(states.norm(dim=1).mean()),
        "angles": {
            side: {"theta1": angles[0, 0].tolist(), "theta2": angles[0, 1].tolist()}
            for side, angles in space.angles(x, full=full).items()
        },
        "conformity": float(p_conf[0]),
        "rewards": [record["reward"] for record in read_history(home) if record["reward"] is not None],
    }
