"""What the diagnosis of a run says, for its report."""

from __future__ import annotations

from pathlib import Path

from launch.diagnosis.evidence import Diagnosis
from launch.diagnosis.report import SURE
from launch.diagnosis.rules import diagnose
from launch.diagnosis.run_files import read_run
from launch.reporting import data


def diagnoses_of(folder: Path | None) -> list[tuple[str, Diagnosis]] | None:
    """How sure and what the diagnosis of a GRPO run is; None without steps to judge by."""
    if folder is None or not data.metrics(folder) or not data.config(folder):
        return None
    found = diagnose(read_run(folder))
    return [(SURE[diagnosis.certainty], diagnosis) for diagnosis in found]
