"""Score fast first, and think only about the videos whose order is in doubt.

The rule and its thresholds are those of `rm.cascade`; launch/calibrate.py makes them.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.distributed import derive_seed
from common.log import say
from common.types import Score
from rm.cascade import Thinking, confidence_of, discordant_pairs
from rm.scorer import DeScoreScorer, identity
from rm.scorer_options import AUDIT_SHARE, check_thinking

# Part of the score that holds the outcome of audits, which training runs add up.
AUDIT = "audit"


@dataclass(frozen=True)
class _Group:
    """Videos that are scored by one way: their places in the call, and what their order rests on.

    places      In the order of their content, so that the order of the call changes nothing.
    confidence  NaN for a single video and for a missing score.
    fast        Whether the fast scores decide.
    audited     Whether the group is drawn for the audit.
    pair        Which of its pairs the audit looks at, as a place in `discordant_pairs`.
    """

    places: list[int]
    confidence: float
    fast: bool
    audited: bool
    pair: int


class AdaptiveScorer:
    """A DeScore that thinks when unsure, behind the Protocol `common.types.RewardModel`.

    Videos of a call with the same prompt are a group: all of them are scored fast, or all behind
    chains of thought, since the two scales are only close. A single video of a prompt has no
    order that could be sure, so the model thinks about it.

    audit  Share of the groups, drawn by their content, that the model also thinks about where
           the fast scores decided. The part "audit" of their videos is 1 if the order of a pair
           of them, drawn by the content too, is another after thinking, and else 0. So its mean
           over the drawn groups estimates the risk "disagreement". Their score is the slow one.
    """

    name = "descore"
    # The loop of GRPO hands such a reward whole groups.
    group_level = True
    # Groups of several prompts may share a call.
    groups_by_prompt = True

    def __init__(
        self, slow: DeScoreScorer, thinking: Thinking, *, audit: float = AUDIT_SHARE
    ) -> None:
        # The thresholds are those of other scores.
        if len(slow.model.dimensions) > 1:
            raise ValueError(
                "thinking=adaptive needs a reward model with a single dimension, "
                f"this one has {', '.join(slow.model.dimensions)}"
            )
        if slow.cots != thinking.cots:
            raise ValueError(
                f"the thresholds were made with cots={thinking.cots}, not cots={slow.cots}"
            )
        self.slow = slow
        self.fast = DeScoreScorer(slow.model, batch=slow.portions.size, cots=0)
        self.thinking = thinking
        self.audit = audit
        self.always = False
        for size, threshold in (("2", thinking.pairs), ("more", thinking.groups)):
            if threshold is not None and threshold.confidence is None:
                say(
                    f"WARNING: no threshold kept the risk of {size} videos of a prompt at "
                    f"{threshold.alpha}, so the reward model thinks about all of them"
                )

    def check_group_size(self, size: int) -> None:
        """Raise ValueError if the checkpoint is not calibrated for groups of this size."""
        self.thinking.threshold_of(size)

    def score(
        self,
        videos: Tensor | Sequence[Tensor | str | Path],
        prompts: Sequence[str],
        *,
        fps: float | None = None,
        groups: Sequence[Hashable] | None = None,
    ) -> Score:
        """Compute rewards (B,), on the scale of those behind a chain of thought.

        As `DeScoreScorer.score`; ``groups`` names the group of each video, None takes the prompts.
        Further parts: "thought" is 1 where the reward is behind a chain of thought and else 0,
        "confidence" that of the group, "audit" NaN in groups that are not drawn.
        """
        count = len(prompts)
        if self.always or not count:
            score = self.slow.score(videos, prompts, fps=fps)
            thought_B = torch.ones(count)
            return Score(
                score.value_B,
                {**score.parts, "thought": thought_B},
                score.texts,
                score.reasons,
            )

        # 1. Fast scores of all videos that have something to be ordered with.
        members = _members(prompts if groups is None else groups)
        ordered = [i for places in members if len(places) > 1 for i in places]
        fast_B = torch.full((count,), math.nan)
        if ordered:
            fast = self.fast.score(
                [videos[i] for i in ordered], [prompts[i] for i in ordered], fps=fps
            )
            scaled = self.thinking.offset + self.thinking.slope * fast.value_B.double()
            fast_B[ordered] = scaled.float()

        # 2. Which groups they decide.
        decided = []
        for places in members:
            decided.append(self._decide(places, videos, prompts, fast_B))

        # 3. Think about the others, and about those that are drawn for the audit.
        slow_places = []
        for group in decided:
            if not group.fast or group.audited:
                slow_places += group.places
        slow_places.sort()
        parts = []
        if slow_places:
            slow = self.slow.score(
                [videos[i] for i in slow_places],
                [prompts[i] for i in slow_places],
                fps=fps,
            )
            parts.append((slow_places, slow))
        fast_places = sorted(set(range(count)) - set(slow_places))
        if fast_places:
            empty = [""] * len(fast_places)
            parts.append((fast_places, Score(fast_B[fast_places], {}, empty)))
        score = Score.placed(count, parts)

        # 4. Say which way each video went.
        thought_B = torch.zeros(count)
        thought_B[slow_places] = 1.0
        confidence_B = torch.full((count,), math.nan)
        audit_B = torch.full((count,), math.nan)
        for group in decided:
            confidence_B[group.places] = group.confidence
            if group.audited:
                audit_B[group.places] = _outcome(group, fast_B, score.value_B)
        described = {
            "thought": thought_B,
            "confidence": confidence_B,
            AUDIT: audit_B,
        }
        return Score(
            score.value_B, {**score.parts, **described}, score.texts, score.reasons
        )

    def _decide(
        self,
        places: Sequence[int],
        videos: Tensor | Sequence[Tensor | str | Path],
        prompts: Sequence[str],
        fast_B: Tensor,
    ) -> _Group:
        """Whether the fast scores decide a group, and whether it is drawn for the audit."""
        threshold = self.thinking.threshold_of(len(places))
        keys = {i: identity(videos[i], prompts[i]).hex() for i in places}
        ordered = sorted(places, key=keys.__getitem__)
        if threshold is None:
            return _Group(ordered, math.nan, fast=False, audited=False, pair=0)
        confidence = confidence_of(fast_B[ordered], sigma=self.thinking.sigma)

        # The audit depends on the content alone.
        seed = derive_seed("audit", *[keys[i] for i in ordered])
        pairs = len(ordered) * (len(ordered) - 1) // 2
        return _Group(
            ordered,
            confidence,
            fast=threshold.decides_fast(confidence),
            audited=seed / 2**63 < self.audit,
            pair=derive_seed(seed, "pair") % pairs,
        )


def _members(groups: Sequence[Hashable]) -> list[list[int]]:
    """Places of the videos of each group, in order of first appearance."""
    places: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        places.setdefault(group, []).append(i)
    return list(places.values())


def _outcome(group: _Group, fast_B: Tensor, slow_B: Tensor) -> float:
    """1 if the fast scores decided a pair of the group differently than thinking, else 0."""
    if not group.fast:
        return 0.0
    differs_M = discordant_pairs(fast_B[group.places], slow_B[group.places])
    return float(differs_M[group.pair])


def load_scorer(
    path: str | Path,
    *,
    thinking: str = "always",
    audit: float | None = None,
    **options: Any,
) -> DeScoreScorer | AdaptiveScorer:
    """Load a checkpoint folder as a scorer that thinks always, never, or when unsure.

    thinking  "always" is `DeScoreScorer.load`; "never" is the same without a chain of thought;
              "adaptive" is an `AdaptiveScorer` with the thinking.json of the folder.
    audit     Of "adaptive"; None is `AUDIT_SHARE`.
    options   Those of `DeScoreScorer.load`.

    Raises ValueError for options that do not fit together, and FileNotFoundError for "adaptive"
    without a thinking.json.
    """
    given = {} if audit is None else {"audit": audit}
    check_thinking({"thinking": thinking, **given, **options})
    if thinking == "never":
        options["cots"] = 0
    if thinking != "adaptive":
        return DeScoreScorer.load(path, **options)
    rule = Thinking.load(path)
    return AdaptiveScorer(DeScoreScorer.load(path, **options), rule, **given)
