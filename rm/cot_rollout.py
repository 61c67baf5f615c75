"""Rollouts of stage 2: sampled chains of thought (CoTs), their rewards, and their tensors.

Every array is indexed (pair, side, rollout) = (N, 2, G); side 0 is video A, side 1 video B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from common import progress
from rm.generate import generate
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

    from rm.config import Generation
    from rm.data import Pair
    from rm.model import DeScore
    from rm.prompt import Encoded
    from rm.text_rewards import Scores
    from rm.video import PreparedVideo


@dataclass(frozen=True)
class SampledPair:
    """A pair and the G CoTs sampled for each of its videos.

    ``videos`` and ``encoded`` are indexed by side, ``cots`` by side and rollout.
    """

    pair: Pair
    videos: Sequence[PreparedVideo]
    encoded: Sequence[Encoded]
    cots: Sequence[Sequence[PackedCot]]


@dataclass(frozen=True)
class Rollouts:
    """A micro-batch of N pairs, sampled and rewarded.

    packed         The sequences; their CoTs are in the order (pair, side, rollout).
    label_NK       Labels in each dimension, see `Pair.label_in`.
    advantage_N2G  Group-relative advantages of the CoTs.
    rules          Rule rewards, [pair][side][rollout].
    finished_N2G   bool, True where a CoT ended before the token limit.
    old_BGT        Log-probabilities under the policy that sampled. None if the weights do
                   not change between sampling and the update.
    reference_BGT  Log-probabilities under the frozen stage-1 model. None without a KL term.
    """

    packed: Packed
    label_NK: Tensor
    advantage_N2G: Tensor
    rules: Sequence[Sequence[Sequence[RuleReward]]]
    finished_N2G: Tensor
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


def generate_cots(
    model: DeScore,
    encoded: Sequence[Encoded],
    videos: Sequence[PreparedVideo],
    how: Generation,
    *,
    seeds: Sequence[int],
    batch: int,
) -> list[list[PackedCot]]:
    """Sample CoTs for every prompt and video, [sequence][copy], with a seed for each.

    ``batch`` sequences go through the model at a time; each has the same number of copies.
    Only the tokens are used: stage 2 computes log-probabilities with `packed_forward`, the
    old policy's too, so that a ratio compares policies and not two ways of computing.
    """
    progress.enter("CoTs")
    copies = len(seeds) // len(encoded)
    groups = []
    for first in range(0, len(encoded), batch):
        part = slice(first, first + batch)
        seed_part = slice(first * copies, (first + batch) * copies)
        written = generate(
            model,
            model.batch(encoded[part], videos[part], query=False),
            how,
            seeds=seeds[seed_part],
            copies=copies,
        )
        # Rows of the result are in the order (sequence, copy).
        for row in range(0, len(written.length_B), copies):
            groups.append([written.cot(row + copy) for copy in range(copies)])
    return groups


def pack_pairs(
    model: DeScore, sampled: Sequence[SampledPair], cots_per_row: int | None
) -> Packed:
    """Pack the CoTs of a micro-batch, ``cots_per_row`` behind each prompt (None: all).

    Rows are in the order (pair, side, part of the group).
    """
    videos = []
    encoded = []
    rows = []
    for item in sampled:
        for side, cots in enumerate(item.cots):
            size = cots_per_row or len(cots)
            for first in range(0, len(cots), size):
                videos.append(item.videos[side])
                encoded.append(item.encoded[side])
                rows.append(cots[first : first + size])
    return pack(model, encoded, videos, rows)


def reward_pair(
    model: DeScore, sampled: SampledPair, how: RuleRewardConfig
) -> list[list[RuleReward]]:
    """Reward every CoT of a pair by rules, [side][rollout].

    Raises ValueError if the pair has no ground-truth scores.
    """
    pair = sampled.pair
    truths = (pair.scores_A, pair.scores_B)
    rewards = []
    for truth, cots in zip(truths, sampled.cots, strict=True):
        if truth is None:
            raise ValueError(
                f"the pair {pair.video_A} has no ground-truth scores: "
                "read it with require_scores=True"
            )
        rewards.append([reward_cot(model, cot, truth, how) for cot in cots])
    # The generative baseline also learns from the overall scores that the CoTs state.
    if how.preference > 0:
        return _add_preference(rewards, pair.label, how.preference)
    return rewards


def reward_cot(
    model: DeScore, cot: PackedCot, truth: Scores, how: RuleRewardConfig
) -> RuleReward:
    """Reward a single CoT by rules, see `rm.text_rewards`."""
    text = model.tokenizer.decode(list(cot.ids))
    return rule_reward(text, truth, tokens=len(cot.ids), how=how)


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
