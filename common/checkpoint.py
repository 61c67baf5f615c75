"""Atomic checkpoints: written to a temporary folder, checksummed, then renamed.

    root/tmp-step-12/        being written; the next save removes what a killed run left
    root/step-000012/        complete: the files of `write`, state.json, and
        manifest.json        written last, with size and SHA-256 of every other file
    root/aside-step-000020/  of an earlier history, until the first checkpoint of the new one

Tensors are stored as safetensors and everything else as JSON, so reading a checkpoint runs no
code. A folder holds a single history: saving step 12 removes later steps, which a resume from an
earlier step left behind.
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
from common.files import give_usual_mode, read_json, sha256
from common.log import say

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
ASIDE = "aside"
STATE = "state.json"
_STEP = re.compile(r"step-(\d{6,})")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


class NoRoomError(OSError):
    """The disk is full, read-only, or over its quota; the message gives the free space."""


# ---- saving ----


def save(
    root: str | Path,
    step: int,
    write: Callable[[Path], None],
    *,
    keep: int,
    state: Mapping[str, Any],
) -> Path:
    """Save a step and return its folder; all ranks call it with the same arguments.

    write  is called on every rank with the same empty folder, and puts that rank's files there
    state  is anything JSON that is not a tensor, such as step counters; rank 0's is stored
    keep   is the number of checkpoints that remain, this one included

    A kill at any moment leaves the earlier checkpoints intact. Raises ValueError for keep < 1 or a
    negative step, TypeError for a state that is not JSON, `NoRoomError` when the disk is full; when
    ``write`` fails on a rank, the other ranks raise RuntimeError.
    """
    root = Path(root)
    if keep < 1 or step < 0:
        raise ValueError(
            f"checkpoint needs keep >= 1 and step >= 0, got keep={keep} and step={step}"
        )
    state_text = json.dumps(dict(state), indent=2)
    distributed.raise_on_all(_too_full(root, step) if distributed.is_main() else None)
    partial = root / f"tmp-step-{step}"
    final = root / f"step-{step:06d}"
    try:
        # 1. An empty folder, which every rank fills.
        if distributed.is_main():
            for leftover in root.glob("tmp-*"):
                _remove(leftover)
            partial.mkdir(parents=True)
        distributed.barrier()
        _write_on_all_ranks(write, partial)

        # 2. Rank 0 seals and renames it.
        if distributed.is_main():
            (partial / STATE).write_text(state_text, encoding="utf-8")
            _write_manifest(partial, step)
            _rename(partial, final)
            _prune(
                root,
                newest=step,
                keep=keep,
            )
        distributed.barrier()
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        shutil.rmtree(partial, ignore_errors=True)
        raise NoRoomError(
            f"step {step} cannot be saved in {root}: {error.strerror}; {_free_space(root)}"
        ) from error
    return final


def _too_full(root: Path, step: int) -> NoRoomError | None:
    """Check the space before writing: a checkpoint is about as large as the previous one."""
    root.mkdir(parents=True, exist_ok=True)
    steps = _steps(root)
    if not steps or _size(steps[-1]) <= shutil.disk_usage(root).free:
        return None
    return NoRoomError(f"step {step} cannot be saved in {root}: {_free_space(root)}")


def _free_space(root: Path) -> str:
    """Free space of the disk, and the size of the latest checkpoint, for a message."""
    steps = _steps(root)
    free = f"{shutil.disk_usage(root).free:,} bytes are free"
    if not steps:
        return f"{free}; nothing was saved before"
    return f"{free}, {steps[-1].name} took {_size(steps[-1]):,} and is still there"


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _write_on_all_ranks(write: Callable[[Path], None], folder: Path) -> None:
    """Call ``write``, and raise RuntimeError if it failed on another rank."""
    done = False
    try:
        write(folder)
        done = True
    finally:
        # a rank that fails takes part too, or the others would hang
        outcome = distributed.gather_objects(done)
    failed = [str(rank) for rank, succeeded in enumerate(outcome) if not succeeded]
    if failed:
        raise RuntimeError(f"writing the checkpoint failed on rank {', '.join(failed)}")


def _write_manifest(folder: Path, step: int) -> None:
    """Flush all files to disk, then write the manifest with their checksums."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    entries = {}
    for file in files:
        _fsync(file)
        name = file.relative_to(folder).as_posix()
        entries[name] = {"size": file.stat().st_size, "sha256": sha256(file)}
    text = json.dumps({"step": step, "files": entries}, indent=2)
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    _fsync(folder / MANIFEST)
    # the names of files are on disk when their folder is
    for inner in folder.rglob("*"):
        if inner.is_dir():
            _fsync(inner)
    _fsync(folder)


def _rename(partial: Path, final: Path) -> None:
    if final.exists():
        # the same step saved again, after a resume from an earlier step
        replaced = final.with_name(f"tmp-replaced-{final.name}")
        os.replace(final, replaced)
        os.replace(partial, final)
        if replaced.is_dir():
            shutil.rmtree(replaced)
        else:
            kept = replaced.replace(final.with_name(f"file-{final.name}"))
            say(f"{final} was a file: it is {kept.name} now")
    else:
        os.replace(partial, final)
    _fsync(final.parent)


