"""Atomic file writes, JSON-lines reading, SHA-256, and hub names; imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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


def append_line(path: Path, line: str) -> None:
    """Append a line to a text file, all of it or nothing."""
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        data = line.encode() + b"\n"
        try:
            # A disk that fills up takes a part of the line, and refuses the next write.
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(before)
            raise


def read_jsonl(path: str | Path) -> list[Any]:
    """Read the complete lines of a JSON-lines file.

    What follows the last newline is left out: a killed writer leaves a torn line.
    """
    # The last piece is empty, or a torn line.
    lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def read_json(path: Path) -> Any:
    """Read a JSON file; OSError or ValueError if that is impossible."""
    return json.loads(path.read_text(encoding="utf-8"))


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


def weight_files(folder: Path, name: str) -> list[Path]:
    """List the files of a model's weights: ``name``, or the shards in ``name``.index.json.

    Raises FileNotFoundError, naming what is missing.
    """
    # A single file.
    if (folder / name).is_file():
        return [folder / name]
    index_file = folder / f"{name}.index.json"
    if not index_file.is_file():
        raise FileNotFoundError(
            f"{folder} has no weights: it lacks {name} and {index_file.name}"
        )

    # The index maps every weight to its shard.
    index = read_json(index_file)
    shards = sorted(set(index["weight_map"].values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}, which {index_file.name} names"
        )
    return [folder / shard for shard in shards]


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
