"""How an entry point ends when the user can mend what is wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn


def check_new_folder(path: Path) -> None:
    """ValueError unless there is nothing, or an empty folder, to write to."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"--out {path} exists and is not an empty folder")


def exit_with_error(message: str) -> NoReturn:
    """Exit with code 2, without a traceback; rank 0 names the program and says ``message``."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


@contextmanager
def user_errors() -> Iterator[None]:
    """Inside is read and built what the user named: a ValueError or an OSError there is a line and exit code 2.

    Every rank says what it met, for others may have met nothing. With TRACEBACK=1 in the environment the error travels
    as it is.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" (rank {rank})"
        print(f"{Path(sys.argv[0]).name}{where}: {_said(error)}", file=sys.stderr)
        sys.exit(2)


def _said(error: ValueError | OSError) -> str:
    """Of an error of the system its reason and its file, of any other its own words."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
