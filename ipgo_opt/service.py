"""A web service that is posted JSON: attempts, pauses, and errors in one line without secrets."""

from __future__ import annotations

import base64
import email.utils
import http.client
import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit

from ipgo_opt import __version__
from ipgo_opt.errors import RunFailed

if TYPE_CHECKING:
    from email.message import Message

LONGEST_WAIT = 600.0
"""A service that asks for more seconds than this before the next attempt has failed."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would arrive without its body, and the password at someone else."""

    def redirect_request(self, *arguments: Any) -> None:
        """Leaves the redirect as the error that it is."""


class Service:
    """A service at an address.

    Connection errors, timeouts, the statuses 429 and 5xx are tried again after pauses that double and vary at random,
    or after what the service asks for (Retry-After). Everything else that is not an answer fails at once.

    Args:
        address: http(s)://[user:password@]host[:port][/path][?query].
        name: how messages begin, without secrets.
        error: makes the error of a message in one line and the start of what was answered.
        token: sent as `Authorization: Bearer`, "" for none.
        secrets: what no message may show, beside token, password and query.
        timeout: seconds that the service may be silent.
        retries: further attempts after the first.
        pause: about how many seconds lie between the first two.

    """

    def __init__(
        self,
        address: str,
        name: str,
        error: Callable[[str, str], RunFailed],
        *,
        token: str = "",
        secrets: Sequence[str] = (),
        timeout: float = 60.0,
        retries: int = 4,
        pause: float = 0.5,
    ) -> None:
        self.name, self.error = name, error
        self.timeout, self.retries, self.pause = timeout, retries, pause
        parts = urlsplit(address)
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
        self._headers = {"Content-Type": "application/json", "User-Agent": f"ipgo-opt/{__version__}"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        elif parts.username is not None:
            basic = base64.b64encode(f"{user}:{password}".encode()).decode()
            self._headers["Authorization"] = f"Basic {basic}"
        values = [value for _, value in parse_qsl(parts.query) if len(value) >= 6]
        hidden = {parts.query, parts.password or "", password, token, *values, *secrets} - {""}
        self._secrets = sorted(hidden, key=len, reverse=True)  # one may be part of another
        self._url = parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="").geturl()
        local = parts.hostname in ("localhost", "127.0.0.1", "::1")
        proxies = [urllib.request.ProxyHandler({})] if local else []
        self._opener = urllib.request.build_opener(NoRedirect, *proxies)

    def post(self, body: dict[str, Any]) -> bytes:
        """The body of the first good answer to a JSON object."""
        data = json.dumps(body).encode()
        attempt = 0
        while True:
            wait = self.pause * 2**attempt * random.uniform(0.5, 1.5)
            answer = b""
            try:
                request = urllib.request.Request(self._url, data, self._headers, method="POST")
                with self._opener.open(request, timeout=self.timeout) as response:
                    received: bytes = response.read()
                    return received
            except urllib.error.HTTPError as error:
                answer, problem = _read(error), f"answered with status {error.code}"
                if error.code != 429 and error.code < 500:
                    raise self.failed(problem, answer) from None
                asked = _retry_after(error.headers)
                if asked > LONGEST_WAIT:
                    raise self.failed(f"{problem} and asks to wait {asked:.0f} s", answer) from None
                wait = asked or wait
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", None) or error
                problem = f"did not answer ({type(reason).__name__}: {reason})"
            if attempt == self.retries:
                raise self.failed(f"{problem}, {attempt + 1} attempts", answer)
            time.sleep(wait)
            attempt += 1

    def failed(self, problem: str, answer: bytes = b"") -> RunFailed:
        """The error of a problem with an answer, of which it shows the beginning, without secrets."""
        text = answer.decode("utf-8", "replace")
        for secret in self._secrets:
            problem, text = problem.replace(secret, "…"), text.replace(secret, "…")
        line = " ".join(text.split())
        start = f": {line[:200]}{'…' if len(line) > 200 else ''}" if line else ""
        return self.error(f"{self.name} {problem}{start}", text[:2000])


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
