"""A reward of your own: a function in a file.

    python launch/grpo.py --config configs/shapes/grpo_oracle.yaml run_dir=runs/examples/warm \\
        rewards.oracle=null rewards.warm.target=examples/my_reward.py:score \\
        rewards.warm.options.calm=0.5 steps=3 prompts_per_step=4 evaluation=null

`python launch/check_rewards.py` tells what a reward can see before a run trains on it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def score(
    video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float, calm: float = 0.0
) -> Tensor:
    """Warm colours score higher, and fast changes of a pixel lower, by the option ``calm``.

    video_BTYXC  uint8 RGB, a copy: write into it as you like
    prompts      a text for each video; this reward does not read them
    fps          frames a second

    Returns B numbers, higher is better; NaN is a video that could not be scored.
    """
    pixel = video_BTYXC.float() / 255

    # red minus blue, MEAN over frames and pixels
    red_B, _, blue_B = pixel.mean((1, 2, 3)).unbind(1)
    # an image does not move
    if pixel.shape[1] == 1:
        return red_B - blue_B

    # change of brightness a second, MEAN over frames and pixels
    grey_BTYX = pixel.mean(-1)
    change_B = grey_BTYX.diff(dim=1).abs().mean((1, 2, 3)) * fps
    return red_B - blue_B - calm * change_B
