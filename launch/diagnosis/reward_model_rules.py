"""Rules over the stages of DeScore's training, launch/cold_start.py and launch/dual_rl.py.

They are judged by metrics and settings: nothing is measured twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from launch.diagnosis.dpo_rules import heldout_accuracy, overfit
from launch.diagnosis.evidence import Diagnosis, Evidence
from launch.diagnosis.reward_rules import mean

# Steps after the warm-up, and pairs, that tell whether a reward model learns.
SOME_STEPS = 50
SOME_PAIRS = 500
# A share differs from one half by this many standard deviations of a coin.
SIGMAS = 2.5
# The loss rises to this many times its first value.
WILD = 3.0
# Shares of pairs in the right order.
WRONG_WAY = 0.4
LEARNT = 0.95
UNLEARNT = 0.6
# Shares of CoTs that end, and of groups of CoTs with one reward.
FINISHED = (0.5, 0.9)
FLAT = 0.95
# |MEAN ratio - 1| before an update, by the dtype.
RATIO_LIMIT = {"float32": 1e-3, "bfloat16": 2e-2}
CLIPPED = 0.5
# Parts of the reward model without which a stage cannot learn.
PARTS = ("llm", "query", "head")


def cold_start_rules(evidence: Evidence) -> Iterator[Diagnosis]:
    """Apply every rule over stage 1, the discriminative cold start."""
    yield from _parts(evidence, ("query", "head"))
    yield from _learning(evidence)
    yield from overfit(evidence, learnt=LEARNT, unlearnt=UNLEARNT)
    without_cots = evidence.setting("cold_start.masking.probability", 0.5) == 1
    if without_cots and evidence.setting("data.layout", "descore") == "descore":
        yield Diagnosis(
            "without-cots",
            "possible",
            "the table has chains of thought, and the reward model never reads them",
            "cold_start.masking.probability=1",
            "DeScore masks half of them: cold_start.masking.probability=0.5",
        )


def dual_rl_rules(evidence: Evidence) -> Iterator[Diagnosis]:
    """Apply every rule over stage 2, dual-objective RL."""
    yield from _parts(evidence, ("llm",))
    yield from _cots(evidence)
    yield from _terms(evidence)


def _parts(evidence: Evidence, needed: Sequence[str]) -> Iterator[Diagnosis]:
    """Parts whose learning rate is 0, and parts that no gradient reaches."""
    for part in needed:
        if evidence.setting(f"lr.{part}", 1.0) == 0:
            yield Diagnosis(
                "part-frozen",
                "certain",
                f"the {part} of the reward model is frozen, and this stage learns by it",
                f"lr.{part}=0",
                f"set lr.{part}",
            )
    for part in PARTS:
        norms = evidence.column(f"train/grad_norm/{part}")
        frozen = evidence.setting(f"lr.{part}", 1.0) == 0
        if len(norms) >= 2 and max(norms) == 0 and not frozen:
            yield Diagnosis(
                "no-gradient",
                "likely",
                f"no gradient reaches the {part} of the reward model",
                f"train/grad_norm/{part} is 0 in {len(norms)} steps",
                "check that the loss depends on it: labels, dual_rl.bt_weight, rules",
            )


def _learning(evidence: Evidence) -> Iterator[Diagnosis]:
    """Whether the training's pairs are ordered better than by chance."""
    warmup = evidence.setting("optimizer.warmup_steps", 0)
    right = evidence.column("train/accuracy")[warmup:]
    losses = evidence.column("train/loss")
    last = right[-max(1, len(right) // 4) :]
    pairs = len(last) * evidence.setting("cold_start.pairs_per_step", 32)
    share = mean(last)
    # One half is what a coin has.
    scatter = SIGMAS * 0.5 / math.sqrt(max(1, pairs))
    enough = len(right) >= SOME_STEPS and pairs >= SOME_PAIRS
    if enough and abs(share - 0.5) < scatter:
        yield Diagnosis(
            "nothing-learnt",
            "likely",
            "the reward model orders the pairs of training by chance: it does not learn",
            f"accuracy {share:.2f} over {pairs} pairs, after {len(right)} steps",
            "check lr.llm, lr.query and lr.head, the labels, and that videos and CoTs of a row "
            "belong to its label (launch/score.py shows what a model makes of a video)",
        )
    elif enough and share < WRONG_WAY:
        yield Diagnosis(
            "reward-sign-in-update",
            "certain",
            "the updates turn the preferences round: a sign is turned in the loss",
            f"accuracy {share:.2f} over {pairs} pairs of training",
            "the better video must get the larger reward",
        )
    # Held-out pairs in the wrong order.
    heldout = heldout_accuracy(evidence)
    if heldout and heldout[-1] < WRONG_WAY and share > 1 - WRONG_WAY:
        yield Diagnosis(
            "labels-turned",
            "likely",
            "labels mean the opposite in the held-out table: A and B may be swapped in it",
            f"accuracy {share:.2f} in training, {heldout[-1]:.2f} on held-out pairs",
            "compare some rows of both tables with their videos",
        )
    later = losses[len(losses) // 2 :]
    if len(losses) >= 4 and mean(later) > WILD * losses[0]:
        yield Diagnosis(
            "lr-too-large",
            "likely",
            "the loss rises far above that of a coin: learning rates are too large",
            f"it starts at {losses[0]:.2g} and is {mean(later):.2g} in the second half",
            "lower lr.llm, lr.query and lr.head by a factor of 10",
        )


def _cots(evidence: Evidence) -> Iterator[Diagnosis]:
    """Chains of thought that do not end, or that all get one reward."""
    finished = evidence.column("cot/finished")
    share = mean(finished[len(finished) // 2 :])
    if finished and share < FINISHED[1]:
        yield Diagnosis(
            "cots-cut",
            "likely" if share < FINISHED[0] else "possible",
            "many chains of thought do not end, so their videos get no reward",
            f"cot/finished is {share:.2f}, dual_rl.max_new_tokens="
            f"{evidence.setting('dual_rl.max_new_tokens', 4096)}",
            "raise dual_rl.max_new_tokens, or train stage 1 for longer",
        )
    flat = evidence.column("reward/zero_spread")
    if len(flat) >= 3 and mean(flat) >= FLAT:
        yield Diagnosis(
            "reward-saturated",
            "likely",
            "the CoTs of nearly every video get one and the same reward, so none is better",
            f"reward/zero_spread is {mean(flat):.2f}",
            "raise dual_rl.temperature, or use rules with a finer scale",
        )


def _terms(evidence: Evidence) -> Iterator[Diagnosis]:
    """Ratio, clipping and KL of the policy's tokens."""
    limit = RATIO_LIMIT[evidence.setting("dtype", "bfloat16")]
    ratios = evidence.column("train/ratio_mean")
    per_step = evidence.setting("dual_rl.pairs_per_step", 128)
    # A later update of a step has moved the policy, as it should.
    one_update = per_step == evidence.setting("dual_rl.pairs_per_update", 4)
    worst = max((abs(ratio - 1) for ratio in ratios), default=0.0)
    if one_update and worst > limit:
        yield Diagnosis(
            "log-prob-dtype",
            "likely",
            "the ratio is not 1 before an update: old and new log-probs are computed otherwise",
            f"largest |MEAN ratio - 1| is {worst:.2g}",
            "compute both by one function, in one dtype, at one temperature, without dropout",
        )
    clipped = evidence.column("train/clip_frac")
    if len(clipped) >= 2 and mean(clipped) > CLIPPED:
        yield Diagnosis(
            "clip-too-narrow",
            "likely",
            "most tokens are clipped, so they teach nothing",
            f"train/clip_frac is {mean(clipped):.2f}",
            "lower lr.llm, or widen dual_rl.clip_low and dual_rl.clip_high",
        )
    kl = evidence.column("train/kl")
    if kl and min(kl) < -1e-6:
        yield Diagnosis(
            "kl-sign",
            "certain",
            "the KL term has its sign turned: it pushes the policy away from the reference",
            f"train/kl is {min(kl):.2g}, the k3 estimate is never negative",
            "k3 is r - log r - 1 with r = p_ref / p",
        )
