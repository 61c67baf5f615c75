"""Rules over a run of launch/dpo.py, by its metrics and settings: nothing is measured twice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from launch.diagnosis.evidence import Diagnosis, Evidence
from launch.diagnosis.reward_rules import mean

# The loss of a policy that is its reference: -log sigmoid(0).
LOG_2 = math.log(2)
# |logit| before any update, by the generator's dtype: rounding is far below.
START_LIMIT = {"float32": 1e-3, "bfloat16": 0.1}
# Steps after the warm-up that tell a direction, and a size.
FEW_STEPS = 5
SOME_STEPS = 20
# The loss of the first steps, in losses of a policy that is its reference.
WILD = 2.0
# |logit| of a policy that hardly moves; 0.05 to 3 are usual.
LEAST_LOGIT = 0.005
# Share of pairs that are ordered rightly.
WRONG_WAY = 0.4
LEARNT = 0.9
UNLEARNT = 0.55
FEW_PAIRS = 8


def dpo_rules(evidence: Evidence) -> Iterator[Diagnosis]:
    """Apply every rule over a run on pairs."""
    yield from _batch(evidence)
    # Flow-RWR and fine-tuning compare with no reference.
    if evidence.setting("dpo.method", "dpo") == "dpo":
        yield from _start(evidence)
        yield from _movement(evidence)
        yield from _direction(evidence)
        yield from _displacement(evidence)
    yield from overfit(evidence, learnt=LEARNT, unlearnt=UNLEARNT)


def _batch(evidence: Evidence) -> Iterator[Diagnosis]:
    pairs = evidence.setting("dpo.pairs_per_step", 64)
    if pairs < FEW_PAIRS:
        yield Diagnosis(
            "few-videos",
            "likely" if pairs <= FEW_PAIRS // 4 else "possible",
            f"an update has {pairs} pairs, which is too few to tell a preference from noise",
            f"dpo.pairs_per_step={pairs}; each pair is seen at one noise level",
            "use 32 or more: raise dpo.pairs_per_step",
        )


def _start(evidence: Evidence) -> Iterator[Diagnosis]:
    """Before any update the policy is its reference."""
    limit = START_LIMIT[evidence.setting("generator.dtype", "bfloat16")]
    for row in evidence.steps:
        logit = row.get("train/dpo_logit_abs", math.nan)
        if row["step"] == 0 and logit > limit:
            yield Diagnosis(
                "reference-differs",
                "likely",
                "policy and reference differ before the first update: they are not the same model, "
                "or a forward is random",
                f"|logit| is {logit:.2g} in the first step, 0 is right",
                "start from an adapter whose lora_B is zero, without dropout, and compute both by "
                "one function",
            )


def _movement(evidence: Evidence) -> Iterator[Diagnosis]:
    """How far the policy has gone from its reference."""
    logits = _after_warmup(evidence, "train/dpo_logit_abs")
    norms = evidence.column("train/grad_norm")
    lr = evidence.setting("optimizer.lr", 5e-6)
    if len(logits) >= 2 and max(logits) == 0 and max(norms, default=0.0) > 0:
        # An adapter that has moved makes a difference somewhere.
        moved = evidence.facts.get("exported_lora_b", 0.0) > 0
        yield Diagnosis(
            "reference-is-policy" if moved else "adapter-frozen",
            "certain",
            "the reference policy is the policy itself: nothing is compared"
            if moved
            else "the adapter is frozen: gradients reach it, and the policy stays its reference",
            f"|logit| is 0 in {len(logits)} steps, the gradient's norm is {max(norms):.2g}",
            "check that the reference switches the adapter off"
            if moved
            else "check that the optimizer holds the adapter's parameters, and optimizer.lr",
        )
    elif len(logits) >= SOME_STEPS and 0 < mean(_last(logits)) < LEAST_LOGIT:
        yield Diagnosis(
            "lr-too-small",
            "likely",
            "the policy hardly moves away from its reference: the learning rate is too small, or "
            "dpo.beta is",
            f"|logit| is {mean(_last(logits)):.2g} at the end, 0.05 to 3 are usual; "
            f"optimizer.lr={lr:g}, dpo.beta={evidence.setting('dpo.beta', 500.0):g}",
            "raise optimizer.lr by a factor of 10",
        )
    losses = evidence.column("train/loss")[:FEW_STEPS]
    if max(losses, default=0.0) > WILD * LOG_2:
        yield Diagnosis(
            "lr-too-large",
            "likely",
            "single updates throw the policy about: the learning rate is far too large, or "
            "dpo.beta is",
            f"the loss is {max(losses):.2g} within the first {len(losses)} steps; it starts at "
            f"log 2 = {LOG_2:.2g}; optimizer.lr={lr:g}",
            "lower optimizer.lr by a factor of 10",
        )


def _direction(evidence: Evidence) -> Iterator[Diagnosis]:
    """Whether chosen videos gain on rejected ones."""
    right = _after_warmup(evidence, "train/accuracy")
    loss = _after_warmup(evidence, "train/loss")
    if len(right) < FEW_STEPS:
        return
    share = mean(_last(right))
    if share < WRONG_WAY and mean(_last(loss)) > LOG_2:
        yield Diagnosis(
            "reward-sign-in-update",
            "certain" if share < WRONG_WAY / 2 else "likely",
            "the updates prefer the rejected videos: a sign is turned in the loss",
            f"the chosen video gains in {100 * share:.0f} % of the pairs, the loss rises to "
            f"{mean(_last(loss)):.2g}",
            "minimise -log sigmoid(-beta / 2 (chosen - rejected)) of the changes of the errors",
        )


def _displacement(evidence: Evidence) -> Iterator[Diagnosis]:
    changes = evidence.column("train/chosen_change")
    window = evidence.setting("dpo.displacement_window", 20)
    if len(changes) >= window and mean(changes[-window:]) > 0:
        yield Diagnosis(
            "displacement",
            "possible",
            "the policy moves away from the chosen videos, too, only less than from the rejected "
            "ones (likelihood displacement)",
            f"the error on chosen videos is {mean(changes[-window:]):.2g} above the reference's "
            f"over {window} steps",
            "look at the videos; a larger dpo.beta, a smaller optimizer.lr or dpo.sft_weight helps",
        )


def overfit(
    evidence: Evidence, *, learnt: float, unlearnt: float
) -> Iterator[Diagnosis]:
    """Training pairs are ordered rightly, and held-out ones by chance."""
    heldout = heldout_accuracy(evidence)
    right = evidence.column("train/accuracy")
    if not heldout or len(right) < FEW_STEPS or not heldout[-1] <= unlearnt:
        return
    if mean(_last(right)) >= learnt:
        yield Diagnosis(
            "overfit",
            "likely",
            "the pairs of training are learnt by heart: held-out pairs are ordered by chance",
            f"accuracy {mean(_last(right)):.2f} in training, {heldout[-1]:.2f} on held-out pairs",
            "train for fewer epochs, at a smaller rate, or on more pairs; check that both tables "
            "mean the same by their labels",
        )


def heldout_accuracy(evidence: Evidence) -> list[float]:
    """Accuracies on held-out pairs, in the order of the steps."""
    rows = [row for row in evidence.metrics if "heldout/accuracy" in row]
    return [row["heldout/accuracy"] for row in rows]


def _after_warmup(evidence: Evidence, name: str) -> list[float]:
    """Values of a metric after the warm-up; the first step is before any update."""
    first = 1 + evidence.setting("optimizer.warmup_steps", 0)
    return evidence.column(name)[first:]


def _last(values: Sequence[float]) -> Sequence[float]:
    """The last quarter, and at least one value."""
    return values[-max(1, len(values) // 4) :]
