"""A judge that writes its scores as words (VideoScore2, UnifiedReward and their kind), as a reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.types import Score
from rm.baselines.generative import (
    FORMS,
    AnswerFormat,
    GenerativeRewardModel,
    ScoreField,
)

if TYPE_CHECKING:
    from torch import Tensor


class Generative:
    """The number behind one label of the answer, or the MEAN of several. The answer comes back as text.

    checkpoint   folder or hub name of a Qwen2-VL or Qwen2.5-VL
    instruction  text file with the model's own words and a slot {prompt} for the video's prompt
    form         "videoscore2", "unifiedreward", "unifiedreward2", or name -> [words before the number, low, high]
    value        with a form of your own: the name that is the reward; null for the MEAN of all
    options      ``expected``, ``fps`` (frames a second it sees), ``max_pixels`` (of a frame), ``max_new_tokens``,
                 ``device``, ``dtype``: see `rm.baselines.generative.GenerativeRewardModel`

    Answers are written one by one: what a video scores does not depend on its batch. A number that is missing, or
    outside its limits, is NaN.
    """

    name = "generative"

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        instruction: str | Path | None = None,
        form: str | Mapping[str, Sequence[Any]] = "videoscore2",
        value: str | None = None,
        **options: Any,
    ) -> None:
        if instruction is None:
            raise ValueError(
                "a generative reward needs options.instruction, a text file with the model's own words"
            )
        self.judge = GenerativeRewardModel(
            checkpoint, instruction, form=_form(form, value), **options
        )

    def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        found = [
            self.judge.judge(video_TYXC, prompt, fps=fps)
            for video_TYXC, prompt in zip(video_BTYXC, prompts, strict=True)
        ]
        parts = {
            name: torch.tensor([one.scores[name] for one in found])
            for name in self.judge.form.labels
        }
        return Score(
            torch.tensor([one.value for one in found]),
            parts,
            [one.answer for one in found],
        )


def _form(form: str | Mapping[str, Sequence[Any]], value: str | None) -> AnswerFormat:
    if isinstance(form, str):
        if form not in FORMS:
            raise ValueError(f"options.form knows {', '.join(FORMS)}, not {form!r}")
        return FORMS[form] if value is None else AnswerFormat(FORMS[form].labels, value)
    if wrong := [name for name, entry in form.items() if len(entry) != 3]:
        raise ValueError(
            f"options.form.{wrong[0]} must be [words before the number, low, high]"
        )
    return AnswerFormat(
        {
            name: ScoreField(str(words), float(low), float(high))
            for name, (words, low, high) in form.items()
        },
        value,
    )
