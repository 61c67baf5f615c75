"""Options of a DeScore scorer that can be checked without a model. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

# When a scorer writes a CoT: for every video, for none, or where the fast order is in doubt.
ThinkingMode = Literal["always", "never", "adaptive"]
# Share of the groups that are drawn for the audit.
AUDIT_SHARE = 0.05


def check_thinking(options: Mapping[str, Any]) -> None:
    """Raise ValueError for options that do not fit their ``thinking``."""
    mode = options.get("thinking", "always")
    known = get_args(ThinkingMode)
    if mode not in known:
        raise ValueError(
            f"thinking={mode!r} must be {', '.join(known[:-1])} or {known[-1]}"
        )
    if mode == "adaptive":
        _check_adaptive(options)
        return
    if "audit" in options:
        raise ValueError(f"audit={options['audit']} needs thinking=adaptive")
    cots = options.get("cots")
    if mode == "never" and cots:
        raise ValueError(f"thinking=never excludes cots={cots}: leave out cots")


def _check_adaptive(options: Mapping[str, Any]) -> None:
    """The thresholds compare the head's raw rewards without and behind a CoT."""
    if options.get("cots") == 0:
        raise ValueError("thinking=adaptive needs CoTs: leave out cots=0")
    value = options.get("value", "head")
    if value != "head":
        raise ValueError(f"thinking=adaptive needs value=head, got value={value}")
    if options.get("calibrated"):
        raise ValueError(
            "thinking=adaptive excludes calibrated=true: its thresholds are about raw rewards"
        )
    audit = options.get("audit", AUDIT_SHARE)
    if not isinstance(audit, int | float) or not 0 <= audit <= 1:
        raise ValueError(f"audit={audit!r} must be a share in [0, 1]")
