"""Checkpoints that are there or not, never half: written aside, verified by a manifest, renamed into place.

    root/tmp-step-12/        being written; a leftover of a killed run is removed by the next save
    root/step-000012/        complete; what `write` put there, state.json, and
        manifest.json        written last: size and SHA-256 of every other file

Tensors travel as safetensors and everything else as JSON: reading a checkpoint runs no code. One folder holds one
line of history: saving step 12 removes later steps, which a resume from an earlier one has left behind.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import distributed
from common.files import sha256
from common.log import say

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST, STATE = "manifest.json", "state.json"
_STEP = re.compile(r"step-(\d{6,})")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


class NoRoomError(OSError):
    """The disk is full, read-only, or over its quota; the message says what there is and what is needed."""


def save(
    root: str | Path,
    step: int,
    write: Callable[[Path], None],
    *,
    keep: int,
    state: Mapping[str, Any],
) -> Path:
    """Save one step and return its folder. All ranks call it, with the same arguments.

    write  called on every rank with the same empty folder, where each puts its own files
    state  what is not a tensor: step counters, sampler positions; anything JSON, kept from rank 0
    keep   how many checkpoints remain, this one included

    A kill at any moment leaves the earlier checkpoints whole. Raises ValueError for keep < 1 or a negative step,
    TypeError for a state that is not JSON, `NoRoomError` where the disk has none; when ``write`` fails on one rank,
    RuntimeError on all the others.
    """
    root = Path(root)
    if keep < 1 or step < 0:
        raise ValueError(
            f"checkpoint needs keep >= 1 and step >= 0, got keep={keep} and step={step}"
        )
    state_text = json.dumps(dict(state), indent=2)
    distributed.raise_on_all(_too_full(root, step) if distributed.is_main() else None)
    try:
        return _save(root, step, write, state_text, keep=keep)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        shutil.rmtree(root / f"tmp-step-{step}", ignore_errors=True)
        raise NoRoomError(
            f"step {step} cannot be saved in {root}: {error.strerror}; {_what_there_is(root)}"
        ) from error


def _save(
    root: Path, step: int, write: Callable[[Path], None], state_text: str, *, keep: int
) -> Path:
    partial, final = root / f"tmp-step-{step}", root / f"step-{step:06d}"
    if distributed.is_main():
        for leftover in root.glob("tmp-*"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
    distributed.barrier()
    _write_on_all_ranks(write, partial)
    if distributed.is_main():
        (partial / STATE).write_text(state_text, encoding="utf-8")
        _seal(partial, step)
        _rename(partial, final)
        _prune(root, newest=step, keep=keep)
    distributed.barrier()
    return final


def verify(path: str | Path) -> list[str]:
    """What is wrong with a checkpoint folder, one line each; empty when every file is as it was written."""
    path = Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = {
            str(name): (int(entry["size"]), str(entry["sha256"]))
            for name, entry in manifest["files"].items()
        }
        step = int(manifest["step"])
    except OSError as error:
        return [f"{MANIFEST}: {error.strerror}"]
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ):  # damaged JSON, or JSON of another form
        return [f"{MANIFEST}: damaged"]
    named = _STEP.fullmatch(path.name)
    problems = (
        [f"{MANIFEST}: is of step {step}"] if named and int(named[1]) != step else []
    )
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file():
            problems.append(f"{name}: missing")
        elif file.stat().st_size != size:
            problems.append(f"{name}: {file.stat().st_size} bytes instead of {size}")
        elif sha256(file) != digest:
            problems.append(f"{name}: content changed (SHA-256 differs)")
    return problems if files else [f"{MANIFEST}: names no files"]


def latest(root: str | Path) -> Path | None:
    """The newest checkpoint that verifies, None if there is none. Says which it skipped and why."""
    for path in reversed(_steps(Path(root))):
        problems = verify(path)
        if not problems:
            return path
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        say(
            f"checkpoint {path.name} is damaged and skipped: {'; '.join(problems[:3])}{more}"
        )
    return None


def resolve_resume(resume: str, root: str | Path) -> Path | None:
    """Where to go on from: ``none`` -> None, ``auto`` -> `latest` of root, else a checkpoint or a folder of them.

    Rank 0 looks and the others follow. Raises ValueError, on every rank, for a path without a whole checkpoint.
    """
    found, problem = distributed.from_main(
        _look(resume, Path(root)) if distributed.is_main() else (None, None)
    )
    if problem:
        raise ValueError(problem)
    return found


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors (detached, on the CPU). Raises ValueError unless the name ends so."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = _safetensors_path(path)
    # the format has no views: two names of one storage (tied weights) are stored twice
    whole = {
        name: tensor.detach().cpu().clone().contiguous()
        for name, tensor in tensors.items()
    }
    try:
        save_file(whole, path)
    except SafetensorError as error:
        if (number := re.search(r"os error (\d+)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read what `save_tensors` wrote, on the CPU. Raises ValueError for other formats: a pickle can run code."""
    from safetensors.torch import load_file

    return load_file(_safetensors_path(path))


