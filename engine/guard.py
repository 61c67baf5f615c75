"""Around a run's steps: no second run in its folder, a stop that loses nothing, an eye on whether it moves."""

from __future__ import annotations

import errno
import faulthandler
import fcntl
import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, TYPE_CHECKING, Any, NoReturn

import torch

from common import distributed
from common.checkpoint import NoRoomError
from common.cli import exit_with_error
from common.log import RunLog, say
from common.run_record import SETTINGS, differences, plain, versions

if TYPE_CHECKING:
    from engine.config import TrainingRun

LOCK = "lock.json"
STUCK = 75  # exit code, EX_TEMPFAIL of sysexits.h: nothing is wrong that another start might not mend
NO_MEMORY = """Rollouts, decoding and judging were cut to one at once, where they can be. Less memory takes also:
  a larger zero_stage (0 to 3), more ranks        the optimizer's and the gradients' part of each rank
  cache_prompts=true                              no text encoder beside the transformer (11 GB for umt5-xxl)
  a smaller micro_batch, or cots_per_row        activations of DPO and of DeScore's training
  a reward server (rewards.NAME.url=)             nothing of a judge, neither weights nor activations
  generator.num_frames, .height, .width           activations of everything
Checkpoints are whole; started again with other settings of these, the run goes on."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def guarded(cfg: TrainingRun) -> Iterator[Guard]:
    """Inside, this process has joined the other ranks and the folder is theirs; afterwards they part. Exit with code 2
    when the ranks were not started alike or do not share the folder. Where there is no room for a checkpoint, the run
    ends with exit code 1 and says so; those before are whole.
    """
    with distributed.joined():
        if problem := difference_between_ranks(cfg):
            exit_with_error(problem)
        with Guard(
            Path(cfg.run_dir), kind=type(cfg).__name__, watchdog_s=cfg.watchdog_s
        ) as guard:
            try:
                yield guard
            except NoRoomError as error:
                sys.stderr.write(f"{error}\n")
                sys.exit(1)
            except torch.OutOfMemoryError as error:
                error.add_note(NO_MEMORY)
                raise
        distributed.barrier()


def end_run(log: RunLog, message: str, code: int) -> NoReturn:
    """All ranks part here and exit with ``code``; rank 0 says why."""
    say(message)
    log.close()
    distributed.barrier()
    distributed.shutdown()
    sys.exit(code)


class Guard:
    """Every rank of a training run holds one from before it writes its first file until it is done.

    The folder belongs to it: while rank 0 lives, another run there exits with code 2 and says whose it is; so does, at
    any time, a run of another ``kind``, and this one when a rank does not see the folder. SIGTERM, SIGINT or SIGUSR1,
    on whichever rank, ends the run after its step, when it is saved; SIGTERM or SIGINT again ends it at once, and so
    it does before `begin`: while weights load or a reward server is waited for there is nothing to save. SIGUSR1 is
    for schedulers: launchers that ignore it leave the ranks alone, while at SIGTERM deepspeed's kills them after 30
    seconds.

    watchdog_s  seconds without a finished step after which the run counts as stuck: all threads' stacks go to stderr
                and to stacks-rank-N.txt, and the process exits with `STUCK`, so that the launcher ends the others. The
                first step, with all that is loaded before it, may take five times as long. 0 for never
    """

    def __init__(self, run_dir: Path, *, kind: str = "", watchdog_s: float) -> None:
        self.run_dir, self.kind, self.watchdog_s = run_dir, kind, watchdog_s
        self.received, self.beat = 0, time.monotonic() + 4 * watchdog_s
        self.begun = False
        self._lock: IO[str] | None = None
        self._done = threading.Event()
        self._before: dict[int, object] = {}

    def __enter__(self) -> Guard:
        problem = distributed.from_main(self._take() if distributed.is_main() else "")
        if problem or (problem := folder_problem(self.run_dir)):
            self._release()
            exit_with_error(problem)
        if threading.current_thread() is threading.main_thread():
            # the system's own answer to the first two, for Python's would come when a wait in C++ is over
            answers = {
                number: self._note if number == signal.SIGUSR1 else signal.SIG_DFL
                for number in SIGNALS
            }
            self._before = {
                number: signal.signal(number, answer)
                for number, answer in answers.items()
            }
        if self.watchdog_s:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._release()

    def begin(self) -> None:
        """From here on there is a step to finish: a signal is noted. A loop calls it before its first step."""
        if not self.begun and self._before:
            for number in SIGNALS:
                signal.signal(number, self._note)
        self.begun = True

    def step_done(self) -> bool:
        """All ranks call it after every step: True when one of them was asked to stop."""
        self.begin()
        self.beat = time.monotonic()
        self.received = int(distributed.max_over_ranks(float(self.received)))
        return bool(self.received)

    def leave(self, log: RunLog, step: int) -> NoReturn:
        """End as a process that a signal ended, on every rank, after ``step`` steps are saved."""
        name = signal.Signals(self.received).name
        message = f"{name}: stopped after {step} steps, which are saved; started again, it goes on"
        end_run(log, message, 128 + self.received)

    def _take(self) -> str:
        """Own the folder; what is wrong, or nothing. The lock is the system's: it ends with the process, however. On a
        network file system it holds for all nodes if the mount says so; where there are no locks at all, it is said.
        """
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            lock = (self.run_dir / LOCK).open("a+", encoding="utf-8")
        except OSError as error:
            return f"run_dir={self.run_dir}: {error.strerror}"
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read() or "someone"
            lock.close()
            return (
                f"{self.run_dir} belongs to a run that is still going: {owner.strip()}"
            )
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            say(
                f"{self.run_dir}: its file system has no locks ({error.strerror}): see that no second run uses it"
            )
        begun = (
            self.run_dir / SETTINGS
        ).is_file()  # else nothing is there that could be mixed
        if begun and (kind := _kind_of(lock)) not in ("", self.kind):
            lock.close()
            return f"{self.run_dir} holds a {kind}, and this is a {self.kind}: give it a folder of its own (run_dir=)"
        lock.truncate(0)
        owner = {
            "kind": self.kind,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "since": time.ctime(),
        }
        lock.write(json.dumps(owner) + "\n")
        lock.flush()
        self._lock = lock
        return ""

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if (
            number != signal.SIGUSR1
        ):  # a scheduler may send it to every process, and a script that gets it pass it on
            signal.signal(
                number, signal.SIG_DFL
            )  # the next one ends the process, even where Python waits for C++
        if distributed.is_main():
            again = "" if number == signal.SIGUSR1 else "; again, at once"
            told = f"\n{signal.Signals(number).name}: this step is finished and saved, then the run ends{again}\n"
            os.write(2, told.encode())

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self.watchdog_s / 4)):
            waited = time.monotonic() - self.beat
            if waited < self.watchdog_s:
                continue
            rank = distributed.rank()
            sys.stderr.write(
                f"rank {rank}: no step for {waited:.0f} s, stuck; the stacks of all threads:\n"
            )
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
            sys.stderr.flush()
            # beside this thread: it may be the folder's file system that all wait for
            keeper = threading.Thread(
                target=self._keep_stacks, args=(rank,), daemon=True
            )
            keeper.start()
            keeper.join(5.0)
            os._exit(STUCK)

    def _keep_stacks(self, rank: int) -> None:
        with (self.run_dir / f"stacks-rank-{rank}.txt").open(
            "w", encoding="utf-8"
        ) as file:
            faulthandler.dump_traceback(file=file, all_threads=True)


def _kind_of(lock: IO[str]) -> str:
    """Which kind of run the folder was of; "" where no run was, or nothing is known of it."""
    lock.seek(0)
    try:
        kind = json.loads(lock.read()).get("kind", "")
    except (ValueError, AttributeError):  # empty, or a half-written line
        return ""
    return kind if isinstance(kind, str) else ""


ROOT = Path(__file__).resolve().parents[1]


def difference_between_ranks(cfg: Any) -> str:
    """How the first rank that differs from rank 0 does: in its config, its packages or this code. Nothing when none
    does. All ranks call it and get the same answer.
    """
    if distributed.world_size() == 1:
        return ""
    own = {"config": plain(cfg), "packages": versions(), "code": digest_of_code()}
    everyone = distributed.gather_objects((socket.gethostname(), own))
    first = everyone[0][1]
    for rank, (host, other) in enumerate(everyone):
        if other != first:
            found = "; ".join(differences(first, other)[:4])
            return f"rank {rank} on {host} was not started as rank 0 on {everyone[0][0]} was: {found}"
    return ""


def digest_of_code() -> str:
    """Of every module that a run may import from here."""
    digest = hashlib.sha256()
    for package in ("common", "rm", "generator", "engine", "alignment", "launch"):
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def folder_problem(folder: Path, *, patience_s: float = 10.0) -> str:
    """Which ranks do not see in ``folder`` what rank 0 writes there, as a sentence; nothing when all do.

    All ranks call it and get the same answer. A network file system may show a new file late: a rank that does not see
    it looks again for ``patience_s``. The name is new every time, so that no answer from before can be remembered.
    """
    if distributed.world_size() == 1:
        return ""
    token = folder / f".seen-by-all-{uuid.uuid4().hex}"
    error = None
    if distributed.is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            token.touch()
        except OSError as problem:
            error = problem
    distributed.raise_on_all(error)
    name = distributed.from_main(token.name)
    end = time.monotonic() + patience_s
    while not (seen := (folder / name).exists()) and time.monotonic() < end:
        time.sleep(0.1)
    places = distributed.gather_objects(
        (seen, distributed.rank(), socket.gethostname())
    )
    if distributed.is_main():
        token.unlink()
    blind = [f"rank {rank} on {host}" for seen, rank, host in places if not seen]
    if not blind:
        return ""
    shown = ", ".join(blind[:4]) + (
        f" and {len(blind) - 4} more" if len(blind) > 4 else ""
    )
    return (
        f"{os.path.abspath(folder)} is not one folder for all ranks: {shown} cannot see what rank 0 on {places[0][2]} "
        "writes there. Nodes need a file system that they share, or a path that leads to it on each of them"
    )
