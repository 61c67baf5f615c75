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

    def score(self, video_BTYXC: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return B win rates; a video that cannot be compared with any other is NaN."""
        count = len(video_BTYXC)
        result_BB = torch.full((count, count), torch.nan)
        for i in range(count):
            for j in range(i):
                # in both orders: a judge may prefer whatever it sees first
                first = self.prefers(video_BTYXC[i], video_BTYXC[j], prompts[i])
                second = self.prefers(video_BTYXC[j], video_BTYXC[i], prompts[i])
                result_BB[i, j] = (first + 1 - second) / 2
                result_BB[j, i] = 1 - result_BB[i, j]
        # without the comparison with itself
        return result_BB.nanmean(1)

    def prefers(self, first_TYXC: Tensor, second_TYXC: Tensor, prompt: str) -> float:
        """The judge: 1 if the first video is better, 0 if the second, 1/2 for a tie.

        This one takes the brighter video and does not read the prompt.
        """
        lead = first_TYXC.float().mean() - second_TYXC.float().mean()
        if lead.abs() <= 255 * self.margin:
            return 0.5
        return float(lead > 0)
