"""Rewards that a user brings: functions in files and modules, and services."""

from __future__ import annotations

import base64
import dataclasses
import email.utils
import io
import json
import math
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from ipgo_opt import cli
from ipgo_opt.errors import BadInput, RunFailed
from ipgo_opt.rewards import REWARDS
from ipgo_opt.rewards.base import RewardFailed, prepare
from ipgo_opt.rewards.custom import find, from_object, reward
from ipgo_opt.rewards.http import HttpReward
from ipgo_opt.store import to_pil

ROOT = Path(__file__).parent.parent
PROMPTS = ["a fox", "two rockets", "狐"]


@pytest.fixture
def images() -> torch.Tensor:
    """Three images of very different brightness."""
    noise = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return noise * torch.tensor([0.2, 0.6, 1.0]).view(3, 1, 1, 1)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty current directory that Python's path does not name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# Finding it


def test_a_function_in_a_file(here, images):
    """With a neighbour that it imports, at once and when it is called; nothing is left on the path or on disk."""
    write(here / "my judges" / "weights.py", "RED = 2.0\n")
    write(here / "my judges" / "late.py", "ONE = 1\n")
    write(
        here / "my judges" / "judge.py",
        "import weights\n\ndef score(image, prompt):\n    import late\n"
        "    return weights.RED * image.getpixel((0, 0))[0] + len(prompt) * late.ONE\n",
    )
    path, files, bytecode = list(sys.path), sorted(here.rglob("*")), sys.dont_write_bytecode
    scores = find("my judges/judge.py:score")(images, PROMPTS)
    expected = [
        2 * to_pil(image).getpixel((0, 0))[0] + len(prompt) for image, prompt in zip(images, PROMPTS, strict=True)
    ]
    assert scores.tolist() == expected
    assert (sys.path, sys.dont_write_bytecode) == (path, bytecode)
    assert sorted(here.rglob("*")) == files


def test_two_files_of_one_name_are_two(here, images):
    for folder, value in (("a", 1), ("b", 2)):
        write(here / folder / "judge.py", f"def score(image, prompt):\n    return {value}\n")
    loaded = prepare("a/judge.py:score+10*b/judge.py:score").load("cpu")
    assert loaded(images, PROMPTS).tolist() == [21, 21, 21]
    assert list(loaded.parts(images, PROMPTS)) == ["a/judge.py:score", "b/judge.py:score"]


def test_a_file_is_executed_once_until_it_changes(here, images):
    """It may load a model of its own; and an edit of the same size within the same second counts."""
    text = "open('log', 'a').write('x')\n\ndef score(image, prompt):\n    return 1\n"
    judge = write(here / "judge.py", text)
    for _ in range(3):
        assert find("judge.py:score")(images, PROMPTS).tolist() == [1, 1, 1]
    assert find(f"{judge}:score")(images, PROMPTS).tolist() == [1, 1, 1]
    assert (here / "log").read_text() == "x"
    stamp = judge.stat().st_mtime_ns
    judge.write_text(text.replace("return 1", "return 2"))
    os.utime(judge, ns=(stamp + 1000, stamp + 1000))
    assert find("judge.py:score")(images, PROMPTS).tolist() == [2, 2, 2]
    assert (here / "log").read_text() == "xx"


def test_a_function_in_a_module(here, images):
    """Of the current directory, or of Python's path."""
    write(here / "ipgo_judges" / "__init__.py", "")
    write(here / "ipgo_judges" / "own.py", "def score(image, prompt):\n    return len(prompt)\n")
    assert find("ipgo_judges.own:score")(images, PROMPTS).tolist() == [5, 11, 1]
    assert find("operator:is_")(images, PROMPTS).tolist() == [0, 0, 0]


def test_a_dataclass_in_a_file(here, images):
    """It looks its module up by name."""
    write(
        here / "judge.py",
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass Judge:\n"
        "    value: float\n\n    def __call__(self, image, prompt):\n        return self.value\n\njudge = Judge(4.0)\n",
    )
    assert find("judge.py:judge")(images, PROMPTS).tolist() == [4, 4, 4]


