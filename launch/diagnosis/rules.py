"""All rules of a diagnosis, and the order of what they find."""

from __future__ import annotations

from collections.abc import Iterator

from launch.diagnosis.certificates import certificate_rules
from launch.diagnosis.dpo_rules import dpo_rules
from launch.diagnosis.evidence import CERTAINTIES, Diagnosis, Evidence
from launch.diagnosis.generator_rules import generator_rules
from launch.diagnosis.metric_rules import gradient_rules, metric_rules
from launch.diagnosis.reward_model_rules import cold_start_rules, dual_rl_rules
from launch.diagnosis.reward_rules import reward_rules
from launch.diagnosis.setting_rules import (
    optimizer_rules,
    outcome_rules,
    setting_rules,
)
from launch.diagnosis.update_rules import update_rules

# Of two rules with the same cause and certainty, the first is reported.
RULES = {
    "grpo": (
        generator_rules,
        update_rules,
        reward_rules,
        setting_rules,
        metric_rules,
        certificate_rules,
    ),
    "dpo": (dpo_rules, optimizer_rules, outcome_rules, gradient_rules),
    "cold_start": (cold_start_rules, gradient_rules),
    "dual_rl": (dual_rl_rules, gradient_rules),
}
# What a cause explains: its consequences are not reported beside it.
EXPLAINS = {
    "adapter-frozen": {"lr-too-small", "no-gradient", "lora-b-zero", "lr-differs"},
    "gradient-clipped": {"lr-too-small"},
    "lr-differs": {"lr-too-small"},
    "weight-decay": {"lr-too-small"},
    "lora-b-zero": {"adapter-frozen", "lr-differs", "lr-too-small", "no-gradient"},
    "lr-too-large": {
        "reward-sign-in-update",
        "kl-holds",
        "reward-saturated",
    },
    "reward-saturated": {"reward-blind"},
    "vae-scaling": {"evaluation-settings", "evaluation-without-adapter"},
    "noise-size": {"members-alike"},
    "wrong-noise": {"evaluation-settings", "rollout-differs"},
    "wrong-shift": {"evaluation-settings"},
    "rollout-differs": {"update-differs", "evaluation-settings"},
    "members-alike": {
        "reward-saturated",
        "reward-blind-to-video",
        "rollout-differs",
        "lora-b-zero",
    },
    "reward-other-videos": {
        "reward-default",
        "reward-saturated",
        "reward-swapped",
        "channels-swapped",
    },
    "reward-stale": {"reward-swapped"},
    "reward-blind-to-video": {"reward-swapped"},
    "channels-swapped": {"evaluation-settings"},
    "frames-reversed": {"evaluation-settings"},
    "frames-turned": {"evaluation-settings"},
    "log-prob-dtype": {"loss-differs"},
    "loss-differs": {"kl-holds"},
    "scores-missing": {"reward-saturated"},
    "adapter-not-in-sampler": {"evaluation-without-adapter"},
    "guidance-not-in-update": {"reward-sign-in-update"},
    "wrong-embeddings": {"rollout-differs", "update-differs", "evaluation-settings"},
}


def diagnose(evidence: Evidence) -> list[Diagnosis]:
    """Apply all rules: one diagnosis a cause, the most certain first."""
    found: dict[str, Diagnosis] = {}
    for diagnosis in _all(evidence):
        known = found.get(diagnosis.cause)
        if known is None or _place(diagnosis) < _place(known):
            found[diagnosis.cause] = diagnosis

    # Consequences of another cause say nothing new. Of two that explain each other the first stays.
    explained: set[str] = set()
    for cause, diagnosis in found.items():
        if diagnosis.accuses and cause not in explained:
            explained |= EXPLAINS.get(cause, set())
    kept = [diagnosis for cause, diagnosis in found.items() if cause not in explained]
    return sorted(kept, key=_place)


def _all(evidence: Evidence) -> Iterator[Diagnosis]:
    for rule in RULES[evidence.stage]:
        yield from rule(evidence)


def _place(diagnosis: Diagnosis) -> int:
    return CERTAINTIES.index(diagnosis.certainty)
