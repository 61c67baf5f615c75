"""Do all ranks see one folder? On several nodes it must be on a file system that they share."""

from __future__ import annotations

import os
import socket
import time
import uuid
from pathlib import Path

from common import distributed


def problem_of(folder: Path, *, patience_s: float = 10.0) -> str:
    """Which ranks do not see in ``folder`` what rank 0 writes there, as a sentence; nothing when all do.

    All ranks call it and get the same answer. A network file system may show a new file late: a rank that does not see
    it looks again for ``patience_s``. The name is new every time, so that no answer from before can be remembered.
    """
    if distributed.world_size() == 1:
        return ""
    token = folder / f".seen-by-all-{uuid.uuid4().hex}"
    error = None
    if distributed.is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            token.touch()
        except OSError as problem:
            error = problem
    distributed.raise_on_all(error)
    name = distributed.from_main(token.name)
    end = time.monotonic() + patience_s
    while not (seen := (folder / name).exists()) and time.monotonic() < end:
        time.sleep(0.1)
    places = distributed.gather_objects((seen, distributed.rank(), socket.gethostname()))
    if distributed.is_main():
        token.unlink()
    blind = [f"rank {rank} on {host}" for seen, rank, host in places if not seen]
    if not blind:
        return ""
    shown = ", ".join(blind[:4]) + (f" and {len(blind) - 4} more" if len(blind) > 4 else "")
    return (
        f"{os.path.abspath(folder)} is not one folder for all ranks: {shown} cannot see what rank 0 on {places[0][2]} "
        "writes there. Nodes need a file system that they share, or a path that leads to it on each of them"
    )
