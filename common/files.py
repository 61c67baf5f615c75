"""Files that are there whole or not at all, and what is in them. No torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Gives another name to write to; afterwards it is ``path``. A reader sees the old file or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    yield partial
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def replace_text(path: Path, text: str) -> None:
    """Write UTF-8 text, see `replaced`."""
    with replaced(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sort_header(path: Path) -> None:
    """Give a safetensors file the one order of its header. Its writer puts entries of the metadata in an order of
    chance, so that equal weights would be unequal files.
    """
    with path.open("rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        ordered = json.dumps(
            header, sort_keys=True, separators=(",", ":"), ensure_ascii=False
        ).encode()
        if len(ordered) > length:
            raise ValueError(f"{path}: its header does not fit in its place")
        file.seek(8)
        file.write(ordered.ljust(length))


def sha256(path: Path) -> str:
    """Of the content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_hub_name(path: str, file: str) -> None:
    """FileNotFoundError for what is no folder and cannot be a hub name either (owner/name), or is one that is not in
    the cache while HF_HUB_OFFLINE is set.

    file  one that every model of the kind has
    """
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise FileNotFoundError(f"{path} does not exist")
    from huggingface_hub import constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE and not isinstance(
        try_to_load_from_cache(path, file), str
    ):
        raise FileNotFoundError(
            f"{path} is no folder here, and as a hub name it is not in the cache {constants.HF_HUB_CACHE}; "
            "HF_HUB_OFFLINE keeps it from being downloaded"
        )
