"""Score video files with a trained DeScore, and read why.

    python examples/score_videos.py --checkpoint runs/demo/descore/final \\
        --prompt "a red circle moves left" --videos a.mp4 b.mp4

`--checkpoint` is the final/ folder of launch/cold_start.py or launch/dual_rl.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from common.types import Score
from rm import DeScoreScorer


def score_videos(checkpoint: Path, videos: Sequence[Path], prompt: str) -> Score:
    """Print reward and chain of thought of every video, best first, and return the scores."""
    # 1. Load once. The reward model takes a GPU if there is one.
    scorer = DeScoreScorer.load(checkpoint)

    # 2. Files know their frame rate; frames (T, Y, X, 3) would need fps=.
    score = scorer.score(videos, [prompt] * len(videos))

    # 3. Higher is better. Only order and differences of the rewards mean something.
    best_first = score.value_B.argsort(descending=True).tolist()
    for i in best_first:
        print(f"{float(score.value_B[i]):8.3f}  {videos[i]}")
        # NaN is a video without a score, and the reason says why
        print(f"          {score.reason(i) or score.texts[i]}")
    return score


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--videos", type=Path, nargs="+", required=True)
    options = parser.parse_args()
    score_videos(options.checkpoint, options.videos, options.prompt)
