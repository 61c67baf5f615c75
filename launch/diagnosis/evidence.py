"""What a diagnosis knows about a run: settings, metrics, measurements, environment, certificate.

A diagnosis reads files only. Heavy packages are not imported here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from common import safe_yaml
from common.files import json_object, read_jsonl
from common.run_record import value_at

Row = dict[str, float]
Certainty = Literal["certain", "likely", "possible"]

# Measurements of the first updates: a line per update.
MEASUREMENTS = "measurements.jsonl"
# The "step" of the row that was measured before any update.
START = -1
# In the order in which a reader wants them.
CERTAINTIES: tuple[Certainty, ...] = ("certain", "likely", "possible")


@dataclass(frozen=True)
class Diagnosis:
    """A cause of trouble in words.

    cause      short name of the kind, for programs: "adapter-not-in-sampler"
    certainty  "certain" and "likely" accuse the run; "possible" is worth knowing
    what       what is wrong
    because    the numbers that show it
    advice     what to do
    """

    cause: str
    certainty: Certainty
    what: str
    because: str
    advice: str

    @property
    def accuses(self) -> bool:
        """False for what is only worth knowing."""
        return self.certainty != "possible"

    @property
    def line(self) -> str:
        """The diagnosis as a line of a log."""
        return f"{self.certainty}: {self.what} ({self.because}); {self.advice}"


@dataclass(frozen=True)
class Evidence:
    """Files of a run, read.

    settings      config.yaml as nested dicts
    metrics       rows of metrics.jsonl, NaN for null
    measurements  rows of measurements.jsonl, which `launch.diagnosis.watch` writes
    facts         of the generator's folder and of evaluations, by name; see `read_run`
    certificate   first updates of the same recipe, {} where none fits
    """

    settings: Mapping[str, Any]
    metrics: Sequence[Row] = ()
    measurements: Sequence[Row] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    certificate: Mapping[str, Any] = field(default_factory=dict)

    def setting(self, key: str, default: Any = None) -> Any:
        """The value at a dotted key; ``default`` where it is missing or null."""
        value = value_at(self.settings, key)
        return default if value is None else value

    @property
    def rewards(self) -> dict[str, Mapping[str, Any]]:
        """The settings of every reward by name."""
        entries = self.setting("rewards", {})
        return {name: entry or {} for name, entry in entries.items()}

    @property
    def trained_rewards(self) -> list[str]:
        """Names of the rewards whose weight is not 0."""
        return [
            name
            for name, entry in self.rewards.items()
            if entry.get("weight", 1.0) != 0
        ]

    @property
    def steps(self) -> list[Row]:
        """The rows of optimizer steps; a row that holds an evaluation alone is none."""
        return [row for row in self.metrics if "seconds/step" in row]

    def column(self, name: str) -> list[float]:
        """The finite values of a metric over the optimizer steps."""
        return _finite(self.steps, name)

    def measured(self, name: str) -> list[float]:
        """The finite values of a measurement: at the start, then over the measured updates."""
        return _finite(self.measurements, name)

    @property
    def measured_updates(self) -> list[Row]:
        """The rows of measurements that follow an update."""
        return [row for row in self.measurements if row["step"] != START]


def _finite(rows: Sequence[Row], name: str) -> list[float]:
    values = [row[name] for row in rows if name in row]
    return [value for value in values if math.isfinite(value)]


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
    """Read a GRPO run, and evaluations that used what it trained.

    Evaluations beside the run's folder are found by the adapter in their config.yaml. Raises
    ValueError where the folder holds no GRPO run.
    """
    from launch.diagnosis.certificates import certificate_of

    # Settings decide whether this is a run at all.
    settings = read_settings(folder / "config.yaml")
    if "grpo" not in settings:
        raise ValueError(f"{folder} holds no GRPO run: its config.yaml has no grpo")
    # Evaluations named by the user, and those beside the run.
    found = {*evaluations, *evaluations_of(folder)}
    facts = {
        **folder_facts(settings),
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


def evaluations_of(folder: Path) -> Iterator[Path]:
    """Find evaluations beside a run: their adapter lies inside the run's folder.

    An evaluation without an adapter belongs to the run if its folder's name says that it is of the
    tuned generator: "tuned" or the run's name is a part of it.
    """
    own = folder.resolve()
    for file in sorted(own.parent.glob("*/config.yaml")):
        settings = read_settings_or_nothing(file)
        if file.parent == own or "adapter" not in settings:
            continue
        adapter = settings["adapter"]
        name = file.parent.name
        # Without an adapter only the folder's name can tell.
        if not adapter:
            words = name.replace("-", "_").split("_")
            mine = "eval" in name and ("tuned" in words or own.name in words)
        else:
            mine = Path(str(adapter)).resolve().is_relative_to(own)
        if mine:
            yield file.parent


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


def as_json(diagnoses: Sequence[Diagnosis]) -> str:
    """Diagnoses as JSON, for programs."""
    rows = []
    for diagnosis in diagnoses:
        rows.append(
            {
                "cause": diagnosis.cause,
                "certainty": diagnosis.certainty,
                "what": diagnosis.what,
                "because": diagnosis.because,
                "advice": diagnosis.advice,
            }
        )
    return json.dumps(rows, indent=2) + "\n"
