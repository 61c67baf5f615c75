"""The command line of every entry point: a run's config, or a plan of what it needs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

from common.cli import exit_with_error
from common.config import CommandLine, parse_command_line
from common.relay import leave_launcher
from engine.config import TrainingRun

C = TypeVar("C")


def read_command(
    schema: type[C],
    argv: Sequence[str] | None = None,
    *,
    description: str,
    extend: Callable[[argparse.ArgumentParser], object] | None = None,
) -> CommandLine[C]:
    """Parse the command line with `common.config.parse_command_line`.

    With ``--dry-run`` the process ends here, after printing a plan, and the options that
    ``extend`` adds are not required. Exits with code 2 when ``run_dir`` or ``out`` cannot be
    a folder.
    """
    words = sys.argv[1:] if argv is None else argv

    # A plan needs no videos and no output file.
    options = [word.partition("=")[0] for word in words]
    if extend is not None and "--dry-run" in options:
        extend = _without_required_options(extend)

    command = parse_command_line(schema, argv, description=description, extend=extend)
    if command.dry_run is not None:
        from launch.planning.dry_run import dry_run

        dry_run(command.cfg, command.dry_run)

    # Found now instead of after loading everything.
    for name in ("run_dir", "out"):
        if hasattr(command.cfg, name):
            _check_folder(name, getattr(command.cfg, name))

    # A training step may take longer than a launcher waits for its ranks.
    if isinstance(command.cfg, TrainingRun):
        leave_launcher()
    return command


def _check_folder(name: str, path: str) -> None:
    """Exit with code 2 if a folder cannot be made at ``path``."""
    if not path.strip():
        exit_with_error(f"{name} must name a folder, got {path!r}")
    place = Path(path).absolute()
    nearest = next(folder for folder in (place, *place.parents) if folder.exists())
    if not nearest.is_dir():
        exit_with_error(f"{name}={path}: {nearest} is a file")


class _OptionalParser:
    """Adds options to a parser, none of them required."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._parser = parser

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        """Add an option as argparse does, ignoring ``required``."""
        settings.pop("required", None)
        return self._parser.add_argument(*names, **settings)


def _without_required_options(
    extend: Callable[[Any], object],
) -> Callable[[argparse.ArgumentParser], object]:
    return lambda parser: extend(_OptionalParser(parser))


def take_kind(words: list[str], kinds: Collection[str]) -> str | None:
    """Remove and return the first of ``kinds`` in ``words``; None if there is none.

    A launcher adds --local_rank=N before the user's words, so the kind need not be the first
    word. Values of options are skipped.
    """
    previous = ""
    for place, word in enumerate(words):
        is_value = previous in ("--config", "--resume")
        if word in kinds and not is_value:
            return words.pop(place)
        previous = word
    return None