FILES = {
    "good.py": "import os\n\ndef score(image, prompt):\n    return 1\n\ndef _hidden(): pass\n\n"
    "class Judge:\n    pass\n\nnumber = 3\n\n"
    "def three(a, b, c): pass\n\ndef one(image): pass\n\nasync def later(image, prompt): pass\n\n"
    "def keyword(*, image, prompt): pass\n\ndef odd(image, prompt): pass\nodd.kind = 'pictures'\n\n"
    "def torn(images, prompts): pass\ntorn.kind, torn.differentiable = 'images', True\n",
    "empty.py": "x = 1\n",
    "syntax.py": "x = 1\ndef score(image, prompt:\n    return 1\n",
    "raises.py": "def helper():\n    return 1 / 0\n\nhelper()\n",
    "late.py": "import json\n\njson.loads('nonsense')\n",
    "missing.py": "import no_such_library_at_all\n",
    "leaves.py": "import sys\n\nsys.exit('usage: …')\n",
    "kind.py": "from ipgo_opt.rewards.custom import reward\n\n"
    "@reward('image', differentiable=True)\ndef f(a, b): pass\n",
    "bare.py": "from ipgo_opt.rewards.custom import reward\n\n@reward\ndef f(a, b): pass\n",
    "pack/__init__.py": "import no_such_library_at_all\n",
}


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        ("nowhere.py:score", "file .* must exist.*'nowhere.py'"),
        ("good.py:scoer", "one of score, .*but got 'scoer'. Did you mean 'score'"),
        ("good.py:Judge", "Judge is a class"),
        ("good.py:number", "callable.*good.py:number is a int"),
        ("good.py:three", r"\(image, prompt\).*good.py:three takes \(a, b, c\)"),
        ("good.py:one", r"takes \(image\)"),
        ("good.py:keyword", r"takes \(\*, image, prompt\)"),
        ("good.py:later", "async"),
        ("good.py:odd", "one of image, images, tensors.*'pictures'"),
        ("good.py:torn", "differentiable.*'tensors'.*'images'"),
        ("empty.py:score", "'empty.py' must define.*'score'"),
        ("syntax.py:score", r"SyntaxError: .*syntax\.py, line 2\)"),
        ("raises.py:score", r"ZeroDivisionError: division by zero \(.*raises\.py, line 2\)"),
        ("late.py:score", r"JSONDecodeError: .*late\.py, line 3\)"),
        ("missing.py:score", r"No module named 'no_such_library_at_all' \(.*missing\.py, line 1\)"),
        ("leaves.py:score", r"SystemExit: usage: … \(.*leaves\.py, line 3\)"),
        ("kind.py:f", r"differentiable.*'tensors'.*kind\.py, line 3\)"),
        ("bare.py:f", r"one of image, images, tensors.*bare\.py, line 3\)"),
        ("no_such_module_at_all:score", "none named 'no_such_module_at_all'"),
        ("empty.nothing:score", "none named 'empty.nothing'|'empty'.* not a package"),
        ("pack.inner:score", r"'pack\.inner' raised ModuleNotFoundError: .*pack/__init__\.py, line 1\)"),
        ("json:lods", "Did you mean .*'loads'"),
    ],
)
def test_what_is_no_reward_is_refused_in_one_line(here, target, shown):
    """Before any image is made, and without a trace."""
    for name, text in FILES.items():
        write(here / name, text)
    modules, files = set(sys.modules), sorted(here.rglob("*"))
    with pytest.raises(BadInput, match=shown) as caught:
        prepare(f"clip+{target}")
    assert "\n" not in str(caught.value)
    assert sorted(here.rglob("*")) == files
    for name in set(sys.modules) - modules:
        sys.modules.pop(name)


