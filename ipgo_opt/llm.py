"""A language model behind an OpenAI-compatible endpoint, as OPENAI_BASE_URL and OPENAI_API_KEY name it.

The key is read from the environment when a request is made ready and is in no message, log or file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from ipgo_opt.errors import BadInput, RunFailed
from ipgo_opt.service import Service

PUBLIC = "https://api.openai.com/v1"
"""Where a key without an address belongs."""


class CallsSpent(RunFailed):
    """The cap on calls is reached."""


def endpoint() -> str | None:
    """The address that the environment names, or None if it names neither an address nor a key; BadInput if it is none.

    An endpoint that wants no key (a local server) needs OPENAI_BASE_URL alone.
    """
    address = os.environ.get("OPENAI_BASE_URL", "").rstrip("/")
    if not address:
        return PUBLIC if os.environ.get("OPENAI_API_KEY") else None
    try:
        parts = urlsplit(address)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        good = False
    if not good:
        public = re.sub(r"\?.*", "?…", re.sub(r"//\S*@", "//", address))
        raise BadInput(f"OPENAI_BASE_URL must be http(s)://HOST[:PORT][/PATH], but it is {public!r}.")
    return address


def require_endpoint() -> str:
    """The address that the environment names; BadInput if there is none."""
    address = endpoint()
    if address is None:
        raise BadInput(
            "a language model needs an OpenAI-compatible endpoint, but OPENAI_BASE_URL and OPENAI_API_KEY are not set."
        )  # fmt: skip
    return address


class Chat:
    """A language model that is asked one thing at a time.

    Args:
        model: its name at the endpoint.
        timeout: seconds that it may be silent.
        most_calls: requests that may be made in all, attempts after a failure not counted.
        retries, pause: as in `Service`.

    Attributes:
        calls: requests made so far.

    """

    def __init__(
        self, model: str, *, timeout: float = 60.0, most_calls: int = 100, retries: int = 4, pause: float = 0.5
    ) -> None:
        address = require_endpoint()
        host = urlsplit(address).netloc.rpartition("@")[2]
        self.model, self.most_calls, self.calls = model, most_calls, 0
        self.service = Service(
            f"{address}/chat/completions", f"the language model {model!r} at {host}", lambda text, _: RunFailed(text),
            token=os.environ.get("OPENAI_API_KEY", ""), timeout=timeout, retries=retries, pause=pause,
        )  # fmt: skip

    def ask(self, messages: Sequence[dict[str, str]]) -> str:
        """The text of its answer to messages with `role` and `content`.

        Raises:
            CallsSpent: it was asked `most_calls` times already.
            RunFailed: it refused, stayed silent, or answered something that is no chat completion.

        """
        if self.calls >= self.most_calls:
            raise CallsSpent(f"the language model was asked {self.calls} times, as often as llm_calls allows.")
        self.calls += 1
        answer = self.service.post({"model": self.model, "messages": list(messages)})
        try:
            text = json.loads(answer)["choices"][0]["message"]["content"]
        except (ValueError, TypeError, KeyError, IndexError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise self.service.failed("must answer with a chat completion, but answered", answer)
        return text

    def failed(self, problem: str, answer: str) -> RunFailed:
        """The error of a problem with an answer's text."""
        return self.service.failed(problem, answer.encode())
