"""The command line of every entry point: a config, or what the run it describes would need."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

from common.cli import exit_with_error
from common.config import CommandLine, parse_command_line

C = TypeVar("C")


def read_command(
    schema: type[C],
    argv: Sequence[str] | None = None,
    *,
    description: str,
    extend: Callable[[argparse.ArgumentParser], object] | None = None,
) -> CommandLine[C]:
    """`common.config.parse_command_line`; with ``--dry-run`` the process ends here, after `launch.planning.dry_run.dry_run`, and
    the options that ``extend`` adds need not be given. Exit with code 2 also where ``run_dir`` or ``out`` can be no
    folder.
    """
    words = sys.argv[1:] if argv is None else argv
    if extend is not None and any(
        word.partition("=")[0] == "--dry-run" for word in words
    ):
        extend = _lenient(extend)
    command = parse_command_line(schema, argv, description=description, extend=extend)
    if command.dry_run is not None:
        from launch.planning.dry_run import dry_run

        dry_run(command.cfg, command.dry_run)
    for name in ("run_dir", "out"):
        if hasattr(command.cfg, name) and (
            problem := _no_folder(name, getattr(command.cfg, name))
        ):
            exit_with_error(problem)
    return command


def _no_folder(name: str, path: str) -> str:
    """Why nothing can be written there, seen from here; or nothing."""
    if not path.strip():
        return f"{name} must name a folder, got {path!r}"
    place = Path(path).absolute()
    there = next(one for one in (place, *place.parents) if one.exists())
    return "" if there.is_dir() else f"{name}={path}: {there} is a file"


class _NothingRequired:
    """A parser whose options may all be left out."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._parser = parser

    def add_argument(self, *names: str, **how: Any) -> argparse.Action:
        return self._parser.add_argument(
            *names, **{key: value for key, value in how.items() if key != "required"}
        )


def _lenient(
    extend: Callable[[Any], object],
) -> Callable[[argparse.ArgumentParser], object]:
    return lambda parser: extend(_NothingRequired(parser))


def take_kind(words: list[str], kinds: Collection[str]) -> str | None:
    """Take the first of ``kinds`` out of ``words``; None if there is none.

    A launcher puts --local_rank=N in front of what the user typed, so it need not be the first word. The value of an
    option is not looked at.
    """
    options = [False, *(word in ("--config", "--resume") for word in words)]
    place = next(
        (i for i, word in enumerate(words) if word in kinds and not options[i]), None
    )
    return None if place is None else words.pop(place)
