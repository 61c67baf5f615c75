"""A request to stop a run: by a signal, or because its launcher is gone."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from contextlib import suppress
from types import FrameType

from common import distributed, relay

POLL_S = 0.5


class StopRequest:
    """Notes signals from `begin` on, and ends the process at a second SIGTERM or SIGINT.

    Before `begin` there is nothing to save, so SIGTERM, SIGINT and SIGHUP end the process.
    SIGUSR1 is always noted. A signal that was ignored at the start, such as SIGHUP under nohup,
    stays ignored. A thread does the work, because the main thread may be in C++ for minutes.

    received     the number of the first signal; 0 for none
    steps_done   finished steps, and `steps_saved` those in a checkpoint; both for messages
    """

    def __init__(self) -> None:
        self.received = 0
        self.begun = False
        self.steps_done = 0
        self.steps_saved = 0
        self._first_time: float | None = None
        self._previous: dict[int, object] = {}
        self._stopped = threading.Event()
        self._pipe: tuple[int, int] | None = None
        self._previous_wakeup = -1

    def install(self) -> None:
        """Take the signals over; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            return
        # The system writes the number of each signal into the pipe, whatever Python is doing.
        self._pipe = os.pipe()
        for descriptor in self._pipe:
            os.set_blocking(descriptor, False)
        self._previous_wakeup = signal.set_wakeup_fd(
            self._pipe[1], warn_on_full_buffer=False
        )
        for number in (*relay.STOP_SIGNALS, *relay.relayed_signals()):
            if signal.getsignal(number) == signal.SIG_IGN and number == signal.SIGHUP:
                continue
            is_noted = number == signal.SIGUSR1
            handler = self._handle if is_noted else signal.SIG_DFL
            self._previous[number] = signal.signal(number, handler)
        threading.Thread(target=self._watch, daemon=True, name="signals").start()

    def begin(self) -> None:
        """Note signals from here on, because there is a step to finish."""
        if not self.begun:
            for number in self._previous:
                signal.signal(number, self._handle)
        self.begun = True

    def uninstall(self) -> None:
        """Give the signals back to those who had them."""
        self._stopped.set()
        if self._pipe is None:
            return
        signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Note the signal in the main thread, so that no step begins after it unnoticed."""
        self.received = self.received or _plain(number)

    def _watch(self) -> None:
        lifeline = relay.lifeline()
        waited_for = [self._pipe[0]]
        if lifeline is not None:
            waited_for.append(lifeline)
        while not self._stopped.is_set():
            ready, _, _ = select.select(waited_for, [], [], POLL_S)
            if self._pipe[0] in ready:
                for number in os.read(self._pipe[0], 64):
                    self._note(number)
            if lifeline in ready:
                waited_for.remove(lifeline)
                self._lose_launcher()
        for descriptor in self._pipe:
            os.close(descriptor)

    def _lose_launcher(self) -> None:
        """Stop as after SIGTERM: the launcher has killed the relay of this rank."""
        if not self.begun:
            os._exit(128 + signal.SIGTERM)
        if not self.received:
            self._note(signal.SIGTERM)

    def _note(self, number: int) -> None:
        now = time.monotonic()
        is_second = False
        if number >= signal.SIGRTMIN:
            number, is_second = relay.from_relay(number)
        elif self._first_time is not None:
            is_late = now - self._first_time >= relay.TOGETHER_S
            is_second = number in relay.FINAL and is_late
        if self._first_time is None:
            self._first_time = now
            self.received = self.received or number
            self._print(number, self._promise())
        elif is_second:
            self._print(number, self._loss())
            os._exit(128 + number)

    def _promise(self) -> str:
        """Say what happens now, and how it can be ended."""
        text = f"step {self.steps_done + 1} is finished and saved, then the run ends"
        if relay.lifeline() is None:
            return f"{text}; a second signal ends it immediately"
        return (
            f"{text}, also if its launcher ends before; "
            f"kill {os.getpid()} ends it immediately"
        )

    def _loss(self) -> str:
        """Say what is saved when the process ends here."""
        unsaved = self.steps_done - self.steps_saved
        text = f"ended in step {self.steps_done + 1}"
        if unsaved:
            return f"{text}; {self.steps_saved} steps are saved, the last {unsaved} are lost"
        return f"{text}; all {self.steps_saved} finished steps are saved"

    def _print(self, number: int, text: str) -> None:
        if distributed.is_main():
            line = f"\n{signal.Signals(number).name}: {text}\n"
            # Not print: the main thread may be in the middle of a line. The terminal may be gone.
            with suppress(OSError):
                os.write(2, line.encode())


def _plain(number: int) -> int:
    """Return the user's signal, also of one that came by the relay."""
    return relay.from_relay(number)[0] if number >= signal.SIGRTMIN else number
