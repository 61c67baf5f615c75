"""Which runs a folder holds, and of what kind each is: by the files in them, whatever the folders are called."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from launch.reporting.data import KINDS, Found, Runs, config, metrics, results

# of several runs of a kind the one so called goes first, as experiments/demo.py calls them
_FIRST = {
    "cold_start": "descore",
    "rm": "eval_rm",
    "base": "eval_base",
    "tuned": "eval_tuned",
    "dpo_tuned": "eval_dpo",
}
_STAGES = ("grpo", "dpo", "dual_rl", "cold_start")
# what runs keep beside their results: large, and no run
_INSIDE = {
    "checkpoints",
    "samples",
    "evaluation",
    "videos",
    "final",
    "final_ema",
    "candidates",
    "shards",
    "wandb",
}


def discover(folder: Path) -> Runs:
    """The runs and evaluations in a folder, itself included: one of each kind, and the others under ``more``.

    Raises ValueError when there is none, and BrokenFileError.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    folders = list(_run_folders(folder))
    trained = {one.name: kind for one in folders if (kind := kind_of(one)) in _STAGES}
    found = [
        Found(kind, one)
        for one in folders
        if (kind := kind_of(one, trained)) is not None
    ]
    if not found:
        raise ValueError(
            f"{folder}: neither it nor a folder inside is a run (config.yaml, metrics.jsonl) or an evaluation "
            f"(results.jsonl, summary.json)"
        )
    found.sort(
        key=lambda one: one.folder.name != _FIRST.get(one.kind, one.kind)
    )  # stable: else by path
    first: dict[str, Found] = {}
    for one in found:
        if one.kind in KINDS:
            first.setdefault(one.kind, one)
    more = tuple(one for one in found if one not in first.values())
    return replace(Runs(**{kind: one.folder for kind, one in first.items()}), more=more)


def read_manifest(path: Path) -> tuple[str | None, Runs]:
    """{"title": "...", "runs": {"grpo": "folder", ...}}, folders relative to the file. ValueError says what is bad."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    runs = raw.get("runs") if isinstance(raw, dict) else None
    if (
        not isinstance(runs, dict)
        or not set(raw) <= {"title", "runs"}
        or not set(runs) <= set(KINDS)
    ):
        raise ValueError(
            f'{path}: needs {{"title": ..., "runs": {{...}}}} with runs among {", ".join(KINDS)}'
        )
    folders = {name: path.parent / folder for name, folder in runs.items()}
    for folder in folders.values():
        if not _is_run(folder):
            raise ValueError(f"{path}: {folder} is no run folder")
    return raw.get("title"), Runs(**folders)


def kind_of(folder: Path, trained: Mapping[str, str] | None = None) -> str | None:
    """A field of `Runs` or dual_rl; None for an evaluation of another program, such as VBench's.

    trained  kinds of the runs beside it, by name: where an evaluation's adapter is not where its config says any more
    """
    cfg = config(folder)
    if (folder / "results.jsonl").is_file():
        first = next(iter(results(folder)), cfg)
        if "label" in first or "pairs" in first:
            return "rm"
        if "rewards" not in first:
            return None
        adapter = cfg.get("adapter")
        if not adapter:
            return "base"
        return (
            "dpo_tuned"
            if _trainer_of(Path(str(adapter)), trained or {}) == "dpo"
            else "tuned"
        )
    stage = _stage_of(cfg)
    if stage is not None:
        return stage
    names = {name for row in metrics(folder) for name in row}
    if "train/bt" in names:
        return "dual_rl"
    if any(name.startswith("reward/") for name in names):
        return "grpo"
    return "dpo" if "train/chosen_change" in names else "cold_start"


def _stage_of(cfg: Mapping[str, object]) -> str | None:
    return next((stage for stage in _STAGES if stage in cfg), None)


def _trainer_of(adapter: Path, trained: Mapping[str, str]) -> str | None:
    """The kind of run that made an adapter: of the folder above it, else of the run that its path names."""
    above = next(
        (one for one in list(adapter.parents)[:3] if (one / "config.yaml").is_file()),
        None,
    )
    if above is not None:
        return _stage_of(config(above))
    return next(
        (trained[part] for part in reversed(adapter.parts) if part in trained), None
    )


def _run_folders(root: Path) -> list[Path]:
    """By path. Links are not followed."""
    found = []
    for place, inside, _ in os.walk(root):
        run = _is_run(Path(place))
        skipped = _INSIDE if run else ()
        inside[:] = sorted(
            name for name in inside if name not in skipped and not name.startswith(".")
        )
        if run:
            found.append(Path(place))
    return found


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("metrics.jsonl", "results.jsonl"))
