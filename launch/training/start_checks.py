"""What the start of GRPO and DPO share: print the findings of checks, and check shared tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from common.cli import exit_with_error

if TYPE_CHECKING:
    from alignment.self_checks import Finding
    from generator.wan import WanGenerator


def report(findings: Sequence[Finding]) -> None:
    """Print every finding; exit with code 2 if a check failed that must not."""
    from common.log import say

    # Print every finding before the process may end.
    failed = []
    for finding in findings:
        outcome = "ok"
        if not finding.ok:
            outcome = "FAILED" if finding.fatal else "WARNING"
        if outcome == "FAILED":
            failed.append(finding.name)
        say(f"self-check {outcome}: {finding.message}")
    if failed:
        exit_with_error(
            f"self-checks failed: {', '.join(failed)}; self_checks=false trains all the same"
        )


def context_findings(generator: WanGenerator) -> list[Finding]:
    """Compare the gradient of ranks that share tokens with one rank's; [] if none do."""
    from alignment.self_checks import shared_tokens

    if generator.cfg.context_parallel == 1:
        return []
    return [shared_tokens(generator.context_gap, dtype=generator.cfg.dtype)]
