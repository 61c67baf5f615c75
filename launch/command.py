"""The command line of every entry point: a config, or what the run it describes would need."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TypeVar

from common.config import CommandLine, parse_command_line

C = TypeVar("C")


def read_command(
    schema: type[C],
    argv: Sequence[str] | None = None,
    *,
    description: str,
    extend: Callable[[argparse.ArgumentParser], object] | None = None,
) -> CommandLine[C]:
    """`common.config.parse_command_line`; with ``--dry-run`` the process ends here, after `launch.plan.dry_run`."""
    command = parse_command_line(schema, argv, description=description, extend=extend)
    if command.dry_run is not None:
        from launch.plan import dry_run

        dry_run(command.cfg, command.dry_run)
    return command
