"""The other side of `launch.vbench_eval.evaluate`: VBench's own judges. A script for VBench's own environment.

It is started by that environment's python, once for every dimension, and imports nothing of this project: only the
standard library, torch and vbench. Each line on stdin is one command, each line on stdout its answer, JSON objects:

    {"command": "locate"}                        -> {"vbench": version or null where there is none, "info": FILE}
    {"command": "filter", "videos": FOLDER, "out": FOLDER}
                                                 -> {"videos": FOLDER, "static": videos of each prompt that are static}
    {"command": "judge", "dimension": NAME, "videos": FOLDER, "info": FILE, "out": FOLDER, "device": NAME,
     "options": {...}}                           -> {"score": number, "found": videos that VBench found}

An error ends the process, its traceback is on stderr; so does the end of stdin. Interface used, read in the wheel of
vbench 0.1.5:

    vbench.VBench(device, full_info_dir, output_path).evaluate(videos_path, name, dimension_list=, mode=, **options)
        writes {name}_full_info.json, a list of entries with "dimension" and "video_list", and {name}_eval_results.json,
        {dimension: [score, a list about its videos]}
    vbench.init_submodules([dimension])          fetches what a dimension's model needs
    vbench.cli.static_filter.register_subparsers its command line, which writes filtered_static_video.json,
        {prompt: {"static_count": n, ...}}, and copies the static videos to filtered_videos/{prompt}-{i}.mp4
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import IO, Any


def locate() -> dict[str, Any]:
    spec = importlib.util.find_spec("vbench")
    if spec is None or not spec.submodule_search_locations:
        return {"vbench": None, "info": None}
    try:
        version = importlib.metadata.version("vbench")
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path
        version = "unknown"
    return {
        "vbench": version,
        "info": str(
            Path(next(iter(spec.submodule_search_locations))) / "VBench_full_info.json"
        ),
    }


def filter_static(videos: str, out: str) -> dict[str, Any]:
    from vbench import init_submodules
    from vbench.cli import static_filter

    init_submodules(
        ["dynamic_degree"]
    )  # the filter loads that dimension's model and does not fetch it itself
    shutil.rmtree(
        out, ignore_errors=True
    )  # what an earlier try kept must not be counted with what this one keeps
    parser = argparse.ArgumentParser()
    static_filter.register_subparsers(parser.add_subparsers())
    args = parser.parse_args(
        ["static_filter", "--videos_path", videos, "--result_path", out]
    )
    args.func(args)
    found = json.loads(
        (Path(out) / "filtered_static_video.json").read_text(encoding="utf-8")
    )
    return {
        "videos": str(Path(out) / "filtered_videos"),
        "static": [one["static_count"] for one in found.values()],
    }


def judge(
    dimension: str,
    videos: str,
    info: str,
    out: str,
    device: str,
    options: dict[str, Any],
) -> dict[str, Any]:
    import torch
    from vbench import VBench

    suite = VBench(torch.device(device), info, out)
    suite.evaluate(
        videos_path=videos,
        name=dimension,
        dimension_list=[dimension],
        mode="vbench_standard",
        **options,
    )
    results = json.loads(
        (Path(out) / f"{dimension}_eval_results.json").read_text(encoding="utf-8")
    )
    entries = json.loads(
        (Path(out) / f"{dimension}_full_info.json").read_text(encoding="utf-8")
    )
    found = sum(
        len(entry.get("video_list", []))
        for entry in entries
        if dimension in entry["dimension"]
    )
    return {"score": float(results[dimension][0]), "found": found}


def serve(commands: IO[bytes], replies: IO[bytes]) -> None:
    known = {"locate": locate, "filter": filter_static, "judge": judge}
    for line in commands:
        message = json.loads(line)
        replies.write(
            json.dumps(known[message.pop("command")](**message)).encode() + b"\n"
        )
        replies.flush()


def main() -> None:
    # VBench prints: the pipes become ours alone, under other numbers, before anything can be imported
    commands, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    # our folder is the first that a script's imports are looked for in; python -P is for 3.11 only
    sys.path[:] = [
        path
        for path in sys.path
        if Path(path).resolve() != Path(__file__).resolve().parent
    ]
    serve(commands, replies)


if __name__ == "__main__":
    main()
