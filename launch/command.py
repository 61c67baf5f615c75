"""The command line of every entry point: a config, or what the run it describes would need."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from common.config import CommandLine, parse_command_line
from launch.refuse import refuse

C = TypeVar("C")


def read_command(
    schema: type[C],
    argv: Sequence[str] | None = None,
    *,
    description: str,
    extend: Callable[[argparse.ArgumentParser], object] | None = None,
) -> CommandLine[C]:
    """`common.config.parse_command_line`; with ``--dry-run`` the process ends here, after `launch.plan.dry_run`, and
    the options that ``extend`` adds need not be given. Exit with code 2 also where ``run_dir`` or ``out`` can be no
    folder.
    """
    words = sys.argv[1:] if argv is None else argv
    if extend is not None and any(word.partition("=")[0] == "--dry-run" for word in words):
        extend = _lenient(extend)
    command = parse_command_line(schema, argv, description=description, extend=extend)
    if command.dry_run is not None:
        from launch.plan import dry_run

        dry_run(command.cfg, command.dry_run)
    for name in ("run_dir", "out"):
        if hasattr(command.cfg, name) and (problem := _no_folder(name, getattr(command.cfg, name))):
            refuse(problem)
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
        return self._parser.add_argument(*names, **{key: value for key, value in how.items() if key != "required"})


def _lenient(extend: Callable[[Any], object]) -> Callable[[argparse.ArgumentParser], object]:
    return lambda parser: extend(_NothingRequired(parser))
