"""Videos of the next batch are prepared meanwhile, and no more than those."""

from __future__ import annotations

import threading

import pytest
import torch

from rm.prepare_ahead import PreparedAhead
from rm.video import VideoError, prepare
from tests.tiny_qwen import SETTINGS, random_frames

VIDEOS = [random_frames(i) for i in range(8)]


def test_next_batch_is_prepared_while_this_one_is_scored(monkeypatch) -> None:
    """The fourth video is read although nobody has asked for it; the fifth is not."""
    done = {row: threading.Event() for row in range(8)}

    def telling(video, settings, *, fps):
        result = prepare(video, settings, fps=fps)
        row = next(i for i, frames in enumerate(VIDEOS) if frames is video)
        done[row].set()
        return result

    monkeypatch.setattr("rm.prepare_ahead.prepare", telling)
    with PreparedAhead(VIDEOS, SETTINGS, fps=4.0) as ahead:
        first = ahead.take(slice(0, 2))
        assert done[3].wait(timeout=30)
        assert sorted(ahead.futures) == [0, 1, 2, 3]
        assert not done[4].is_set()
        # a batch that was halved begins at the same place
        again = ahead.take(slice(0, 1))
        assert again[0] is first[0]
        # what has been scored is let go
        ahead.take(slice(2, 4))
        assert sorted(ahead.futures) == [2, 3, 4, 5]
    for row, video in enumerate(first):
        want = prepare(VIDEOS[row], SETTINGS, fps=4.0)
        assert torch.equal(video.patches, want.patches)
        assert video.grid == want.grid


def test_error_of_a_video_comes_with_its_batch(tmp_path) -> None:
    """Earlier batches are scored, though a later video cannot be read."""
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    with PreparedAhead([VIDEOS[0], broken, VIDEOS[1]], SETTINGS, fps=4.0) as ahead:
        assert len(ahead.take(slice(0, 1))) == 1
        with pytest.raises(VideoError, match=r"broken\.mp4"):
            ahead.take(slice(1, 2))
