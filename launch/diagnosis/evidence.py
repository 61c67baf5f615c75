"""What a diagnosis knows about a run: settings, metrics, measurements, environment, certificate.

A diagnosis reads files only. Heavy packages are not imported here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from common.run_record import value_at

Row = dict[str, float]
Certainty = Literal["certain", "likely", "possible"]

# Measurements of the first updates: a line per update.
MEASUREMENTS = "measurements.jsonl"
# The "step" of the row that was measured before any update.
START = -1
# The section of a config.yaml that tells which command trained.
STAGES = ("grpo", "dpo", "dual_rl", "cold_start")
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
    facts         of the folder and of evaluations, by name; see `run_files.read_run`
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
    def stage(self) -> str:
        """Which command trained, one of `STAGES`; "grpo" if no section tells."""
        return next((stage for stage in STAGES if stage in self.settings), "grpo")

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
