"""Rules over the measurements of optimizer steps: gradient, size, direction and batch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from launch.diagnosis.evidence import Diagnosis, Evidence

# The engine's gradient norm against that of the loss.
NORM_LIMIT = 0.05
# rms change of the velocity by the first update, relative to the velocity.
DRIFT_TOO_LARGE = 0.5
DRIFT_TOO_SMALL = 1e-6
# Updates that tell a size.
FEW_UPDATES = 3
# Share of the gradient that is the KL term's.
KL_SHARE = 0.3
# Learning rates by which an update moves a weight.
SLOW = 0.1
SLOWED = 0.3
FAST = 5.0
# max_grad_norm is below this part of every gradient.
CLIPPED = 0.01
# An average has gone this part of the weights' way.
LAGS = 0.05
# Share of lora_A's norm that an update takes away.
DECAY = 0.01
# What the two terms of the loss may leave unexplained.
REST = {"float32": 0.05, "bfloat16": 0.3}
# Rounding of a KL.
NEGATIVE_KL = 1e-9
# Draws of a noise level, before their being equal says anything.
MANY_GROUPS = 12
# A group's mean advantage, relative to the size of advantages.
OFF_CENTRE = 1e-2


def update_rules(evidence: Evidence) -> Iterator[Diagnosis]:
    """Apply every rule over measurements of updates."""
    yield from _gradient(evidence)
    yield from _optimizer(evidence)
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


def _optimizer(evidence: Evidence) -> Iterator[Diagnosis]:
    """What the optimizer made of the gradient."""
    still = evidence.measured("weights/still")
    if still and 0 < min(still) < 1:
        yield Diagnosis(
            "adapter-frozen",
            "certain",
            "a part of what should be trained is frozen: it has a gradient and never moves",
            f"{100 * min(still):.0f} % of the weight matrices with a gradient",
            "check which parameters the optimizer holds, and that it was built after the adapter",
        )
    # The average starts at the weights and follows them quickly at first.
    came = evidence.measured("ema/came")
    if came and came[-1] < LAGS and len(evidence.measured_updates) >= FEW_UPDATES:
        yield Diagnosis(
            "ema-frozen",
            "certain",
            "the average of the weights, which is evaluated and exported, does not follow them",
            f"it has gone {100 * came[-1]:.2g} % of their way",
            "update the average after every step",
        )
    # AdamW moves a weight by about one learning rate an update.
    updates = evidence.setting("grpo.updates", 1)
    moved = [m / updates for m in evidence.measured("weights/moved_per_rate")]
    moved = [m for m in moved if m > 0]
    fp32 = evidence.setting("generator.lora.compute_dtype", "float32") == "float32"
    adapter = evidence.setting("generator.lora") is not None
    if len(moved) >= FEW_UPDATES and adapter and fp32:
        norms = evidence.column("train/grad_norm")
        largest = evidence.setting("optimizer.max_grad_norm", 1.0)
        clipped = norms and 0 < largest < CLIPPED * min(norms)
        if clipped:
            yield Diagnosis(
                "gradient-clipped",
                # Adam's step does not depend on the size of gradients far above its eps.
                "certain" if max(moved) < SLOWED else "possible",
                "gradients are clipped to nearly nothing: what is left is near Adam's eps",
                f"optimizer.max_grad_norm={largest:g}, gradients have a norm of {min(norms):.2g} "
                f"and more, weights move by {max(moved):.2g} learning rates an update",
                "raise optimizer.max_grad_norm above the usual norm, or set 0",
            )
        elif max(moved) < SLOW or min(moved) > FAST:
            yield Diagnosis(
                "lr-differs",
                "likely",
                "the optimizer does not step at the learning rate of the settings",
                f"weights move by {_list(moved)} learning rates an update; AdamW's steps are about "
                "one",
                "check the scheduler of the learning rate, clipping, and the size of gradients "
                "against Adam's eps",
            )
    # Decay that outweighs the steps; a start at random numbers hardly grows or shrinks.
    norm = evidence.measured("adapter/lora_A_norm")
    if len(norm) >= FEW_UPDATES and norm[0] > 0:
        falls = (norm[-1] / norm[0]) ** (1 / (len(norm) - 1))
        if falls < 1 - DECAY:
            yield Diagnosis(
                "weight-decay",
                "likely",
                "the adapter dies: weight decay takes more than the updates give",
                f"the norm of lora_A falls by {100 * (1 - falls):.2g} % an update, "
                f"optimizer.weight_decay={evidence.setting('optimizer.weight_decay', 1e-4):g}",
                "lower optimizer.weight_decay; lr x weight_decay is the share lost in an update",
            )


def _size_of_update(evidence: Evidence) -> Iterator[Diagnosis]:
    drift = {}
    for row in evidence.measured_updates:
        if row.get("adapter/drift", 0.0) > 0:
            drift[int(row["step"])] = row["adapter/drift"]
    lr = evidence.setting("optimizer.lr", 1e-4)
    # A resumed run may have measured later updates only.
    first = drift.get(0, 0.0)
    _, high = drift_limits(evidence, 0)
    middle = statistics.median(drift.values()) if len(drift) >= FEW_UPDATES else 0.0
    if first > high or middle > DRIFT_TOO_LARGE:
        worst = max(first, middle)
        yield Diagnosis(
            "lr-too-large",
            "likely",
            "the learning rate is far too large: single updates throw the policy about",
            f"an update at lr={lr:g} changes the velocity by {100 * worst:.3g} %, at most "
            f"{100 * high:.2g} % is sound",
            f"try optimizer.lr={lr * high / worst / 3:.1g}",
        )
    # Single updates scatter by a factor of ten: their geometric MEAN counts.
    if len(drift) >= FEW_UPDATES:
        lows = [drift_limits(evidence, step)[0] for step in drift]
        usual = statistics.geometric_mean(lows)
        moved = statistics.geometric_mean(drift.values())
        if moved < usual:
            yield Diagnosis(
                "lr-too-small",
                "likely",
                "the learning rate is far too small: the policy hardly moves",
                f"{len(drift)} updates at lr={lr:g} change the velocity by {100 * moved:.2g} %, "
                f"at least {100 * usual:.2g} % is usual",
                f"try optimizer.lr={lr * usual / moved * 10:.1g}",
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
            "the KL weight holds the policy: its gradient is a large part of the whole",
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
    yield from _terms_of_the_loss(evidence)
    gain = evidence.measured("update/gain")
    if len(gain) >= 3 and sum(value < 0 for value in gain) > 0.7 * len(gain):
        yield Diagnosis(
            "reward-sign-in-update",
            "likely",
            "updates make the rewarded videos less likely: a sign is turned in the loss",
            f"gain of the updates {_list(gain)} of 1",
            "minimise -A log p: check the sign of the loss and of the optimizer",
        )


def _terms_of_the_loss(evidence: Evidence) -> Iterator[Diagnosis]:
    """The gradient of a step's first backward against the two terms of GRPO's loss."""
    share = evidence.measured("loss/policy")
    rest = evidence.measured("loss/rest")
    if share and max(share) < -0.5:
        yield Diagnosis(
            "reward-sign-in-update",
            "certain",
            "a sign is turned in the loss: its gradient points away from the rewarded videos",
            f"the policy term's share of the gradient is {_list(share)}, 1 is right",
            "minimise -A log p: check the sign of the loss and of the advantages",
        )
    elif other_loss(evidence):
        yield Diagnosis(
            "loss-differs",
            "likely",
            "the loss is not GRPO's of these samples and advantages: other samples, advantages of "
            "others, or another formula",
            f"parts of the gradient that neither the policy term nor the KL explains: "
            f"{_list(rest)}",
            "check that the update uses the groups of this rollout with their own advantages",
        )
        return

    # The KL term, where it is large enough.
    factors = evidence.measured("loss/kl_factor")
    kl = evidence.column("train/kl")
    if kl and min(kl) < -NEGATIVE_KL:
        yield _kl_sign(f"train/kl is {min(kl):.2g}, a KL is never negative")
    elif len(factors) >= 2 and max(factors) < 0:
        yield _kl_sign(
            f"its gradient has the factor {_list(factors)} beside the policy term's"
        )
    elif len(factors) >= 2 and not 0.5 < sorted(factors)[len(factors) // 2] < 2:
        yield Diagnosis(
            "kl-differs",
            "likely",
            "the KL term has another weight than the settings say",
            f"its gradient has {_list(factors)} times the size of grpo.kl_weight="
            f"{evidence.setting('grpo.kl_weight', 3e-4):g}",
            "check the weight of the KL term, and that its gradient reaches the policy",
        )


def other_loss(evidence: Evidence) -> bool:
    """True if the gradient is neither the policy term's nor the KL's, in half of the updates."""
    rest = sorted(evidence.measured("loss/rest"))
    limit = REST[evidence.setting("generator.dtype", "bfloat16")]
    return bool(rest) and rest[len(rest) // 2] > limit


def _kl_sign(because: str) -> Diagnosis:
    return Diagnosis(
        "kl-sign",
        "certain",
        "the KL term has its sign turned: it pushes the policy away from the reference",
        because,
        "the loss is the policy term plus grpo.kl_weight times a KL that is never negative",
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
    # Seeds of other groups.
    repeated = evidence.measured("batch/repeated")
    if repeated and max(repeated) > 0:
        ranks = max(evidence.measured("ranks"), default=1)
        yield Diagnosis(
            "ranks-repeat" if ranks > 1 else "same-seeds",
            "certain",
            "several groups of a step are sampled from the same seed",
            f"{100 * max(repeated):.0f} % of the seeds of a step occur twice, on {ranks:.0f} ranks",
            "give every group a seed of its own, and every rank its own share of the prompts",
        )
    # Samples that are equal, whatever their seeds are.
    twins = evidence.measured("samples/twins")
    if twins and min(twins) > 0:
        yield Diagnosis(
            "members-alike",
            "certain",
            "videos of a step are duplicates of each other",
            f"{100 * min(twins):.0f} % of the samples are equal to another, to the bit",
            "each member needs noise of its own, and each group its own samples",
        )
    stale = evidence.measured("samples/as_before")
    if stale and max(stale) > 0:
        yield Diagnosis(
            "stale-samples",
            "certain",
            "an update trains on samples of the step before",
            f"{100 * max(stale):.0f} % of the samples are repeated, to the bit",
            "sample every step anew",
        )
    yield from _prompts(evidence)

    # A step that is drawn for each group is drawn from a range.
    low = evidence.measured("samples/level_min")
    sampler = evidence.setting("generator.sampler", {})
    drawn = sampler.get("stochastic", "one") == "one"
    some = sampler.get("stochastic_range", 6) - sampler.get("stochastic_first", 0) > 1
    groups = sum(evidence.measured("samples/groups"))
    high = evidence.measured("samples/level_max")
    if low and drawn and some and groups >= MANY_GROUPS and min(low) == max(high):
        yield Diagnosis(
            "one-noise-level",
            "likely",
            "all groups are trained at one noise level, though a range is set",
            f"sigma is {low[0]:.3g} for all of {groups:.0f} groups",
            "draw the stochastic step from the group's seed",
        )


def _prompts(evidence: Evidence) -> Iterator[Diagnosis]:
    known = max(evidence.measured("batch/prompts_known"), default=0.0)
    share = evidence.measured("batch/prompts")
    groups = max(evidence.measured("batch/groups"), default=0.0)
    if len(share) >= 2 and max(share) <= 0.5:
        yield Diagnosis(
            "prompts-repeat",
            "certain",
            "a step repeats few prompts, though more are known",
            f"at most {100 * max(share):.0f} % of the prompts that {groups:.0f} groups could have, "
            f"of {known:.0f} known",
            "draw the prompts of a step without repetition",
        )
    elif groups > 1 and known == 1:
        yield Diagnosis(
            "few-prompts",
            "possible",
            "there is a single prompt: what is learnt may hold for it alone",
            "the file of prompts has one line",
            "train on many prompts",
        )
    # With many prompts, steps have hardly any in common.
    before = evidence.measured("batch/prompts_as_before")
    if len(before) >= 2 and min(before) == 1 and known > 2 * groups:
        yield Diagnosis(
            "same-prompts",
            "certain",
            "every step has the prompts of the step before",
            f"all of them, of {known:.0f} known",
            "choose prompts by the number of the step",
        )


def _of_step(evidence: Evidence, row: dict[str, float], name: str) -> float:
    for step in evidence.steps:
        if step["step"] == row["step"]:
            return step.get(name, math.nan)
    return math.nan


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)
