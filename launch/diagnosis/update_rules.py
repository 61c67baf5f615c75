"""Rules over the measurements of optimizer steps: gradient, size, direction and batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from launch.diagnosis.evidence import Diagnosis, Evidence

# The engine's gradient norm against that of the loss.
NORM_LIMIT = 0.05
# rms change of the velocity by the first update, relative to the velocity.
DRIFT_TOO_LARGE = 0.5
DRIFT_TOO_SMALL = 1e-6
# Of the measured updates, and their least number.
MOST_UPDATES = 0.7
FEW_UPDATES = 3
# Share of the gradient that is the KL term's.
KL_SHARE = 0.5
# A group's mean advantage, relative to the size of advantages.
OFF_CENTRE = 1e-2


def update_rules(evidence: Evidence) -> Iterator[Diagnosis]:
    """Apply every rule over measurements of updates."""
    yield from _gradient(evidence)
    yield from _size_of_update(evidence)
    yield from _direction(evidence)
    yield from _batch(evidence)


def _gradient(evidence: Evidence) -> Iterator[Diagnosis]:
    ranks = int(max(evidence.measured("ranks"), default=1))
    apart = max(evidence.measured("weights/ranks_apart"), default=0.0)
    # The largest difference between the two norms over the updates.
    worst = 0.0
    numbers = ""
    for row in evidence.measurements:
        norm = row.get("gradient/norm", math.nan)
        engine = _of_step(evidence, row, "train/grad_norm")
        if not (math.isfinite(norm) and math.isfinite(engine)) or norm == 0:
            continue
        difference = abs(engine / norm - 1)
        if difference > worst:
            worst = difference
            numbers = f"the engine's norm is {engine:.3g}, that of the mean over ranks {norm:.3g}"
    single_update = evidence.setting("grpo.updates", 1) == 1
    if apart > 0 or (worst > NORM_LIMIT and ranks > 1 and single_update):
        because = numbers
        if apart > 0:
            because = f"{apart:.0f} of {ranks} ranks have other weights than rank 0"
        yield Diagnosis(
            "gradients-not-averaged",
            "certain",
            f"gradients are not averaged over the {ranks} ranks: each trains on its own videos",
            because,
            "check the all-reduce of gradients (DeepSpeed's ZeRO stage, DDP wrapping, no_sync)",
        )
    elif worst > NORM_LIMIT and single_update:
        yield Diagnosis(
            "gradient-differs",
            "likely",
            "the engine steps along another gradient than the loss has",
            numbers,
            "check accumulation, zero_grad between updates, and frozen parameters",
        )


def _size_of_update(evidence: Evidence) -> Iterator[Diagnosis]:
    drift = {}
    for row in evidence.measured_updates:
        if row.get("adapter/drift", 0.0) > 0:
            drift[int(row["step"])] = row["adapter/drift"]
    lr = evidence.setting("optimizer.lr", 1e-4)
    # A resumed run may have measured later updates only.
    first = drift.get(0)
    _, high = drift_limits(evidence, 0)
    if first is not None and first > high:
        yield Diagnosis(
            "lr-too-large",
            "likely",
            "the learning rate is far too large: single updates throw the policy about",
            f"the first update at lr={lr:g} changes the velocity by {100 * first:.3g} %, at most "
            f"{100 * high:.2g} % is sound",
            f"try optimizer.lr={lr * high / first / 3:.1g}",
        )
    # Single updates at a small rate may happen to change one video more.
    below = [step for step in drift if drift[step] < drift_limits(evidence, step)[0]]
    if len(below) >= max(FEW_UPDATES, MOST_UPDATES * len(drift)):
        last = max(below)
        low, _ = drift_limits(evidence, last)
        yield Diagnosis(
            "lr-too-small",
            "likely",
            "the learning rate is far too small: the policy hardly moves",
            f"{last + 1} updates at lr={lr:g} change the velocity by {100 * drift[last]:.3g} %, at "
            f"least {100 * low:.2g} % is usual",
            f"try optimizer.lr={lr * low / drift[last] * 10:.1g}",
        )

    # The share of the KL term once the policy has moved.
    shares = []
    for row in evidence.measured_updates[1:]:
        norm = row.get("gradient/norm", 0.0)
        if norm > 0 and "kl/pull" in row:
            shares.append(row["kl/pull"] / norm)
    if len(shares) >= 2 and sorted(shares)[len(shares) // 2] > KL_SHARE:
        # The median, since single groups scatter.
        share = sorted(shares)[len(shares) // 2]
        yield Diagnosis(
            "kl-holds",
            "likely",
            "the KL weight holds the policy: its gradient is as large as the reward's",
            f"grpo.kl_weight={evidence.setting('grpo.kl_weight', 3e-4):g}, gradient of the KL term "
            f"is {share:.2f} of the whole within the first updates",
            "lower grpo.kl_weight, by a factor of 10 or more",
        )


def drift_limits(evidence: Evidence, step: int) -> tuple[float, float]:
    """Smallest and largest sound change of the velocity after an update."""
    bands = evidence.certificate.get("bands", {}).get("adapter/drift", [])
    if step >= len(bands):
        return DRIFT_TOO_SMALL, DRIFT_TOO_LARGE
    low, high = bands[step]
    return low, min(high, DRIFT_TOO_LARGE)


def _direction(evidence: Evidence) -> Iterator[Diagnosis]:
    sign = evidence.measured("advantage/sign")
    if sign and max(sign) < 0:
        yield Diagnosis(
            "reward-sign",
            "certain",
            "the sign of the reward is turned: advantages fall where rewards rise",
            f"correlation of advantages and rewards {sum(sign) / len(sign):.2f}",
            "a larger reward must give a larger advantage",
        )
    elif sign and sum(sign) / len(sign) < 0.2:
        yield Diagnosis(
            "advantage-differs",
            "likely",
            "advantages do not follow the rewards",
            f"correlation of advantages and rewards {sum(sign) / len(sign):.2f}",
            "check that rewards and rollouts are in the same order",
        )
    # Did the updates make rewarded videos more likely?
    centre = evidence.measured("advantage/off_centre")
    clipped = evidence.setting("grpo.advantage_clip") is not None
    if centre and max(centre) > OFF_CENTRE and not clipped:
        yield Diagnosis(
            "advantage-differs",
            "likely",
            "advantages are not centred within their groups, so that easy prompts push all their "
            "videos up",
            f"a group's mean advantage is {max(centre):.2g} of their size",
            "subtract the mean of each group",
        )
    gain = evidence.measured("update/gain")
    if len(gain) >= 3 and sum(value < 0 for value in gain) > 0.7 * len(gain):
        yield Diagnosis(
            "reward-sign-in-update",
            "likely",
            "updates make the rewarded videos less likely: a sign is turned in the loss",
            f"gain of the updates {_list(gain)} of 1",
            "minimise -A log p: check the sign of the loss and of the optimizer",
        )


def _batch(evidence: Evidence) -> Iterator[Diagnosis]:
    # Seeds of the step before.
    before = evidence.measured("batch/as_before")
    if before and max(before) > 0.5:
        yield Diagnosis(
            "same-seeds",
            "certain",
            "every step samples with the seeds of the step before",
            f"{100 * max(before):.0f} % of the seeds are repeated",
            "derive seeds from the number of the step",
        )
    # Seeds of other ranks.
    repeated = evidence.measured("batch/repeated")
    if repeated and max(repeated) > 0:
        yield Diagnosis(
            "ranks-repeat",
            "certain",
            "several ranks sample the same videos",
            f"{100 * max(repeated):.0f} % of the seeds of a step occur twice",
            "give every rank its own share of the prompts",
        )
    # Members of one group.
    apart = evidence.measured("batch/members_apart")
    if apart and min(apart) == 0:
        yield Diagnosis(
            "members-alike",
            "certain",
            "members of a group are the same video",
            "the difference of two members' latents is 0",
            "each member needs noise of its own",
        )


def _of_step(evidence: Evidence, row: dict[str, float], name: str) -> float:
    for step in evidence.steps:
        if step["step"] == row["step"]:
            return step.get(name, math.nan)
    return math.nan


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)
