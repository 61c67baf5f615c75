"""The command line of every entry point: a run's config, or a plan of what it needs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from common.cli import exit_with_error
from common.config import CommandLine, parse_command_line
from common.relay import leave_launcher
from engine.config import TrainingRun

if TYPE_CHECKING:
    from engine.trainer import TrainingTask

C = TypeVar("C")
R = TypeVar("R", bound="TrainingRun")


def read_command(
    schema: type[C],
    argv: Sequence[str] | None = None,
    *,
    description: str,
    extend: Callable[[argparse.ArgumentParser], object] | None = None,
) -> CommandLine[C]:
    """Parse the command line with `common.config.parse_command_line`.

    With ``--dry-run`` the process ends here, after printing a plan. Exits with code 2 when
    ``run_dir`` or ``out`` cannot be a folder, and with ``--rehearse``, which `run_command` takes.
    """
    command = _parse(schema, argv, description, extend)
    if command.rehearse is not None:
        exit_with_error("this command cannot be rehearsed")
    return _checked(command)


def run_command(
    schema: type[C],
    run: Callable[[CommandLine[C]], Any],
    argv: Sequence[str] | None = None,
    *,
    description: str,
    extend: Callable[[argparse.ArgumentParser], object] | None = None,
) -> Any:
    """Parse the command line as `read_command` does, then ``run`` it.

    With ``--rehearse`` one unit of it runs on a simulated device, and the process ends.
    """
    command = _parse(schema, argv, description, extend)
    if command.rehearse is not None:
        from launch.rehearsal.rehearse import rehearse

        rehearse(command, run)
    return run(_checked(command))


def _parse(
    schema: type[C],
    argv: Sequence[str] | None,
    description: str,
    extend: Callable[[argparse.ArgumentParser], object] | None,
) -> CommandLine[C]:
    command = parse_command_line(schema, argv, description=description, extend=extend)
    if command.dry_run is not None:
        from launch.planning.dry_run import dry_run

        dry_run(command.cfg, command.dry_run, command.measured)
    return command


def _checked(command: CommandLine[C]) -> CommandLine[C]:
    """Check the folders of a run, and prepare the process for training."""
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


def train_command(
    schema: type[R],
    *,
    description: str,
    read_input: Callable[[R], tuple[Any, ...]],
    build_task: Callable[..., TrainingTask],
) -> None:
    """Read the command line of a training command, then `train`."""

    def run(command: CommandLine[R]) -> None:
        train(command.cfg, read_input, build_task, resume=command.resume)

    run_command(schema, run, description=description)


def train(
    run: R,
    read_input: Callable[[R], tuple[Any, ...]],
    build_task: Callable[..., TrainingTask],
    *,
    resume: str,
) -> None:
    """Read a run's input, join the ranks, build everything with ``build_task`` and train.

    ``build_task`` gets the run and what ``read_input`` returns.
    """
    from launch.compose import quiet

    quiet()
    from engine.trainer import run_training
    from launch.training.inputs import with_inputs

    # Read the input first: a mistake in it ends the process within seconds.
    parts = read_input(run)
    build_recorded = with_inputs(run, lambda: build_task(run, *parts))
    run_training(run, build_recorded, resume=resume)


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
