"""Keeps the first five static videos of each prompt of temporal_flickering, in the order of their sorted names.

A file that says "moving" is not static. Like the real one it reads the prompts of the package's own info file.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import vbench


def register_subparsers(subparser: Any) -> None:
    parser = subparser.add_parser("static_filter")
    parser.add_argument("--videos_path", default="", required=True)
    parser.add_argument("--result_path", type=str, default="./filter_results")
    parser.add_argument("--store_name", type=str, default="filtered_static_video.json")
    parser.add_argument("--filter_scope", default="temporal_flickering")
    parser.set_defaults(func=static_filter)


def static_filter(args: argparse.Namespace) -> None:
    assert "dynamic_degree" in vbench.fetched, "the weights of RAFT are not there"
    info = json.loads(
        (Path(__file__).parents[1] / "VBench_full_info.json").read_text(
            encoding="utf-8"
        )
    )
    prompts = [
        entry["prompt_en"]
        for entry in info
        if "temporal_flickering" in entry["dimension"]
    ]
    found: dict[str, Any] = {
        prompt: {"static_count": 0, "static_path": []} for prompt in prompts
    }
    for path in sorted(Path(args.videos_path).glob("*.mp4")):
        one = found.get(re.sub(r"-\d+$", "", path.stem))
        if (
            one is not None
            and one["static_count"] < 5
            and b"moving" not in path.read_bytes()
        ):
            one["static_count"] += 1
            one["static_path"].append(str(path))
    target = Path(args.result_path) / "filtered_videos"
    target.mkdir(parents=True, exist_ok=True)
    (Path(args.result_path) / args.store_name).write_text(json.dumps(found))
    for prompt, one in found.items():
        for i, path in enumerate(one["static_path"]):
            shutil.copy(path, target / f"{prompt}-{i}.mp4")
