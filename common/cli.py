"""How a command ends when the user can fix the problem: a one-line message and exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn


def command_parser(doc: str) -> argparse.ArgumentParser:
    """Make the parser of a program; its help has the docstring's first line and its examples.

    The examples are the first indented lines of ``doc``.
    """
    lines = doc.splitlines()
    examples: list[str] = []
    for line in lines[1:]:
        if line.startswith("    "):
            examples.append(line)
        elif examples:
            break
    return argparse.ArgumentParser(
        description=lines[0],
        epilog="\n".join(["examples:", *examples]) if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def new_folder_parser(doc: str) -> argparse.ArgumentParser:
    """Make a `command_parser` with the option ``--out`` of a folder for `check_new_folder`."""
    parser = command_parser(doc)
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="a new or empty folder",
    )
    return parser


def check_new_folder(path: Path) -> None:
    """Raise ValueError unless the path does not exist or is an empty folder."""
    if not path.exists():
        return
    # Nothing of the user's is overwritten.
    if not path.is_dir() or any(path.iterdir()):
        raise ValueError(f"--out {path} exists and is not an empty folder")


def exit_with_error(message: str) -> NoReturn:
    """Exit with code 2 and a message from rank 0, without a traceback."""
    if _rank() == "0":
        # All ranks have this error: a single line is enough.
        sys.stderr.write(f"{_program()}: {message}\n")
    sys.exit(2)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a ValueError or OSError inside the block into a one-line message and exit code 2.

    Use it where files and settings of the user are read. Every rank prints its error, since other
    ranks may have none. With TRACEBACK=1 in the environment the error is raised as it is.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        # rank 0 needs no label: a command without ranks is rank 0
        label = "" if _rank() == "0" else f" (rank {_rank()})"
        sys.stderr.write(f"{_program()}{label}: {_describe(error)}\n")
        sys.exit(2)


def _rank() -> str:
    return os.environ.get("RANK", "0")


def _program() -> str:
    return Path(sys.argv[0]).name


def _describe(error: ValueError | OSError) -> str:
    """File and reason of a system error, or else the message of the error."""
    # Python's own text adds the error's number.
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
