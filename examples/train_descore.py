"""Train DeScore on a table of your own.

    python examples/make_clips.py --out runs/examples/clips
    python examples/train_descore.py --table runs/examples/clips/my_table.csv \\
        --base assets/shapes/qwen --out runs/examples/descore

The table has the columns caption, first, second, winner (first, second or tie). It holds no chains
of thought, so all are masked: what is trained scores a video without writing one.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from pathlib import Path

from rm import DeScoreScorer
from rm.data import read_pairs

WINNERS = {"first": "A", "second": "B", "tie": "same"}


def convert(table: Path) -> Path:
    """Write the table with the columns that DeScore reads, beside it; return the file."""
    rows = []
    with table.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            # paths are relative to the table
            videos = repr([row["first"], row["second"]])
            rows.append([videos, row["caption"], WINNERS[row["winner"]]])
    path = table.with_name("pairs.csv")
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["videos", "prompt", "GSB"], *rows])
    return path


def train(table: Path, base: str, out: Path, *overrides: str) -> float:
    """Train stage 1 of DeScore on a table, and return its accuracy on the same pairs."""
    pairs_csv = convert(table)

    # 1. The command. Any key of configs/shapes/cold_start.yaml can be overridden.
    command = [
        sys.executable,
        "launch/cold_start.py",
        "--config",
        "configs/shapes/cold_start.yaml",
        f"run_dir={out}",
        f"base={base}",
        f"data.train={pairs_csv}",
        "data.heldout=null",
        "cold_start.masking.probability=1",
        *overrides,
    ]
    subprocess.run(command, check=True)

    # 2. The trained model, on the pairs that it has seen: held-out pairs would say more.
    scorer = DeScoreScorer.load(out / "final")
    pairs = read_pairs(pairs_csv, require_cot=False).pairs
    right = 0
    for pair in pairs:
        prompts = [pair.prompt, pair.prompt]
        score = scorer.score([pair.video_A, pair.video_B], prompts)
        reward_A, reward_B = score.value_B.tolist()
        # the label is 1 for A, -1 for B and 0 for a tie
        if (reward_A - reward_B) * pair.label > 0:
            right += 1
    return right / len(pairs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--base", default="assets/shapes/qwen")
    parser.add_argument("--out", type=Path, default=Path("runs/examples/descore"))
    options, words = parser.parse_known_args()
    accuracy = train(
        options.table,
        options.base,
        options.out,
        *words,
    )
    print(f"accuracy on the pairs it was trained on: {accuracy:.2f}")
