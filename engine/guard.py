"""Run lock, graceful stop on SIGTERM, and watchdog of a training run."""

from __future__ import annotations

import errno
import faulthandler
import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, NoReturn

import torch

from common import distributed
from common.checkpoint import NoRoomError
from common.cli import exit_with_error
from common.log import RunLog, say
from common.run_record import SETTINGS
from engine.rank_checks import difference_between_ranks, folder_problem

if TYPE_CHECKING:
    from engine.config import TrainingRun

LOCK_FILE = "lock.json"
# Exit code of a stuck run: EX_TEMPFAIL of sysexits.h, another start may succeed.
STUCK = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
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
        with Guard(Path(run.run_dir), kind=kind, watchdog_s=run.watchdog_s) as guard:
            try:
                yield guard
            except NoRoomError as error:
                sys.stderr.write(f"{error}\n")
                sys.exit(1)
            except torch.OutOfMemoryError as error:
                error.add_note(OUT_OF_MEMORY)
                raise
        distributed.barrier()


def end_run(log: RunLog, message: str, code: int) -> NoReturn:
    """Exit with ``code`` on all ranks; rank 0 prints the message."""
    say(message)
    log.close()
    distributed.barrier()
    distributed.shutdown()
    sys.exit(code)


class Guard:
    """Holds a run's folder, notes signals, and watches that steps finish, on every rank.

    Folder: while rank 0 lives, another run there exits with code 2. So does a run of another
    ``kind``, and this run when a rank does not see the folder.

    Signals: SIGTERM, SIGINT or SIGUSR1 on any rank ends the run after its current step, when
    it is saved. A second SIGTERM or SIGINT ends it immediately, and so does the first before
    `begin`, when there is nothing to save. SIGUSR1 is for schedulers: launchers that ignore
    it leave the ranks alone, while at SIGTERM deepspeed's kills them after 30 seconds.

    Watchdog: see `Watchdog`; ``watchdog_s`` = 0 switches it off.
    """

    def __init__(self, run_dir: Path, *, kind: str = "", watchdog_s: float) -> None:
        self.run_dir = run_dir
        self.lock = RunLock(run_dir, kind)
        self.watchdog = Watchdog(run_dir, watchdog_s)
        self.received = 0
        self.begun = False
        self._previous_handlers: dict[int, object] = {}

    def __enter__(self) -> Guard:
        # Rank 0 locks the folder, and all ranks must see it.
        problem = self.lock.take() if distributed.is_main() else ""
        problem = distributed.from_main(problem) or folder_problem(self.run_dir)
        if problem:
            self.lock.release()
            exit_with_error(problem)

        # The system's default handlers end the process even while Python waits for C++.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                is_noted = number == signal.SIGUSR1
                handler = self._note_signal if is_noted else signal.SIG_DFL
                self._previous_handlers[number] = signal.signal(number, handler)
        self.watchdog.start()
        return self

    def __exit__(self, *_: object) -> None:
        # In the reverse order of `__enter__`.
        self.watchdog.stop()
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self.lock.release()

    def begin(self) -> None:
        """Note signals from here on, because there is a step to finish."""
        if not self.begun and self._previous_handlers:
            for number in SIGNALS:
                signal.signal(number, self._note_signal)
        self.begun = True

    def step_done(self) -> bool:
        """Return True if any rank has received a signal. All ranks call it after every step."""
        # The largest signal number wins, so that all ranks leave for the same reason.
        self.begin()
        self.watchdog.reset()
        self.received = int(distributed.max_over_ranks(float(self.received)))
        return bool(self.received)

    def leave(self, log: RunLog, step: int) -> NoReturn:
        """End every rank with the exit code of a signal, after ``step`` steps are saved."""
        name = signal.Signals(self.received).name
        message = f"{name}: stopped after {step} steps, which are saved; started again, it goes on"
        end_run(log, message, 128 + self.received)

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        hint = ""
        # SIGUSR1 may come several times: from a scheduler, and from a script that it reaches.
        if number != signal.SIGUSR1:
            signal.signal(number, signal.SIG_DFL)
            hint = "; a second signal ends it immediately"
        if distributed.is_main():
            name = signal.Signals(number).name
            text = (
                f"\n{name}: this step is finished and saved, then the run ends{hint}\n"
            )
            # Not print: a signal may interrupt a write to the same stream.
            os.write(2, text.encode())


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
            return f"{self.run_dir} belongs to a run that is still going: {owner}"
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
        if begun and kind not in ("", self.kind):
            return (
                f"{self.run_dir} holds a {kind}, and this is a {self.kind}: give it a folder "
                "of its own (run_dir=)"
            )
        return ""


class Watchdog:
    """Ends the process if no step finishes for ``limit_s`` seconds; 0 switches it off.

    The stacks of all threads go to stderr and to stacks-rank-N.txt, and the exit code is
    `STUCK`, so that the launcher ends the other ranks. The first step, with all that is
    loaded before it, may take five times as long.
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
            # Reset after every step.
            waited = time.monotonic() - self._last_reset
            if waited >= self.limit_s:
                self._end_process(waited)

    def _end_process(self, waited: float) -> NoReturn:
        # Show where every thread is.
        rank = distributed.rank()
        sys.stderr.write(
            f"rank {rank}: no step for {waited:.0f} s, stuck; the stacks of all threads:\n"
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