def test_no_torch_is_needed_to_refuse(here):
    """The answer comes at once."""
    write(here / "judge.py", "def score(image): return 1\n")
    code = (
        "import sys\nfrom ipgo_opt.rewards.base import prepare\n"
        "prepare('http://h/score')\n"
        "try:\n    prepare('judge.py:score')\nexcept ValueError:\n"
        "    print('torch' in sys.modules, 'PIL' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.stdout == "False False\n", done.stderr


# Its kind


def kinds(function: Callable[..., Any]) -> tuple[str, bool]:
    settled = from_object(function)
    return settled.kind, settled.differentiable


def test_the_kind_is_settled_by_what_it_says_or_by_its_parameters():
    def by_name(images, prompts): ...
    def other_names(picture, text): ...
    def with_more(image, prompt, scale=2.0): ...
    def open_ended(*arguments): ...
    def by_hand(x, y): ...
    def by_contract(images, prompts): ...

    by_hand.kind = "images"  # type: ignore[attr-defined]
    by_contract.differentiable = True  # type: ignore[attr-defined]
    assert kinds(by_name) == ("images", False)
    for function in (other_names, with_more, open_ended, lambda image, prompt: 0):
        assert kinds(function) == ("image", False)
    assert kinds(by_hand) == ("images", False)
    assert kinds(by_contract) == ("tensors", True)
    assert kinds(tiny.Redness()) == ("tensors", True)
    for kind in ("image", "images", "tensors"):
        assert kinds(reward(kind)(lambda images, prompts: 0)) == (kind, False)
    assert kinds(reward("tensors", differentiable=True)(lambda images, prompts: 0)) == ("tensors", True)


def test_a_decorated_function_is_still_the_function():
    """And a decorated `image` function is called with PIL images though its parameter is called images."""

    @reward("image")
    def score(images: Image.Image, prompts: str) -> float:
        return images.width * len(prompts)

    assert score(Image.new("RGB", (4, 2)), "ab") == 8
    assert from_object(score)(torch.zeros(1, 3, 2, 5), ["abc"]).tolist() == [15]


def test_what_each_kind_is_given(images):
    """PIL images of the pixels, float32 tensors; raw prompts."""
    seen: list[Any] = []

    def one(image, prompt):
        seen.append((image, prompt))
        return 0.0

    def many(images, prompts):
        seen.append((images, prompts))
        return [0.0] * len(images)

    def tensors(images, prompts):
        seen.append((images, prompts))
        return torch.zeros(len(images))

    from_object(one)(images, PROMPTS)
    assert [prompt for _, prompt in seen] == PROMPTS
    for (image, _), pixels in zip(seen, images, strict=True):
        assert isinstance(image, Image.Image)
        np.testing.assert_allclose(np.asarray(image), pixels.permute(1, 2, 0) * 255, atol=0.5001)
    seen.clear()
    from_object(many)(images, PROMPTS)
    ((pictures, prompts),) = seen
    assert (type(pictures), [type(picture) for picture in pictures]) == (list, [Image.Image] * 3)
    assert prompts == PROMPTS
    seen.clear()
    from_object(reward("tensors")(tensors))(images.half().requires_grad_(), PROMPTS)
    ((given, prompts),) = seen
    assert (given.dtype, given.requires_grad, prompts) == (torch.float32, False, PROMPTS)
    torch.testing.assert_close(given, images.half().float())


@pytest.mark.parametrize(
    "value",
    [3, 3.0, True, np.float32(3), np.int64(3), np.array(3.0), torch.tensor(3), math.nan, math.inf, -math.inf],
    ids=repr,
)
def test_numbers_of_all_kinds_are_scores(images, value):
    """NaN and infinity included: what to do with them is for the loop to decide."""
    for function in (lambda image, prompt: value, lambda images, prompts: (value,) * len(images)):
        scores = from_object(function)(images, PROMPTS)
        assert scores.dtype == torch.float32
        np.testing.assert_equal(scores.numpy(), np.full(3, float(value), dtype=np.float32))


@pytest.mark.parametrize(
    "scores", [np.arange(3), torch.arange(3.0), (0, 1, 2), range(3)], ids=lambda v: type(v).__name__
)
def test_sequences_of_all_kinds_are_scores(images, scores):
    assert from_object(lambda images, prompts: scores)(images, PROMPTS).tolist() == [0, 1, 2]


# What goes wrong in it


@pytest.mark.parametrize(
    ("kind", "result", "shown"),
    [
        ("image", None, "a number but it returned None"),
        ("image", "3", "a number but it returned a str"),
        ("image", [1.0], "a number but it returned a list of length 1"),
        ("image", np.zeros(3), r"a ndarray of shape \(3,\)"),
        ("image", 1j, "a complex"),
        ("images", 1.0, "3 numbers, one per image, but it returned a float"),
        ("images", [1.0, 2.0], "a list of length 2.*batch of 3"),
        ("images", [1.0, 2.0, None], "a list of length 3 with None in it"),
        ("images", np.zeros((3, 1)), r"a ndarray of shape \(3, 1\)"),
        ("images", "abc", "a str"),
        ("images", dict.fromkeys(range(3), 1.0), "a dict"),
        ("tensors", [1.0, 2.0, 3.0], r"a tensor of shape \(3,\).*a list of length 3"),
        ("tensors", torch.zeros(3, 1), r"a Tensor of shape \(3, 1\)"),
        ("tensors", torch.tensor(1.0), r"a Tensor of shape \(\)"),
        ("tensors", torch.zeros(3, dtype=torch.complex64), "complex64"),
    ],
)
def test_what_is_no_score_fails_the_run(images, kind, result, shown):
    with pytest.raises(RewardFailed, match=shown) as caught:
        from_object(reward(kind)(lambda images, prompts: result))(images, PROMPTS)
    assert isinstance(caught.value, RunFailed)
    assert "\n" not in str(caught.value)
    assert torch.equal(caught.value.image, images[0])


def test_a_gradient_that_was_promised_and_is_not_there(images):
    @reward("tensors", differentiable=True)
    def broken(images, prompts):
        return images.detach().mean((1, 2, 3))

    with pytest.raises(RewardFailed, match="no gradient"):
        from_object(broken)(images.clone().requires_grad_(), PROMPTS)
    assert from_object(broken)(images, PROMPTS).shape == (3,)


JUDGE = """
import json

def score(image, prompt):
    return look(prompt)

def look(prompt):
    if prompt == "two rockets":
        return json.loads("[1,\\n2,")
    return 1.0

def scores(images, prompts):
    raise ValueError("first line\\nsecond line")

def leaves(image, prompt):
    raise SystemExit(3)

def stops(image, prompt):
    raise KeyboardInterrupt
"""


def test_what_it_raises_is_shown_with_its_own_traceback_and_image(here, images):
    judge = write(here / "judge.py", JUDGE)
    with pytest.raises(RewardFailed) as caught:
        find("judge.py:score")(images, PROMPTS)
    failed = caught.value
    assert re.fullmatch(
        rf"reward judge.py:score raised JSONDecodeError: .* \({re.escape(str(judge))}, line 9\)\.", str(failed)
    )
    lines = failed.details.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1] == f'  File "{judge}", line 5, in score'
    assert lines[-1].startswith("json.decoder.JSONDecodeError")
    assert torch.equal(failed.image, images[1])
    with pytest.raises(RewardFailed, match=r"ValueError: first line second line .*a batch of 3\.$") as caught:
        find("judge.py:scores")(images, PROMPTS)
    assert torch.equal(caught.value.image, images[0])
    with pytest.raises(RewardFailed, match="SystemExit: 3"):
        find("judge.py:leaves")(images, PROMPTS)
    with pytest.raises(KeyboardInterrupt):
        find("judge.py:stops")(images, PROMPTS)


