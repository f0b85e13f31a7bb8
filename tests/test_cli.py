"""The command line: quick to answer, one line for what is wrong, exit codes that scripts can use."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ipgo_opt
from ipgo_opt import cli
from ipgo_opt.config import RunConfig
from ipgo_opt.errors import RunFailed
from ipgo_opt.methods import METHODS
from ipgo_opt.models import EMBEDDED, MODELS
from ipgo_opt.rewards import JUDGES, REWARDS
from ipgo_opt.spaces import SPACES
from ipgo_opt.strategies import STRATEGIES

HEAVY = ("torch", "diffusers", "transformers", "numpy", "scipy", "PIL", "botorch", "nevergrad")
FOX = ["run", "a fox and a rocket"]


def python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A Python process of its own that sees the package under test."""
    root = str(Path(ipgo_opt.__file__).parent.parent)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=env, timeout=120)


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capfd, monkeypatch, tmp_path) -> Command:
    """Runs `ipgo-opt …` in this process, in an empty directory; exit code, stdout and stderr."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ipgo-opt", *arguments])
        capfd.readouterr()
        code: Any = 0
        try:
            cli.entry()
        except SystemExit as end:
            code = end.code or 0
        return code, *capfd.readouterr()

    return call


@pytest.mark.parametrize(
    ("arguments", "seconds"), [(["--help"], 0.5), (["run", "--help"], 0.5), (["list"], 1.0)], ids=str
)
def test_it_answers_at_once(arguments, seconds):
    """Best of three."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = python("-m", "ipgo_opt.cli", *arguments)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0
        assert done.stdout
        assert done.stderr == ""
    assert min(times) < seconds


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["list"], 0),
        (["run", "--help"], 0),
        (["run", ""], 2),
        ([*FOX, "--budget", "-3"], 2),
        ([*FOX, "--strategy", "gradeint"], 2),
        ([*FOX, "--learning-rate", "nan"], 2),
        ([*FOX, "--reward", "klip"], 2),
    ],
    ids=str,
)
def test_nothing_heavy_is_imported_for_it(arguments, code):
    """torch alone takes seconds."""
    script = f"""
import sys
sys.argv = ['ipgo-opt', *{arguments}]
from ipgo_opt.cli import entry
try:
    entry()
except SystemExit as end:
    assert (end.code or 0) == {code}, end.code
print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""
    done = python("-c", script)
    assert done.stderr.splitlines()[-1] == "[]", done.stderr


def test_the_package_itself_is_light():
    done = python("-c", f"import sys, ipgo_opt; print([name for name in {HEAVY} if name in sys.modules])")
    assert done.stdout == "[]\n"


def test_the_console_script_is_this_entry():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="ipgo-opt")
    assert script.value == "ipgo_opt.cli:entry"


def test_version(command):
    assert command("--version") == (0, f"ipgo-opt {ipgo_opt.__version__}\n", "")


def test_list_names_everything(command):
    """All of it, or one kind; a name in front, a summary behind."""
    expected: dict[str, Any] = {
        "models": MODELS, "rewards": REWARDS, "judges": JUDGES, "strategies": STRATEGIES, "spaces": SPACES,
        "methods": METHODS,
    }  # fmt: skip
    code, out, err = command("list")
    assert (code, err) == (0, "")
    for kind, names in expected.items():
        code, part, _ = command("list", kind)
        assert code == 0
        assert part in out
        title, *rest = part.splitlines()
        assert title == kind
        assert [line.split()[0] for line in rest] == list(names)
        assert all(len(line.split()) > 2 for line in rest)


def test_help_shows_every_setting_and_its_default(command):
    """What holds for the embedded model and what for others."""
    assert {field.name for field in dataclasses.fields(RunConfig)} <= set(inspect.signature(cli.run).parameters)
    code, out, _ = command("run", "--help")
    text = " ".join(out.split())
    assert code == 0
    for shown in (
        "[default: 0.02 for emoji, 0.001 for other models]",
        "[default: 10 for emoji, 50 for Stable Diffusion 1 and 2, the pipeline's own elsewhere]",
        "[default: clip+preference for emoji, clip for other models]",
        "[default: the model's own for emoji, LMSDiscreteScheduler for Stable Diffusion 1 and 2, ",
        "The unconditional prompt. [default: none]",
        "[default: gradient]",
        "[default: emoji]",
    ):
        assert shown in text
    for field in dataclasses.fields(RunConfig):
        if field.name != "prompt":
            assert re.search(rf"--{field.name.replace('_', '-')}\b", text)


BAD = [
    (["run", ""], "the prompt must not be empty"),
    (["run", "  \t"], "the prompt must not be empty"),
    ([*FOX, "--strategy", "gradeint"], "strategy must be one of .*'gradeint'. Did you mean 'gradient'"),
    ([*FOX, "--space", "token"], "space must be one of .*'token'"),
    ([*FOX, "--reward", "klip"], "reward must be one of .*'klip'"),
    ([*FOX, "--reward", "clip++"], "weighted sum"),
    ([*FOX, "--reward", "object:Redness"], "reward"),
    ([*FOX, "--judge", "nobody"], "judge must be one of .*'nobody'"),
    ([*FOX, "--model", "nowhere"], "model must be one of .*'nowhere'"),
    ([*FOX, "--model", "some/hub-model"], "hf download some/hub-model"),
    ([*FOX, "--model", "EMPTY"], r"no model_index\.json"),
    ([*FOX, "--model", "FILE"], "must be a safetensors file"),
    ([*FOX, "--budget", "-3"], "budget=-3"),
    ([*FOX, "--budget", "1"], "budget=1"),
    ([*FOX, "--held-out", "-1"], "held_out=-1"),
    ([*FOX, "--seed", "-1"], "seed=-1"),
    ([*FOX, "--steps", "0"], "num_inference_steps=0"),
    ([*FOX, "--steps", "4", "--grad-steps", "5"], "grad_steps=5"),
    ([*FOX, "--learning-rate", "nan"], "learning_rate=nan"),
    ([*FOX, "--lr", "0"], "learning_rate"),
    ([*FOX, "--guidance-scale", "inf"], "guidance_scale=inf"),
    ([*FOX, "--prefix", "0", "--suffix", "0"], "prefix=0, suffix=0"),
    ([*FOX, "--layout", "free"], "'free'"),
    ([*FOX, "--constraints", "value,size"], "'value,size'"),
    ([*FOX, "--strategy", "cma", "--constraints", "none"], "constraints='none'"),
    ([*FOX, "--scheduler", "NoScheduler"], "'NoScheduler'"),
    ([*FOX, "--device", "tpu"], "'tpu'"),
    ([*FOX, "--device", "cpu", "--dtype", "float16"], "float16 does not run on the CPU"),
    ([*FOX, "--dtype", "int8"], "'int8'"),
    ([*FOX, "--out", "FILE/below"], "must be writable"),
    ([*FOX, "--out", "RUN"], "must not hold another run"),
    (["resume", "EMPTY"], r"must hold run\.json"),
    (["resume", "nowhere"], r"must hold run\.json"),
    (["resume", "FILE"], r"must hold run\.json"),
    (["list", "modles"], "'modles'. Did you mean 'models'"),
]


@pytest.fixture
def there(tmp_path) -> dict[str, str]:
    """What stands in a command line for an empty folder, a file and a folder with a run."""
    empty, file, other = tmp_path / "empty", tmp_path / "file", tmp_path / "run"
    empty.mkdir()
    file.write_text("text")
    other.mkdir()
    (other / "run.json").write_text(json.dumps({"format": 1, "status": "finished"}))
    (other / "history.jsonl").write_text("{}\n")
    return {"EMPTY": str(empty), "FILE": str(file), "RUN": str(other)}


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("arguments", "shown"), BAD, ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else ""
)
def test_bad_input_is_one_line_and_leaves_no_trace(command, there, tmp_path, arguments, shown):
    """Exit code 2, one line on standard error that names rule and value, nothing on standard output or on disk."""
    for name, path in there.items():
        arguments = [argument.replace(name, path) for argument in arguments]
    before = snapshot(tmp_path)
    for extra in ([], ["--json"])[: 1 if arguments[0] == "list" else 2]:
        code, out, err = command(*arguments, *extra)
        assert (code, out) == (2, ""), err
        assert err.startswith("ipgo-opt: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        assert re.search(shown, err), err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("arguments", [["run", ""], [*FOX, "--device", "tpu"], ["resume", "."]], ids=str)
def test_a_shell_sees_the_same(tmp_path, arguments):
    """In a process of its own, where the libraries are imported for the first time and could have a say."""
    done = python("-m", "ipgo_opt.cli", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ipgo-opt: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [["run"], ["run", "a", "b"], [*FOX, "--bogdet", "3"], [*FOX, "--budget", "many"], ["fly"], ["resume"]],
    ids=str,
)
def test_a_wrong_command_line_is_exit_code_2(command, arguments):
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert err
    assert not list(Path.cwd().iterdir())


def test_a_run_of_another_model_says_which_weights_it_needs(command, tiny_folder, tmp_path, monkeypatch):
    """There `clip` means the published CLIP, which is looked for in the cache of the Hugging Face hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    code, out, err = command(*FOX, "--model", str(tiny_folder), "--scheduler", "", "--basis-size", "4", "--budget", "3")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "clip:ViT-L-14/openai" in err
    assert "get it with: hf download" in err


