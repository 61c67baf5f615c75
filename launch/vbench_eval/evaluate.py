"""VBench's judges on the videos of `launch/sample.py vbench`, of one model beside another.

    out/MODEL/results.jsonl   a row for every dimension: score, videos that VBench found, or an error
    out/MODEL/DIMENSION/      what VBench itself wrote
    out/summary.json, table.md  all models: 16 dimensions, quality, semantic, total; null and "not run", never 0

VBench's pins (transformers 4.33.2, numpy below 2) clash with ours, so it runs in processes and an environment of its
own (`launch/vbench_eval/worker.py`), a process for every dimension: what one holds or breaks is no matter to the next. A
dimension that fails is not run, its reason is in the table, the others go on, and the program ends with exit code 1;
started again, it tries those that are not there. Ranks share the dimensions, one GPU each. Of the real VBench only
temporal_flickering was run here, which needs no weights: the one in most tests (tests/fakes_vbench) stands in for it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.cli import exit_with_error
from common.config import dump
from common.line_process import LineProcess, LineProcessError, foreign_environment
from launch.schemas.vbench import VbenchEvaluation
from launch.vbench_eval.scores import markdown, normalised, totals
from launch.vbench_eval.suite import FLICKERING, INDICES, Suite, read_suite, strangers

SCRIPT = Path(__file__).with_name("worker.py")
INSTALL = (
    "VBench needs an environment of its own: python3.10 -m venv VBENCH_ENV && VBENCH_ENV/bin/pip install torch "
    "torchvision vbench==0.1.5 (and detectron2 for object_class, multiple_objects, color and spatial_relationship), "
    "then python=VBENCH_ENV/bin/python; docs/vbench.md"
)
Gaps = dict[
    str, dict[str, list[str]]
]  # model -> dimension -> names of videos that are not there


def evaluate_vbench(cfg: VbenchEvaluation, *, resume: str = "auto") -> None:
    """Check that all is there, judge what is not judged yet, write the table."""
    from launch.evaluation.results_table import all_ranks

    if cfg.python is not None and shutil.which(cfg.python) is None:
        exit_with_error(f"python: there is no interpreter {cfg.python}. {INSTALL}")
    for model, folder in cfg.videos.items():
        if not Path(folder).is_dir():
            exit_with_error(f"videos.{model}: there is no folder {folder}")
    hours = 1.0 + len(cfg.videos) * len(cfg.dimensions) * cfg.timeout_s / 3600
    with all_ranks(hours=hours):
        from common.distributed import from_main, is_main
        from common.log import say

        if is_main():
            dump(cfg, cfg.out)
        place = from_main(locate(cfg) if is_main() else None)
        if place["vbench"] is None:
            exit_with_error(
                f"{cfg.python or sys.executable} has no package vbench. {INSTALL}"
            )
        try:
            suite = read_suite(cfg.info or place["info"])
            gaps = find_gaps(cfg, suite)
            found = {
                model: judge_model(
                    cfg, suite, place["vbench"], model, gaps[model], resume
                )
                for model in gaps
            }
        except ValueError as error:
            exit_with_error(str(error))
        failed = [
            f"{model}.{row['dimension']}"
            for model, rows in found.items()
            for row in rows
            if "error" in row
        ]
        if is_main():
            conclude(cfg, suite, place["vbench"], found, gaps)
        say(f"the table is in {Path(cfg.out) / 'table.md'}")
    if failed:
        say(
            f"{len(failed)} failed and are not run: {', '.join(failed)}; started again, these are tried again"
        )
        sys.exit(1)


def locate(cfg: VbenchEvaluation) -> dict[str, Any]:
    """Version and info file of the VBench that ``python`` has."""
    worker = start(cfg, Path(cfg.out) / "locate.stderr.txt")
    place = worker.ask({"command": "locate"}, timeout_s=120.0)
    worker.end()
    return place


def find_gaps(cfg: VbenchEvaluation, suite: Suite) -> Gaps:
    """Videos that are not there, by model and dimension; ValueError with their numbers unless that is allowed for."""
    from common.log import say

    gaps: Gaps = {}
    lines = []
    for model, folder in cfg.videos.items():
        if problem := strangers(Path(folder)):
            raise ValueError(f"videos.{model}: {problem}")
        gaps[model] = {}
        for dimension in cfg.dimensions:
            if suite.count(dimension) == 0:
                raise ValueError(
                    f"dimensions: {suite.path} has no prompt of {dimension}"
                )
            each = files_each(cfg, dimension)
            missing = suite.missing(Path(folder), dimension, flickering=each)
            if missing:
                gaps[model][dimension] = missing
                wanted = len(suite.prompts([dimension])) * each
                lines.append(
                    f"  {model}.{dimension}: {len(missing)} of {wanted}, first {missing[0]!r}"
                )
    if lines:
        text = "\n".join(
            [f"videos that are not there, by dimension, of {suite.path}:", *lines]
        )
        if cfg.missing == "refuse":
            raise ValueError(
                f"{text}\nmake them with launch/sample.py vbench, or missing=leave_out to judge the rest"
            )
        say(text)
    return gaps


def files_each(cfg: VbenchEvaluation, dimension: str) -> int:
    """Videos of each prompt that a dimension is judged on."""
    return cfg.flickering if dimension == FLICKERING and cfg.static_filter else INDICES


# ------------------------------------------------------------------ judging


def judge_model(
    cfg: VbenchEvaluation,
    suite: Suite,
    version: str,
    model: str,
    gaps: dict[str, list[str]],
    resume: str,
) -> list[dict[str, Any]]:
    """A row for every dimension that lacks no video. Judged again is what failed, and what has other videos now."""
    from common.log import say
    from launch.evaluation.results_table import ResultsTable, fingerprint

    identity = {
        "info": fingerprint(suite.path),
        "vbench": version,
        "static_filter": cfg.static_filter,
        "options": cfg.options,
        "device": cfg.device,
    }
    path = Path(cfg.out) / model / "results.jsonl"
    table = ResultsTable(
        path,
        identity=identity,
        key=("dimension", "files"),
        resume=resume,
        retry="error",
    )
    keys = [
        (
            dimension,
            files_digest(
                suite, Path(cfg.videos[model]), dimension, files_each(cfg, dimension)
            ),
        )
        for dimension in cfg.dimensions
        if dimension not in gaps
    ]
    left = sum(key not in table.done for key in keys)
    say(f"{model}: {left} of {len(keys)} dimensions to judge")
    for dimension, files in table.share(keys):
        row = {"dimension": dimension, "files": files}
        try:
            row |= judge_dimension(cfg, suite, model, dimension)
            say(f"{model}.{dimension}: {row['score']}")
        except LineProcessError as error:
            row["error"] = str(error)
            say(f"{model}.{dimension}: not run, {str(error).splitlines()[-1]}")
        table.add([row])
    return table.finish(keys)


def judge_dimension(
    cfg: VbenchEvaluation, suite: Suite, model: str, dimension: str
) -> dict[str, Any]:
    """score, the videos found and wanted, and for flickering the prompts with static ones. LineProcessError if none."""
    out = Path(cfg.out).absolute() / model / dimension
    out.mkdir(parents=True, exist_ok=True)
    videos = str(Path(cfg.videos[model]).absolute())
    row: dict[str, Any] = {"wanted": INDICES * suite.count(dimension)}
    worker = start(cfg, out / "stderr.txt")
    if dimension == FLICKERING and cfg.static_filter:
        message = {"command": "filter", "videos": videos, "out": str(out / "static")}
        kept = worker.ask(message, timeout_s=cfg.timeout_s)
        videos, row["with_static"] = (
            kept["videos"],
            sum(count >= INDICES for count in kept["static"]),
        )
    message = {
        "command": "judge",
        "dimension": dimension,
        "videos": videos,
        "info": str(suite.path.absolute()),
        "out": str(out),
        "device": cfg.device,
        "options": cfg.options,
    }
    answer = worker.ask(message, timeout_s=cfg.timeout_s)
    worker.end()
    if not -1 <= answer["score"] <= 1:  # NaN as well: a mean over no videos
        raise LineProcessError(
            f"VBench gave {dimension} a score of {answer['score']}, which is none"
        )
    if answer["found"] != row["wanted"] and "with_static" not in row:
        raise LineProcessError(
            f"VBench found {answer['found']} of the {row['wanted']} videos of {dimension}"
        )
    return {"score": answer["score"], "found": answer["found"], **row}


def start(cfg: VbenchEvaluation, stderr: Path) -> LineProcess:
    """A worker of VBench's environment, on this rank's GPU."""
    gpu = (
        int(os.environ.get("LOCAL_RANK", "0"))
        if int(os.environ.get("WORLD_SIZE", "1")) > 1
        else None
    )
    command = [cfg.python or sys.executable, str(SCRIPT)]
    return LineProcess(
        command, stderr=stderr, env={**foreign_environment(gpu), **cfg.env}
    )


def files_digest(suite: Suite, folder: Path, dimension: str, each: int) -> str:
    """Of the names and sizes of a dimension's videos."""
    videos = suite.videos(suite.prompts([dimension]), each=each, flickering=each)
    text = "".join(
        f"{(folder / video.name).stat().st_size} {video.name}\n" for video in videos
    )
    return hashlib.sha256(text.encode()).hexdigest()