def load_state(path: str | Path) -> dict[str, Any]:
    """The ``state`` of a checkpoint folder."""
    return json.loads((Path(path) / STATE).read_text(encoding="utf-8"))


def _too_full(root: Path, step: int) -> NoRoomError | None:
    """Found out before anything is written: a checkpoint is about as large as the one before."""
    root.mkdir(parents=True, exist_ok=True)
    if not _steps(root) or _size(_steps(root)[-1]) <= shutil.disk_usage(root).free:
        return None
    return NoRoomError(f"step {step} cannot be saved in {root}: {_what_there_is(root)}")


def _what_there_is(root: Path) -> str:
    steps = _steps(root)
    free = f"{shutil.disk_usage(root).free:,} bytes are free"
    if not steps:
        return f"{free}; nothing was saved before"
    return f"{free}, {steps[-1].name} took {_size(steps[-1]):,} and is still there"


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _write_on_all_ranks(write: Callable[[Path], None], folder: Path) -> None:
    """Call ``write`` and learn how it went elsewhere; a rank that fails still takes part, or the others would hang."""
    done = False
    try:
        write(folder)
        done = True
    finally:
        outcome = distributed.gather_objects(done)
    if not all(outcome):
        failed = [rank for rank, ok in enumerate(outcome) if not ok]
        raise RuntimeError(
            f"writing the checkpoint failed on rank {', '.join(map(str, failed))}"
        )


def _seal(folder: Path, step: int) -> None:
    """Everything on disk first, then the manifest that vouches for it."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for file in files:
        _fsync(file)
    entries = {
        file.relative_to(folder).as_posix(): {
            "size": file.stat().st_size,
            "sha256": sha256(file),
        }
        for file in files
    }
    (folder / MANIFEST).write_text(
        json.dumps({"step": step, "files": entries}, indent=2), encoding="utf-8"
    )
    _fsync(folder / MANIFEST)
    for inner in folder.rglob("*"):
        if inner.is_dir():
            _fsync(inner)
    _fsync(folder)


def _rename(partial: Path, final: Path) -> None:
    if final.exists():  # the same step saved again, after a resume from an earlier one
        replaced = final.with_name(f"tmp-replaced-{final.name}")
        os.replace(final, replaced)
        os.replace(partial, final)
        shutil.rmtree(replaced)
    else:
        os.replace(partial, final)
    _fsync(final.parent)


def _prune(root: Path, *, newest: int, keep: int) -> None:
    steps = _steps(root)
    current = [path for path in steps if _number(path) <= newest]
    abandoned = [path for path in steps if _number(path) > newest]
    if abandoned:
        say(
            f"removing checkpoints of an abandoned history: {', '.join(path.name for path in abandoned)}"
        )
    for path in [*current[:-keep], *abandoned]:
        # renamed first: a kill in the middle of the removal must not leave half a step-* folder
        doomed = path.with_name(f"tmp-removed-{path.name}")
        os.replace(path, doomed)
        shutil.rmtree(doomed)


def _look(resume: str, root: Path) -> tuple[Path | None, str | None]:
    """(checkpoint, problem): at most one of them."""
    if resume == "none":
        return None, None
    if resume == "auto":
        return latest(root), None
    path = Path(resume)
    if not path.is_dir():
        return None, f"--resume {resume}: there is no such folder"
    if _steps(path):
        found = latest(path)
        return (
            found,
            None if found else f"--resume {resume}: no checkpoint in it is whole",
        )
    problems = verify(path)
    return (
        (None, f"--resume {resume}: {'; '.join(problems)}")
        if problems
        else (path, None)
    )


def _steps(root: Path) -> list[Path]:
    """Checkpoint folders by number; leftovers (tmp-*) and foreign files are none."""
    found = [
        path
        for path in root.glob("step-*")
        if path.is_dir() and _STEP.fullmatch(path.name)
    ]
    return sorted(found, key=_number)


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _safetensors_path(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path.name}: only .safetensors is read and written here, convert other formats first"
        )
    return path
