"""Output that survives its terminal or pipe.

A run that is asked to stop by a closing terminal, or by Ctrl-C in ``deepspeed ... | tee log``,
finishes its step while nobody reads its output any more. A write would raise an error then.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


class LastingStream:
    """A text stream that goes on in a file once its terminal or pipe is gone."""

    def __init__(self, stream: IO[str], file: Path) -> None:
        self._stream = stream
        self._file = file
        self._poll = select.poll()
        # A stream of a test has no descriptor.
        with suppress(OSError, ValueError):
            self._poll.register(stream.fileno(), 0)

    def write(self, text: str) -> int:
        # Before the text comes into a buffer, from which it could be written twice.
        if self._poll.poll(0):
            self._continue_in_file()
        return self._stream.write(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._continue_in_file()
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _continue_in_file(self) -> None:
        """Put the file in the place of the lost descriptor, for every writer of the process."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        try:
            descriptor = os.open(self._file, flags, 0o666)
        except OSError:
            # Without room for a file the text is lost, but not the run.
            descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, self._stream.fileno())
        os.close(descriptor)


@contextmanager
def lasting_output(file: Path) -> Iterator[None]:
    """Let stdout and stderr go on in ``file`` when their readers are gone."""
    before = (sys.stdout, sys.stderr)
    sys.stdout = LastingStream(sys.stdout, file)
    sys.stderr = LastingStream(sys.stderr, file)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
