"""A diagnosis as a page of text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from launch.diagnosis.evidence import Diagnosis, Evidence

WIDTH = 96
# How sure a diagnosis is, in words.
SURE = {
    "certain": "CERTAIN",
    "likely": "LIKELY",
    "possible": "worth knowing",
}


def text_of(evidence: Evidence, diagnoses: Sequence[Diagnosis]) -> str:
    """What was read, and every diagnosis with its numbers and its advice."""
    lines = [what_was_read(evidence), ""]
    for number, diagnosis in enumerate(diagnoses, start=1):
        # The cause, what is wrong, the numbers, the advice.
        head = f"{number}. {SURE[diagnosis.certainty]} [{diagnosis.cause}]"
        lines.append(head)
        for label, text in (
            ("", diagnosis.what),
            ("seen: ", diagnosis.because),
            ("do: ", diagnosis.advice),
        ):
            lines += textwrap.wrap(
                label + text,
                WIDTH,
                initial_indent="   ",
                subsequent_indent="   ",
            )
        lines.append("")
    if not any(diagnosis.accuses for diagnosis in diagnoses):
        lines.append("nothing is wrong as far as this can tell")
    return "\n".join(lines).rstrip()


def what_was_read(evidence: Evidence) -> str:
    """A sentence about the evidence."""
    # Say what is missing, too: it limits what can be found.
    parts = [f"{len(evidence.steps)} steps", "the settings"]
    if evidence.measurements:
        parts.append(f"measurements of {len(evidence.measurements)} updates")
    elif evidence.setting("generator.target") is not None:
        parts.append("no measurements: they are of Wan, and generator.target is not")
    elif evidence.stage == "grpo":
        parts.append("no measurements (grpo runs with diagnosis.updates=0 have none)")
    else:
        command = f"launch/{evidence.stage}.py"
        parts.append(f"no measurements: {command} makes none, metrics must do")
    # Its bands are of GRPO's updates.
    if evidence.certificate and evidence.stage == "grpo":
        parts.append(f"the certificate of {evidence.certificate['recipe']}")
    environment = evidence.facts.get("environment", {})
    torch = environment.get("packages", {}).get("torch")
    if torch:
        parts.append(f"its environment (torch {torch})")
    count = len(evidence.facts.get("evaluations", {}))
    if count:
        parts.append(f"{count} evaluations")
    return "read: " + ", ".join(parts)