def test_a_failed_run_is_exit_code_1(command, monkeypatch):
    """With its reason in one line, and nothing on standard output."""

    def fail(*arguments: object, **settings: object) -> None:
        raise RunFailed("the disk\nis full")

    monkeypatch.setattr("ipgo_opt.run.resume", fail)
    assert command("resume", ".", "--json") == (1, "", "ipgo-opt: the disk is full\n")


def test_ctrl_c_is_exit_code_130():
    """And tells how to go on."""
    code = """
import os, signal, sys
import ipgo_opt.doctor
ipgo_opt.doctor.examine = lambda: os.kill(os.getpid(), signal.SIGINT)
sys.argv = ["ipgo-opt", "doctor"]
from ipgo_opt.cli import entry
entry()
"""
    done = python("-c", code)
    assert (done.returncode, done.stdout) == (130, "")
    assert "resume" in done.stderr
    assert "Traceback" not in done.stderr


def test_fresh_folders_do_not_collide(command):
    """runs/SLUG-N with the first N that is free."""
    assert cli._fresh_folder("A fox & a rocket!") == Path("runs/a-fox-a-rocket-0")
    Path("runs/a-fox-a-rocket-0").mkdir(parents=True)
    assert cli._fresh_folder("a fox, a rocket") == Path("runs/a-fox-a-rocket-1")
    assert cli._fresh_folder("狐") == Path("runs/run-0")
    assert len(cli._fresh_folder("fox " * 100).name) < 50


