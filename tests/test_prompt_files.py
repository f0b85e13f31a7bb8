"""Prompt files: every kind, and one clear line for whatever is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ipgo_opt import BadInput
from ipgo_opt.prompt_files import SHIPPED, read_prompts


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
