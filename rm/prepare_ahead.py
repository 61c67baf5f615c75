"""Prepares the videos of the next batch while the model works on the current one."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from rm.video import PreparedVideo, prepare

if TYPE_CHECKING:
    from torch import Tensor

    from rm.config import VideoSettings


class PreparedAhead(AbstractContextManager["PreparedAhead"]):
    """Reads and cuts videos in a thread, up to a batch ahead of what `take` has given.

    At most two batches are held. Batches may shrink on the way, and be taken again. The errors
    of `rm.video.prepare` are raised by the `take` of their video.
    """

    def __init__(
        self,
        videos: Sequence[Tensor | str | Path],
        settings: VideoSettings,
        *,
        fps: float | None,
    ) -> None:
        self.videos = videos
        self.settings = settings
        self.fps = fps
        self.thread = ThreadPoolExecutor(1)
        self.futures: dict[int, Future[PreparedVideo]] = {}

    def __exit__(self, *_: object) -> None:
        # after an error, nobody wants the rest
        self.thread.shutdown(cancel_futures=True)

    def take(self, part: slice) -> list[PreparedVideo]:
        """Return the videos of a batch, and have the next ones prepared meanwhile."""
        # Videos before this batch have been scored.
        for row in list(self.futures):
            if row < part.start:
                del self.futures[row]

        # This batch, and the next of the same size.
        size = part.stop - part.start
        end = min(part.stop + size, len(self.videos))
        for row in range(part.start, end):
            if row not in self.futures:
                self.futures[row] = self.thread.submit(self._prepare, row)
        return [self.futures[row].result() for row in range(part.start, part.stop)]

    def _prepare(self, row: int) -> PreparedVideo:
        return prepare(self.videos[row], self.settings, fps=self.fps)
