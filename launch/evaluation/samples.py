"""Write sample videos as mp4 files, with a samples.jsonl that describes each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.video_io import write_mp4
from launch.evaluation.results_table import score_fields

if TYPE_CHECKING:
    from torch import Tensor

    from alignment.grpo import StepResult

FILE = "samples.jsonl"


class SampleWriter:
    """Writes 0000.mp4, 0001.mp4, ... and a row for each; replaces earlier samples of a folder."""

    def __init__(self, folder: str | Path, *, fps: float, crf: int = 12) -> None:
        self.folder = Path(folder)
        self.fps = fps
        self.crf = crf
        self.count = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / FILE).write_text("", encoding="utf-8")

    def add(self, video_BTYXC: Tensor, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write an mp4 file per video and its row, with the name added as ``file``."""
        with (self.folder / FILE).open("a", encoding="utf-8") as lines:
            for video_TYXC, row in zip(video_BTYXC, rows, strict=True):
                name = f"{self.count:04d}.mp4"
                write_mp4(self.folder / name, video_TYXC, self.fps, crf=self.crf)
                line = json.dumps({"file": name, **row}, ensure_ascii=False)
                lines.write(line + "\n")
                self.count += 1


def rows_of_step(
    result: StepResult, *, step: int, groups: int
) -> Iterator[dict[str, Any]]:
    """Describe every member of this rank's first groups of a GRPO step.

    A row has the prompt, seed, rewards with parts and texts (chains of thought), and advantage.
    """
    group_size = result.advantage_PM.shape[1]
    for b in range(min(groups, len(result.batch.prompts)) * group_size):
        p, member = divmod(b, group_size)
        yield {
            "step": step,
            "prompt": result.batch.prompts[p],
            "seed": result.batch.seeds[p],
            "member": member,
            "advantage": float(result.advantage_PM[p, member]),
            **score_fields(result.scores, b),
        }
