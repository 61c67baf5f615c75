"""Certificates: what the first updates of a recipe look like where it works."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from launch.diagnosis.evidence import Diagnosis, Evidence


def certificate_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The certificate that fits a run's settings; {} without any."""
    return {}


def certificate_rules(evidence: Evidence) -> Iterator[Diagnosis]:
    """Compare the first updates with the certificate's."""
    yield from ()