def test_what_it_prints_goes_to_standard_error(here, images, capsys):
    """Standard output is for the result."""
    write(here / "judge.py", "print('imported')\n\ndef score(image, prompt):\n    print('called')\n    return 1\n")
    find("judge.py:score")(images[:1], PROMPTS[:1])
    assert capsys.readouterr() == ("", "imported\ncalled\n")


# A service


@dataclasses.dataclass
class Service:
    """An HTTP server that plays `answers` (status, headers, body; or a function of the request) and then scores."""

    url: str
    answers: list[Any] = dataclasses.field(default_factory=list)
    asked: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def darkness(image: Image.Image, prompt: str) -> float:
    return -float(np.asarray(image).mean()) - len(prompt)


@pytest.fixture
def service() -> Iterator[Service]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = self.rfile.read(int(self.headers["Content-Length"]))
            service.asked.append({"path": self.path, "headers": self.headers, "body": sent, "at": time.monotonic()})
            status, headers, body = service.answers.pop(0) if service.answers else (200, {}, scored(json.loads(sent)))
            if status in ("hang up", "be silent"):
                time.sleep(0.5 if status == "be silent" else 0)
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        service = Service(f"http://127.0.0.1:{server.server_port}/score")
        yield service
        server.shutdown()


def scored(asked: dict[str, Any]) -> bytes:
    pictures = [Image.open(io.BytesIO(base64.b64decode(image))) for image in asked["images"]]
    assert all(picture.format == "PNG" for picture in pictures)
    scores = [darkness(picture, prompt) for picture, prompt in zip(pictures, asked["prompts"], strict=True)]
    return json.dumps({"scores": scores}).encode()


