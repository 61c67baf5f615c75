"""Were all ranks started alike? On several nodes each has a command line, a checkout and an environment of its own."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path
from typing import Any

from common import distributed
from common.run_record import differences, plain, versions

ROOT = Path(__file__).resolve().parents[1]


def problem_of(cfg: Any) -> str:
    """How the first rank that differs from rank 0 does: in its config, its packages or this code. Nothing when none
    does. All ranks call it and get the same answer.
    """
    if distributed.world_size() == 1:
        return ""
    own = {"config": plain(cfg), "packages": versions(), "code": digest_of_code()}
    everyone = distributed.gather_objects((socket.gethostname(), own))
    first = everyone[0][1]
    for rank, (host, other) in enumerate(everyone):
        if other != first:
            found = "; ".join(differences(first, other)[:4])
            return f"rank {rank} on {host} was not started as rank 0 on {everyone[0][0]} was: {found}"
    return ""


def digest_of_code() -> str:
    """Of every module that a run may import from here."""
    digest = hashlib.sha256()
    for package in ("common", "rm", "generator", "alignment", "launch"):
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
