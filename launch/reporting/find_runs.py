"""Find the runs in a folder and the kind of each, by the files in them and not by their names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from launch.reporting.data import (
    KINDS,
    Row,
    Runs,
    config,
    results,
)

# Of several runs of a kind the sections show the one with this name, as experiments/demo.py
# gives it; without an entry, the one with the name of its kind.
_PREFERRED = {
    "cold_start": "descore",
    "rm": "eval_rm",
    "base": "eval_base",
    "tuned": "eval_tuned",
    "dpo_tuned": "eval_dpo",
}
STAGES = ("grpo", "dpo", "dual_rl", "cold_start")


def discover(root: Path) -> Runs:
    """Find the runs and evaluations in a folder, and the folder itself if it is a run.

    Raises ValueError without any.
    """
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}")

    # Kinds by name: they tell what an evaluated adapter was trained by.
    folders = _run_folders(root)
    trained = {folder.name: _stage_of(config(folder)) for folder in folders}
    runs = [
        (kind, folder)
        for folder in folders
        if (kind := kind_of(folder, trained)) is not None
    ]
    if not runs:
        raise ValueError(
            f"{root} holds no run (config.yaml, metrics.jsonl) and no evaluation "
            "(results.jsonl, summary.json)"
        )

    # The sections show a run of each kind: the preferred name, else the first path.
    runs.sort(key=lambda run: run[1].name != _PREFERRED.get(run[0], run[0]))
    shown: dict[str, Path] = {}
    more = []
    for kind, folder in runs:
        if kind in KINDS and kind not in shown:
            shown[kind] = folder
        else:
            more.append((kind, folder))
    return Runs(shown, more)


def kind_of(folder: Path, trained: Mapping[str, str | None]) -> str | None:
    """Kind of a run; None for an evaluation of another program, such as VBench's.

    ``trained`` are the kinds of the runs of the report, by name. They are needed where a run was
    moved, so that the adapter of an evaluation is not where its config says.
    """
    cfg = config(folder)
    if not (folder / "results.jsonl").is_file():
        return _stage_of(cfg)

    # An evaluation: the first row tells, or the config where nothing is evaluated yet.
    rows = results(folder)
    first = rows[0] if rows else cfg
    if "label" in first or "pairs" in first:
        return "rm"
    if "rewards" not in first:
        return None
    if not cfg.get("adapter"):
        return "base"
    trainer = _trainer_of(Path(str(cfg["adapter"])), trained)
    return "dpo_tuned" if trainer == "dpo" else "tuned"


def _stage_of(cfg: Row) -> str | None:
    return next((stage for stage in STAGES if stage in cfg), None)


def _trainer_of(adapter: Path, trained: Mapping[str, str | None]) -> str | None:
    """Kind of the run that made an adapter: of a folder above it, else by a name in its path."""
    for folder in adapter.parents:
        stage = _stage_of(config(folder))
        if stage is not None:
            return stage

    # The run was moved, and kept its name.
    for name in reversed(adapter.parts):
        if trained.get(name):
            return trained[name]
    return None


def _run_folders(root: Path) -> list[Path]:
    """List the run folders by path, without following links; a run holds no other run."""
    folders = []
    for place, inside, files in os.walk(root):
        inside.sort()
        if "metrics.jsonl" in files or "results.jsonl" in files:
            folders.append(Path(place))
            inside.clear()
    return folders