def test_doctor_says_what_it_found(command):
    """Exit code 1 exactly when there is a problem, each with its cure; JSON and text tell the same."""
    code, out, err = command("doctor", "--json")
    found = json.loads(out)
    assert err == ""
    assert code == (1 if found["problems"] else 0)
    assert found["ipgo_opt"] == ipgo_opt.__version__
    assert all("cure: " in problem for problem in found["problems"])
    missing = [entry for entry in found["weights"] if not entry["present"] and "hf download" not in entry["get"]]
    assert len([problem for problem in found["problems"] if "embedded" in problem]) == len(missing)
    assert {entry["name"] for entry in found["weights"]} >= set(EMBEDDED)
    same_code, text, err = command("doctor")
    assert (same_code, err) == (code, "")
    for shown in (*found["versions"], *found["devices"], *found["problems"]):
        assert shown in text


def test_a_method_sets_space_and_strategy_and_yields_to_options(command):
    _, out, _ = command("run", "a", "--method", "best-of-n", "--budget", "3", "--held-out", "0", "--json")
    assert json.loads(out)["space"] == "seeds"
    code, _, err = command("run", "a", "--method", "best-of-n", "--strategy", "cma")
    assert (code, "space of seeds" in err) == (2, True)
    code, out, err = command("run", "a", "--method", "ipgoo")
    assert (code, out, err) == (
        2,
        "",
        f"ipgo-opt: method must be one of {', '.join(METHODS)}, but got 'ipgoo'. Did you mean 'ipgo'?\n",
    )
