"""Run lock, graceful stop on SIGTERM, and watchdog of a training run."""

from __future__ import annotations

import errno
import faulthandler
import fcntl
import json
import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, NoReturn

import torch

from common import distributed, progress
from common.checkpoint import NO_ROOM, NoRoomError
from common.cli import exit_with_error
from common.lasting_output import lasting_output
from common.log import RunLog, say
from common.run_record import SETTINGS
from engine.rank_checks import difference_between_ranks, folder_problem
from engine.stop_request import StopRequest

if TYPE_CHECKING:
    from engine.config import TrainingRun

LOCK_FILE = "lock.json"
# Exit code of a stuck run: EX_TEMPFAIL of sysexits.h, another start may succeed.
STUCK = 75
# By Slurm, in seconds since 1970: when it ends the job.
JOB_END = "SLURM_JOB_END_TIME"
# A run stops when fewer steps than this would fit.
STEPS_LEFT = 1.5
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
OUT_OF_MEMORY = """Where rollouts, decoding and scoring can go one by one, they already do.
These settings take less memory:
  a larger zero_stage (0 to 3), more ranks      splits optimizer state and gradients further
  cache_prompts=true                            frees the text encoder (11 GB for umt5-xxl)
  a smaller micro_batch, or cots_per_row        activations of DPO and of DeScore's training
  a reward server (rewards.NAME.url=)           weights and activations of a reward model
  generator.num_frames, .height, .width         activations of everything
Checkpoints are whole. Started again with other settings of these, the run resumes."""


@contextmanager
def guarded(run: TrainingRun) -> Iterator[Guard]:
    """Join the other ranks and hold the run's folder inside; leave both afterwards.

    Exits with code 2 if the ranks were started with different config, packages or code, or
    do not share the folder. Exits with code 1 if there is no room for a checkpoint.
    """
    with distributed.joined():
        difference = difference_between_ranks(run)
        if difference:
            exit_with_error(difference)
        # A folder belongs to a single kind of run, such as GrpoRun.
        kind = type(run).__name__
        folder = Path(run.run_dir)
        with (
            Guard(folder, kind=kind, watchdog_s=run.watchdog_s) as guard,
            lasting_output(folder / f"output-rank-{distributed.rank()}.log"),
        ):
            try:
                yield guard
            except NoRoomError as error:
                sys.stderr.write(f"{error}\n")
                sys.exit(1)
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise
                sys.stderr.write(f"{_no_room(folder, error, guard)}\n")
                sys.exit(1)
            except torch.OutOfMemoryError as error:
                error.add_note(OUT_OF_MEMORY)
                raise
        distributed.barrier()


def _no_room(folder: Path, error: OSError, guard: Guard) -> str:
    """Say in a sentence that the disk is full, and what of the run is saved."""
    file = error.filename or folder
    free = shutil.disk_usage(folder).free
    return (
        f"{file} cannot be written: {os.strerror(error.errno)}; {free:,} bytes are free in "
        f"{folder}. {guard.request.steps_saved} of {guard.request.steps_done} finished steps "
        "are saved: make room and start the same command again"
    )


def end_run(log: RunLog, message: str, code: int) -> NoReturn:
    """Exit with ``code`` on all ranks; rank 0 prints the message."""
    say(message)
    log.close()
    distributed.barrier()
    distributed.shutdown()
    sys.exit(code)


class Guard:
    """Holds a run's folder, notes signals, and watches that steps go on, on every rank.

    Folder: while rank 0 lives, another run there exits with code 2. So does a run of another
    ``kind``, and this run when a rank does not see the folder.

    Signals: SIGTERM, SIGINT, SIGHUP or SIGUSR1 on any rank ends the run after its current step,
    when it is saved; see `StopRequest`. So does the end of a Slurm job that is too near for
    another step.

    Watchdog: see `Watchdog`; ``watchdog_s`` = 0 switches it off.
    """

    def __init__(self, run_dir: Path, *, kind: str = "", watchdog_s: float) -> None:
        self.run_dir = run_dir
        self.lock = RunLock(run_dir, kind)
        self.watchdog = Watchdog(run_dir, watchdog_s)
        self.request = StopRequest()
        self.received = 0
        self.reason = ""
        self._job_end = _job_end()

    def __enter__(self) -> Guard:
        # Rank 0 locks the folder, and all ranks must see it.
        problem = self.lock.take() if distributed.is_main() else ""
        problem = distributed.from_main(problem) or folder_problem(self.run_dir)
        if problem:
            self.lock.release()
            exit_with_error(problem)
        self.request.install()
        self.watchdog.start()
        return self

    def __exit__(self, *_: object) -> None:
        # In the reverse order of `__enter__`.
        self.watchdog.stop()
        self.request.uninstall()
        self.lock.release()

    def begin(self, steps_done: int = 0) -> None:
        """Note signals from here on, because there is a step to finish."""
        self.request.steps_done = steps_done
        self.request.steps_saved = steps_done
        self.request.begin()

    def step_done(self, steps_done: int = 0, step_s: float = 0.0) -> bool:
        """Return True if the run must stop after this step. All ranks call it after every step.

        step_s  seconds of a step, with which the end of the job is compared
        """
        self.request.begin()
        self.request.steps_done = steps_done
        self.watchdog.reset()
        received = self.request.received
        left = self._job_end - time.time()
        if not received and left < STEPS_LEFT * step_s:
            # As if the scheduler had sent its signal in time.
            received = signal.SIGUSR1
            self.reason = (
                f"the job ends in {left:.0f} s, and a step takes {step_s:.0f} s"
            )
        # The largest signal number wins, so that all ranks leave for the same reason.
        self.received = int(distributed.max_over_ranks(float(received)))
        return bool(self.received)

    def saved(self, steps: int) -> None:
        """Note that a checkpoint of so many steps is complete."""
        self.request.steps_saved = steps

    def leave(self, log: RunLog, step: int) -> NoReturn:
        """End every rank with the exit code of a signal, after ``step`` steps are saved."""
        reason = self.reason or signal.Signals(self.received).name
        message = (
            f"{reason}: stopped after {step} steps, which are saved; started again, the run "
            "goes on"
        )
        end_run(log, message, 128 + self.received)


