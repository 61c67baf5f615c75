"""Sample videos of a step are the VAE's, whichever decoder its rewards saw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from launch.training import grpo_outputs


@pytest.mark.parametrize(("scored", "shown", "want"), [(10, 20, 20), (10, None, 10)])
def test_samples_show_the_vaes_videos(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    scored: int,
    shown: int | None,
    want: int,
) -> None:
    """Of two videos that were kept, one is written; without a small decoder it was scored."""
    written: list[Tensor] = []

    class Writer:
        def __init__(self, folder: Path, *, fps: float) -> None:
            self.folder = folder

        def add(self, video_BTYXC: Tensor, rows: Sequence[Any]) -> None:
            written.append(video_BTYXC)

    row = {"prompt": "a boat", "rewards": {"mine": 0.5}}
    monkeypatch.setattr(grpo_outputs, "SampleWriter", Writer)
    monkeypatch.setattr(grpo_outputs, "rows_of_step", lambda result, **how: [row])
    run = SimpleNamespace(
        video_every=1,
        video_groups=1,
        steps=3,
        run_dir=str(tmp_path),
        generator=SimpleNamespace(fps=8.0),
    )
    result = SimpleNamespace(
        video_BTYXC=torch.full((2, 1, 2, 2, 3), scored),
        shown_BTYXC=None if shown is None else torch.full((2, 1, 2, 2, 3), shown),
    )
    log = SimpleNamespace(videos=lambda step, files, captions: None)
    grpo_outputs.write_samples(run, result, 0, log)
    assert [video.shape[0] for video in written] == [1]
    assert written[0].unique().tolist() == [want]
