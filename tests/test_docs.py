"""The commands and the code in the documents run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[str, str]]:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [
        (page.name, match[2]) for page in pages for match in FENCE.finditer(page.read_text()) if match[1] == language
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where everything runs, with what the documents take for granted: a file of prompts and a model's folder."""
    home = tmp_path_factory.mktemp("docs")
    (home / "prompts.csv").write_text("text\na fox\na pizza at sunset\n")
    (home / "emoji").symlink_to(ROOT / "ipgo_opt" / "models" / "emoji")
    return home


def test_there_is_something_to_run() -> None:
    assert len(blocks("sh")) >= 5
    assert len(blocks("python")) >= 3


@pytest.mark.parametrize(("page", "text"), blocks("sh"))
def test_commands(page: str, text: str, folder: Path) -> None:
    for line in text.strip().splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] == ["pip", "install"]:  # run by .ci/run
            words = words[words.index("&&") + 1 :]
        if words[:1] != ["ipgo-opt"]:
            assert words[:1] == ["pytest"], f"{page}: {line!r} is not covered by any test"
            continue
        command = [sys.executable, "-m", "ipgo_opt.cli", *words[1:]]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"})
        allowed = (0, 1) if words[1] == "doctor" else (0,)  # doctor's verdict is on the machine
        assert done.returncode in allowed, f"{page}: {line}\n{done.stderr}"


@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_python(page: str, text: str, folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", text], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{page}\n{done.stderr}"
