"""Labelled pairs of small videos for the tests of the reward model."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.video_io import write_mp4
from rm.data import Pair
from tests.tiny_qwen import random_frames

LABELS = (1, -1, 1, -1)
SCORES = {"subject": 2, "dynamics": 0}


def write_pair_videos(folder: Path, number: int) -> list[Path]:
    """Write the two videos of a pair."""
    files = [folder / f"{number}{side}.mp4" for side in "AB"]
    for side, file in enumerate(files):
        write_mp4(file, random_frames(10 * number + side), 4.0)
    return files


@pytest.fixture(scope="module")
def cold_start_pairs(tmp_path_factory) -> list[Pair]:
    """Four pairs with a CoT for each video."""
    folder = tmp_path_factory.mktemp("pairs")
    pairs = []
    for i, label in enumerate(LABELS):
        files = write_pair_videos(folder, i)
        cots = (f"first {i}", f"the second, longer {i}")
        pairs.append(Pair(f"prompt {i}", *files, *cots, label))
    return pairs


@pytest.fixture(scope="module")
def dual_rl_pairs(tmp_path_factory) -> list[Pair]:
    """Four pairs without CoT, with scores of two dimensions."""
    folder = tmp_path_factory.mktemp("pairs")
    pairs = []
    for i, label in enumerate(LABELS):
        files = write_pair_videos(folder, i)
        pairs.append(Pair(f"prompt {i}", *files, "", "", label, SCORES, SCORES))
    return pairs
