"""Rules over metrics.jsonl: what the run itself has logged."""

from __future__ import annotations

import math
from collections.abc import Iterator

from launch.diagnosis.evidence import Diagnosis, Evidence

# Limits of |ratio - 1| with one update a rollout, by the generator's dtype.
RATIO_LIMIT = {"float32": 1e-3, "bfloat16": 1e-2}
# Shares of the videos, of the groups and of the updates.
UNSCORED_SHARE = 0.1
FLAT_SHARE = 0.5
SKIPPED_SHARE = 0.2
# Scores of a group that differ by less than this part of their size hardly differ.
SMALL_SPREAD = 1e-4
# Half of the groups have less than this part of the largest group's spread.
FAR_BELOW = 0.02
# Rules about updates need some of them.
SEEN_UPDATES = 2
SEEN_STEPS = 3
# A watched reward that falls while the trained one rises: over how many steps.
LONG = 20


def metric_rules(evidence: Evidence) -> Iterator[Diagnosis]:
    """Apply every rule over metrics."""
    for name in evidence.trained_rewards:
        yield from _unscored(evidence, name)
        yield from _flat(evidence, name)
    yield from gradient_rules(evidence)
    yield from _clip(evidence)
    yield from _hacking(evidence)


def gradient_rules(evidence: Evidence) -> Iterator[Diagnosis]:
    """Gradients that are no numbers, or 0."""
    yield from _nonfinite(evidence)
    yield from _gradient(evidence)


def _unscored(evidence: Evidence, name: str) -> Iterator[Diagnosis]:
    videos = videos_per_update(evidence)
    missing = evidence.column(f"reward/{name}_unscored")
    if not missing:
        return
    share = sum(missing) / len(missing) / videos
    if share < UNSCORED_SHARE:
        return
    yield Diagnosis(
        "scores-missing",
        "certain",
        f"the reward {name} gives no score (NaN) for {100 * share:.0f} % of the videos",
        f"reward/{name}_unscored is {sum(missing) / len(missing):.1f} of {videos} videos a step",
        "the reasons stand in samples.jsonl and in the log; NaN counts as no information, never "
        "as 0",
    )


def _flat(evidence: Evidence, name: str) -> Iterator[Diagnosis]:
    """A reward that hardly tells the members of a group apart."""
    zero = evidence.column(f"reward/{name}_zero_spread")
    spread = evidence.column(f"reward/{name}_group_std_max")
    means = evidence.column(f"reward/{name}")
    if len(zero) < SEEN_STEPS or not spread or not means:
        return
    # From most to least certain.
    share = sum(zero) / len(zero)
    largest = max(spread)
    median = evidence.column(f"reward/{name}_group_std_median")
    typical = sum(median) / len(median) if median else largest
    mean = sum(means) / len(means)
    eps = evidence.setting("grpo.advantage_eps", 1e-4)
    what = ""
    if largest == 0:
        what = f"the reward {name} is constant: it gives all videos of a group the same score"
    elif share >= FLAT_SHARE:
        what = (
            f"the reward {name} is saturated: it gives all videos of most groups the same "
            "score"
        )
    elif largest < max(eps, SMALL_SPREAD * abs(mean)) or typical < FAR_BELOW * largest:
        what = (
            f"the reward {name} is saturated: its scores hardly differ within a group"
        )
    if not what:
        return
    spread_of_all = max(evidence.column(f"reward/{name}_std"), default=0.0)
    of_prompt = largest == 0 and spread_of_all > 0
    if of_prompt:
        what = f"the reward {name} depends on the prompt alone: it does not look at the video"
    yield Diagnosis(
        "reward-blind-to-video" if of_prompt else "reward-saturated",
        "likely",
        what,
        f"{100 * share:.0f} % of the groups have no spread, the largest spread is {largest:.2g} "
        f"around a mean of {mean:.3g}",
        "check that the frames reach the reward's model"
        if of_prompt
        else "use a reward with a finer scale, take its raw logit before any clamp or sigmoid, or "
        "choose harder prompts",
    )


def _nonfinite(evidence: Evidence) -> Iterator[Diagnosis]:
    # Updates that the engine skipped, and losses that are no number.
    skipped = evidence.column("train/nonfinite_updates")
    losses = [row["train/loss"] for row in evidence.steps if "train/loss" in row]
    bad = sum(not math.isfinite(loss) for loss in losses)
    share = (sum(skipped) + bad) / max(1, len(evidence.steps))
    if share < SKIPPED_SHARE:
        return
    yield Diagnosis(
        "gradient-not-finite",
        "certain",
        "updates are skipped because loss or gradient is NaN or infinite",
        f"{sum(skipped):.0f} skipped updates and {bad} losses of {len(evidence.steps)} steps",
        "lower optimizer.lr or the guidance scale; check weights and latents for NaN",
    )


def _gradient(evidence: Evidence) -> Iterator[Diagnosis]:
    norms = evidence.column("train/grad_norm")
    if len(norms) < SEEN_UPDATES or max(norms) > 0:
        return
    # Rewards without spread give no gradient either.
    grpo = evidence.stage == "grpo"
    if grpo and max(evidence.column("train/advantage_abs") or [0.0]) == 0:
        return
    yield Diagnosis(
        "no-gradient",
        "likely",
        "no gradient reaches a trained weight",
        f"train/grad_norm is 0 in {len(norms)} updates"
        + (", while advantages are not" if grpo else ""),
        "check that lora_A is not zero, that both matrices of the adapter are trained, and that "
        "the loss depends on them",
    )


def _clip(evidence: Evidence) -> Iterator[Diagnosis]:
    shares = evidence.column("train/clip_frac")
    if len(shares) < SEEN_UPDATES or sum(shares) / len(shares) < 0.5:
        return
    yield Diagnosis(
        "clip-too-narrow",
        "likely",
        "most ratios are clipped, so most samples teach nothing",
        f"train/clip_frac is {sum(shares) / len(shares):.2f}",
        "widen grpo.clip_low and grpo.clip_high, or lower optimizer.lr",
    )


def _hacking(evidence: Evidence) -> Iterator[Diagnosis]:
    """A watched reward falls while the trained one rises."""
    # A change counts from the scatter of single steps on.
    trained = evidence.trained_rewards
    watched = [name for name in evidence.rewards if name not in trained]
    rising = [name for name in trained if trend(evidence, name) > 1]
    for name in watched:
        if rising and trend(evidence, name) < -1:
            yield Diagnosis(
                "reward-hacking",
                "possible",
                f"the reward {rising[0]} rises while {name}, which is only watched, falls",
                f"over {len(evidence.steps)} steps, by more than the scatter of single steps",
                "look at the videos; stop earlier, raise grpo.kl_weight, or train on both",
            )


def trend(evidence: Evidence, name: str) -> float:
    """Last quarter of a reward's curve minus the first, in the scatter of single steps."""
    values = evidence.column(f"reward/{name}")
    if len(values) < LONG:
        return 0.0
    quarter = len(values) // 4
    first = values[:quarter]
    last = values[-quarter:]
    change = sum(last) / quarter - sum(first) / quarter
    middle = sum(first) / quarter
    scatter = math.sqrt(sum((value - middle) ** 2 for value in first) / quarter)
    return change / scatter if scatter > 0 else 0.0


def videos_per_update(evidence: Evidence) -> int:
    """The number of videos of an update over all ranks."""
    prompts = evidence.setting("prompts_per_step", 64)
    return prompts * evidence.setting("grpo.group_size", 4)
