"""Keeps a rank out of reach of its launcher, so that it can finish its step.

deepspeed and torchrun kill their ranks 30 seconds after a request to stop, and die of some signals
without stopping them at all. A step may take hours. So every rank of a launcher becomes

    launcher -> relay        the launcher's child: passes signals on, ends as the rank ends
    keeper   -> rank         in a session of their own, where no launcher and no terminal reaches

The relay treats the launcher's own SIGTERM as the first request only, since the launcher sends it
after the user's signal too. It asks the rank to stop when the launcher is gone, and ends it when
another rank of this machine has failed. The rank sees at the end of a pipe that its relay is gone.
Plain python has no launcher: nothing changes. Imports no torch, and runs before it is imported.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

STOP_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# These end a run at once when they come a second time; the others may come several times: from
# a scheduler, or from a closing terminal and its shell.
FINAL = (signal.SIGINT, signal.SIGTERM)
# From relay to rank, as real-time signals: other senders use the plain ones.
_FIRST = signal.SIGRTMIN
_SECOND = signal.SIGRTMIN + 15
# From relay to relay: a rank has failed, so the others cannot finish their step.
PEER_FAILED = signal.SIGUSR2
# A rank whose peer has failed gets this long to write its own error.
PATIENCE_S = 20.0
ENDED_S = 5.0
# A script and its children are often sent the same signal together.
TOGETHER_S = 0.5
POLL_S = 0.2
LAUNCHERS = (
    "deepspeed.launcher.launch",
    "torchrun",
    "torch.distributed.run",
    "torch.distributed.launch",
    "accelerate",
)

# In a rank with a relay: the pipe that ends with it.
_lifeline: int | None = None


def lifeline() -> int | None:
    """Return the descriptor that becomes readable when this rank's relay is gone, or None."""
    return _lifeline


def relayed_signals() -> list[int]:
    """List the signals that a relay sends to its rank."""
    first = [_FIRST + number for number in STOP_SIGNALS]
    return [*first, *(_SECOND + number for number in FINAL)]


def from_relay(number: int) -> tuple[int, bool]:
    """Return the user's signal of a relayed one, and whether it is a second request."""
    if number > _SECOND:
        return number - _SECOND, True
    return number - _FIRST, False


def leave_launcher() -> None:
    """Go on as a rank in a session of its own, if a known launcher has started this process."""
    global _lifeline
    ancestors = _launcher_processes()
    if not ancestors:
        return

    # No signal is lost from here on. Under nohup SIGHUP stays ignored.
    noted = {*STOP_SIGNALS, PEER_FAILED}
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        noted.remove(signal.SIGHUP)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, noted)
    sys.stdout.flush()
    sys.stderr.flush()
    lifeline_read, lifeline_write = os.pipe()
    report_read, report_write = os.pipe()

    # 1. The launcher's child becomes the relay.
    middle = os.fork()
    if middle:
        os.close(lifeline_read)
        os.close(report_write)
        os.waitpid(middle, 0)
        _Relay(report_read, ancestors, noted).run()

    # 2. The keeper's parent ends, so that no ancestor of the keeper is the launcher.
    os.close(lifeline_write)
    os.close(report_read)
    os.setsid()
    if os.fork():
        os._exit(0)

    # 3. The keeper waits for the rank, and reports its process number and how it ended.
    rank = os.fork()
    if rank:
        os.close(lifeline_read)
        _keep(rank, report_write)
    os.close(report_write)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    _lifeline = lifeline_read


def _keep(rank: int, report: int) -> NoReturn:
    """Report the rank's number now and its exit status later. Signals stay blocked here."""
    with suppress(OSError):
        os.write(report, f"{rank}\n".encode())
    _, status = os.waitpid(rank, 0)
    # The relay may be gone.
    with suppress(OSError):
        os.write(report, f"{status}\n".encode())
    os._exit(0)