def _job_end() -> float:
    """Return the time at which Slurm ends this job; infinity without a known limit."""
    try:
        return float(os.environ.get(JOB_END, "")) or math.inf
    except ValueError:
        return math.inf


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold a folder of results; exit with code 2 if another process does. All ranks call it."""
    lock = RunLock(folder, "")
    problem = lock.take() if distributed.is_main() else ""
    problem = distributed.from_main(problem)
    if problem:
        exit_with_error(problem)
    try:
        yield
    finally:
        lock.release()


class RunLock:
    """Locks a run's folder with the system's file lock, which ends with its process.

    On a network file system the lock holds for all nodes if the mount supports it.
    """

    def __init__(self, run_dir: Path, kind: str) -> None:
        self.run_dir = run_dir
        self.kind = kind
        self._file: IO[str] | None = None

    def take(self) -> str:
        """Lock the folder; return why that is impossible, or ""."""
        # Open the lock file without truncating it: it may name the owner.
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            file = (self.run_dir / LOCK_FILE).open("a+", encoding="utf-8")
        except OSError as error:
            return f"run_dir={self.run_dir}: {error.strerror}"
        problem = self._lock(file) or self._kind_problem(file)
        if problem:
            file.close()
            return problem

        # The file names the owner, for whoever is refused.
        owner = {
            "kind": self.kind,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "since": time.ctime(),
        }
        file.truncate(0)
        file.write(json.dumps(owner) + "\n")
        file.flush()
        self._file = file
        return ""

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _lock(self, file: IO[str]) -> str:
        try:
            # Refused without waiting if another process holds the lock.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "someone"
            return (
                f"{self.run_dir} belongs to a run that is still going (after a request to "
                f"stop it finishes its step; kill its process to end it): {owner}"
            )
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            say(
                f"{self.run_dir}: its file system has no locks ({error.strerror}): make sure "
                "that no second run uses it"
            )
        return ""

    def _kind_problem(self, file: IO[str]) -> str:
        """Refuse a folder in which a run of another kind has begun."""
        file.seek(0)
        try:
            kind = json.loads(file.read()).get("kind", "")
        except (ValueError, AttributeError):
            # The file is empty or holds half a line: nothing is known of an earlier run.
            return ""
        # A run that never began has left nothing that could be mixed.
        begun = (self.run_dir / SETTINGS).is_file()
        if self.kind and begun and kind not in ("", self.kind):
            return (
                f"{self.run_dir} holds a {kind}, and this is a {self.kind}: give it a folder "
                "of its own (run_dir=)"
            )
        return ""


class Watchdog:
    """Ends the process if nothing moves for ``limit_s`` seconds; 0 switches it off.

    A step may take longer, as long as it reports progress (`common.progress`) on the way.
    The stacks of all threads go to stderr and to stacks-rank-N.txt, and the exit code is
    `STUCK`, so that the launcher ends the other ranks. The first step, with all that is
    loaded before it, may take five times as long to report anything.
    """

    def __init__(self, run_dir: Path, limit_s: float) -> None:
        self.run_dir = run_dir
        self.limit_s = limit_s
        self._last_reset = time.monotonic() + 4 * limit_s
        self._stopped = threading.Event()

    def start(self) -> None:
        if self.limit_s:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def reset(self) -> None:
        """Start the time again, after a step."""
        self._last_reset = time.monotonic()

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self.limit_s / 4)):
            # Reset after every step, and fed from inside it.
            moved = max(self._last_reset, progress.last_moved())
            waited = time.monotonic() - moved
            if waited >= self.limit_s:
                self._end_process(waited)

    def _end_process(self, waited: float) -> NoReturn:
        # Show where every thread is.
        rank = distributed.rank()
        sys.stderr.write(
            f"rank {rank}: no progress for {waited:.0f} s, stuck; the stacks of all threads:\n"
        )
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()

        # In a thread of its own: the process may be stuck in the folder's file system.
        file = self.run_dir / f"stacks-rank-{rank}.txt"
        writer = threading.Thread(target=_write_stacks, args=(file,), daemon=True)
        writer.start()
        writer.join(5.0)
        os._exit(STUCK)


def _write_stacks(file: Path) -> None:
    with file.open("w", encoding="utf-8") as stream:
        faulthandler.dump_traceback(file=stream, all_threads=True)
