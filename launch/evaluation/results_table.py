"""A long table of results as jsonl: written row by row by every rank, gone on with after a kill, merged at the end.

results.jsonl            rows in their final order; {"index": 0, "prompt": ..., "rewards": {"shapes": 0.8}, ...}
results.identity.json    what the rows depend on; another identity is refused, not mixed in
results.rank-0.jsonl     rows not merged yet, one file per rank
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from common import distributed
from common.files import replace_text, sha256
from common.run_record import differences
from common.types import json_number
from engine import guard

if TYPE_CHECKING:
    from common.types import Score

Row = dict[str, Any]
Key = tuple[Any, ...]
T = TypeVar("T")

_HASHED_BYTES = (
    1 << 26
)  # larger files are known by size and time: hashing 10 GB of weights takes a minute


class ResultsTable:
    """The table at ``path``. All ranks build one, with the same arguments, and each adds its own rows.

    identity  JSON: everything that decides a row beside its key
    key       names of the fields that say which row it is
    resume    "auto" keeps the rows that are there, "none" starts anew
    retry     name of a field; finished rows that carry it are made again

    Raises ValueError, on every rank, when the file holds rows of another identity or was not written by this class, or
    when the ranks do not share its folder.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        identity: Mapping[str, Any],
        key: Sequence[str] = ("index",),
        resume: str = "auto",
        retry: str | None = None,
    ) -> None:
        self.path, self.key, self.retry = Path(path), tuple(key), retry
        self._identity_path = self.path.with_suffix(".identity.json")
        self._identity = json.loads(json.dumps(dict(identity)))
        self._added = ""  # name of the file with this rank's rows
        problem = guard.folder_problem(self.path.parent)
        if not problem and distributed.is_main():
            problem = self._open(resume)
        done = []
        if (
            not problem and distributed.is_main()
        ):  # who alone has changed the files, and may be doing so still
            done = [
                key
                for key, row in self._read().items()
                if retry is None or retry not in row
            ]
        problem, done = distributed.from_main((problem, done))
        if problem:
            raise ValueError(problem)
        self.done: set[Key] = set(done)

    def key_of(self, row: Mapping[str, Any]) -> Key:
        """The values of a row's key fields."""
        return tuple(row[name] for name in self.key)

    def share(self, keys: Iterable[Key]) -> list[Key]:
        """The keys not done yet that are this rank's: every world-size-th of them."""
        open_keys = [key for key in keys if key not in self.done]
        return open_keys[distributed.rank() :: distributed.world_size()]

    def add(self, rows: Sequence[Row]) -> None:
        """Append finished rows; what was added survives a kill. Raises ValueError for NaN, which is no JSON."""
        file = self.path.with_suffix(f".rank-{distributed.rank()}.jsonl")
        with file.open("a", encoding="utf-8") as lines:
            lines.writelines(_line(row) for row in rows)
        self._added = file.name

    def finish(self, keys: Sequence[Key]) -> list[Row]:
        """Wait for all ranks, leave exactly these rows in ``path``, in this order, and return them (on every rank).

        Raises KeyError when one of them was never added.
        """
        added = [name for name in distributed.gather_objects(self._added) if name]
        if distributed.is_main():
            rows = self._read(added)
            self._write([rows[key] for key in keys])
        distributed.barrier()
        return read_rows(self.path)

    def _open(self, resume: str) -> str | None:
        """Check what is there and merge it; a problem, or None."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume not in ("auto", "none"):
            return f"--resume must be auto or none here, got {resume!r}"
        exists = self.path.exists()
        if exists and not self._identity_path.exists():
            return f"{self.path} is there and was not written by this program; name another output"
        if resume == "none":
            self.path.unlink(missing_ok=True)
            for part in self._parts():
                part.unlink()
        elif self._identity_path.exists():
            found = json.loads(self._identity_path.read_text(encoding="utf-8"))
            if found != self._identity and self._read():
                changes = "; ".join(differences(found, self._identity)[:4])
                return f"{self.path} holds other results ({changes}); name another output, or use --resume none"
        replace_text(
            self._identity_path,
            json.dumps(self._identity, indent=1, ensure_ascii=False) + "\n",
        )
        self._write(list(self._read().values()))
        return None

    def _read(self, added: Sequence[str] = ()) -> dict[Key, Row]:
        """All rows by key, merged or not; of two with one key the one not merged yet, which is newer.

        added  files that are there by what their ranks say: the list that a network file system gives may be older
        """
        parts = sorted({*self._parts(), *(self.path.with_name(name) for name in added)})
        files = [*([self.path] if self.path.exists() else []), *parts]
        return {self.key_of(row): row for file in files for row in read_rows(file)}

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.stem}.rank-*.jsonl"))

    def _write(self, rows: Sequence[Row]) -> None:
        """One merged file instead of the parts; a kill in between leaves rows twice, which reading mends."""
        replace_text(self.path, "".join(_line(row) for row in rows))
        for part in self._parts():
            part.unlink()


def read_rows(path: str | Path) -> list[Row]:
    """Every complete line of a jsonl file; a torn last one (a killed run) is left out. ValueError names a bad line."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error.msg}") from error
    return rows


def score_fields(scores: Mapping[str, Score], index: int) -> Row:
    """What all rewards say of one video: {"rewards": {name: value}, "parts": {name: {part: value}}, "texts": {...}}.

    A value that is NaN, "could not judge", is null.
    """
    return {
        "rewards": {
            name: json_number(score.value_B[index]) for name, score in scores.items()
        },
        "parts": {
            name: {
                part: json_number(value_B[index])
                for part, value_B in score.parts.items()
            }
            for name, score in scores.items()
            if score.parts
        },
        "texts": {
            name: score.texts[index] for name, score in scores.items() if score.texts
        },
    }


def attempt(judge: Callable[[Sequence[T]], list[Row]], items: Sequence[T]) -> list[Row]:
    """``judge(items)``; when the batch fails with a ValueError (a broken file, a prompt nobody can judge), each alone.

    What fails alone becomes {"error": reason}, so that one bad item costs one row. Other exceptions travel.
    """
    try:
        return judge(items)
    except ValueError as error:
        if len(items) == 1:
            return [{"error": str(error)}]
    return [row for item in items for row in attempt(judge, [item])]


def batches(items: Sequence[T], size: int) -> Iterator[list[T]]:
    """Consecutive parts; the last one may be shorter."""
    for first in range(0, len(items), size):
        yield list(items[first : first + size])


@contextmanager
def all_ranks(*, hours: float = 4.0) -> Iterator[None]:
    """Inside, the processes of a launcher are joined; alone, nothing is. ``hours`` allow for unequal shares."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        with distributed.joined(timeout_s=hours * 3600, for_deepspeed=False):
            yield
    else:
        yield


def fingerprint(path: str | Path) -> Any:
    """What is in a file or folder: SHA-256 of small files, size and time of large ones. None for what is not there."""
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        text = "".join(
            f"{file.relative_to(path)} {fingerprint(file)}\n" for file in files
        )
        return hashlib.sha256(text.encode()).hexdigest()
    if not path.is_file():
        return None  # a hub name, say
    state = path.stat()
    if state.st_size > _HASHED_BYTES:
        return f"{state.st_size} bytes of {state.st_mtime_ns}"
    return sha256(path)


def write_json(path: str | Path, value: Any) -> None:
    """Indented JSON; a reader sees the old file or the new one. ValueError for NaN."""
    replace_text(
        Path(path),
        json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    )


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
