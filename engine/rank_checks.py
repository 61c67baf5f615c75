"""Check that all ranks run the same config, packages and code, and share one folder."""

from __future__ import annotations

import hashlib
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from common import distributed
from common.run_record import differences, plain, versions

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("common", "rm", "generator", "engine", "alignment", "launch")


def difference_between_ranks(cfg: Any) -> str:
    """Describe how the first rank that differs from rank 0 does, or return "".

    Compared are the config, the versions of packages and the code. All ranks call it and get
    the same answer.
    """
    if distributed.world_size() == 1:
        return ""
    # Every rank compares the same list, so all of them find the same difference.
    facts = {"config": plain(cfg), "packages": versions(), "code": digest_of_code()}
    ranks = distributed.gather_objects((socket.gethostname(), facts))
    first_host, first_facts = ranks[0]
    for rank, (host, other_facts) in enumerate(ranks):
        if other_facts != first_facts:
            changes = "; ".join(differences(first_facts, other_facts)[:4])
            return (
                f"rank {rank} on {host} was not started as rank 0 on {first_host} was: "
                f"{changes}"
            )
    return ""


def digest_of_code() -> str:
    """Return the SHA-256 of every module that a run may import from this repository."""
    # Names count too: an added file may be imported on one rank only.
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def folder_problem(folder: Path, *, patience_s: float = 10.0) -> str:
    """Name the ranks that do not see what rank 0 writes into a folder, or return "".

    All ranks call it and get the same answer. A network file system may show a new file
    late, so a rank looks again for ``patience_s`` seconds. The file's name is new every
    time, so that no cached answer can be wrong.
    """
    if distributed.world_size() == 1:
        return ""
    # Look for rank 0's file.
    name = _write_token(folder)
    deadline = time.monotonic() + patience_s
    is_seen = (folder / name).exists()
    while not is_seen and time.monotonic() < deadline:
        time.sleep(0.1)
        is_seen = (folder / name).exists()

    # Only when all ranks have looked may the file go.
    ranks = distributed.gather_objects((is_seen, socket.gethostname()))
    if distributed.is_main():
        (folder / name).unlink()
    # Say who is blind.
    blind = []
    for rank, (seen, host) in enumerate(ranks):
        if not seen:
            blind.append(f"rank {rank} on {host}")
    if not blind:
        return ""
    shown = ", ".join(blind[:4])
    if len(blind) > 4:
        shown += f" and {len(blind) - 4} more"
    return (
        f"{folder.absolute()} is not one folder for all ranks: {shown} cannot see what "
        f"rank 0 on {ranks[0][1]} writes there. Nodes need a shared file system, or a path "
        "that leads to it on each of them"
    )


def _write_token(folder: Path) -> str:
    """Create an empty file on rank 0 and return its name on all ranks."""
    token = folder / f".seen-by-all-{uuid.uuid4().hex}"
    # If rank 0 fails, the other ranks must not wait for its file.
    problem = None
    if distributed.is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            token.touch()
        except OSError as error:
            problem = error
    distributed.raise_on_all(problem)
    return distributed.from_main(token.name)
