"""Preference data on disk: CSV columns, people's labels, bytes that ignore the workers."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from pathlib import Path

import pytest

from rm.data import read_pairs
from rm.prompt import parse_answer
from rm.video import VideoSettings, read_video
from tests.launch.processes import run
from toy.people import QUALITY_WEIGHT, WEIGHTS, utility
from toy.world import parse, split_attributes

SETTINGS = VideoSettings(
    fps=8.0, min_frames=5, max_frames=5, min_pixels=256, max_pixels=1024, patch_size=4
)


def make(out: Path, workers: int) -> Path:
    words = [
        sys.executable,
        "toy/make_pairs.py",
        "--out",
        str(out),
        "--workers",
        str(workers),
    ]
    run(*words, "--pairs", "train=20", "heldout=4")
    return out


@pytest.mark.long
def test_made_pairs_are_readable_and_fixed_by_seed(tmp_path: Path) -> None:
    first, second = make(tmp_path / "one", 1), make(tmp_path / "two", 2)
    for split, count in (("train", 20), ("heldout", 4)):
        assert (first / f"{split}.csv").read_bytes() == (
            second / f"{split}.csv"
        ).read_bytes()
        table = read_pairs(first / f"{split}.csv")
        assert (len(table.pairs), table.problems, table.invalid) == (count, (), 0)
    assert (first / "videos/train_00003_A.mp4").read_bytes() == (
        second / "videos/train_00003_A.mp4"
    ).read_bytes()

    with (first / "train.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    train, _ = split_attributes()
    kept = []
    for pair, row in zip(read_pairs(first / "train.csv").pairs, rows, strict=True):
        utilities = [float(row[f"utility_{letter}"]) for letter in "AB"]
        assert pair.label in (-1, 0, 1)
        assert parse(pair.prompt) in train
        sides = zip((pair.video_A, pair.video_B), utilities, "AB", strict=True)
        for path, value, letter in sides:
            seen = json.loads(row[f"seen_{letter}"])
            weights = {**WEIGHTS, "quality": QUALITY_WEIGHT}
            want = sum(weights[name] * part for name, part in seen.items())
            assert value == pytest.approx(want)
            frames = read_video(path, SETTINGS).frames_TYXC
            kept.append(abs(utility(frames, pair.prompt).value - value))
    # mp4 moves the utility of a few videos, those that stand at the edge of a threshold
    assert sum(change < 0.05 for change in kept) >= 0.8 * len(kept)
    (best, *_) = csv.DictReader((first / "train_best.csv").open(encoding="utf-8"))
    assert (first / best["video"]).exists()
    values = [float(row[f"utility_{letter}"]) for row in rows for letter in "AB"]
    assert float(best["utility"]) == max(values)
    # Only a chain of thought about noise, in which people see nothing, may not end.
    for row, letter in itertools.product(rows, "AB"):
        if any(json.loads(row[f"seen_{letter}"]).values()):
            assert parse_answer(row[f"CoT_{letter}"]) is not None
