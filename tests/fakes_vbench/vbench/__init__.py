"""Stands in for the package `vbench` in the worker process: the calls that `launch/vbench_eval/worker.py` makes.

Keeps to the interface of vbench 0.1.5 as read in its wheel (vbench/__init__.py, utils.py, cli/static_filter.py, see
docs/vbench.md): names of folder entries are compared with ``{prompt}-{0..4}`` and ONE ending, that of the first entry;
a missing video is printed, not an error; a dimension's result is [mean, list about its videos]. It prints on stdout.

The score of a video is the number in its file, or for another file its size: the mean over a dimension's videos. The
environment variable FAKE_VBENCH breaks a dimension on purpose: "die:color", "nan:color", "percent:color".
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.write(1, b"libraries of VBench talk on stdout\n")
fetched: list[str] = []


def init_submodules(
    dimension_list: Sequence[str], *, local: bool = False, read_frame: bool = False
) -> None:
    """What VBench would download now."""
    fetched.extend(dimension_list)
    print(f"fetched {list(dimension_list)}")


class VBench:
    def __init__(self, device: str, full_info_dir: str, output_path: str) -> None:
        assert device in ("cuda", "cpu")
        self.full_info, self.output_path = Path(full_info_dir), Path(output_path)
        self.output_path.mkdir(parents=True, exist_ok=True)

    def evaluate(
        self, videos_path: str, name: str, *, prompt_list: tuple[str, ...] = (),
        dimension_list: list[str] | None = None, local: bool = False, read_frame: bool = False,
        mode: str = "vbench_standard", **kwargs: Any,
    ) -> None:  # fmt: skip
        assert mode == "vbench_standard"
        assert set(kwargs) <= {"imaging_quality_preprocessing_mode"}
        init_submodules(dimension_list, local=local, read_frame=read_frame)
        listing = os.listdir(videos_path)
        ending = Path(listing[0]).suffix
        entries = []
        for entry in json.loads(self.full_info.read_text(encoding="utf-8")):
            if not set(dimension_list) & set(entry["dimension"]):
                continue
            names = [f"{entry['prompt_en']}-{i}{ending}" for i in range(5)]
            for missing in set(names) - set(listing):
                print(f"WARNING the video {missing} is not found")
            entry["video_list"] = [
                f"{videos_path}/{one}" for one in names if one in listing
            ]
            entries.append(entry)
        (self.output_path / f"{name}_full_info.json").write_text(
            json.dumps(entries, indent=4)
        )
        results = {
            dimension: self._judge(dimension, entries) for dimension in dimension_list
        }
        (self.output_path / f"{name}_eval_results.json").write_text(
            json.dumps(results, indent=4)
        )

    def _judge(self, dimension: str, entries: list[dict[str, Any]]) -> list[Any]:
        fault, _, where = os.environ.get("FAKE_VBENCH", "").partition(":")
        if where == dimension and fault == "die":
            raise ModuleNotFoundError("No module named 'detectron2'")
        videos = [
            video
            for entry in entries
            if dimension in entry["dimension"]
            for video in entry["video_list"]
        ]
        found = [
            {"video_path": video, "video_results": _number(Path(video))}
            for video in videos
        ]
        mean = sum(one["video_results"] for one in found) / len(found)
        factor = (
            {"nan": float("nan"), "percent": 100.0}.get(fault, 1.0)
            if where == dimension
            else 1.0
        )
        return [factor * mean, found]


def _number(path: Path) -> float:
    content = path.read_bytes()
    try:
        return float(content)
    except ValueError:
        return (len(content) % 1000) / 1000
