"""Read the files of a run for a diagnosis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import safe_yaml
from common.files import json_object, read_jsonl
from common.run_record import value_at
from launch.diagnosis.certificates import certificate_of
from launch.diagnosis.evidence import MEASUREMENTS, STAGES, Evidence, Row

# As diffusers names it.
ADAPTER = "pytorch_lora_weights.safetensors"
# Names of evaluations that are meant to use no adapter.
OF_THE_BASE = ("base", "before", "untrained", "untuned", "reference", "stock", "start")


def rows_of(path: Path) -> list[Row]:
    """Read a file of rows, with NaN for null; [] where there is none."""
    if not path.is_file():
        return []
    rows = []
    for row in read_jsonl(path):
        # JSON has no NaN.
        rows.append({k: math.nan if v is None else v for k, v in row.items()})
    return rows


def read_settings(file: Path) -> dict[str, Any]:
    """Read a config.yaml. Raises ValueError where it is missing or no mapping."""
    if not file.is_file():
        raise ValueError(f"{file} does not exist: a run folder has a config.yaml")
    try:
        loaded = safe_yaml.parse(file.read_text(encoding="utf-8")).value
    except safe_yaml.YamlError as error:
        raise ValueError(f"{file}: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{file} must hold a mapping")
    return loaded


def read_run(folder: Path, evaluations: Sequence[Path] = ()) -> Evidence:
    """Read a training run, and evaluations that used what it trained.

    Evaluations beside the run's folder are found by the adapter in their config.yaml. Raises
    ValueError where the folder holds no training run.
    """
    # Settings decide whether this is a run at all.
    runs = runs_inside(folder)
    if runs and not (folder / "config.yaml").is_file():
        raise ValueError(
            f"{folder} is no run: name one of those inside: {', '.join(runs)}"
        )
    settings = read_settings(folder / "config.yaml")
    if not any(stage in settings for stage in STAGES):
        raise ValueError(
            f"{folder} holds no training run: its config.yaml has none of {', '.join(STAGES)}"
        )
    # Evaluations named by the user, and those beside the run.
    found = {*evaluations, *evaluations_of(folder)}
    facts = {
        **folder_facts(settings),
        **adapter_facts(folder),
        "environment": _environment(folder),
        "evaluations": {
            str(place): read_settings(place / "config.yaml") for place in sorted(found)
        },
    }
    return Evidence(
        settings=settings,
        metrics=rows_of(folder / "metrics.jsonl"),
        measurements=rows_of(folder / MEASUREMENTS),
        facts=facts,
        certificate=certificate_of(settings),
    )


def runs_inside(folder: Path) -> list[str]:
    """Names of the training runs in a folder."""
    names = []
    for file in sorted(folder.glob("*/config.yaml")):
        settings = read_settings_or_nothing(file)
        if any(stage in settings for stage in STAGES):
            names.append(file.parent.name)
    return names


def folder_facts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of the generator's folder, as far as it is on this machine.

    flow_shift  the shift of its scheduler
    """
    # A name on the hub is no folder here.
    path = value_at(settings, "generator.path")
    file = Path(str(path)) / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return {}
    # Schedulers of flow matching call it by either name.
    scheduler = json_object(file.read_text(encoding="utf-8"), str(file))
    shift = scheduler.get("flow_shift", scheduler.get("shift"))
    return {} if shift is None else {"flow_shift": float(shift)}


def evaluations_of(folder: Path) -> list[Path]:
    """Find evaluations beside a run or inside of it: their adapter lies in the run's folder.

    An evaluation without an adapter may be one of the base generator, to compare with. It belongs
    to the run if there is no other and its name says so: it lies inside the run, or has "eval" and
    none of `OF_THE_BASE` in its name.
    """
    own = folder.resolve()
    files = [*own.parent.glob("*/config.yaml"), *own.glob("*/config.yaml")]
    mine = []
    others = []
    for file in sorted(files):
        settings = read_settings_or_nothing(file)
        if file.parent == own or "adapter" not in settings:
            continue
        adapter = settings["adapter"]
        name = file.parent.name
        if adapter and Path(str(adapter)).resolve().is_relative_to(own):
            mine.append(file.parent)
        elif not adapter and ("eval" in name or file.parent.parent == own):
            others.append(file.parent)
    if mine:
        return mine
    return [
        place for place in others if not any(word in place.name for word in OF_THE_BASE)
    ]


def adapter_facts(folder: Path) -> dict[str, Any]:
    """Norm of all lora_B of the exported adapter, and whether its weights are finite.

    {} where the run has not ended, or trained without an adapter.
    """
    file = folder / "final" / ADAPTER
    if not file.is_file():
        return {}
    import numpy as np
    from safetensors.numpy import load_file

    square = 0.0
    finite = True
    for name, weight in load_file(file).items():
        finite = finite and bool(np.isfinite(weight).all())
        if ".lora_B." in name:
            square += float((weight.astype(np.float64) ** 2).sum())
    return {"exported_lora_b": math.sqrt(square), "exported_finite": finite}


def read_settings_or_nothing(file: Path) -> dict[str, Any]:
    """Read a config.yaml of another program; {} where it cannot be read."""
    try:
        return read_settings(file)
    except ValueError:
        return {}


def _environment(folder: Path) -> dict[str, Any]:
    file = folder / "environment.json"
    if not file.is_file():
        return {}
    return json_object(file.read_text(encoding="utf-8"), str(file))
