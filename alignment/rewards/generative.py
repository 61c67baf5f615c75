"""A generative reward model (VideoScore2, UnifiedReward) that writes its scores as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.types import Score
from rm.baselines.generative import (
    FORMS,
    AnswerFormat,
    GenerativeRewardModel,
    ParsedAnswer,
    ScoreField,
)

if TYPE_CHECKING:
    from torch import Tensor


class Generative:
    """The number behind a label of the answer, or the MEAN of several. The answer is the text.

    checkpoint   The folder or hub name of a Qwen2-VL or Qwen2.5-VL.
    instruction  A text file with the model's instruction and a slot {prompt}.
    form         "videoscore2", "unifiedreward", "unifiedreward2", or a mapping
                 name -> [words before the number, low, high].
    value        The name in a ``form`` mapping that is the reward; null for the MEAN of all.
    options      ``expected``, ``fps`` (frames a second that it sees), ``max_pixels`` (of a
                 frame), ``max_new_tokens``, ``device`` and ``dtype``: see
                 `rm.baselines.generative.GenerativeRewardModel`.

    Each answer is generated separately: the score of a video does not depend on its batch. A
    number that is missing or outside its limits is NaN, and so are all numbers of an answer that
    was cut at ``max_new_tokens``. The text of a video without a reward ends with the reason.
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
                "a generative reward needs options.instruction, a text file with the "
                "instruction that the model was trained on"
            )
        # the instruction and the format of the answer belong to the checkpoint
        self.reward_model = GenerativeRewardModel(
            checkpoint, instruction, form=_answer_format(form, value), **options
        )

    def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        answers = []
        for video_TYXC, prompt in zip(video_BTYXC, prompts, strict=True):
            answers.append(self.reward_model.judge(video_TYXC, prompt, fps=fps))

        # the reward, and every labelled number beside it
        value_B = torch.tensor([answer.value for answer in answers])
        parts = {}
        for name in self.reward_model.form.labels:
            parts[name] = torch.tensor([answer.scores[name] for answer in answers])
        texts = [_shown(answer) for answer in answers]
        return Score(value_B, parts, texts, [_reason(answer) for answer in answers])


def _shown(answer: ParsedAnswer) -> str:
    """The answer, and why it gives no reward."""
    if not answer.problem:
        return answer.answer
    return f"{answer.answer}\n[not scored: {answer.problem}]"


def _reason(answer: ParsedAnswer) -> str:
    """Why an answer gives no reward; empty for one that does."""
    if math.isfinite(answer.value):
        return ""
    return answer.problem or "the answer states no score in the range of the form"


def _answer_format(
    form: str | Mapping[str, Sequence[Any]], value: str | None
) -> AnswerFormat:
    if isinstance(form, str):
        if form not in FORMS:
            raise ValueError(f"options.form knows {', '.join(FORMS)}, not {form!r}")
        return FORMS[form] if value is None else AnswerFormat(FORMS[form].labels, value)
    fields = {}
    for name, entry in form.items():
        if len(entry) != 3:
            raise ValueError(
                f"options.form.{name} must be [words before the number, low, high]"
            )
        words, low, high = entry
        fields[name] = ScoreField(str(words), float(low), float(high))
    return AnswerFormat(fields, value)
