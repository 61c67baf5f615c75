"""The paper's claims about reward models, each with what was measured and what follows.

A claim holds where the 95 % interval of its number lies above 0, does not hold where it lies below,
and cannot be told where it contains 0. Numbers are MEANs over seeds (2605.05922, Figures 1b, 1c
and the main table; numbers of its ablations could not be read).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments import tables
from experiments.rm_methods import GROUPS
from experiments.rm_results import (
    FIELD_TITLES,
    SAME,
    WRONG,
    Curve,
    Outcomes,
    first_update,
    mean_of,
    right_by_stated_order,
    wobble,
)
from launch.evaluation.intervals import nested_ci95

HOLDS = "holds"
FAILS = "does not hold"
UNKNOWN = "cannot be told"


@dataclass(frozen=True)
class Claim:
    """A claim that ``method`` has more of a field than ``other`` on the same pairs."""

    text: str
    method: str
    other: str
    group: str
    field: str = "right"


@dataclass(frozen=True)
class ClaimResult:
    """A claim with its number: what it is, and its interval."""

    text: str
    measure: str
    value: Mapping[str, Any] | None

    @property
    def verdict(self) -> str:
        """What the interval says of the claim."""
        if self.value is None or None in self.value["ci95"]:
            return UNKNOWN
        low, high = self.value["ci95"]
        if low > 0:
            return HOLDS
        return FAILS if high < 0 else UNKNOWN


# Claims of the paper's Figure 1b, then of its stages and of masking.
COMPARISONS = (
    Claim(
        "DeScore beats a generative reward model", "descore", "generative", "in domain"
    ),
    Claim("... and out of its domain", "descore", "generative", "out of domain"),
    Claim(
        "DeScore beats a discriminative reward model",
        "descore",
        "discriminative",
        "in domain",
    ),
    Claim("... and out of its domain", "descore", "discriminative", "out of domain"),
    Claim(
        "A discriminative model generalises worse than a generative one",
        "generative",
        "discriminative",
        "out of domain",
    ),
    Claim("Training adds to what the base states", "descore", "base", "in domain"),
    Claim("Stage 2 adds to stage 1", "descore", "stage1", "in domain"),
    Claim("... and out of its domain", "descore", "stage1", "out of domain"),
    Claim(
        "Stage 2 refines the chains of thought",
        "descore",
        "stage1",
        "in domain",
        "thought",
    ),
    Claim(
        "Masking chains of thought in stage 1 helps both stages together",
        "descore",
        "descore_p0",
        "in domain",
    ),
    Claim(
        "The chain of thought helps the score at test time",
        "stage1",
        "stage1_at_once",
        "in domain",
    ),
)


def findings_of(
    outcomes: Outcomes,
    size: int,
    curves: Mapping[str, Mapping[int, Curve]],
) -> list[ClaimResult]:
    """All claims with their numbers, on the models that were trained on ``size`` pairs."""
    # Comparisons on the same pairs.
    found = []
    for claim in COMPARISONS:
        value = mean_of(
            outcomes,
            size,
            claim.method,
            GROUPS[claim.group],
            claim.field,
            minus=claim.other,
        )
        names = f"{claim.method} - {claim.other}"
        measure = f"{FIELD_TITLES[claim.field]}, {names}, {claim.group}"
        found.append(ClaimResult(claim.text, measure, value))

    # What the score adds to the five that a chain of thought states.
    for text, order, measure in (
        (
            "The score tells videos apart that the chain of thought states as equal",
            SAME,
            "accuracy on pairs of equal stated sums, less 1/2",
        ),
        (
            "The score corrects chains of thought that are wrong",
            WRONG,
            "accuracy on pairs of wrongly ordered sums, less 1/2",
        ),
    ):
        value = lead_on(outcomes, size, order)
        found.append(ClaimResult(text, f"{measure}, descore, all tests", value))
    return [*found, *training_findings(curves)]


def lead_on(outcomes: Outcomes, size: int, order: float) -> dict[str, Any] | None:
    """Accuracy of DeScore less 1/2 on the pairs whose chains of thought state an order."""
    tests = [test for members in GROUPS.values() for test in members]
    found = right_by_stated_order(outcomes, size, "descore", tests)
    by_seed = []
    for by_order in found.values():
        by_seed.append([is_right - 0.5 for is_right in by_order[order]])

    # Every seed has pairs of its own.
    if len(by_seed) < 2 or not all(by_seed):
        return None
    return nested_ci95([[leads] for leads in by_seed]).as_dict()


def training_findings(curves: Mapping[str, Mapping[int, Curve]]) -> list[ClaimResult]:
    """Efficiency and stability of stage 1 against the generative model, seed by seed."""
    theirs = curves.get("generative", {})
    ours = curves.get("stage1", {})
    seeds = sorted(set(theirs) & set(ours))
    # The goal of a seed is the best accuracy of its generative model.
    saved = []
    calmer = []
    for seed in seeds:
        goal = max(accuracy for _, accuracy in theirs[seed])
        needed = first_update(ours[seed], goal)
        taken = first_update(theirs[seed], goal)
        saved.append(_log_ratio(taken, needed))
        calmer.append(wobble(theirs[seed]) - wobble(ours[seed]))
    return [
        ClaimResult(
            "DeScore reaches the generative model's best accuracy in fewer updates",
            "log of the ratio of updates, generative over stage 1",
            _of_seeds(saved),
        ),
        ClaimResult(
            "DeScore trains more steadily",
            "std over the last tenth of training, generative - stage 1",
            _of_seeds(calmer),
        ),
    ]


def _log_ratio(taken: int | None, needed: int | None) -> float:
    """log(taken / needed); NaN if the goal was not reached."""
    if not taken or not needed:
        return math.nan
    return math.log(taken / needed)


def _of_seeds(values: Sequence[float]) -> dict[str, Any] | None:
    """Interval of one number a seed; None where a seed has none."""
    if len(values) < 2 or any(math.isnan(value) for value in values):
        return None
    return nested_ci95([[[value]] for value in values]).as_dict()


def claims_table(findings: Sequence[ClaimResult]) -> list[str]:
    """Lines of the table: the claim, the verdict, the number and what it is."""
    rows = []
    for finding in findings:
        number = tables.show(finding.value) or "not in every seed"
        rows.append([finding.text, finding.verdict, number, finding.measure])
    return tables.markdown_table(("claim", "verdict", "number", "of what"), rows)
