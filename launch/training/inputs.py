"""Which files a training run reads, so that a resumed run can tell what changed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignment.config import RewardConfig
    from engine.config import TrainingRun
    from engine.trainer import TrainingTask
    from launch.schemas.pairs import DpoRun
    from launch.schemas.training import ColdStartRun, DualRlRun, GrpoRun

Inputs = dict[str, str | Path | None]


def with_inputs(
    run: TrainingRun, build_task: Callable[[], TrainingTask]
) -> Callable[[], TrainingTask]:
    """Hash the run's input files now, and add the record to the task that is built later.

    Rank 0 does it. Files that are read by others are not found: the videos of a table, and
    what a reward's file imports.
    """
    from common.cli import user_errors
    from common.input_record import record_inputs

    # The files are the same on all ranks.
    record: dict[str, Any] = {}
    if os.environ.get("RANK", "0") == "0":
        with user_errors():
            record = record_inputs(inputs_of(run))
    return lambda: replace(build_task(), inputs=record)


def inputs_of(run: TrainingRun) -> Inputs:
    """The files and folders that a run reads, by setting."""
    from launch.schemas.pairs import DpoRun
    from launch.schemas.training import ColdStartRun, DualRlRun, GrpoRun

    if isinstance(run, GrpoRun):
        return _inputs_of_grpo(run)
    if isinstance(run, DpoRun):
        return _inputs_of_dpo(run)
    if isinstance(run, ColdStartRun | DualRlRun):
        return _inputs_of_reward_model(run)
    return {}


def _inputs_of_grpo(run: GrpoRun) -> Inputs:
    inputs: Inputs = {"prompts": run.prompts, "generator.path": run.generator.path}
    if run.generator.target_file is not None:
        inputs["generator.target"] = run.generator.target_file
    if run.evaluation is not None:
        inputs["evaluation.prompts"] = run.evaluation.prompts
    return inputs | _inputs_of_rewards("rewards", run.rewards)


def _inputs_of_dpo(run: DpoRun) -> Inputs:
    from alignment.pair_store import INDEX, MANIFEST

    inputs: Inputs = {"generator.path": run.generator.path}
    # The manifest has the SHA-256 of every shard.
    for name in ("pairs", "heldout"):
        folder = getattr(run, name)
        if folder is not None:
            for file in (MANIFEST, INDEX):
                inputs[f"{name}/{file}"] = Path(folder) / file
    if run.refresh is not None:
        inputs["refresh.prompts"] = run.refresh.prompts
        inputs |= _inputs_of_rewards("refresh.rewards", run.refresh.rewards)
    return inputs


def _inputs_of_reward_model(run: ColdStartRun | DualRlRun) -> Inputs:
    from rm.data import csv_file

    # A table may be given by its folder, which also holds the videos.
    inputs: Inputs = {"data.train": csv_file(Path(run.data.train))}
    if run.data.heldout is not None:
        inputs["data.heldout"] = csv_file(Path(run.data.heldout))
    # The model that is trained; each stage names it by another key.
    for name in ("base", "template", "checkpoint"):
        inputs[name] = getattr(run, name, None)
    return inputs


def _inputs_of_rewards(section: str, rewards: Mapping[str, RewardConfig]) -> Inputs:
    # A server of rewards has no file here.
    inputs: Inputs = {}
    for name, reward in rewards.items():
        inputs[f"{section}.{name}.checkpoint"] = reward.checkpoint
        if reward.target_file is not None:
            inputs[f"{section}.{name}.target"] = reward.target_file
    return inputs