class _Relay:
    """Passes signals to a rank until it ends, then ends in the same way."""

    def __init__(
        self,
        report: int,
        ancestors: dict[int, int],
        noted: set[signal.Signals],
    ) -> None:
        self.report = os.fdopen(report, "rb", buffering=0)
        self.ancestors = ancestors
        self.launcher = os.getppid()
        self.noted = noted
        # The user's first signal.
        self.request = 0
        self.deadline = float("inf")

    def run(self) -> NoReturn:
        # The mark of a relay, see `_is_relay`. A signal that is waited for arrives all the same.
        signal.signal(PEER_FAILED, signal.SIG_IGN)
        self.rank = int(self.report.readline())
        while not select.select([self.report], [], [], 0)[0]:
            received = signal.sigtimedwait(self.noted, POLL_S)
            if received is not None:
                self._receive(signal.Signals(received.si_signo), received.si_pid)
            if not self.request and _changed(self.ancestors):
                self._report_orphan()
                self._request_stop(signal.SIGTERM)
            if time.monotonic() > self.deadline:
                self._send(signal.SIGKILL)
        self._end(self.report.readline())

    def _receive(self, number: signal.Signals, sender: int) -> None:
        if number == PEER_FAILED:
            # After a request to stop, the other rank has saved with this one, or was ended.
            patience = ENDED_S if self.request else PATIENCE_S
            self.deadline = min(self.deadline, time.monotonic() + patience)
            return
        if not self.request:
            self._request_stop(number)
            return
        # The launcher repeats what the user has sent, and a script's group gets it twice.
        is_late = time.monotonic() - self.requested_at >= TOGETHER_S
        if number in FINAL and sender != self.launcher and is_late:
            self._send(_SECOND + number)

    def _request_stop(self, number: signal.Signals) -> None:
        self.request = number
        self.requested_at = time.monotonic()
        self._send(_FIRST + number)

    def _send(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.rank, number)

    def _report_orphan(self) -> None:
        if os.environ.get("RANK") == "0":
            text = f"\nthe launcher is gone: its ranks stop (process {self.rank})\n"
            # The terminal may be gone too.
            with suppress(OSError):
                os.write(2, text.encode())

    def _end(self, report: bytes) -> NoReturn:
        """End as the rank did; if it failed, tell the relays of the other ranks."""
        # Without a report the keeper was killed.
        status = int(report) if report.strip() else 1 << 8
        if status and os.getppid() == self.launcher:
            for sibling in _children(self.launcher):
                if sibling != os.getpid() and _is_relay(sibling):
                    with suppress(ProcessLookupError):
                        os.kill(sibling, PEER_FAILED)
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            if number >= signal.SIGRTMIN:
                number, _ = from_relay(number)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            # SIGKILL has no handler.
            with suppress(OSError):
                signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        os._exit(os.waitstatus_to_exitcode(status) if status >= 0 else 1)


# ---- the processes above and beside this one, from /proc ----


def _launcher_processes() -> dict[int, int]:
    """Parents by process, from this one up to the launcher; empty without a known launcher."""
    if "LOCAL_RANK" not in os.environ or os.environ.get("NO_RELAY"):
        return {}
    launcher = os.getppid()
    if not _is_launcher(launcher):
        return {}
    ancestors = {os.getpid(): launcher}
    # deepspeed's command starts deepspeed.launcher.launch, which starts the ranks.
    outer = _parent(launcher)
    if outer is not None and "deepspeed" in " ".join(_words(outer)):
        ancestors[launcher] = outer
    return ancestors


def _is_launcher(process: int) -> bool:
    # The launcher's own words, before those of the program that it starts.
    words = " ".join(_words(process)[:4])
    return any(name in words for name in LAUNCHERS)


def _changed(ancestors: dict[int, int]) -> bool:
    """True when a process has lost its parent: the system gives it another."""
    return any(_parent(process) != parent for process, parent in ancestors.items())


def _parent(process: int) -> int | None:
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    # The name, in brackets, may hold blanks.
    return int(stat.rpartition(")")[2].split()[1])


def _words(process: int) -> list[str]:
    try:
        line = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return []
    return line.decode(errors="replace").split("\0")


def _children(process: int) -> list[int]:
    children = []
    for tasks in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            children += [int(word) for word in tasks.read_text().split()]
    return children


def _is_relay(process: int) -> bool:
    """True when `PEER_FAILED` does not end the process."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return False
    for line in status.splitlines():
        if line.startswith("SigIgn:"):
            return bool(int(line.split()[1], 16) >> (PEER_FAILED - 1) & 1)
    return False