def quick(service: Service, **changed: Any) -> HttpReward:
    return HttpReward(service.url, **({"timeout": 5.0, "pause": 0.01} | changed))


def test_a_service_judges_as_a_function_does(service, images):
    """One request per batch, that the service can read with standard tools; the images are not changed."""
    before = images.clone()
    scores = quick(service)(images.requires_grad_(), PROMPTS)
    expected = from_object(darkness)(images, PROMPTS)
    assert torch.equal(scores, expected)
    assert not scores.requires_grad
    assert not HttpReward.differentiable
    assert torch.equal(images, before)
    (request,) = service.asked
    assert request["headers"]["Content-Type"] == "application/json"
    body = json.loads(request["body"])
    assert set(body) == {"format", "prompts", "images"}
    assert (body["format"], body["prompts"]) == (1, PROMPTS)


def test_a_service_in_a_sum(service, images):
    address = service.url.replace("http://", "http://me:sesame@") + "?key=sesame"
    loaded = prepare(f"0.5*{address}+jpeg-incompressibility").load("cpu")
    parts = loaded.parts(images, PROMPTS)
    assert list(parts) == [service.url, "jpeg-incompressibility"]
    torch.testing.assert_close(
        loaded(images, PROMPTS), 0.5 * from_object(darkness)(images, PROMPTS) + parts["jpeg-incompressibility"]
    )
    (*_, request) = service.asked
    assert request["path"] == "/score?key=sesame"
    assert base64.b64decode(request["headers"]["Authorization"].removeprefix("Basic ")) == b"me:sesame"


def test_null_is_nan(service, images):
    service.answers = [(200, {}, b'{"scores": [1, null, 2.5], "more": "is ignored"}')]
    np.testing.assert_equal(quick(service)(images, PROMPTS).numpy(), np.float32([1, np.nan, 2.5]))


def test_a_service_that_recovers(service, images):
    """After hanging up, silence, 5xx and 429, at pauses that double: 0.04 s and its jitter of a half."""
    service.answers = [("hang up", {}, b""), (500, {}, b"oh"), (429, {}, b"slowly"), ("be silent", {}, b"{}")]
    scores = quick(service, pause=0.04, timeout=0.3)(images, PROMPTS)
    assert torch.equal(scores, from_object(darkness)(images, PROMPTS))
    times = [request["at"] for request in service.asked]
    assert len(times) == 5
    assert [times[k + 1] - times[k] > 0.02 * 2**k for k in range(3)] == [True] * 3
    assert len({request["body"] for request in service.asked}) == 1


