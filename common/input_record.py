"""Record which input files a run reads, by their content, and tell what changed at a resume.

inputs.json    {"prompts": {"path": "prompts.txt", "files": {".": "sha256 ..."}}, ...}
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from common.files import read_json, sha256, write_json

INPUTS = "inputs.json"
# Larger files are hashed in parts: 10 GB of weights would take a minute.
WHOLE_BYTES = 256 << 20
_EDGE_BYTES = 1 << 20
_BLOCK_BYTES = 64 << 10
_BLOCKS = 64
# A single file has no name inside its input.
_ITSELF = "."
_SHOWN = 3


def record_inputs(inputs: Mapping[str, str | Path | None]) -> dict[str, Any]:
    """Hash the files and folders of a run, by the name of the setting that names each.

    A path that does not exist, such as the name of a model on the hub, has no files.
    """
    record = {}
    # A setting that is null reads nothing.
    for name, path in inputs.items():
        if path is not None:
            record[name] = {"path": str(path), "files": _hashes(Path(path))}
    return record


def write_inputs(folder: Path, record: Mapping[str, Any]) -> None:
    """Write inputs.json into a folder."""
    write_json(folder / INPUTS, record)


def changed_inputs(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """Describe every input whose content is not that of the folder's inputs.json.

    A path that changed while the content did not is no change; the settings show it. Nothing is
    compared with a folder of an earlier version, which has no inputs.json.
    """
    if not (folder / INPUTS).is_file():
        return []
    stored = read_json(folder / INPUTS)
    # Inputs that only one of the two has are settings that changed.
    lines = []
    for name, entry in record.items():
        if name in stored:
            changes = _differences(stored[name]["files"], entry["files"])
            if changes:
                lines.append(f"{name} ({entry['path']}): {changes}")
    return lines


def content_hash(file: Path) -> str:
    """Identify the content of a file.

    A file below 256 MB: its SHA-256. A larger file: a SHA-256 of its size, its first and last MB
    and 64 blocks of 64 KB that are spread evenly over it, and of a safetensors file the whole
    header, with the names and shapes of the weights. Training changes nearly every block of
    weights; a change of a few bytes elsewhere in so large a file is not seen.
    """
    size = file.stat().st_size
    if size < WHOLE_BYTES:
        return f"sha256 {sha256(file)}"
    # A shorter or longer file is another one, whatever its parts hold.
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for start, length in _parts(file, stream, size):
            stream.seek(start)
            digest.update(stream.read(length))
    return f"sha256 of parts {digest.hexdigest()}"


def _parts(file: Path, stream: BinaryIO, size: int) -> list[tuple[int, int]]:
    """(start, length) of the parts of a large file that are hashed."""
    parts = [(0, _EDGE_BYTES), (size - _EDGE_BYTES, _EDGE_BYTES)]
    for block in range(_BLOCKS):
        parts.append((block * size // _BLOCKS, _BLOCK_BYTES))
    # A safetensors file begins with the length of its header.
    if file.suffix == ".safetensors":
        header = int.from_bytes(stream.read(8), "little")
        parts.append((0, min(8 + header, WHOLE_BYTES)))
    return parts


def _hashes(path: Path) -> dict[str, str]:
    if path.is_file():
        return {_ITSELF: content_hash(path)}
    hashes = {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        # Hidden files hold the state of a download or of git.
        hidden = any(part.startswith(".") for part in name.parts)
        if file.is_file() and not hidden:
            hashes[name.as_posix()] = content_hash(file)
    return hashes


def _differences(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """Name the files that changed, are new or are missing; "" for none."""
    changes = []
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) == new.get(name):
            continue
        what = "changed"
        if name not in old:
            what = "is new"
        elif name not in new:
            what = "is missing"
        changes.append(f"{'the file' if name == _ITSELF else name} {what}")
    if len(changes) > _SHOWN:
        changes[_SHOWN:] = [f"and {len(changes) - _SHOWN} more"]
    return ", ".join(changes)
