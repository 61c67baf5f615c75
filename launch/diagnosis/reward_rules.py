"""Rules over the measurements of rewards: what reaches them, and how they answer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from launch.diagnosis.certificates import identity
from launch.diagnosis.evidence import Diagnosis, Evidence

# In units of the spread of the scores.
SCORE_LIMIT = 0.1
AT_THE_END = 0.8
# Two scores of one video, in spreads of the scores; noise alone gives 2 / sqrt(pi) = 1.13.
NOISY = 0.5
VERY_NOISY = 0.8
# Share of the videos with the most frequent score.
DEFAULTS = 0.2
# More scores rise than fall by this many standard deviations of a coin.
SIGMAS = 2.5
FEW_COMPARED = 24
FEW_SWAPPED = 8
# Kinds of rewards of this project that read the prompt, whatever their options are.
READERS = ("descore", "generative")


# What a video may have gone through on the way.
PIXEL_MISTAKES = {
    "channels": "their colour channels are swapped (BGR for RGB)",
    "reversed": "their frames are in reverse order",
    "upside-down": "they are upside down",
    "mirrored": "they are mirrored",
    "transposed": "height and width are swapped",
    "inverted": "they are negatives",
    "frozen": "their first frame is repeated",
    "clipped": "-1..1 is taken for 0..1, so that dark pixels are black",
    "before": "they are those of the step before",
    "unit": "their values are 0..1 instead of 0..255",
    "frames": "they have another number of frames",
    "size": "they have another size",
}


def reward_rules(evidence: Evidence) -> Iterator[Diagnosis]:
    """Apply every rule over measurements of the rewards."""
    for name in evidence.rewards:
        yield from _received(evidence, name)
        yield from _scores(evidence, name)
    for name in evidence.trained_rewards:
        yield from _sense(evidence, name)


def _received(evidence: Evidence, name: str) -> Iterator[Diagnosis]:
    ratio = evidence.measured(f"rewards/{name}/fps_ratio")
    if ratio and not math.isclose(ratio[-1], 1, rel_tol=0.01):
        yield wrong_fps(f"the reward {name}", ratio[-1])
    asked = evidence.measured(f"rewards/{name}/asked")
    if asked and min(asked) == 0:
        yield Diagnosis(
            "reward-stale",
            "certain",
            f"the reward {name} is not asked for every step's scores: they come from elsewhere",
            f"in {asked.count(0)} of {len(asked)} steps it got no video",
            "score every step's videos; check caches on the way",
        )
    # Videos and prompts of the step, as they reached the reward.
    wrong = max(evidence.measured(f"rewards/{name}/wrong_prompt"), default=0.0)
    changed = max(evidence.measured(f"rewards/{name}/changed_prompt"), default=0.0)
    other = max(evidence.measured(f"rewards/{name}/other_video"), default=0.0)
    if wrong > 0:
        yield Diagnosis(
            "reward-swapped",
            "certain",
            f"prompts and videos are swapped for the reward {name}: it gets videos with the "
            "prompts of others",
            f"{100 * wrong:.0f} % of the videos",
            "keep videos and prompts in one order on the way to the reward",
        )
    elif changed > 0:
        yield Diagnosis(
            "reward-other-prompts",
            "certain",
            f"the reward {name} gets other prompts than the rollout's: changed or cut on the way",
            f"{100 * changed:.0f} % of the videos",
            "hand the prompts to the reward as they are",
        )
    if other > 0:
        yield _other_videos(evidence, name, other)


def _other_videos(evidence: Evidence, name: str, share: float) -> Diagnosis:
    # Which mistake makes the reward's videos of the rollout's?
    made = [
        mistake
        for mistake in PIXEL_MISTAKES
        if evidence.measured(f"rewards/{name}/other/{mistake}")
    ]
    how = PIXEL_MISTAKES[made[0]] if made else "changed, or not those of this step"
    return Diagnosis(
        "reward-other-videos",
        "certain" if made else "likely",
        f"the reward {name} gets other videos than the rollout's: {how}",
        f"{100 * share:.0f} % of the videos",
        "hand the decoded frames to the reward as they are: uint8, RGB, in the order of time",
    )


def wrong_fps(who: str, ratio: float) -> Diagnosis:
    return Diagnosis(
        "wrong-fps",
        "certain",
        f"{who} is told a wrong fps",
        f"{ratio:.3g} times generator.fps",
        "pass generator.fps: rewards judge speed by it",
    )


def _scores(evidence: Evidence, name: str) -> Iterator[Diagnosis]:
    """Scores of a step against the same videos scored one by one."""
    alone = mean(evidence.measured(f"rewards/{name}/alone_gap"))
    turned = mean(evidence.measured(f"rewards/{name}/turned_gap"))
    random = mean(evidence.measured(f"rewards/{name}/random"))
    if alone > max(SCORE_LIMIT, 3 * random):
        because = (
            f"they differ by {alone:.2g} spreads from the same videos scored one by one"
        )
        late = mean(evidence.measured(f"rewards/{name}/late_gap"))
        same = evidence.measured(f"rewards/{name}/as_before")
        if same and (late < alone / 5 or min(same) == 1):
            yield Diagnosis(
                "reward-stale",
                "certain",
                f"scores of the reward {name} are those of the step before",
                because,
                "score every step's videos; check caches and queues on the way",
            )
        elif _default(evidence, name) is not None:
            yield Diagnosis(
                "reward-default",
                "certain",
                f"some scores of the reward {name} are not the videos' own, but one default: what "
                "failed or was late is scored like that",
                f"{_default(evidence, name):g} where the same videos alone have other scores",
                "return NaN for a video that could not be scored: it counts as no information",
            )
        elif turned < alone / 5:
            yield Diagnosis(
                "reward-sign",
                "certain",
                f"the sign of the reward {name} is turned on its way into training",
                because,
                "higher is better: do not negate the score",
            )
        else:
            yield Diagnosis(
                "reward-swapped",
                "likely",
                f"scores of the reward {name} belong to other videos or prompts of the batch: they "
                "are swapped",
                because,
                "the reward must answer in the order of its videos",
            )
    # A score that changes by itself is noise.
    elif random > NOISY:
        # The scores of the step are one more draw.
        differ = max(random, alone)
        yield Diagnosis(
            "reward-random",
            "likely" if differ > VERY_NOISY else "possible",
            f"the reward {name} gives one and the same video different scores",
            f"they differ by {differ:.2g} spreads",
            "switch dropout and sampling off in the reward, or average several scores",
        )
    # A default for what could not be scored is no score.
    usual = mean(evidence.measured(f"rewards/{name}/usual"))
    distinct = evidence.measured(f"rewards/{name}/others_distinct")
    if distinct and min(distinct) == 1 and usual > DEFAULTS:
        yield Diagnosis(
            "reward-default",
            "possible",
            f"the reward {name} gives many videos one and the same score, and no two others are "
            "equal: is it a default for what failed?",
            f"{100 * usual:.0f} % of the scores",
            "return NaN for a video that could not be scored: it counts as no information",
        )
    # Scores at the end of their scale say no more which video is better.
    at_max = mean(evidence.measured(f"rewards/{name}/at_max"))
    at_min = mean(evidence.measured(f"rewards/{name}/at_min"))
    if max(at_max, at_min) >= AT_THE_END and name in evidence.trained_rewards:
        yield Diagnosis(
            "reward-saturated",
            "likely",
            f"the reward {name} is saturated: most videos have the same, most extreme score",
            f"{100 * max(at_max, at_min):.0f} % of the scores",
            "use a finer scale, or the raw value before any clamp or sigmoid",
        )


def _default(evidence: Evidence, name: str) -> float | None:
    """The value of all recorded scores that differ from those of the videos alone, if it is one."""
    differ = sum(evidence.measured(f"rewards/{name}/differ"))
    compared = sum(evidence.measured(f"rewards/{name}/compared"))
    rows = [row for row in evidence.measured(f"rewards/{name}/differ") if row > 0]
    values = evidence.measured(f"rewards/{name}/default")
    one_value = len(set(values)) == 1 and len(values) == len(rows)
    return values[0] if one_value and 3 <= differ < compared else None


def _sense(evidence: Evidence, name: str) -> Iterator[Diagnosis]:
    """How the reward answers wrong prompts and shuffled pixels."""
    wrong = counts(evidence, name, "wrong_prompt")
    shuffled = counts(evidence, name, "shuffled_pixels")
    compared = sum(wrong)
    if compared < 8:
        return
    fell, same, rose = wrong
    if same == compared:
        yield _blind(evidence, name, compared)
        return
    # The videos of a group have one wrong prompt together, so that more of them are needed.
    prefers_wrong = compared >= FEW_COMPARED and rose - fell > SIGMAS * math.sqrt(
        fell + rose
    )
    swapped = counts(evidence, name, "swapped_channels")
    prefers_swapped = (
        reads_prompt(evidence, name)
        and swapped[2] >= FEW_SWAPPED
        and swapped[2] - swapped[0] > SIGMAS * math.sqrt(swapped[0] + swapped[2])
    )
    prefers_shuffled = shuffled[2] - shuffled[0] > SIGMAS * math.sqrt(sum(shuffled))
    if prefers_shuffled:
        yield Diagnosis(
            "reward-sign",
            "likely",
            f"the sign of the reward {name} is turned: shuffled pixels score higher than videos",
            f"{shuffled[2]} of {sum(shuffled)} rose with shuffled pixels, {rose} of {compared} "
            "with a wrong prompt",
            "higher must be better",
        )
    elif prefers_swapped:
        yield Diagnosis(
            "channels-swapped",
            "likely",
            f"the reward {name} prefers videos with swapped colour channels: it takes RGB for BGR",
            f"{swapped[2]} scores rose with swapped channels, {swapped[0]} fell",
            "hand frames to the reward's model as RGB",
        )
    elif prefers_wrong:
        yield Diagnosis(
            "reward-swapped",
            "likely",
            f"the reward {name} prefers wrong prompts: prompt and video are swapped in it, or its "
            "sign is turned",
            f"{rose} of {compared} scores rose with the prompt of another video",
            "check the order of prompts inside the reward, and its prompt format",
        )


def _blind(evidence: Evidence, name: str, compared: int) -> Diagnosis:
    reads = reads_prompt(evidence, name)
    return Diagnosis(
        "reward-blind",
        "certain" if reads else "possible",
        f"the reward {name} is blind to the prompt: other prompts change no score",
        f"{compared} of {compared} scores are the same with the prompt of another video",
        "check that the prompt reaches the model"
        if reads
        else "all is well if the reward judges the picture alone; if not, check that the prompt "
        "reaches it",
    )


def reads_prompt(evidence: Evidence, name: str) -> bool:
    """True if a reward is known to read the prompt: by its kind, or by the certificate."""
    entry = evidence.rewards[name]
    kind = entry.get("kind") or name
    certified = evidence.certificate.get("rewards", {}).get(identity(name, entry), {})
    return certified.get(
        "reads_prompt",
        entry.get("target") is None and kind in READERS,
    )


def counts(evidence: Evidence, name: str, case: str) -> tuple[int, int, int]:
    """How many scores fell, stayed and rose over all measured updates."""
    totals = []
    for answer in ("fell", "same", "rose"):
        totals.append(int(sum(evidence.measured(f"rewards/{name}/{case}/{answer}"))))
    return totals[0], totals[1], totals[2]


def mean(values: Sequence[float]) -> float:
    """MEAN; 0 without values."""
    return sum(values) / len(values) if values else 0.0
