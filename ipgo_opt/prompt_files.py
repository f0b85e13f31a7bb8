"""Many prompts: from a text, CSV, JSON or JSONL file, a hub data set, or one of the sets that the package ships."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from pathlib import Path
from typing import Any

from ipgo_opt.errors import BadInput
from ipgo_opt.registry import unknown

SHIPPED = {path.stem: path for path in sorted((Path(__file__).parent / "prompts").glob("*.txt"))}
"""Prompt sets in the package, by name."""

TABLES = (".csv", ".json", ".jsonl")
"""Kinds of files that have columns; every other one is plain text, a prompt in each line."""

COLUMN = "prompt"
"""The column that is read if none is named."""

HUB = re.compile(r"hub:(?P<name>[^@:\[]+)(@(?P<split>\w+))?(\[:(?P<rows>\d+)\])?(:(?P<column>[^:]+))?")
"""A data set of the Hugging Face hub: hub:OWNER/NAME, and its split, how many rows, and their column."""

ROWS = 300
"""Rows that are read of a data set if it is not said how many: the paper's number for DiffusionDB and Pick-a-Pic."""

MOST_CHARACTERS = 10_000
"""Characters that a prompt may have: a longer one is a mistake in the file."""


def read_prompts(spec: str | Path) -> list[str]:
    """The prompts of `spec`, in order; empty ones are skipped.

    Args:
        spec: the name of a shipped set, FILE, or FILE:COLUMN of a .csv (with a header), .json (a list of strings or
            objects) or .jsonl file, or hub:OWNER/NAME@SPLIT[:ROWS]:COLUMN, the first rows of a data set of the Hugging
            Face hub. Without a COLUMN it is "prompt"; without a SPLIT, "train"; without [:ROWS], ROWS.

    Raises:
        BadInput: there is no such set, file, data set or column, the file is not UTF-8 or not what its name says, a
            prompt is longer than MOST_CHARACTERS, or there is no prompt in it.

    """
    name = str(spec)
    if name.startswith("hub:"):
        return _prompts(_hub(name), name)
    if name in SHIPPED and not Path(name).exists():
        path, column = SHIPPED[name], ""
    else:
        path, column = _found(name)
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"a prompt file must be UTF-8, but {name!r} is not (byte {error.start}).") from None
    except OSError as error:
        raise BadInput(f"the prompt file {name!r} can't be read: {error.strerror}.") from None
    if path.suffix.lower() in TABLES:
        found = _column(_rows(path, text), column or COLUMN, name)
    else:
        found = list(enumerate(text.splitlines(), 1))
    return _prompts(found, name)


def _prompts(found: list[tuple[int, Any]], name: str) -> list[str]:
    """The prompts among numbered values, without empty ones; BadInput for what is none."""
    prompts = []
    for number, value in found:
        if not isinstance(value, str):
            raise BadInput(f"a prompt must be text, but number {number} of {name!r} is {value!r}.")
        if len(value) > MOST_CHARACTERS:
            raise BadInput(
                f"a prompt may have {MOST_CHARACTERS} characters, but number {number} of {name!r} has {len(value)}."
            )
        if value.strip():
            prompts.append(value.strip())
    if not prompts:
        raise BadInput(f"a prompt file must hold at least one prompt, but {name!r} holds none.")
    return prompts


def _hub(name: str) -> list[tuple[int, Any]]:
    """Number and value of the first rows of a data set's column."""
    match = HUB.fullmatch(name)
    if match is None or match["rows"] == "0":
        raise BadInput(f"a data set must be named hub:OWNER/NAME@SPLIT[:ROWS]:COLUMN, but got {name!r}.")
    try:
        import datasets
    except ImportError:
        raise BadInput(f"data sets need the library datasets ({name!r}): pip install 'ipgo-opt[hub]'.") from None
    try:
        stream = datasets.load_dataset(match["name"], split=match["split"] or "train", streaming=True)
        rows = list(itertools.islice(stream, int(match["rows"] or ROWS)))
    except Exception as error:  # of the network, the hub, the files' formats
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BadInput(f"the data set {name!r} can't be read: {reason[0]}") from None
    return _column(rows, match["column"] or COLUMN, name)


def _found(name: str) -> tuple[Path, str]:
    """The file of FILE or FILE:COLUMN, and the column."""
    if Path(name).is_file():
        return Path(name), ""
    file, colon, column = name.rpartition(":")
    if colon and Path(file).is_file():
        if Path(file).suffix.lower() not in TABLES:
            raise BadInput(f"only {', '.join(TABLES)} files have columns, but got {name!r}.")
        return Path(file), column
    raise unknown("prompts", name, ["a file", *SHIPPED])


def _rows(path: Path, text: str) -> list[Any]:
    """The rows of a table: dicts, or strings where JSON has them."""
    if path.suffix.lower() == ".csv":
        return list(csv.DictReader(io.StringIO(text), strict=True))
    try:
        if path.suffix.lower() == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        rows = json.loads(text) if text.strip() else []
    except ValueError as error:
        raise BadInput(f"{str(path)!r} is not {path.suffix[1:].upper()}: {error}.") from None
    if not isinstance(rows, list):
        raise BadInput(f"a JSON file of prompts must hold a list, but {str(path)!r} holds a {type(rows).__name__}.")
    return rows


def _column(rows: list[Any], column: str, name: str) -> list[tuple[int, Any]]:
    """Number and value of a column in each row."""
    out = []
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict):
            if column not in row:
                known = ", ".join(str(key) for key in row)
                raise BadInput(f"row {number} of {name!r} must have the column {column!r}, but it has {known}.")
            out.append((number, "" if row[column] is None else row[column]))
        else:
            out.append((number, row))
    return out
