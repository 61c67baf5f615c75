"""Rules over the settings of a run: what goes wrong before the first step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from common.run_record import value_at
from launch.diagnosis.evidence import Diagnosis, Evidence

# An update with fewer videos than this is noisy; with half of them it hardly learns.
FEW_VIDEOS = 32
# Share of every weight that an update takes away.
MOST_DECAY = 0.01
# Keys of a generator that decide what an evaluation measures.
SAME_IN_EVALUATION = (
    "sampler.guidance_scale",
    "sampler.negative_prompt",
    "sampler.shift",
    "height",
    "width",
    "num_frames",
    "fps",
    "max_sequence_length",
)


def setting_rules(evidence: Evidence) -> Iterator[Diagnosis]:
    """Apply every rule over settings."""
    yield from _batch(evidence)
    yield from _shift(evidence)
    yield from _guidance(evidence)
    yield from optimizer_rules(evidence)
    yield from _warmup(evidence)
    yield from _weights(evidence)
    yield from outcome_rules(evidence)


def outcome_rules(evidence: Evidence) -> Iterator[Diagnosis]:
    """Frame rate, evaluations and exported adapter of a generator that was trained."""
    yield from _fps(evidence)
    yield from _evaluations(evidence)
    yield from _exported(evidence)


def _batch(evidence: Evidence) -> Iterator[Diagnosis]:
    prompts = evidence.setting("prompts_per_step", 64)
    members = evidence.setting("grpo.group_size", 4)
    videos = prompts * members
    if videos >= FEW_VIDEOS:
        return
    yield Diagnosis(
        "few-videos",
        "likely" if 2 * videos <= FEW_VIDEOS - 2 else "possible",
        f"an update has {videos} videos, which is too few to tell the reward from noise",
        f"prompts_per_step={prompts} x grpo.group_size={members}",
        f"use {FEW_VIDEOS} or more: raise prompts_per_step",
    )


def _shift(evidence: Evidence) -> Iterator[Diagnosis]:
    shift = evidence.setting("generator.sampler.shift", 3.0)
    native = evidence.facts.get("flow_shift")
    if native is None or math.isclose(shift, native, rel_tol=0.01):
        return
    # A little more noise is a choice; another model's shift is not.
    ratio = max(shift / native, native / shift)
    yield Diagnosis(
        "wrong-shift",
        "likely" if ratio >= 1.6 else "possible",
        "the shift of the noise levels is not the generator's: it trains at other noise levels "
        "than people sample from",
        f"generator.sampler.shift={shift:g}, its scheduler has flow_shift={native:g}",
        f"set generator.sampler.shift={native:g}",
    )


def _guidance(evidence: Evidence) -> Iterator[Diagnosis]:
    scale = evidence.setting("generator.sampler.guidance_scale", 4.5)
    in_update = value_at(evidence.settings, "generator.guidance_in_update")
    if scale == 1 or in_update is not False:
        return
    yield Diagnosis(
        "guidance-not-in-update",
        "certain",
        "the rollout is guided and the update is not: the log-probs are of two different policies",
        f"generator.guidance_in_update=false with guidance_scale={scale:g}",
        "set generator.guidance_in_update=true, or guidance_scale=1",
    )


def _fps(evidence: Evidence) -> Iterator[Diagnosis]:
    fps = evidence.setting("generator.fps", 16.0)
    # The folder of a generator does not tell its rate; a recipe does.
    known = value_at(evidence.certificate, "settings.generator.fps")
    if known is None or math.isclose(fps, known, rel_tol=0.01):
        return
    yield Diagnosis(
        "wrong-fps",
        "likely",
        "rewards are told another frame rate than this generator's",
        f"generator.fps={fps:g}, the recipe of the same generator has {known:g}",
        f"set generator.fps={known:g}: rewards judge speed by it",
    )


def optimizer_rules(evidence: Evidence) -> Iterator[Diagnosis]:
    """A learning rate of 0, and decay that takes more than updates give."""
    lr = evidence.setting("optimizer.lr", 1e-4)
    if lr == 0:
        yield Diagnosis(
            "adapter-frozen",
            "certain",
            "nothing is trained: the adapter is frozen by a learning rate of 0",
            "optimizer.lr=0",
            "set optimizer.lr",
        )
    # Decay forgets an update within 1 / (lr x weight_decay) others.
    lost = lr * evidence.setting("optimizer.weight_decay", 1e-4)
    if lost > MOST_DECAY:
        yield Diagnosis(
            "weight-decay",
            "likely",
            "the adapter dies: weight decay takes more than the updates give",
            f"each update takes {100 * lost:.2g} % of every weight away: optimizer.lr x "
            "optimizer.weight_decay",
            "lower optimizer.weight_decay",
        )


def _warmup(evidence: Evidence) -> Iterator[Diagnosis]:
    """A warm-up that never ends trains at a part of the rate."""
    warmup = evidence.setting("optimizer.warmup_steps", 0)
    steps = evidence.setting("steps", 500)
    if warmup > steps:
        yield Diagnosis(
            "warmup-too-long",
            "likely",
            "the learning rate never reaches its value",
            f"optimizer.warmup_steps={warmup} of steps={steps}",
            "shorten optimizer.warmup_steps",
        )


def _weights(evidence: Evidence) -> Iterator[Diagnosis]:
    if evidence.rewards and not evidence.trained_rewards:
        yield Diagnosis(
            "no-trained-reward",
            "certain",
            "no reward is trained on: the weight of each is 0",
            ", ".join(f"rewards.{name}.weight=0" for name in evidence.rewards),
            "give one of them a weight",
        )
    # A negative weight lowers the reward.
    for name, entry in evidence.rewards.items():
        weight = entry.get("weight", 1.0)
        if weight < 0:
            yield Diagnosis(
                "reward-sign",
                "likely",
                f"the run lowers the reward {name}: its sign is turned by a negative weight",
                f"rewards.{name}.weight={weight:g}",
                "make the weight positive, unless a low score is the aim",
            )


def _evaluations(evidence: Evidence) -> Iterator[Diagnosis]:
    generator = evidence.setting("generator", {})
    for folder, settings in evidence.facts.get("evaluations", {}).items():
        # What the evaluation's own config says.
        changes = different_settings(generator, settings.get("generator") or {})
        if changes:
            yield Diagnosis(
                "evaluation-settings",
                "certain",
                "an evaluation samples with other settings than training, so it measures "
                "something else",
                f"{folder}: {'; '.join(changes)}",
                "evaluate with the settings of the run's config.yaml",
            )
        if "adapter" in settings and not settings["adapter"]:
            yield Diagnosis(
                "evaluation-without-adapter",
                "certain",
                "an evaluation samples the base generator, without the adapter",
                f"{folder}: adapter=null",
                "set adapter=RUN/final",
            )


def different_settings(
    trained: Mapping[str, Any],
    evaluated: Mapping[str, Any],
) -> list[str]:
    """Name the keys of `SAME_IN_EVALUATION` that differ: ``guidance_scale 1.0, trained 4.5``."""
    changes = []
    for key in SAME_IN_EVALUATION:
        old = value_at(trained, key)
        new = value_at(evaluated, key)
        # A key that one of them lacks has its default in both.
        if old is not None and new is not None and old != new:
            changes.append(f"generator.{key} is {new}, trained with {old}")
    return changes


def all_skipped(evidence: Evidence) -> bool:
    """True if no update had an advantage: then nothing should have moved."""
    skipped = evidence.column("train/skipped")
    return bool(skipped) and min(skipped) == 1


def _exported(evidence: Evidence) -> Iterator[Diagnosis]:
    """The adapter in final/, which people will use."""
    if not evidence.facts.get("exported_finite", True):
        yield Diagnosis(
            "adapter-not-finite",
            "certain",
            "the exported adapter holds NaN or infinity",
            "weights of final/",
            "go on from an earlier checkpoint, at a lower optimizer.lr",
        )
    elif evidence.facts.get("exported_lora_b") == 0 and not all_skipped(evidence):
        yield Diagnosis(
            "lora-b-zero",
            "certain",
            "every lora_B of the exported adapter is zero, so it changes nothing",
            "norm of all lora_B in final/ is 0",
            "check that training moves lora_B, and what the export writes",
        )
