"""Provenance of a run: its settings, means by hand, and hub names only."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from common.schema import annotation_at
from launch.release import provenance
from launch.release.provenance import (
    LoggedChange,
    is_hub_name,
    logged_changes,
    read_provenance,
    run_folder,
)
from launch.schemas.pairs import DpoRun
from launch.schemas.training import ColdStartRun, DualRlRun, GrpoRun

SCHEMAS = {
    "grpo": GrpoRun,
    "dpo": DpoRun,
    "cold_start": ColdStartRun,
    "dual_rl": DualRlRun,
}


@pytest.mark.parametrize("kind", SCHEMAS)
def test_settings_are_keys_of_the_schema(kind: str) -> None:
    assert SCHEMAS.keys() == provenance.SETTINGS.keys()
    keys = provenance.SETTINGS[kind]
    assert len(set(keys)) == len(keys)
    assert [
        key
        for key in keys
        if annotation_at(SCHEMAS[kind], tuple(key.split("."))) is None
    ] == []


def test_logged_changes_by_hand() -> None:
    rows = [
        {"step": i, "reward/a": float(i), "reward/a_std": 5.0, "seconds/step": 1.0}
        for i in range(20)
    ]
    rows[3]["eval/a"], rows[9]["eval/a"], rows[12]["eval/a"] = 0.5, math.nan, 0.75
    rows[5]["heldout/accuracy"] = 1.0
    assert logged_changes(rows) == [
        LoggedChange("eval/a", 0.5, 0.75, 1),
        LoggedChange("heldout/accuracy", 1.0, 1.0, 1),
        LoggedChange("reward/a", 4.5, 14.5, 10),  # means of 0..9 and 10..19
    ]
    assert [c.over for c in logged_changes(rows[:19]) if c.name == "reward/a"] == [1]


def test_hub_name_is_not_a_local_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("models/wan")
    (tmp_path / "models/wan").mkdir(parents=True)
    assert not is_hub_name("models/wan")
    assert [
        name
        for name in ("/a/b", "./b", "~/b", "a/b/c", "a", "a/b c", None)
        if is_hub_name(name)
    ] == []


def test_run_folder_is_found_above_trained_folders(tmp_path: Path) -> None:
    for name in ("final", "final_ema", "checkpoints/step-9/trained"):
        (tmp_path / "run" / name).mkdir(parents=True)
        assert run_folder(tmp_path / "run" / name) is None
    (tmp_path / "run/config.yaml").write_text(
        "dpo: {method: rwr}\ngenerator: {path: a/b}\n"
    )
    for name in ("final", "final_ema", "checkpoints/step-9/trained"):
        found = read_provenance(tmp_path / "run" / name)
        assert (found.algorithm, found.base_model, found.steps) == (
            "Flow-RWR",
            "a/b",
            0,
        )
    assert read_provenance(tmp_path).algorithm is None


def test_steps_count_training_lines_before_the_checkpoint(tmp_path: Path) -> None:
    """Three steps and a line with the last evaluation; a checkpoint after two steps has two."""
    run = tmp_path / "run"
    rows = [
        {"step": step, "train/loss": 1.0, "reward/a": float(step)} for step in range(3)
    ]
    lines = [json.dumps(row) for row in [*rows, rows[2], {"step": 3, "eval/a": 0.5}]]
    for name in ("final", "checkpoints/step-000002/trained"):
        (run / name).mkdir(parents=True)
    (run / "config.yaml").write_text("grpo: {}\n")
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert read_provenance(run / "final").steps == 3
    early = read_provenance(run / "checkpoints/step-000002/trained")
    assert (early.steps, early.changes) == (
        2,
        (
            LoggedChange("reward/a", 0.0, 1.0, 1),
            LoggedChange("train/loss", 1.0, 1.0, 1),
        ),
    )
