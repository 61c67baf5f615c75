"""Sample videos on disk: mp4 files and, beside them, samples.jsonl with what is known about each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.types import json_number
from common.video_io import write_mp4

if TYPE_CHECKING:
    from torch import Tensor

    from alignment.grpo import StepResult

FILE = "samples.jsonl"


class SampleWriter:
    """Writes 0000.mp4, 0001.mp4, ... and a line for each; a folder that holds samples already is written anew."""

    def __init__(self, folder: str | Path, *, fps: float, crf: int = 12) -> None:
        self.folder, self.fps, self.crf, self.count = Path(folder), fps, crf, 0
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / FILE).write_text("", encoding="utf-8")

    def add(self, video_BTYXC: Tensor, rows: Sequence[Mapping[str, Any]]) -> None:
        """One mp4 per video and one line per row, with its ``file`` added."""
        with (self.folder / FILE).open("a", encoding="utf-8") as lines:
            for video_TYXC, row in zip(video_BTYXC, rows, strict=True):
                name = f"{self.count:04d}.mp4"
                write_mp4(self.folder / name, video_TYXC, self.fps, crf=self.crf)
                lines.write(
                    json.dumps({"file": name, **row}, ensure_ascii=False) + "\n"
                )
                self.count += 1


def rows_of_step(
    result: StepResult, *, step: int, groups: int
) -> Iterator[dict[str, Any]]:
    """A row for every member of this rank's first groups: prompt, seed, rewards, parts, texts (CoT) and advantage."""
    group_size = result.advantage_PM.shape[1]
    for b in range(min(groups, len(result.batch.prompts)) * group_size):
        p, member = divmod(b, group_size)
        scores = result.scores.items()
        yield {
            "step": step,
            "prompt": result.batch.prompts[p],
            "seed": result.batch.seeds[p],
            "member": member,
            "advantage": float(result.advantage_PM[p, member]),
            "rewards": {name: json_number(score.value_B[b]) for name, score in scores},
            "parts": {
                name: {k: json_number(v[b]) for k, v in score.parts.items()}
                for name, score in scores
                if score.parts
            },
            "texts": {name: score.texts[b] for name, score in scores if score.texts},
        }