# ------------------------------------------------------------------ the table


def conclude(
    cfg: VbenchEvaluation,
    suite: Suite,
    version: str,
    found: dict[str, list[dict[str, Any]]],
    gaps: Gaps,
) -> None:
    """summary.json and table.md."""
    from common.files import replace_text
    from launch.evaluation.results_table import write_json

    models = {}
    for model, rows in found.items():
        scores = {row["dimension"]: row["score"] for row in rows if "error" not in row}
        models[model] = {
            **{name: scores.get(name) for name in cfg.dimensions},
            **totals(scores),
        }
    notes = list_notes(cfg, suite, version, found, gaps)
    summary = {
        "models": models,
        "normalised": {
            model: {
                name: normalised(name, scores[name])
                for name in cfg.dimensions
                if scores[name] is not None
            }
            for model, scores in models.items()
        },
        "vbench": version,
        "notes": notes,
    }
    write_json(Path(cfg.out) / "summary.json", summary)
    replace_text(Path(cfg.out) / "table.md", markdown(models, notes))


def list_notes(
    cfg: VbenchEvaluation,
    suite: Suite,
    version: str,
    found: dict[str, list[dict[str, Any]]],
    gaps: Gaps,
) -> Sequence[str]:
    """What a reader of the numbers must know."""
    kind = (
        "VBench's standard prompts"
        if suite.is_standard
        else f"NOT VBench's standard prompts, {suite.path.name}"
    )
    notes = [f"vbench {version}; {kind}: {len(suite.prompts(cfg.dimensions))} prompts."]
    if not cfg.static_filter and FLICKERING in cfg.dimensions:
        notes.append(
            "temporal flickering: without VBench's filter of static videos, not its protocol."
        )
    for model, rows in found.items():
        for row in rows:
            if "error" in row:
                notes.append(
                    f"{model}, {row['dimension']}: not run, {row['error'].splitlines()[-1]}"
                )
            elif "with_static" in row:
                notes.append(
                    f"{model}, {FLICKERING}: {row['with_static']} of {suite.count(FLICKERING)} prompts have "
                    f"{INDICES} static videos; {row['found']} of {row['wanted']} were judged."
                )
        for dimension, names in gaps[model].items():
            notes.append(
                f"{model}, {dimension}: not run, {len(names)} videos are not there."
            )
    return notes
