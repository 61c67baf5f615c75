"""Write sample videos as mp4 files, with a samples.jsonl that describes each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.types import text_of
from common.video_io import write_mp4
from launch.evaluation.results_table import score_fields

if TYPE_CHECKING:
    from torch import Tensor

    from alignment.grpo import StepResult

FILE = "samples.jsonl"


class SampleWriter:
    """Writes 0000.mp4, 0001.mp4, ... and a row for each; replaces earlier samples of a folder."""

    def __init__(
        self,
        folder: str | Path,
        *,
        fps: float,
        crf: int = 12,
    ) -> None:
        self.folder = Path(folder)
        self.fps = fps
        self.crf = crf
        self.count = 0
        # Rows of earlier samples go; their videos are overwritten.
        self.folder.mkdir(parents=True, exist_ok=True)
        self.table = self.folder / FILE
        self.table.write_text("", encoding="utf-8")

    def add(self, video_BTYXC: Tensor, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write an mp4 file per video and its row, with the name added as ``file``."""
        with self.table.open("a", encoding="utf-8") as lines:
            for video_TYXC, row in zip(video_BTYXC, rows, strict=True):
                # The video first: a row names a complete file.
                name = f"{self.count:04d}.mp4"
                path = self.folder / name
                write_mp4(path, video_TYXC, self.fps, crf=self.crf)
                described = {"file": name, **row}
                line = json.dumps(described, ensure_ascii=False)
                lines.write(line + "\n")
                self.count += 1


def rows_of_step(
    result: StepResult, *, step: int, groups: int
) -> Iterator[dict[str, Any]]:
    """Describe every member of this rank's first groups of a GRPO step.

    A row has the prompt, seed, rewards with parts and texts (chains of thought), and advantage.
    """
    batch = result.batch
    group_size = result.advantage_PM.shape[1]
    groups = min(groups, len(batch.prompts))
    # Videos are in the order of their groups.
    for b in range(groups * group_size):
        group, member = divmod(b, group_size)
        yield {
            "step": step,
            "prompt": text_of(batch.prompts[group]),
            "seed": batch.seeds[group],
            "member": member,
            "advantage": float(result.advantage_PM[group, member]),
            **score_fields(result.scores, b),
        }
