"""Rules over the measurements of rewards: what reaches them, and how they answer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from launch.diagnosis.evidence import Diagnosis, Evidence

# In units of the spread of the scores.
SCORE_LIMIT = 0.1
AT_THE_END = 0.8
# More scores rise than fall by this many standard deviations of a coin.
SIGMAS = 2.5
FEW_COMPARED = 24
# Kinds of rewards of this project that read the prompt, whatever their options are.
READERS = ("descore", "generative")


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
    # Videos of the step, as they reached the reward.
    wrong = max(evidence.measured(f"rewards/{name}/wrong_prompt"), default=0.0)
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
    elif other > 0:
        yield Diagnosis(
            "reward-other-videos",
            "likely",
            f"the reward {name} gets other videos than the rollout's: changed on the way, or "
            "not those of this step",
            f"{100 * other:.0f} % of the videos",
            "hand the decoded frames to the reward as they are",
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
        if turned < alone / 5:
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
    # Is it known to read the prompt?
    entry = evidence.rewards[name]
    kind = entry.get("kind") or name
    certified = evidence.certificate.get("rewards", {}).get(_identity(entry), {})
    reads = certified.get(
        "reads_prompt",
        entry.get("target") is None and kind in READERS,
    )
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


def _identity(entry: Any) -> str:
    return str(entry.get("target") or entry.get("kind") or "")


def counts(evidence: Evidence, name: str, case: str) -> tuple[int, int, int]:
    """How many scores fell, stayed and rose over all measured updates."""
    totals = []
    for answer in ("fell", "same", "rose"):
        totals.append(int(sum(evidence.measured(f"rewards/{name}/{case}/{answer}"))))
    return totals[0], totals[1], totals[2]


def mean(values: Sequence[float]) -> float:
    """MEAN; 0 without values."""
    return sum(values) / len(values) if values else 0.0