@pytest.mark.parametrize(("status", "as_date"), [(429, False), (503, True)])
def test_a_service_says_when_to_come_back(service, images, status, as_date):
    """In seconds or as a date (of whole seconds), instead of the pause of a minute that would come next."""
    value = email.utils.formatdate(math.ceil(time.time()) + 1, usegmt=True) if as_date else "1"
    service.answers = [(status, {"Retry-After": value}, b"")]
    quick(service, pause=60)(images, PROMPTS)
    first, second = (request["at"] for request in service.asked)
    assert 0.9 < second - first < 4


def fails(service: Service, images: torch.Tensor, **changed: Any) -> str:
    with pytest.raises(RewardFailed) as caught:
        quick(service, **changed)(images, PROMPTS)
    assert "\n" not in str(caught.value)
    assert torch.equal(caught.value.image, images[0])
    return str(caught.value)


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ((400, {}, b"no such\n model: fox"), "answered with status 400: no such model: fox"),
        ((404, {}, b"x" * 1000), "status 404: x{200}…$"),
        ((401, {}, b""), "status 401$"),
        ((302, {"Location": "/elsewhere"}, b""), "status 302"),
        ((307, {"Location": "/elsewhere"}, b""), "status 307"),
        ((429, {"Retry-After": "3600"}, b""), "status 429 and asks to wait 3600 s"),
        ((200, {}, b""), "must answer .*scores.*"),
        ((200, {}, b"<html>\xff</html>"), "must answer .*but answered: <html>�</html>"),
        ((200, {}, b"[1, 2, 3]"), r"but answered: \[1, 2, 3\]"),
        ((200, {}, b'{"score": [1, 2, 3]}'), "must answer"),
        ((200, {}, b'{"scores": 1}'), "list of numbers or nulls"),
        ((200, {}, b'{"scores": [1, 2, "3"]}'), "list of numbers or nulls"),
        ((200, {}, b'{"scores": [1, 2, true]}'), "list of numbers or nulls"),
        ((200, {}, b'{"scores": [1, 2]}'), "one score per image, 3, but answered 2"),
        ((200, {}, b'{"scores": [1, 2, 3, 4]}'), "one score per image, 3, but answered 4"),
    ],
    ids=lambda value: "" if isinstance(value, str) else f"{value[0]} {value[2][:20]}",
)
def test_an_answer_that_is_none_fails_at_once(service, images, answer, shown):
    """Named: the address, what was wrong, and how the answer began."""
    service.answers = [answer]
    message = fails(service, images)
    assert message.startswith(f"the reward at {service.url} ")
    assert re.search(shown, message), message
    assert len(service.asked) == 1


def test_a_service_that_stays_away(service, images):
    """As many attempts as promised, then the last reason."""
    service.answers = [(503, {}, b"overloaded")] * 9
    assert "status 503, 3 attempts: overloaded" in fails(service, images, retries=2)
    assert len(service.asked) == 3
    service.answers = [("be silent", {}, b"{}")] * 2
    start = time.monotonic()
    assert "did not answer (TimeoutError" in fails(service, images, retries=1, timeout=0.1)
    assert time.monotonic() - start < 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        service.url = f"http://127.0.0.1:{free.getsockname()[1]}/"
    assert "ConnectionRefusedError" in fails(service, images, retries=1)


def test_a_service_is_named_without_secrets(service, images):
    """Even if it repeats them."""
    service.url = service.url.replace("http://", "http://me:sesame@") + "?key=opensesame&n=1"
    service.answers = [(403, {}, b"wrong key opensesame (user me, password sesame) in /score?key=opensesame&n=1")]
    with pytest.raises(RewardFailed, match="wrong key …") as caught:
        quick(service)(images, PROMPTS)
    assert "sesame" not in str(caught.value) + caught.value.details
    service.answers = [(500, {}, b"")] * 2
    assert "sesame" not in fails(service, images, retries=1)


# Through the command line


SHORT = ("--steps", "2", "--budget", "3", "--held-out", "0")


