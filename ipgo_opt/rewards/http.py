"""A scoring service as a reward: images and prompts are posted, scores come back.

The request is JSON, {"format": 1, "prompts": ["a fox", …], "images": ["iVBORw0…", …]}, the images base64 of PNG files;
the answer is {"scores": [0.5, …]}, one number per image, null for one that can't be scored (it counts as NaN). Larger
scores are better. `user:password@` in the address is sent as basic authentication. What is shown of an address has
neither that nor the query in it.
"""

from __future__ import annotations

import base64
import email.utils
import http.client
import io
import json
import math
import random
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit

from ipgo_opt import __version__
from ipgo_opt.rewards.base import RewardFailed, parse

if TYPE_CHECKING:
    from email.message import Message

    from torch import Tensor

LONGEST_WAIT = 600.0
"""A service that asks for more seconds than this before the next attempt has failed."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would arrive without its body, and the password at someone else."""

    def redirect_request(self, *arguments: Any) -> None:
        """Leaves the redirect as the error that it is."""


class HttpReward:
    """A service at an address, asked once per batch.

    Connection errors, timeouts, the statuses 429 and 5xx are tried again after pauses that double and vary at random,
    or after what the service asks for (Retry-After). Everything else that is not an answer is RewardFailed at once.

    Args:
        address: http(s)://[user:password@]host[:port][/path][?query].
        timeout: seconds that the service may be silent.
        retries: further attempts after the first.
        pause: about how many seconds lie between the first two.

    """

    differentiable = False

    def __init__(self, address: str, *, timeout: float = 60.0, retries: int = 4, pause: float = 0.5) -> None:
        self.name = parse(address)[0].name
        self.timeout, self.retries, self.pause = timeout, retries, pause
        parts = urlsplit(address)
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
        self._headers = {"Content-Type": "application/json", "User-Agent": f"ipgo-opt/{__version__}"}
        if parts.username is not None:
            token = base64.b64encode(f"{user}:{password}".encode()).decode()
            self._headers["Authorization"] = f"Basic {token}"
        values = [value for _, value in parse_qsl(parts.query) if len(value) >= 6]
        secrets = {parts.query, parts.password or "", password, *values} - {""}
        self._secrets = sorted(secrets, key=len, reverse=True)  # one may be part of another
        self._url = parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="").geturl()
        local = parts.hostname in ("localhost", "127.0.0.1", "::1")
        proxies = [urllib.request.ProxyHandler({})] if local else []
        self._opener = urllib.request.build_opener(NoRedirect, *proxies)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), on the images' device, of images (B, 3, H, W) in [0, 1] and their raw prompts."""
        import torch

        body = {"format": 1, "prompts": list(prompts), "images": [_png(image) for image in images]}
        try:
            scores = self._scores(self._post(json.dumps(body).encode()), len(images))
        except RewardFailed as failed:
            failed.image = images[0].detach().float().cpu()
            raise
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _post(self, body: bytes) -> bytes:
        """The body of the first good answer."""
        attempt = 0
        while True:
            wait = self.pause * 2**attempt * random.uniform(0.5, 1.5)
            answer = b""
            try:
                request = urllib.request.Request(self._url, body, self._headers, method="POST")
                with self._opener.open(request, timeout=self.timeout) as response:
                    received: bytes = response.read()
                    return received
            except urllib.error.HTTPError as error:
                answer, problem = _read(error), f"answered with status {error.code}"
                if error.code != 429 and error.code < 500:
                    raise self._failed(problem, answer) from None
                asked = _retry_after(error.headers)
                if asked > LONGEST_WAIT:
                    raise self._failed(f"{problem} and asks to wait {asked:.0f} s", answer) from None
                wait = asked or wait
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", None) or error
                problem = f"did not answer ({type(reason).__name__}: {reason})"
            if attempt == self.retries:
                raise self._failed(f"{problem}, {attempt + 1} attempts", answer)
            time.sleep(wait)
            attempt += 1

    def _scores(self, answer: bytes, count: int) -> list[float]:
        try:
            found = json.loads(answer)["scores"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise self._failed('must answer {"scores": [...]}, but answered', answer) from None
        if not isinstance(found, list) or any(
            not (score is None or isinstance(score, int | float)) or isinstance(score, bool) for score in found
        ):
            raise self._failed("must answer scores that are a list of numbers or nulls, but answered", answer)
        if len(found) != count:
            raise self._failed(f"must answer one score per image, {count}, but answered {len(found)}", answer)
        return [math.nan if score is None else float(score) for score in found]

    def _failed(self, problem: str, answer: bytes = b"") -> RewardFailed:
        text = answer.decode("utf-8", "replace")
        for secret in self._secrets:
            problem, text = problem.replace(secret, "…"), text.replace(secret, "…")
        line = " ".join(text.split())
        start = f": {line[:200]}{'…' if len(line) > 200 else ''}" if line else ""
        return RewardFailed(f"the reward at {self.name} {problem}{start}", text[:2000])


def _png(image: Tensor) -> str:
    from ipgo_opt.store import to_pil

    file = io.BytesIO()
    to_pil(image).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _read(error: urllib.error.HTTPError) -> bytes:
    """The start of what an error status came with, if that arrives."""
    try:
        with error:
            return error.read(10_000)
    except (OSError, http.client.HTTPException):
        return b""


def _retry_after(headers: Message) -> float:
    """Seconds until the service wants to be asked again, given as a number or a date; 0 if it does not say."""
    value = headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0
