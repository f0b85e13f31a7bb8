"""Prompts from files."""

from __future__ import annotations

from pathlib import Path


def read_prompts(source: str) -> list[str]:
    """The lines of a file, or of a shipped set."""
    path = Path(source)
    if not path.exists():
        path = Path(__file__).parent / "prompts" / f"{source}.txt"
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]
