"""Strategies that write texts, against a language model at a local HTTP server and a tiny one on disk."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ipgo_opt import BadInput, Result, RunFailed, cli, optimize, resume
from ipgo_opt.llm import Chat
from ipgo_opt.models import EMBEDDED
from ipgo_opt.rewards.goals import goal
from ipgo_opt.store import Store
from ipgo_opt.strategies.base import Exhausted, Problem
from ipgo_opt.strategies.llm import Llm, LlmOptions, prompts_in
from ipgo_opt.strategies.promptist import BEAMS, Promptist, PromptistOptions, find_model

KEY = "sk-sesame-0123456789"
PLACES = ["at night", "in the snow", "on a beach", "in a meadow", "at sunset", "underwater", "in the desert"]


@dataclass
class Model:
    """An OpenAI-compatible server that plays `answers` (a status and a body, or words) and then writes its own."""

    url: str
    answers: list[Any] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)

    def own(self) -> str:
        """One new prompt per request."""
        n = len(self.asked)
        return f"a fox {PLACES[n % len(PLACES)]}, {n}"


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            model.asked.append({"path": self.path, "key": self.headers["Authorization"], "at": time.monotonic()} | sent)
            answer = model.answers.pop(0) if model.answers else model.own()
            if answer == "silence":
                time.sleep(0.6)
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            status, body = answer if isinstance(answer, tuple) else (200, completion(answer))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        model = Model(f"http://127.0.0.1:{server.server_port}/v1")
        monkeypatch.setenv("OPENAI_BASE_URL", model.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        yield model
        server.shutdown()


def completion(text: Any) -> bytes:
    return json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}).encode()


def chat(**changed: Any) -> Chat:
    return Chat("tiny-model", **({"timeout": 5.0, "pause": 0.01} | changed))


def search(mode: str = "history", batch: int = 1, **changed: Any) -> Llm:
    problem = Problem(torch.zeros(1), torch.zeros(1), torch.full((1,), 30.0), 30, batch)
    return Llm(problem, ["a fox"], chat(**changed), LlmOptions(mode, "more preferred by people", "a fox"))


# The client


def test_what_is_sent_and_what_comes_back(model):
    model.answers = ["  a red fox \n"]
    assert chat().ask([{"role": "user", "content": "hello"}]) == "  a red fox \n"
    (asked,) = model.asked
    assert (asked["path"], asked["key"]) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert (asked["model"], asked["messages"]) == ("tiny-model", [{"role": "user", "content": "hello"}])


def test_a_model_that_recovers(model):
    """After 429, 503 and silence, at growing pauses; it counts as one call."""
    model.answers = [(429, b"slowly"), (503, b""), "silence", "a fox"]
    asked = chat(timeout=0.3, pause=0.04)
    assert asked.ask([]) == "a fox"
    times = [one["at"] for one in model.asked]
    assert len(times) == 4
    assert [times[k + 1] - times[k] > 0.02 * 2**k for k in range(2)] == [True, True]
    assert asked.calls == 1


@pytest.mark.parametrize(
    ("answer", "shown", "times"),
    [
        ((401, b"wrong key " + KEY.encode()), "answered with status 401: wrong key …", 1),
        ((404, b"no model"), "answered with status 404: no model", 1),
        ((200, b"<html>"), "must answer with a chat completion, but answered: <html>", 1),
        ((200, b'{"choices": []}'), "must answer with a chat completion", 1),
        ((200, completion(None)), "must answer with a chat completion", 1),
        ((500, b"oh"), "answered with status 500, 2 attempts: oh", 2),
        ("silence", "did not answer .*, 2 attempts", 2),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_model_that_does_not_answer_fails_in_one_line(model, answer, shown, times):
    """Named with its host, and never with the key."""
    model.answers = [answer] * times
    start = time.monotonic()
    with pytest.raises(RunFailed, match=shown) as caught:
        chat(retries=1, timeout=0.2).ask([])
    assert str(caught.value).startswith("the language model 'tiny-model' at 127.0.0.1:")
    assert "\n" not in str(caught.value)
    assert KEY not in str(caught.value)
    assert len(model.asked) == times
    assert time.monotonic() - start < 3


def test_an_endpoint_that_refuses_connections(model, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://me:sesame@127.0.0.1:{free.getsockname()[1]}/v1")
    with pytest.raises(RunFailed, match="ConnectionRefusedError") as caught:
        chat(retries=1).ask([])
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    "address", ["localhost:8000", "ftp://host/v1", "http://", "http://me:sesame@host:port/v1?key=sesame"]
)
def test_addresses_that_are_none(monkeypatch, address):
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    with pytest.raises(BadInput, match="OPENAI_BASE_URL must be") as caught:
        chat()
    assert "sesame" not in str(caught.value)


# What it is told and what it writes


@pytest.mark.parametrize(
    ("answer", "prompts"),
    [
        ("a red fox", ["a red fox"]),
        ('"A red fox."\n\n', ["A red fox."]),
        (
            "1. a red fox\n2) 'two foxes'\n- a fox at night\n* “a vixen”",
            ["a red fox", "two foxes", "a fox at night", "a vixen"],
        ),
        ("3 foxes in the snow", ["3 foxes in the snow"]),
        ("", []),
        ("---\n...", []),
        ("x" * 1001, []),
    ],
)
def test_prompts_in_an_answer(answer, prompts):
    assert prompts_in(answer) == prompts


def test_the_goal_is_the_rewards():
    assert goal("clip+0.2*aesthetic") == "better aligned with the sentence and more aesthetically pleasing"
    assert goal("clip+clip-spherical") == "better aligned with the sentence"
    assert goal("hps:v2.1") == "more preferred by people"
    assert goal("object:Redness") == "better by the measure Redness"


def told(solver: Any, rounds: int, value: Callable[[str], float]) -> list[str]:
    """Rounds of ask and tell; the texts asked."""
    asked = []
    for _ in range(rounds):
        x = solver.ask()
        texts = [solver.texts[int(number)] for number in x[:, 0]]
        solver.tell(x, torch.tensor([value(text) for text in texts]))
        asked += texts
    return asked


def test_it_sees_its_rewrites_with_their_scores(model):
    """The worst first, as OPT2I has them; new ones are asked when the last are used up."""
    model.answers = ["two foxes\na vixen", "a red fox"]
    solver = search()
    assert told(solver, 4, len) == ["a fox", "two foxes", "a vixen", "a red fox"]
    first, second = (one["messages"][0]["content"] for one in model.asked)
    assert "5.0000: a fox" in first
    assert "two foxes" not in first
    lines = re.findall(r"^\d\.\d+: .*$", second, re.MULTILINE)
    assert lines == ["5.0000: a fox", "7.0000: a vixen", "9.0000: two foxes"]
    assert "more preferred by people" in second


def test_the_single_instruction_is_always_the_same(model):
    model.answers = ["one fox\nand more", "two foxes"]
    assert told(search("single"), 3, len) == ["a fox", "one fox", "two foxes"]
    first, second = (one["messages"] for one in model.asked)
    assert first == second
    assert "Sentence: a fox" in first[0]["content"]


def test_batches_and_repeats(model):
    """A batch asks as often as it must; what was written before is not asked again."""
    model.answers = ["a vixen\na vixen\na fox", "a vixen", "two foxes\nthree foxes"]
    solver = search(batch=3)
    assert told(solver, 1, len) == ["a fox", "a vixen", "two foxes"]
    assert solver.ask()[0].item() == 3


def test_nothing_new_ends_the_search(model):
    model.answers = ["a vixen"] * 20
    solver = search(batch=4)
    assert told(solver, 1, len) == ["a fox", "a vixen"]
    with pytest.raises(Exhausted, match="no new prompt"):
        solver.ask()


def test_answers_without_a_prompt(model):
    """Are asked again, and fail the run at the third."""
    model.answers = ["...", "", "a vixen", "", "...", "---"]
    solver = search()
    assert told(solver, 2, len) == ["a fox", "a vixen"]
    with pytest.raises(RunFailed, match="gave no prompt in 3 answers; the last was: ---"):
        solver.ask()


def test_a_saved_search_goes_on_the_same(model, tmp_path):
    """Through a checkpoint on disk; the space's list is restored in place, and no text is asked for again."""
    solver = search(most_calls=3)
    before, store = told(solver, 3, len), Store(tmp_path)
    store.save_checkpoint(solver.state_dict())
    again = search(most_calls=3)
    shared = again.texts
    again.load_state_dict(store.load_checkpoint())
    store.close()
    assert shared == solver.texts == before
    count = len(model.asked)
    told(again, 1, len)
    assert len(model.asked) == count + 1
    assert again.chat.calls == 3
    with pytest.raises(Exhausted, match="as often as llm_calls allows"):
        again.ask()


