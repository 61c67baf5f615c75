"""Resumable tables of results as jsonl.

Every rank appends its rows as they are finished. A killed run continues with the missing rows, and
the end merges the files of all ranks:

    results.jsonl          rows in their final order: {"index": 0, "rewards": {"shapes": 0.8}, ...}
    results.identity.json  settings the rows depend on; a run with other settings is refused
    results.rank-0.jsonl   rows that are not merged yet, a file per rank
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from common import distributed
from common.files import read_json, read_jsonl, replace_text, sha256, write_json
from common.run_record import differences
from common.types import json_number
from engine import guard

if TYPE_CHECKING:
    from common.types import Score

Row = dict[str, Any]
Key = tuple[Any, ...]
T = TypeVar("T")

# Larger files are known by size and time: hashing 10 GB of weights takes a minute.
_HASHED_BYTES = 1 << 26


class ResultsTable:
    """A table of results that all ranks fill together.

    All ranks build it with the same arguments, and each adds its rows. ``done`` holds the keys of
    the rows that are finished.

    identity  Settings, as JSON, that decide a row beyond its key.
    key       Names of the fields that identify a row.
    resume    "auto" keeps existing rows, "none" deletes them.
    retry     Tells of a finished row whether it is computed again; rank 0 alone asks.

    Raises ValueError on every rank when the file holds rows of another identity, was not written by
    this class, or when the ranks do not share its folder.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        identity: Mapping[str, Any],
        key: Sequence[str] = ("index",),
        resume: str = "auto",
        retry: Callable[[Row], bool] = lambda row: False,
    ) -> None:
        self.path = Path(path)
        self.key = tuple(key)
        self._identity_path = self.path.with_suffix(".identity.json")
        self._identity = json.loads(json.dumps(dict(identity)))
        # Name of the file with this rank's rows, once there are any.
        self._added = ""

        # Only rank 0 reads, because it merges files while the other ranks are waiting.
        problem = guard.folder_problem(self.path.parent)
        rows: dict[Key, Row] = {}
        if not problem and distributed.is_main():
            problem = self._open(resume)
            rows = {} if problem else self._read()
        done = [row_key for row_key, row in rows.items() if not retry(row)]
        # All ranks continue, or all of them raise.
        problem, done = distributed.from_main((problem, done))
        if problem:
            raise ValueError(problem)
        self.done: set[Key] = set(done)

    def key_of(self, row: Mapping[str, Any]) -> Key:
        """Return the values of a row's key fields."""
        return tuple(row[name] for name in self.key)

    def share(self, keys: Iterable[Key]) -> list[Key]:
        """List this rank's share of the keys that are not done."""
        missing = [key for key in keys if key not in self.done]
        return missing[distributed.rank() :: distributed.world_size()]

    def add(self, rows: Sequence[Row]) -> None:
        """Append finished rows, which then survive a kill. Raises ValueError for NaN."""
        rank = distributed.rank()
        file = self.path.with_suffix(f".rank-{rank}.jsonl")
        # A kill may cut the last line, which `read_jsonl` skips.
        with file.open("a", encoding="utf-8") as lines:
            lines.writelines(map(_line, rows))
        self._added = file.name

    def finish(self, keys: Sequence[Key]) -> list[Row]:
        """Wait for all ranks, then leave exactly these rows in ``path``, in this order.

        Returns the rows on every rank. Raises KeyError when a row was never added.
        """
        # A rank without a share has written no file.
        added = [name for name in distributed.gather_objects(self._added) if name]
        if distributed.is_main():
            rows = self._read(added)
            self._write([rows[key] for key in keys])
        distributed.barrier()
        return read_jsonl(self.path)

    def _open(self, resume: str) -> str | None:
        """Check the existing files and merge them; returns a problem or None."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume not in ("auto", "none"):
            return f"--resume must be auto or none here, got {resume!r}"
        if self.path.exists() and not self._identity_path.exists():
            return f"{self.path} was not written by this program; name another output"
        # Delete the earlier rows, or check that they belong to these settings.
        if resume == "none":
            self.path.unlink(missing_ok=True)
            for part in self._parts():
                part.unlink()
        elif self._identity_path.exists():
            earlier = read_json(self._identity_path)
            if earlier != self._identity and self._read():
                changes = "; ".join(differences(earlier, self._identity)[:4])
                return (
                    f"{self.path} holds other results ({changes}); name another "
                    "output, or use --resume none"
                )
        # Merge what a killed run has left.
        write_json(self._identity_path, self._identity)
        self._write(list(self._read().values()))
        return None

    def _read(self, added: Sequence[str] = ()) -> dict[Key, Row]:
        """Read all rows by key; a row that is not merged yet is newer and wins.

        ``added`` names files that their ranks have written. A network file system may not list
        them yet.
        """
        named = [self.path.with_name(name) for name in added]
        files = sorted({*self._parts(), *named})
        if self.path.exists():
            files.insert(0, self.path)
        # Later files replace rows of earlier files.
        rows = {}
        for file in files:
            for row in read_jsonl(file):
                rows[self.key_of(row)] = row
        return rows

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.stem}.rank-*.jsonl"))

    def _write(self, rows: Sequence[Row]) -> None:
        """Replace the parts by a merged file.

        A kill between the two steps leaves rows twice, which `_read` resolves.
        """
        replace_text(self.path, "".join(map(_line, rows)))
        for part in self._parts():
            part.unlink()


def failed(row: Row) -> bool:
    """Whether the row holds an error instead of a result."""
    return "error" in row


def score_fields(scores: Mapping[str, Score], index: int) -> Row:
    """Convert the scores of a single video to fields of a row.

    {"rewards": {name: value}, "parts": {name: {part: value}}, "texts": {name: text}}; a value that
    is NaN ("could not be scored") becomes null.
    """
    fields: Row = {"rewards": {}, "parts": {}, "texts": {}}
    for name, score in scores.items():
        fields["rewards"][name] = json_number(score.value_B[index])
        # Parts and texts only where the reward has them.
        if score.parts:
            parts = {}
            for part, value_B in score.parts.items():
                parts[part] = json_number(value_B[index])
            fields["parts"][name] = parts
        if score.texts:
            fields["texts"][name] = score.texts[index]
    return fields


def attempt(
    function: Callable[[Sequence[T]], list[Row]], items: Sequence[T]
) -> list[Row]:
    """Call ``function(items)``; if that raises ValueError, call it for each item alone.

    A broken file or a prompt that cannot be scored then costs a single row, which becomes
    {"error": reason}. Other exceptions travel.
    """
    try:
        return function(items)
    except ValueError as error:
        if len(items) == 1:
            return [{"error": str(error)}]
    rows = []
    for item in items:
        rows += attempt(function, [item])
    return rows


def batches(
    items: Sequence[T],
    size: int,
    label: str,
) -> Iterator[list[T]]:
    """Cut items into batches, the last of which may be smaller, under a progress bar."""
    from common.log import progress

    starts = range(0, len(items), size)
    for first in progress(starts, len(starts), label):
        yield list(items[first : first + size])


@contextmanager
def all_ranks(*, folder: str | None = None, hours: float = 4.0) -> Iterator[None]:
    """Join the processes of a launcher; without a launcher there is nothing to join.

    folder  is held for the whole block: a second command in it exits with code 2
    hours   is how long ranks wait for each other, because their shares take unequal times
    """
    with ExitStack() as stack:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            joined = distributed.joined(timeout_s=hours * 3600, for_deepspeed=False)
            stack.enter_context(joined)
        if folder is not None:
            stack.enter_context(guard.locked_folder(Path(folder)))
        yield


def fingerprint(path: str | Path) -> Any:
    """Identify the content of a file or folder.

    SHA-256 of small files and folders, size and time of large files, None if nothing is there
    (a name on the hub, for example).
    """
    path = Path(path)
    if path.is_dir():
        digest = hashlib.sha256()
        for file in sorted(path.rglob("*")):
            if not file.is_file():
                continue
            name = file.relative_to(path)
            line = f"{name} {fingerprint(file)}\n"
            digest.update(line.encode())
        return digest.hexdigest()
    if not path.is_file():
        return None
    # Read small files only.
    state = path.stat()
    if state.st_size > _HASHED_BYTES:
        return f"{state.st_size} bytes of {state.st_mtime_ns}"
    return sha256(path)


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