def _remove(path: Path) -> None:
    """Remove a temporary folder, or a file that has its name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _prune(
    root: Path,
    *,
    newest: int,
    keep: int,
) -> None:
    """Remove checkpoints beyond the newest ``keep``, and those of an abandoned history."""
    steps = _steps(root)
    current = [path for path in steps if _number(path) <= newest]
    abandoned = [path for path in steps if _number(path) > newest]
    # those that `set_aside` has left belong to it too, now that this one is complete
    abandoned += sorted(path for path in root.glob(f"{ASIDE}-*") if path.is_dir())
    if abandoned:
        names = ", ".join(path.name for path in abandoned)
        say(f"removing checkpoints of an abandoned history: {names}")
    for path in [*current[:-keep], *abandoned]:
        # renamed first: a kill during the removal must not leave half a step-* folder
        doomed = path.with_name(f"tmp-removed-{path.name}")
        os.replace(path, doomed)
        shutil.rmtree(doomed)


# ---- finding and verifying ----


def verify(path: str | Path) -> list[str]:
    """List the problems of a checkpoint folder; empty when every file is as it was written."""
    path = Path(path)
    # 1. The manifest.
    try:
        manifest = read_json(path / MANIFEST)
        step = int(manifest["step"])
        files = {
            str(name): (int(entry["size"]), str(entry["sha256"]))
            for name, entry in manifest["files"].items()
        }
    except OSError as error:
        return [f"{MANIFEST}: {error.strerror}"]
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError):
        # damaged JSON, a size that is infinite, or JSON of another form
        return [f"{MANIFEST}: damaged"]
    if not files:
        return [f"{MANIFEST}: names no files"]
    problems = []
    if _STEP.fullmatch(path.name) and _number(path) != step:
        problems.append(f"{MANIFEST}: is of step {step}")

    # 2. Every file in it.
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file():
            problems.append(f"{name}: missing")
        elif file.stat().st_size != size:
            problems.append(f"{name}: {file.stat().st_size} bytes instead of {size}")
        elif sha256(file) != digest:
            problems.append(f"{name}: content changed (SHA-256 differs)")
    return problems


def latest(root: str | Path) -> Path | None:
    """Find the newest intact checkpoint, and report the damaged ones that are skipped."""
    for path in reversed(_steps(Path(root))):
        problems = verify(path)
        if not problems:
            return path
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        shown = "; ".join(problems[:3])
        say(f"checkpoint {path.name} is damaged and skipped: {shown}{more}")
    return None


def resolve_resume(resume: str, root: str | Path) -> Path | None:
    """Find the checkpoint to resume from, the same on every rank.

    ``none`` gives None, ``auto`` the `latest` in root, a path that checkpoint or the latest in
    that folder. Raises ValueError, on every rank, for a path without an intact checkpoint.
    """
    # rank 0 looks, the others follow
    path = None
    problem = None
    if distributed.is_main():
        try:
            path = _find(resume, Path(root))
        except ValueError as error:
            problem = error
    distributed.raise_on_all(problem)
    return distributed.from_main(path)


def set_aside(root: str | Path, resumed: Path | None) -> None:
    """Rename the checkpoints that do not belong to the history that begins now. One rank calls it.

    These are the later ones when a run resumes from a checkpoint of ``root``, and all of them
    otherwise. Without it, a run that is killed before its first save would resume from them.
    The first checkpoint of the new history removes them.
    """
    root = Path(root)
    last = -1
    if resumed is not None and resumed.resolve().parent == root.resolve():
        last = _number(resumed)
    for path in _steps(root):
        if _number(path) <= last:
            continue
        place = path.with_name(f"{ASIDE}-{path.name}")
        # left by a start that never saved
        if place.exists():
            shutil.rmtree(place)
        os.replace(path, place)
        say(
            f"{path} is now {place.name}, until this run's first checkpoint replaces it"
        )


def _find(resume: str, root: Path) -> Path | None:
    if root.exists() and not root.is_dir():
        raise ValueError(f"{root} is a file, and checkpoints need a folder: remove it")
    if resume == "none":
        return None
    if resume == "auto":
        return latest(root)
    path = Path(resume)
    if not path.is_dir():
        raise ValueError(f"--resume {resume}: there is no such folder")
    # a folder of checkpoints
    if _steps(path):
        newest = latest(path)
        if newest is None:
            raise ValueError(f"--resume {resume}: all its checkpoints are damaged")
        return newest
    # a checkpoint
    problems = verify(path)
    if problems:
        raise ValueError(f"--resume {resume}: {'; '.join(problems)}")
    return path


def _steps(root: Path) -> list[Path]:
    """Checkpoint folders by number, without leftovers (tmp-*) and other files."""
    folders = [
        path
        for path in root.glob("step-*")
        if path.is_dir() and _STEP.fullmatch(path.name)
    ]
    return sorted(folders, key=_number)


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- tensors and state ----


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors; ValueError unless the name ends in .safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = _safetensors_path(path)
    # cloned: the format has no views, so tied weights are stored twice
    copies = {
        name: tensor.detach().cpu().clone().contiguous()
        for name, tensor in tensors.items()
    }
    try:
        save_file(copies, path)
        give_usual_mode(path)
    except SafetensorError as error:
        # a system error, which the library reports as text
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from error


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read safetensors to the CPU; ValueError for other formats, since a pickle can run code."""
    from safetensors.torch import load_file

    return load_file(_safetensors_path(path))


def load_state(path: str | Path) -> dict[str, Any]:
    """Read the ``state`` of a checkpoint folder."""
    return read_json(Path(path) / STATE)


def _safetensors_path(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path.name}: only .safetensors files are supported, convert other formats first"
        )
    return path