# Promptist


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 of two layers with its tokenizer, as save_pretrained leaves it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("gpt2")
    words = ["<end>", "<unk>", "a", "fox", "cat", "red", "snow", "night", "Rephrase", ":", "two", "three", "in", "the"]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", unk_token="<unk>").save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}
        lm = GPT2LMHeadModel(GPT2Config(vocab_size=len(words), bos_token_id=0, eos_token_id=0, **shape))
    lm.save_pretrained(folder)
    return folder


def rephrase(folder: Path, seed: int = 0, batch: int = 1) -> Promptist:
    problem = Problem(torch.zeros(1), torch.zeros(1), torch.full((1,), 30.0), 30, batch, seed)
    return Promptist(problem, ["a fox"], PromptistOptions(str(folder)))


def test_the_first_rewrites_are_the_beams(gpt2):
    """Those of transformers' own beam search with the paper's settings, without what the model was given."""
    tokenizer, lm = AutoTokenizer.from_pretrained(gpt2), AutoModelForCausalLM.from_pretrained(gpt2)
    ids = tokenizer("a fox Rephrase:", return_tensors="pt").input_ids
    made = lm.generate(
        ids, attention_mask=torch.ones_like(ids), num_beams=8, num_return_sequences=8, max_new_tokens=75,
        length_penalty=-1.0, do_sample=False, pad_token_id=0, eos_token_id=0,
    )  # fmt: skip
    expected = tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
    assert len(expected) == BEAMS
    written = rephrase(gpt2).write()
    assert len(written) > 1
    assert written == [" ".join(text.split()) for text in expected if text.strip()]


