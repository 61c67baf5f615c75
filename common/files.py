"""Atomic file writes, text and JSON-lines reading, SHA-256, and hub names; imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# The files of a transformers model that are read: weights, configs, tokenizer.
TRANSFORMERS_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
# How other encodings of Unicode begin. UTF-32 first: its mark begins with that of UTF-16.
_OTHER_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_SURROGATE = re.compile("[\ud800-\udfff]")
_DIGITS = re.compile("([0-9]+)")


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


def give_usual_mode(path: Path) -> None:
    """Give a file, or all weights of a folder, the mode that the umask allows (0644 under 022).

    The writer of safetensors makes its files readable by their owner only.
    """
    # The umask can only be read by setting it.
    mask = os.umask(0o077)
    os.umask(mask)
    files = path.rglob("*.safetensors") if path.is_dir() else [path]
    for file in files:
        # Some network file systems have no modes: that is no reason to lose a checkpoint.
        with suppress(OSError):
            file.chmod(0o666 & ~mask)


# ---- text ----


def read_text(path: str | Path) -> str:
    """Read a text file that a user wrote: UTF-8, with or without a byte order mark.

    Line ends stay as they are. Raises ValueError, with the file and the line, for another
    encoding and for NUL bytes, and OSError for a file that cannot be read.
    """
    content = Path(path).read_bytes()
    # Other encodings are named by their mark: table programs write UTF-16 as "Unicode text".
    for mark, name in _OTHER_MARKS.items():
        if content.startswith(mark):
            raise ValueError(f"{path}: is {name} text, save it as UTF-8")
    nul = content.find(b"\0")
    if nul >= 0:
        line = content.count(b"\n", 0, nul) + 1
        raise ValueError(f"{path}:{line}: holds a NUL byte, so it is no UTF-8 text")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # the line of the first byte that is not UTF-8
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8") from error


def read_lines(path: str | Path) -> list[str]:
    """Read the lines of a user's text file, see `read_text`; they end with LF, CR LF or CR only.

    Unlike str.splitlines, it leaves the other line separators of Unicode inside their line.
    """
    text = read_text(path).replace("\r\n", "\n").replace("\r", "\n")
    return text.split("\n")


def check_text(text: str, name: str = "the text") -> str:
    """Return the text; raise ValueError if it holds a lone surrogate, half of a character.

    JSON can spell it (a character that was cut in two), but no file or tokenizer can take it.
    """
    found = _SURROGATE.search(text)
    if found is not None:
        code = f"\\u{ord(found[0]):04x}"
        raise ValueError(
            f"{name} holds half of a character, {code} at position {found.start()}: "
            "it was cut in two, remove it"
        )
    return text


def natural_order(name: str) -> tuple[Any, ...]:
    """Sort key of a file name: numbers in it count as numbers, so that 2 comes before 10."""
    # A folder's files stay together, whatever its name continues with.
    parts = []
    for part in Path(name).parts:
        pieces = _DIGITS.split(part)
        # Text and numbers alternate, so that only equal kinds are compared.
        pieces[1::2] = [int(piece) for piece in pieces[1::2]]
        parts.append(tuple(pieces))
    return (tuple(parts), name)


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


# ---- JSON ----


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Read the complete lines of a JSON-lines file; ValueError names a line that is no object.

    What follows the last newline is left out: a killed writer leaves a torn line.
    """
    # The last piece is empty, or torn. A text in a line may hold other line separators.
    lines = Path(path).read_bytes().split(b"\n")[:-1]
    return [
        json_object(line, f"{path}:{number}")
        for number, line in enumerate(lines, start=1)
    ]


def parse_json_line(line: str) -> Any:
    """Parse a line that a user wrote.

    Raises ValueError, without the file's name, for text that is not JSON, and for an object with
    a key twice, of which Python would silently take the last.
    """

    def without_repeats(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) < len(items):
            keys = [key for key, _ in items]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"has the key {twice!r} twice")
        return result

    try:
        return json.loads(line, object_pairs_hook=without_repeats)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg}") from error
    except RecursionError as error:
        raise ValueError("not JSON: nested too deeply") from error


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


def require_model(path: str | Path, file: str) -> None:
    """Raise FileNotFoundError unless a path is a model's folder, or may be its hub name.

    Nothing is downloaded. ``file`` is a file that every model of its kind has.
    """
    folder = Path(path)
    if not folder.is_dir():
        require_hub_name(str(path), file)
    elif not (folder / file).is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it lacks {file}")


def model_folder(path: str | Path, file: str, *, patterns: Sequence[str]) -> Path:
    """Return the folder of a model: ``path`` itself, or where the hub's library keeps this name.

    ``file`` is a file that every model of its kind has; ``patterns`` are those to download.
    Raises FileNotFoundError where there is no such folder or name.
    """
    folder = Path(path)
    require_model(path, file)
    if folder.is_dir():
        return folder
    # the import takes a second
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(path), allow_patterns=list(patterns)))
