"""Prompt files: every kind, and one clear line for whatever is wrong with one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ipgo_opt import BadInput
from ipgo_opt.prompt_files import ROWS, SHIPPED, read_prompts


def test_every_kind_gives_the_same(tmp_path):
    """Empty lines and cells are skipped, quotes and line breaks of CSV kept, a byte order mark is not a character."""
    prompts = ["a fox, vivid", 'a "red" house', "zwei Füchse"]
    (tmp_path / "p.txt").write_bytes('\ufeff a fox, vivid \r\n\n   \na "red" house\nzwei Füchse'.encode())
    (tmp_path / "p.csv").write_text(
        'id,prompt,other\n1,"a fox, vivid",x\n2,,y\n3,"a ""red"" house",z\n4,zwei Füchse,\n'
    )
    (tmp_path / "p.json").write_text(json.dumps(prompts))
    (tmp_path / "q.json").write_text(json.dumps([{"text": one} for one in prompts]))
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": one}) for one in prompts) + "\n\n")
    for spec in ("p.txt", "p.csv", "p.csv:prompt", "p.json", "q.json:text", "p.jsonl", "p.jsonl:prompt"):
        assert read_prompts(tmp_path / spec) == prompts, spec
    assert read_prompts(f"{tmp_path / 'p.csv'}:other") == ["x", "y", "z"]


def test_shipped_sets_by_name():
    assert set(SHIPPED) == {"animals", "buildings", "complex", "nature", "people", "rooms", "vehicles"}
    assert read_prompts("animals")[0] == "a cat on a yellow background, vivid"
    assert all(len(read_prompts(name)) == 60 for name in SHIPPED)


@pytest.mark.parametrize(
    ("name", "content", "spec", "shown"),
    [
        ("e.txt", b"", "e.txt", "at least one prompt"),
        ("b.txt", b"\n  \n", "b.txt", "at least one prompt"),
        ("l.txt", b"a fox\n" + b"x" * 10_001, "l.txt", "number 2 .* has 10001"),
        ("u.txt", "a föx".encode("utf-16"), "u.txt", r"must be UTF-8.*byte 0"),
        ("u.csv", "prompt\na föx".encode("latin-1"), "u.csv", "must be UTF-8"),
        ("c.csv", b"text\na fox\n", "c.csv", "column 'prompt', but it has text"),
        ("c.csv", b"text\na fox\n", "c.csv:txet", "column 'txet'"),
        ("t.txt", b"a fox\n", "t.txt:prompt", "files have columns"),
        ("j.json", b"{", "j.json", "is not JSON"),
        ("d.json", b'{"prompt": "a fox"}', "d.json", "holds a dict"),
        ("n.json", b"[1]", "n.json", "number 1 .* is 1"),
        ("l.jsonl", b'{"prompt": "a"}\n{"prom', "l.jsonl", "is not JSONL"),
        ("x.txt", b"a", "animal", "Did you mean 'animals'"),
    ],
    ids=str,
)
def test_bad_files(tmp_path, monkeypatch, name, content, spec, shown):
    """Before anything loads, in one line."""
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    with pytest.raises(BadInput, match=shown) as caught:
        read_prompts(spec)
    assert "\n" not in str(caught.value)


def test_exactly_the_longest_is_read(tmp_path):
    (tmp_path / "p.txt").write_text("x" * 10_000)
    assert len(read_prompts(tmp_path / "p.txt")[0]) == 10_000


def test_data_sets(tmp_path):
    """The first rows of a column, by the real library, from a folder as the hub has it."""
    (tmp_path / "data").mkdir()
    rows = [{"prompt": f"a fox, {n}", "other": f"o{n}"} for n in range(400)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "data" / "test.jsonl").write_text(json.dumps({"prompt": "a cat", "other": "x"}))
    name = f"hub:{tmp_path}"
    assert read_prompts(name) == [row["prompt"] for row in rows[:ROWS]]
    assert read_prompts(f"{name}[:2]") == ["a fox, 0", "a fox, 1"]
    assert read_prompts(f"{name}@test") == ["a cat"]
    assert read_prompts(f"{name}@train[:3]:other") == ["o0", "o1", "o2"]
    with pytest.raises(BadInput, match=r"must have the column 'text', but it has prompt, other"):
        read_prompts(f"{name}@test:text")
    for wrong in (f"{name}[:0]", f"{name}[2:3]", "hub:", f"{name}@a-b"):
        with pytest.raises(BadInput, match="must be named hub:OWNER/NAME"):
            read_prompts(wrong)


def test_a_data_set_that_is_not_to_be_had(tmp_path):
    """No such split, no such set and no network: one line each, exit code 2."""
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "a fox"}))
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    for spec in (f"hub:{tmp_path}@nowhere", "hub:somebody/nothing"):
        line = [sys.executable, "-m", "ipgo_opt.cli", "run", "--prompts", spec]
        done = subprocess.run(line, capture_output=True, text=True, check=False, env=os.environ | offline)
        assert done.returncode == 2, done.stderr
        assert done.stderr.splitlines()[-1].startswith(f"ipgo-opt: the data set {spec!r} can't be read: ")