def test_more_rewrites_are_drawn(gpt2):
    """Others for another seed; the global generator has no say and is left alone; a saved search goes on the same."""
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    solver = rephrase(gpt2)
    first = told(solver, 14, len)
    assert torch.equal(torch.rand(1), expected)
    assert first[0] == "a fox"
    assert len(set(first)) == 14
    beams = len(set(rephrase(gpt2).write()))
    other = told(rephrase(gpt2, seed=1), 14, len)
    assert other[: 1 + beams] == first[: 1 + beams]
    assert other != first
    again = rephrase(gpt2)
    told(again, 10, len)
    state, third = again.state_dict(), rephrase(gpt2, seed=0)
    third.load_state_dict(state)
    assert told(third, 4, len) == first[10:]


def test_weights_that_are_missing(tmp_path, gpt2, monkeypatch):
    """One line with the size and the command; before anything is loaded or written."""
    with pytest.raises(
        BadInput, match=r"'microsoft/Promptist' \(0.5 GB\).*get it with: hf download microsoft/Promptist"
    ):
        optimize("a fox", strategy="promptist", promptist="microsoft/Promptist", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    for name, template, shown in (
        (str(tmp_path), "{prompt}", "must have safetensors weights"),
        (str(gpt2), "Rephrase:", "promptist_template must hold {prompt}"),
        ("a b/c d/e", "{prompt}", "folder or a hub id"),
    ):
        with pytest.raises(BadInput, match=shown):
            find_model(name, template)


@pytest.mark.parametrize(
    ("prompt", "kept"),
    [
        ("a fox in the snow", {"fox", "snow"}),
        ("a cat left of a rocket", {"cat", "left", "rocket"}),
        ("three apples on a blue background", {"three", "apples", "blue"}),
    ],
)
def test_the_embedded_rewriter_keeps_what_a_prompt_says(prompt, kept):
    """In most of its beams; and all of its rewrites are in the world's words."""
    solver = Promptist(
        Problem(torch.zeros(1), torch.zeros(1), torch.full((1,), 30.0), 30, 1), [prompt], PromptistOptions("emoji")
    )
    written = solver.write() + solver.write()
    assert sum(kept <= set(re.findall(r"\w+", text)) for text in written) > len(written) / 2
    assert any(set(re.findall(r"\w+", text)) > set(re.findall(r"\w+", prompt)) for text in written)
    pipeline = AutoTokenizer.from_pretrained(EMBEDDED["emoji"] / "tokenizer")
    for text in written:  # a word of the captions is one token of the image model; they leave out "large"
        words = re.findall(r"\w+|,", text.replace("large", ""))
        assert len(pipeline(" ".join(words), add_special_tokens=False).input_ids) == len(words), text


def test_the_embedded_rewriter_is_for_the_embedded_model(tiny_folder):
    with pytest.raises(BadInput, match=f"'emoji' knows the embedded model's world only, .* model='{tiny_folder}'"):
        run(tiny_folder, strategy="promptist", promptist="emoji")


def test_a_fuller_caption_tells_all_that_the_bare_one_tells(monkeypatch):
    """What the embedded rewriter is trained on."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent)
    import numpy as np

    from training.promptist import pair

    rng, fuller = np.random.default_rng(0), 0
    for _ in range(500):
        bare, full = (set(re.findall(r"\w+", text)) - FRAME for text in pair(rng))
        assert bare <= full
        fuller += bare < full
    assert fuller > 250


FRAME = {"a", "an", "picture", "image", "photo", "of"}


# Runs


def run(folder: Path, **changed: Any) -> Result:
    settings = {**tiny.RUN, "reward": tiny.Redness(), "budget": 8, "held_out": 0, "search_seeds": 1} | changed
    return optimize("a fox", model=str(folder), **settings)


def lines(result: Result) -> list[dict[str, Any]]:
    return [{key: value for key, value in one.items() if key not in ("seconds", "parts")} for one in result.history]


def test_a_run_of_promptist(tiny_folder, gpt2):
    result = run(tiny_folder, strategy="promptist", promptist=str(gpt2))
    prompts = [record["prompt"] for record in result.history]
    assert prompts[:2] == ["a fox", "a fox"]  # the raw prompt, and the start of every search
    assert len(set(prompts)) == 7
    assert result.summary["optimized"]["prompt"] in prompts
    assert result.reward == max(record["reward"] for record in result.history)


def test_a_run_with_a_language_model(model, tiny_folder, tmp_path, monkeypatch):
    """The key is in no file; what was found is the prompt of the best image."""
    result = run(tiny_folder, strategy="llm", out=tmp_path / "run")
    best = max(result.history, key=lambda record: record["reward"])
    assert result.summary["optimized"] == {"prompt": best["prompt"], "negative_prompt": ""}
    assert len(model.asked) == 6
    assert all(KEY.encode() not in path.read_bytes() for path in (tmp_path / "run").iterdir())


def test_a_model_that_fails_loses_nothing(model, tiny_folder, tmp_path):
    """Resumed when it answers again, the run ends as one that was not interrupted."""
    model.answers = [f"fox {n}" for n in range(6)]
    whole = run(tiny_folder, strategy="llm", llm_mode="single")
    model.answers = [*(f"fox {n}" for n in range(3)), (400, b"out of credit")]
    with pytest.raises(RunFailed, match="status 400: out of credit"):
        run(tiny_folder, strategy="llm", llm_mode="single", out=tmp_path)
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 5
    model.answers = [f"fox {n}" for n in range(3, 6)]
    again = resume(tmp_path, reward=tiny.Redness())
    assert lines(again) == lines(whole)
    assert again.summary["optimized"] == whole.summary["optimized"]


def test_the_cap_on_calls_ends_the_search(model, tiny_folder):
    """With a verdict on what was found until then."""
    result = run(tiny_folder, strategy="llm", llm_calls=2, held_out=2)
    assert len(result.history) == 4
    assert len(model.asked) == 2
    assert result.held_out["n"] == 2


LISTS = '{"synonyms": {"fox": ["vixen", "red fox"]}, "negative": ["dog"]}'


def test_word_lists_by_a_language_model(model, tiny_folder, tmp_path):
    """Asked for once, nonsense asked again, and kept: a resumed run asks nothing."""
    model.answers = ["I am sorry.", "[]", f"Here they are:\n```json\n{LISTS}\n```"]
    stopping = Stopping()
    with pytest.raises(KeyboardInterrupt):
        run(tiny_folder, reward=stopping, space="words", words="llm", strategy="evolution", out=tmp_path)
    assert len(model.asked) == 3
    assert "Prompt: a fox" in model.asked[0]["messages"][0]["content"]
    result = resume(tmp_path, reward=tiny.Redness())
    assert len(model.asked) == 3
    assert any("vixen" in record["prompt"] for record in result.history)
    model.answers = ["no"] * 3
    with pytest.raises(RunFailed, match="gave no word lists in 3 answers"):
        run(tiny_folder, space="words", words="llm", strategy="evolution")


class Stopping(tiny.Redness):
    """Redness, until Ctrl-C is pressed in its fourth call."""

    calls = 0

    def __call__(self, images: Tensor, prompts: Any) -> Tensor:
        self.calls += 1
        if self.calls == 4:
            raise KeyboardInterrupt
        return super().__call__(images, prompts)


# Through the command line


@pytest.mark.parametrize(
    ("arguments", "answers", "code", "shown"),
    [
        (["--strategy", "llm"], [(401, b"no")], 1, "at 127.0.0.1:.* answered with status 401"),
        (["--strategy", "llm"], ["", "", ""], 1, "gave no prompt in 3 answers"),
        (["--strategy", "llm", "--llm-timeout", "0"], [], 2, "llm_timeout > 0"),
        (["--strategy", "llm", "--llm-mode", "chat"], [], 2, "`llm_mode` one of single, history"),
        (["--strategy", "llm", "--space", "tokens"], [], 2, "searches the space of texts"),
        (["--space", "words", "--words", "nowhere.json", "--strategy", "evolution"], [], 2, "can't be read"),
        (["--method", "promptist"], [], 2, "hf download microsoft/Promptist"),
    ],
    ids=str,
)
def test_errors_are_one_line_and_a_code(
    model, tiny_folder, tmp_path, monkeypatch, capfd, arguments, answers, code, shown
):
    monkeypatch.chdir(tmp_path)
    model.answers = answers
    short = ["--model", str(tiny_folder), "--reward", "jpeg-incompressibility", "--steps", "2", "--budget", "4"]
    monkeypatch.setattr(sys, "argv", ["ipgo-opt", "run", "a fox", *short, "--held-out", "0", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.entry()
    out, err = capfd.readouterr()
    assert (end.value.code, out) == (code, "")
    assert re.search(shown, err.splitlines()[-1])
    assert (tmp_path / "runs").exists() == (code == 1)


def test_no_endpoint_is_bad_input(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(BadInput, match="OPENAI_BASE_URL and OPENAI_API_KEY are not set"):
        run(tiny_folder, strategy="llm", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
