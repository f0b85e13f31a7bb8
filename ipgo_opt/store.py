"""The run directory: everything a run leaves on disk, readable without this package.

    run.json          configuration, versions, status and, at the end, the result
    history.jsonl     one line per evaluated image
    raw.png, best.png the prompt's own image and the best one, on the first search seed
    best.safetensors  learned tokens and the prompt embeddings that gave the best image
    report.html       the same for people
    checkpoint.safetensors, space.safetensors   what `resume` needs

Files are replaced atomically. A history that is longer than the checkpoint says (a torn last line included) is cut
back before anything is appended.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import tempfile
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from ipgo_opt.errors import BadInput

FORMAT = 1
"""Version of the run directory's layout; later versions of the package read earlier layouts."""


def check_out(folder: Path) -> None:
    """Raises BadInput unless a new run can be written to `folder`; leaves nothing behind."""
    if (folder / "run.json").exists():
        raise BadInput(
            f"the output directory must not hold another run, but {str(folder)!r} does; continue it with "
            f"`ipgo-opt resume {folder}` or choose another one."
        )
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        if not existing.is_dir():
            raise NotADirectoryError(20, "not a directory")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise BadInput(
            f"the output directory must be writable, but {str(folder)!r} is not: {error.strerror}."
        ) from None


def pack(state: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """Splits nested dicts and lists into JSON (tensors become {"$tensor": key}) and tensors by key."""
    tensors: dict[str, Tensor] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            key = f"t{len(tensors)}"
            tensors[key] = value.detach().cpu().contiguous().clone()
            return {"$tensor": key}
        if isinstance(value, dict):
            return {str(name): walk(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [walk(inner) for inner in value]
        return value

    return walk(state), tensors


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `pack` (tuples come back as lists)."""
    if isinstance(value, dict):
        if set(value) == {"$tensor"}:
            return tensors[value["$tensor"]]
        return {name: unpack(inner, tensors) for name, inner in value.items()}
    if isinstance(value, list):
        return [unpack(inner, tensors) for inner in value]
    return value


def slug(text: str) -> str:
    """A file name that reads like the text: letters a to z, digits and hyphens, at most 40; "run" if none is left."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "run"


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class Store:
    """One run directory, locked while it is open.

    Args:
        folder: the directory; it is made if it is missing.

    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock: IO[str] = (folder / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # freed by the system when the process dies
        except OSError:
            self._lock.close()
            raise BadInput(f"{str(folder)!r} is in use by another process.") from None

    def close(self) -> None:
        """Releases the lock."""
        self._lock.close()

    def write_bytes(self, name: str, data: bytes) -> None:
        """Writes a file whole or not at all."""
        write_whole(self.folder / name, data)

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file."""
        self.write_bytes(name, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file."""
        self.write_bytes(name, text.encode())

    def write_image(self, name: str, image: Tensor) -> None:
        """Writes an image (3, H, W) in [0, 1] as PNG."""
        import io

        buffer = io.BytesIO()
        to_pil(image).save(buffer, "PNG")
        self.write_bytes(name, buffer.getvalue())

    def write_tensors(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        """Writes a safetensors file."""
        write_tensors(self.folder / name, tensors, metadata)

    def read_tensors(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata of a safetensors file; BadInput if it is damaged."""
        return read_tensors(self.folder / name)

    def append_history(self, records: list[dict[str, Any]]) -> None:
        """Adds lines to history.jsonl."""
        with (self.folder / "history.jsonl").open("a") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))
            file.flush()
            os.fsync(file.fileno())  # before the checkpoint that counts these lines

    def cut_history(self, lines: int) -> list[dict[str, Any]]:
        """Keeps the first `lines` records of history.jsonl and returns them."""
        path = self.folder / "history.jsonl"
        kept = path.read_bytes().splitlines(keepends=True)[:lines] if path.exists() else []
        try:
            records = [json.loads(line) for line in kept]
        except ValueError as error:
            raise BadInput(f"{str(path)!r} is damaged: {error}") from None
        if len(records) < lines:
            raise BadInput(f"{str(path)!r} must hold {lines} records, but it holds {len(records)}.")
        if path.exists() and path.stat().st_size != sum(map(len, kept)):
            self.write_bytes("history.jsonl", b"".join(kept))
        return records

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Writes the state of the loop."""
        layout, tensors = pack(state)
        self.write_tensors("checkpoint.safetensors", tensors, {"state": json.dumps(layout)})

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The state of the loop, or None if the run had not got that far."""
        if not (self.folder / "checkpoint.safetensors").exists():
            return None
        tensors, metadata = self.read_tensors("checkpoint.safetensors")
        state: dict[str, Any] = unpack(json.loads(metadata["state"]), tensors)
        return state


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file whole or not at all."""
    ready = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    write_whole(path, to_safetensors(ready, metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; BadInput if it is damaged."""
    try:
        with safe_open(str(path), "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{str(path)!r} can't be read: {error}") from None


def read_best(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a finished run found: best.safetensors and its metadata; BadInput if it found no tokens."""
    tensors, metadata = read_tensors(folder / "best.safetensors")
    if not any(name.startswith("basis.") for name in tensors):
        raise BadInput(f"the run in {str(folder)!r} found no tokens: its best image is the raw prompt's.")
    return tensors, metadata


def read_run(folder: Path) -> dict[str, Any]:
    """run.json of a run directory; BadInput if there is none or it is of a later layout."""
    path = folder / "run.json"
    if not path.is_file():
        raise BadInput(f"a run directory must hold run.json, but {str(folder)!r} does not.")
    try:
        run: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise BadInput(f"{str(path)!r} is damaged: {error}") from None
    if not isinstance(run, dict):
        raise BadInput(f"{str(path)!r} is damaged: it holds no object.")
    if run.get("format", FORMAT + 1) > FORMAT:
        raise BadInput(f"{str(path)!r} has layout {run.get('format')!r}; this version reads up to {FORMAT}.")
    return run


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The records of history.jsonl of a finished run."""
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def to_pil(image: Tensor) -> Any:
    """An image (3, H, W) in [0, 1] as a PIL image."""
    from PIL import Image

    array = image.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)