@pytest.fixture
def ipgo(capfd, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    """Runs `ipgo-opt …` in this process; exit code, stdout and stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ipgo-opt", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.entry()
        return end.value.code or 0, *capfd.readouterr()

    return call


def test_the_example(tmp_path):
    """Through the shell; the recorded scores are the function's own on the images that are kept."""
    spec = "examples/custom_reward.py:colourfulness"
    out = tmp_path / "run"
    command = [sys.executable, "-m", "ipgo_opt.cli", "run", "a red fox", "--strategy", "random", "--reward", spec]
    done = subprocess.run([*command, *SHORT, "--out", str(out), "--json"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["search_reward"] >= result["raw_reward"] > 0
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert all(record["parts"] == {spec: record["reward"]} for record in history)
    function = find(f"{ROOT}/{spec}").function
    for name, score in (("raw", result["raw_reward"]), ("best", result["search_reward"])):
        with Image.open(out / f"{name}.png") as image:
            assert function(image, "a red fox") == pytest.approx(score, rel=1e-6)


def test_the_example_is_the_papers_formula():
    """Grey is 0; a colour is 0.3 of its distance from grey; two colours have a spread."""
    colourfulness = find(f"{ROOT}/examples/custom_reward.py:colourfulness").function
    assert colourfulness(Image.new("L", (4, 4), 99), "") == 0
    assert colourfulness(Image.new("RGB", (4, 4), (255, 0, 0)), "") == pytest.approx(0.3 * math.hypot(255, 127.5))
    half = Image.new("RGB", (4, 4), (255, 0, 0))
    half.paste((0, 255, 0), (0, 0, 2, 4))
    assert colourfulness(half, "") == pytest.approx(255 + 0.3 * 127.5)


def test_a_reward_that_raises_ends_the_run_with_its_traceback_and_image(here, ipgo):
    """Exit code 1, the image as failed.png, nothing on standard output; mended, the run goes on."""
    judge = write(here / "judge.py", "def score(image, prompt):\n    image.save('seen.png')\n    return image.wdith\n")
    run = ("run", "a red fox", "--strategy", "random", *SHORT, "--json", "--out")
    code, out, err = ipgo(*run, "run", "--reward", "judge.py:score")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("ipgo-opt: reward judge.py:score raised AttributeError: ")
    shown = err[err.index("Traceback") : err.rindex("ipgo-opt:")]
    assert shown.splitlines()[1] == f'  File "{judge}", line 3, in score'
    assert str(Path(cli.__file__).parent) not in shown
    with Image.open("run/failed.png") as kept, Image.open("seen.png") as seen:
        assert kept.tobytes() == seen.tobytes()
    judge.write_text("def score(image, prompt):\n    return image.width\n")
    code, out, _ = ipgo("resume", "run", "--json")
    assert (code, json.loads(out)["raw_reward"]) == (0, 64)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--reward", "judge.py:socre", "--strategy", "random"], "Did you mean 'score'"),
        (["--reward", "judge.py:score", "--strategy", "gradient"], "differentiable"),
        (["--reward", "clip+jpeg-compressibility", "--strategy", "gradient"], "differentiable"),
    ],
    ids=str,
)
def test_a_reward_that_can_not_start_leaves_no_trace(here, ipgo, arguments, shown):
    write(here / "judge.py", "def score(image, prompt):\n    return 1\n")
    code, out, err = ipgo("run", "a red fox", *SHORT, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert shown in err
    assert [path.name for path in here.iterdir()] == ["judge.py"]


def test_the_page_on_rewards(here, ipgo):
    """Its files and commands, with fewer and shorter steps; its table names every registered reward."""
    page = (ROOT / "docs" / "rewards.md").read_text()
    for text in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        if named := re.match(r"# (\w+\.py)\n", text):
            write(here / named[1], text)
    commands = re.findall(r"^\$ ipgo-opt (.*)$", page, re.MULTILINE)
    assert commands
    for command in commands:
        code, _, err = ipgo(*shlex.split(command), *SHORT)
        assert code == 0, err
    for name in REWARDS:
        assert f"\n| `{name}` |" in page
