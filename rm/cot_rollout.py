"""Rollouts of stage 2: sampled chains of thought (CoTs), their rewards, and their tensors.

Every array of a micro-batch of N pairs is indexed (video, rollout) = (V, G), where V = 2N: the
videos A and B of each pair in turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from rm.packed import Packed, PackedCot, pack
from rm.text_rewards import (
    RuleReward,
    RuleRewardConfig,
    preference_rewards,
    rule_reward,
)
from rm.video import prepare

if TYPE_CHECKING:
    from torch import Tensor

    from rm.data import Pair
    from rm.model import DeScore
    from rm.prompt import Encoded
    from rm.text_rewards import Scores
    from rm.video import PreparedVideo


class SampledPairs(NamedTuple):
    """N pairs, and by video: its patches, its prompt and the G CoTs sampled for it."""

    pairs: Sequence[Pair]
    videos: Sequence[PreparedVideo]
    encoded: Sequence[Encoded]
    cots: Sequence[Sequence[PackedCot]]

    def parts(self, size: int) -> Iterator[SampledPairs]:
        """Yield ``size`` pairs at a time, the micro-batches of an update."""
        for first in range(0, len(self.pairs), size):
            last = first + size
            # Each pair has two videos.
            videos = slice(2 * first, 2 * last)
            yield SampledPairs(
                pairs=self.pairs[first:last],
                videos=self.videos[videos],
                encoded=self.encoded[videos],
                cots=self.cots[videos],
            )


@dataclass(frozen=True)
class Rollouts:
    """A micro-batch of N pairs, sampled and rewarded.

    packed         The sequences; their CoTs are in the order (video, rollout).
    label_NK       Labels in each dimension, see `Pair.label_in`.
    advantage_VG   Group-relative advantages of the CoTs.
    rules          Rule rewards, [video][rollout].
    finished_VG    bool, True where a CoT ended before the token limit.
    old_BGT        Log-probabilities under the policy that sampled. None if the weights do
                   not change between sampling and the update.
    reference_BGT  Log-probabilities under the frozen stage-1 model. None without a KL term.
    """

    packed: Packed
    label_NK: Tensor
    advantage_VG: Tensor
    rules: Sequence[Sequence[RuleReward]]
    finished_VG: Tensor
    old_BGT: Tensor | None = None
    reference_BGT: Tensor | None = None

    @property
    def tokens(self) -> int:
        return int(self.packed.token_BGT.sum())


def encode_pairs(
    model: DeScore, pairs: Sequence[Pair]
) -> tuple[list[PreparedVideo], list[Encoded]]:
    """Prepare both videos of every pair and encode their prompts, in the order (pair, side)."""
    videos = []
    encoded = []
    for pair in pairs:
        for path in (pair.video_A, pair.video_B):
            video = prepare(path, model.settings)
            videos.append(video)
            encoded.append(model.encode(pair.prompt, video))
    return videos, encoded


def pack_pairs(
    model: DeScore, sampled: SampledPairs, cots_per_row: int | None
) -> Packed:
    """Pack the CoTs of a micro-batch, ``cots_per_row`` behind each prompt (None: all).

    Rows are in the order (video, part of the group).
    """
    videos = []
    encoded = []
    rows = []
    for video, prompt, cots in zip(*sampled[1:], strict=True):
        size = cots_per_row or len(cots)
        for first in range(0, len(cots), size):
            videos.append(video)
            encoded.append(prompt)
            rows.append(cots[first : first + size])
    return pack(model, encoded, videos, rows)


def reward_cots(
    model: DeScore, sampled: SampledPairs, how: RuleRewardConfig
) -> list[list[RuleReward]]:
    """Reward every CoT by rules, [video][rollout]."""
    rewards = []
    for n, pair in enumerate(sampled.pairs):
        groups = []
        for side, truth in enumerate((pair.scores_A, pair.scores_B)):
            cots = sampled.cots[2 * n + side]
            groups.append([reward_cot(model, cot, truth, how) for cot in cots])
        # The generative baseline also learns from the overall scores that the CoTs state.
        if how.preference > 0:
            groups = _add_preference(groups, pair.label, how.preference)
        rewards += groups
    return rewards


def reward_cot(
    model: DeScore, cot: PackedCot, truth: Scores | None, how: RuleRewardConfig
) -> RuleReward:
    """Reward a single CoT by rules, see `rm.text_rewards`; unknown scores have quality 0."""
    text = model.tokenizer.decode(list(cot.ids))
    return rule_reward(text, truth or {}, tokens=len(cot.ids), how=how)


def _add_preference(
    rewards: Sequence[Sequence[RuleReward]], label: int, weight: float
) -> list[list[RuleReward]]:
    """Add the preference term of the generative baseline to both groups of a pair."""
    # A CoT's term depends on the overall scores of the other video's group.
    overall_A, overall_B = ([rule.overall for rule in group] for group in rewards)
    terms = preference_rewards(overall_A, overall_B, label)

    # Add the term to the total.
    result = []
    for group, group_terms in zip(rewards, terms, strict=True):
        new_group = []
        for rule, term in zip(group, group_terms, strict=True):
            total = rule.total + weight * term
            new_group.append(replace(rule, preference=term, total=total))
        result.append(new_group)
    return result
