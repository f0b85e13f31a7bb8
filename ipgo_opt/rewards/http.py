"""A scoring service as a reward: images and prompts are posted, scores come back.

The request is JSON, {"format": 1, "prompts": ["a fox", …], "images": ["iVBORw0…", …]}, the images base64 of PNG files;
the answer is {"scores": [0.5, …]}, one number per image, null for one that can't be scored (it counts as NaN). Larger
scores are better. `user:password@` in the address is sent as basic authentication. What is shown of an address has
neither that nor the query in it.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ipgo_opt.rewards.base import RewardFailed, parse
from ipgo_opt.service import Service

if TYPE_CHECKING:
    from torch import Tensor


class HttpReward:
    """A service at an address, asked once per batch; what is no answer is RewardFailed (see `Service`).

    Args:
        address: http(s)://[user:password@]host[:port][/path][?query].
        timeout: seconds that the service may be silent.
        retries: further attempts after the first.
        pause: about how many seconds lie between the first two.

    """

    differentiable = False

    def __init__(self, address: str, *, timeout: float = 60.0, retries: int = 4, pause: float = 0.5) -> None:
        self.name = parse(address)[0].name
        self.service = Service(
            address, f"the reward at {self.name}", RewardFailed, timeout=timeout, retries=retries, pause=pause
        )

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), on the images' device, of images (B, 3, H, W) in [0, 1] and their raw prompts."""
        import torch

        body = {"format": 1, "prompts": list(prompts), "images": [_png(image) for image in images]}
        try:
            scores = self._scores(self.service.post(body), len(images))
        except RewardFailed as failed:
            failed.image = images[0].detach().float().cpu()
            raise
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _scores(self, answer: bytes, count: int) -> list[float]:
        try:
            found = json.loads(answer)["scores"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise self.service.failed('must answer {"scores": [...]}, but answered', answer) from None
        if not isinstance(found, list) or any(
            not (score is None or isinstance(score, int | float)) or isinstance(score, bool) for score in found
        ):
            raise self.service.failed("must answer scores that are a list of numbers or nulls, but answered", answer)
        if len(found) != count:
            raise self.service.failed(f"must answer one score per image, {count}, but answered {len(found)}", answer)
        return [math.nan if score is None else float(score) for score in found]


def _png(image: Tensor) -> str:
    from ipgo_opt.store import to_pil

    file = io.BytesIO()
    to_pil(image).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
