"""Make a table of VBench scores from the result files that VBench's command line writes.

    out/summary.json  models, their normalised dimensions, and notes
    out/table.md      16 dimensions, quality, semantic and total of every model

VBench writes DIMENSION_eval_results.json, {dimension: [score, details]}. A dimension without a
result is null in the summary and "not run" in the table, never 0. No torch here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.cli import user_errors
from common.config import dump
from common.files import read_json, replace_text, write_json
from launch.schemas.vbench import VbenchEvaluation
from launch.vbench_eval.scores import markdown, normalised, totals
from launch.vbench_eval.suite import DIMENSIONS

PATTERN = "*_eval_results.json"


def evaluate_vbench(cfg: VbenchEvaluation) -> None:
    """Write summary.json and table.md from the result files of every model."""
    models = {}
    normalised_scores = {}
    notes = []
    with user_errors():
        for model, folder in cfg.results.items():
            found = read_results(Path(folder))
            scores = {name: found.get(name) for name in cfg.dimensions}
            models[model] = {**scores, **totals(scores)}

            # Dimensions without a result have no normalised score.
            normalised_scores[model] = {}
            for name, score in scores.items():
                if score is None:
                    notes.append(f"{model}, {name}: not run, {folder} has no result.")
                else:
                    normalised_scores[model][name] = normalised(name, score)

    # Later readers find the settings and the table in one folder.
    dump(cfg, cfg.out)
    summary = {"models": models, "normalised": normalised_scores, "notes": notes}
    write_json(Path(cfg.out) / "summary.json", summary)
    table = markdown(models, notes)
    replace_text(Path(cfg.out) / "table.md", table)
    print(table)


def read_results(folder: Path) -> dict[str, float]:
    """Return the score of each dimension that has a result file in the folder.

    Raises ValueError for a folder without result files, an unreadable file, an unknown dimension, a
    dimension in two files, and a score outside -1..1. VBench gives NaN, the mean of nothing, where
    it found no video.
    """
    paths = sorted(folder.glob(PATTERN))
    if not paths:
        raise ValueError(f"results: {folder} holds no file {PATTERN}")
    scores: dict[str, float] = {}
    for path in paths:
        for dimension, score in _read_file(path).items():
            if dimension not in DIMENSIONS:
                raise ValueError(f"{path}: VBench has no dimension {dimension!r}")
            if dimension in scores:
                raise ValueError(f"{path}: another file has {dimension}; remove one")
            # NaN fails this comparison as well.
            if not -1 <= score <= 1:
                raise ValueError(f"{path}: {dimension} has the score {score}")
            scores[dimension] = score
    return scores


def _read_file(path: Path) -> dict[str, float]:
    try:
        content: dict[str, list[Any]] = read_json(path)
        return {name: float(result[0]) for name, result in content.items()}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        shape = "{dimension: [score, details]}"
        raise ValueError(f"{path}: is not JSON of the form {shape}") from error
