"""Mean brightness: the smallest complete reward, to copy from and to test with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from common.types import Score

if TYPE_CHECKING:
    from torch import Tensor


class Brightness:
    """MEAN over all pixels and channels of a video, as a fraction of white, in [0, 1]."""

    name = "brightness"

    def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        # a reward returns one number per video; higher is better
        value_B = video_BTYXC.float().mean(dim=(1, 2, 3, 4)) / 255
        return Score(value_B=value_B)
