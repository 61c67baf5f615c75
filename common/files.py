"""Atomic file writes, JSON-lines reading, SHA-256, and hub names; imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# The files of a transformers model that are read: weights, configs, tokenizer.
TRANSFORMERS_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give another file name to write to, and rename that file to ``path`` afterwards.

    A reader sees the old file or the new file, never a part of it.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    yield partial
    # on the disk before the name
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def replace_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically, see `replaced`."""
    with replaced(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Read the complete lines of a JSON-lines file; ValueError names a line that is no object.

    What follows the last newline is left out: a killed writer leaves a torn line.
    """
    # The last piece is empty, or a torn line.
    lines = Path(path).read_bytes().split(b"\n")[:-1]
    return [
        json_object(line, f"{path}:{number}")
        for number, line in enumerate(lines, start=1)
    ]


def json_object(text: str | bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object; ValueError begins with ``where``, a file or its line."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: want an object, {{...}}")
    return value


def read_json(path: str | Path) -> Any:
    """Read a JSON file; OSError or ValueError, with its name, if that is impossible."""
    # A file that is nested without end exhausts the parser.
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error


def write_json(path: str | Path, value: Any) -> None:
    """Replace a file by indented JSON, atomically. Raises ValueError for NaN."""
    text = json.dumps(
        value,
        indent=1,
        ensure_ascii=False,
        allow_nan=False,
    )
    replace_text(Path(path), text + "\n")


def sort_header(path: Path) -> None:
    """Sort the header of a safetensors file in place.

    Its writer orders the metadata at random, so that equal weights would be unequal files.
    """
    with path.open("rb+") as file:
        # 8 bytes of length, then the header as JSON
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        text = json.dumps(
            header,
            sort_keys=True,
            separators=(",", ":"),
            ensure_ascii=False,
        )
        ordered = text.encode()
        if len(ordered) > length:
            raise ValueError(f"{path}: its sorted header needs more space")
        file.seek(8)
        file.write(ordered.ljust(length))


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_hub_name(path: str, file: str) -> None:
    """Raise FileNotFoundError unless the path may be the hub name (owner/name) of a model.

    With HF_HUB_OFFLINE set the model must be in the cache; ``file`` is a file that every model of
    its kind has.
    """
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise FileNotFoundError(f"{path} does not exist")
    # the import takes a second
    from huggingface_hub import constants, try_to_load_from_cache

    # The library returns the path of a cached file.
    cached = isinstance(try_to_load_from_cache(path, file), str)
    if constants.HF_HUB_OFFLINE and not cached:
        raise FileNotFoundError(
            f"{path} is no folder here, and as a hub name it is not in the cache "
            f"{constants.HF_HUB_CACHE}; HF_HUB_OFFLINE keeps it from being downloaded"
        )


def model_folder(path: str | Path, file: str, *, patterns: Sequence[str]) -> Path:
    """Return the folder of a model: ``path`` itself, or where the hub's library keeps this name.

    ``file`` is a file that every model of its kind has; ``patterns`` are those to download.
    Raises FileNotFoundError where there is no such folder or name.
    """
    folder = Path(path)
    if folder.is_dir():
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} is not a model folder: it lacks {file}")
        return folder
    require_hub_name(str(path), file)
    # the import takes a second
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(path), allow_patterns=list(patterns)))
