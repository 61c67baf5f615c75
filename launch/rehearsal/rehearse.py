"""``--rehearse``: run one unit of a command on a simulated GPU, as rank 0 of N.

    python launch/grpo.py --config configs/wan/grpo.yaml --rehearse 8xh100
    python launch/dpo.py --config configs/wan/dpo.yaml --rehearse 8xh100 --measured rates.json

The command runs its usual code on modules of full size without weights. What is simulated is
listed in `launch.rehearsal.report.BLIND_SPOTS`. Exit code 1 where a tensor is on the wrong
device or has the wrong dtype, 2 where the run cannot be rehearsed.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar
from unittest import mock

from common.cli import exit_with_error, user_errors

if TYPE_CHECKING:
    from common.config import CommandLine
    from launch.rehearsal.cots import ShortCots
    from launch.rehearsal.device import SimulatedGpu
    from launch.rehearsal.stand_ins import Adapted

C = TypeVar("C")
FILE = "rehearsal.json"


class UnitDone(BaseException):
    """The unit is done; no handler of errors may stop this."""


def rehearse(command: CommandLine[C], run: Callable[[CommandLine[C]], Any]) -> NoReturn:
    """Rehearse a command: ``run`` gets a command line that makes one unit; then exit."""
    from launch.compose import quiet
    from launch.planning.dry_run import parse_where

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        exit_with_error("a rehearsal plays all ranks: start it without a launcher")
    # Where it runs, and by which rates.
    where = parse_where(command.rehearse, option="--rehearse")
    quiet()
    from launch.planning.models import COT_TOKENS
    from launch.planning.roofline import rates_of
    from launch.rehearsal.cots import ShortCots
    from launch.rehearsal.device import SimulatedGpu
    from launch.rehearsal.report import lines_of, rehearsal_of, write
    from launch.rehearsal.stand_ins import adapt

    with user_errors():
        rates = rates_of(where.key, command.measured)
    gpu = SimulatedGpu(rates)
    cots = ShortCots(gpu, length=COT_TOKENS)
    began = time.process_time()
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as temporary:
        with user_errors():
            adapted = adapt(command.cfg, Path(temporary), where.ranks)
        # An error travels, after the result is printed.
        try:
            run_unit(command, run, gpu, cots, adapted, ranks=where.ranks)
        finally:
            result = rehearsal_of(type(command.cfg).__name__, where, gpu, adapted, cots)
            result.cpu_minutes = round((time.process_time() - began) / 60, 2)
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            result.process_gib = round(used / 2**20, 2)
            print("\n".join(lines_of(result)), flush=True)
            file = output_file(command)
            if file is not None:
                write(result, file)
                print(f"  {file} has all of it", flush=True)
    sys.exit(1 if result.faults else 0)


def output_file(command: CommandLine[Any]) -> Path | None:
    """Return where the JSON goes: --rehearse-out, or the folder that the run writes to."""
    if command.rehearse_out is not None:
        return command.rehearse_out
    for name in ("run_dir", "out"):
        if hasattr(command.cfg, name):
            return Path(getattr(command.cfg, name)) / FILE
    out = getattr(command.args, "out", None)
    return None if out is None else Path(out).parent / FILE


def run_unit(
    command: CommandLine[C],
    run: Callable[[CommandLine[C]], Any],
    gpu: SimulatedGpu,
    cots: ShortCots,
    adapted: Adapted,
    *,
    ranks: int,
) -> None:
    """Run one unit on the simulated device. Errors of the command travel."""
    flags = {**vars(command.args), **adapted.flags}
    short = replace(
        command,
        cfg=adapted.cfg,
        resume="none",
        args=type(command.args)(**flags),
    )
    with suppress(UnitDone), simulated(gpu, ranks), cots.used(), Noted(gpu):
        run(short)


class Noted(AbstractContextManager[None]):
    """Notes an error that ends the command among the faults, with its line; it travels on."""

    def __init__(self, gpu: SimulatedGpu) -> None:
        self.gpu = gpu

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from launch.rehearsal.ledger import describe

        if isinstance(error, SystemExit) and error.code:
            self.gpu.faults.append(f"the command ended with exit code {error.code}")
        elif isinstance(error, Exception) and not self.gpu.faults:
            # PyTorch refuses some operations before the device sees them.
            self.gpu.faults.append(describe(error))


@contextmanager
def simulated(gpu: SimulatedGpu, ranks: int) -> Iterator[None]:
    """Inside, this process is rank 0 of ``ranks`` on the simulated device."""
    from common import memory, progress, strict_loading
    from launch.rehearsal.model_folders import shapes_only
    from launch.rehearsal.patches import as_on_cuda
    from launch.rehearsal.ranks import rank_0_of

    patch = mock.patch.object
    with ExitStack() as stack:
        stack.enter_context(rank_0_of(ranks))
        stack.enter_context(patch(strict_loading, "_read_weights", shapes_only(gpu)))
        stack.enter_context(patch(progress, "enter", _phases(gpu, progress.enter)))
        for owner, name, stand_in in _ends():
            stack.enter_context(patch(owner, name, stand_in))
        _mark_optimizer_step(gpu, stack)
        stack.enter_context(memory.device_is(gpu.device))
        stack.enter_context(as_on_cuda(gpu))
        stack.enter_context(gpu)
        yield


def _phases(gpu: SimulatedGpu, enter: Callable[[str], None]) -> Callable[[str], None]:
    """Let every phase of the command be a phase of the ledger."""

    def enter_both(phase: str) -> None:
        enter(phase)
        gpu.ledger.enter(phase)

    return enter_both


def _ends() -> list[tuple[Any, str, Any]]:
    """Where a unit ends: before a training run saves, and when a table gets its rows."""
    import uvicorn

    from engine import trainer
    from launch.evaluation.results_table import ResultsTable
    from launch.rehearsal.request import ask_once

    def done(*_: Any, **__: Any) -> NoReturn:
        raise UnitDone

    def answered(app: Any, **_: Any) -> NoReturn:
        ask_once(app)
        raise UnitDone

    return [
        (trainer, "_save", done),
        (ResultsTable, "add", done),
        (uvicorn, "run", answered),
    ]


def _mark_optimizer_step(gpu: SimulatedGpu, stack: ExitStack) -> None:
    """Make DeepSpeed's step of the optimizer a phase of its own."""
    from deepspeed import DeepSpeedEngine

    from launch.rehearsal.ledger import OPTIMIZER_STEP

    take_step = DeepSpeedEngine._take_model_step

    def step(engine: DeepSpeedEngine, *args: Any, **kwargs: Any) -> Any:
        before = gpu.ledger.phase
        gpu.ledger.enter(OPTIMIZER_STEP)
        try:
            return take_step(engine, *args, **kwargs)
        finally:
            gpu.ledger.enter(before)

    stack.enter_context(mock.patch.object(DeepSpeedEngine, "_take_model_step", step))
