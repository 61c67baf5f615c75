"""A reward that compares the videos of a group two by two: the share of comparisons that each wins.

    python launch/grpo.py --config configs/shapes/grpo_oracle.yaml run_dir=runs/examples/pairwise \\
        rewards.oracle=null rewards.wins.target=examples/pairwise_reward.py:WinRate \\
        rewards.wins.options.margin=0.01 steps=3 prompts_per_step=4 evaluation=null

Put your judge into `prefers`: a vision-language model that sees two videos at once, for example.
A win rate is bounded, and small where a group is nearly equal. With more than one reward keep
`grpo.scale` at max_group or none, so that such a group is not blown up.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from statistics import mean

import torch
from torch import Tensor


class WinRate:
    """The mean result against the other videos of the prompt: 1 won, 1/2 tied, 0 lost.

    margin  brightness, in [0, 1], by which a video must lead to win; less is a tie.
    """

    # The loop calls `score` once for each group, with all of its members.
    group_level = True

    def __init__(self, margin: float = 0.0) -> None:
        self.margin = margin

    def score(
        self,
        video_BTYXC: Tensor,
        prompts: Sequence[str],
    ) -> Tensor:
        """Return B win rates; a video that cannot be compared with any other is NaN."""
        videos = list(video_BTYXC)
        rates = []
        for i, video in enumerate(videos):
            # against every video but itself
            others = videos[:i] + videos[i + 1 :]
            results = [self.result(video, other, prompts[i]) for other in others]
            rates.append(mean(results) if results else nan)
        return torch.tensor(rates)

    def result(
        self,
        video_TYXC: Tensor,
        other_TYXC: Tensor,
        prompt: str,
    ) -> float:
        """The mean of both orders: a judge may prefer whatever it sees first."""
        as_first = self.prefers(video_TYXC, other_TYXC, prompt)
        as_second = 1 - self.prefers(other_TYXC, video_TYXC, prompt)
        return (as_first + as_second) / 2

    def prefers(
        self,
        first_TYXC: Tensor,
        second_TYXC: Tensor,
        prompt: str,
    ) -> float:
        """The judge: 1 if the first video is better, 0 if the second, 1/2 for a tie.

        This one takes the brighter video and does not read the prompt.
        """
        first = first_TYXC.float().mean()
        second = second_TYXC.float().mean()
        lead = (first - second) / 255
        if lead.abs() <= self.margin:
            return 0.5
        # brighter is better
        return float(lead > 0)
