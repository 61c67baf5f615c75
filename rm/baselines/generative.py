"""Judges that write their scores: VideoScore2 (2509.22799), UnifiedReward (2503.05236), and models asked like them.

A Qwen2-VL or Qwen2.5-VL reads the video and an instruction, writes an answer, and the numbers behind known labels are
its scores. Nothing is trained here and there is no head: what cannot be read is NaN.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rm.baselines.load_published import CLIP_COLOURS, read_instruction
from rm.baselines.qwen2_vl import PADS, chat, frame_indices
from rm.config import VideoSettings
from rm.prompt import token_id
from rm.video import preprocess

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODELS = ("qwen2_vl", "qwen2_5_vl")
_NUMBER = r"[^:\n]*:\s*(-?\d+(?:\.\d+)?)"


@dataclass(frozen=True)
class ScoreField:
    """The words before a number, and between what it must lie. A label may be followed by other words, then a colon."""

    words: str
    low: float
    high: float

    def find(self, answer: str) -> re.Match[str] | None:
        """Where it is written last: a chain of thought may name a score before it is decided."""
        found = None
        for match in re.finditer(
            re.escape(self.words) + _NUMBER, answer, re.IGNORECASE
        ):
            found = match
        return found


@dataclass(frozen=True)
class AnswerFormat:
    """What an answer holds, by name; ``value`` names the one that is the reward, None is the MEAN of all."""

    labels: Mapping[str, ScoreField]
    value: str | None = None

    def __post_init__(self) -> None:
        if not self.labels:
            raise ValueError("a form needs at least one label")
        if self.value is not None and self.value not in self.labels:
            raise ValueError(
                f"value={self.value!r} is none of {', '.join(self.labels)}"
            )
        if bad := [
            name for name, label in self.labels.items() if not label.low < label.high
        ]:
            raise ValueError(f"label {bad[0]}: low must lie below high")


FORMS = {
    "videoscore2": AnswerFormat(
        {
            "visual": ScoreField("visual quality", 1, 5),
            "alignment": ScoreField("text-to-video alignment", 1, 5),
            "physics": ScoreField("physical/common-sense consistency", 1, 5),
        }
    ),
    "unifiedreward": AnswerFormat(
        {
            "visual": ScoreField("visual quality", 1, 4),
            "consistency": ScoreField("temporal consistency", 1, 4),
            "dynamics": ScoreField("dynamic degree", 1, 4),
            "alignment": ScoreField("text-to-video alignment", 1, 4),
            "facts": ScoreField("factual consistency", 1, 4),
            "final": ScoreField("final score", 1, 10),
        },
        "final",
    ),
    "unifiedreward2": AnswerFormat(
        {
            "alignment": ScoreField("alignment score", 1, 5),
            "physics": ScoreField("physics score", 1, 5),
            "style": ScoreField("style score", 1, 5),
        }
    ),
}


@dataclass(frozen=True)
class ParsedAnswer:
    """One answer and what it says: a number for every name of the form, NaN where it says none that is allowed."""

    answer: str
    scores: Mapping[str, float]
    value: float


class GenerativeRewardModel:
    """A model, its tokenizer and its instruction.

    form      the labels of the answer
    expected  instead of the digit that is written, the mean of all digits by the model's own probabilities at that
              token: whole numbers tie, and what ties teaches nothing. Only for forms of whole numbers up to 9
    """

    def __init__(
        self,
        checkpoint: str | Path,
        instruction: str | Path,
        *,
        form: AnswerFormat,
        expected: bool = False,
        fps: float = 2.0,
        max_pixels: int = 768 * 28 * 28,
        max_new_tokens: int = 1024,
        device: str | None = None,
        dtype: str = "float32",
    ) -> None:
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

        config = AutoConfig.from_pretrained(checkpoint)
        if config.model_type not in MODELS:
            raise ValueError(
                f"{checkpoint}: model_type is {config.model_type!r}, this reads {' and '.join(MODELS)}"
            )
        if expected and any(
            label.low < 0 or label.high > 9 for label in form.labels.values()
        ):
            raise ValueError(
                "expected=true reads single digits, but a label of the form allows other numbers"
            )
        self.instruction, self.form, self.expected = (
            read_instruction(instruction),
            form,
            expected,
        )
        self.max_new_tokens = max_new_tokens
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            checkpoint
        )
        model = AutoModelForImageTextToText.from_pretrained(
            checkpoint, dtype=getattr(torch, dtype)
        )
        model = model.requires_grad_(requires_grad=False).eval()
        self.model: Any = model.to(
            device or ("cuda" if torch.cuda.is_available() else "cpu")
        )
        vision = config.vision_config
        self.settings = VideoSettings(
            fps=fps, min_pixels=min(128 * 28 * 28, max_pixels), max_pixels=max_pixels, patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size, temporal_patch_size=vision.temporal_patch_size, **CLIP_COLOURS,
        )  # fmt: skip

    def inputs(
        self, frames_TYXC: Tensor, prompt: str, *, fps: float
    ) -> dict[str, Tensor]:
        """What the model reads: ids, patches, and where the patches are in space and time."""
        seen = frame_indices(len(frames_TYXC), fps, self.settings)
        pixels = preprocess(frames_TYXC[seen], self.settings)
        pads = math.prod(pixels.grid) // self.settings.merge_size**2
        pad = token_id(self.tokenizer, PADS["video"])
        ids_1L = torch.tensor(
            [chat(self.tokenizer, [pad] * pads, self.instruction, prompt)]
        )
        inputs = {
            "input_ids": ids_1L,
            "attention_mask": torch.ones_like(ids_1L),
            "mm_token_type_ids": (ids_1L == pad).int() * 2,
            "pixel_values_videos": pixels.patches.to(self.model.dtype),
            "video_grid_thw": torch.tensor([pixels.grid]),
        }
        if (
            self.model.config.model_type == "qwen2_5_vl"
        ):  # its temporal positions are times
            seconds = (
                self.settings.temporal_patch_size * len(frames_TYXC) / fps / len(seen)
            )
            inputs["second_per_grid_ts"] = torch.tensor([seconds])
        return {name: value.to(self.model.device) for name, value in inputs.items()}

    @torch.no_grad()
    def judge(self, frames_TYXC: Tensor, prompt: str, *, fps: float) -> ParsedAnswer:
        """Greedy, so one video and one prompt have one answer."""
        inputs = self.inputs(frames_TYXC, prompt, fps=fps)
        out = self.model.generate(
            **inputs,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=self.expected,
        )
        ids = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        return self.read(
            ids,
            [step_1V[0].float().cpu() for step_1V in out.logits]
            if self.expected
            else [],
        )

    def read(self, ids: list[int], logits: list[Tensor]) -> ParsedAnswer:
        """The scores of an answer; ``logits`` (V,) of every token where ``expected``."""
        answer = self.tokenizer.decode(ids, skip_special_tokens=True)
        scores = {}
        for name, label in self.form.labels.items():
            match = label.find(answer)
            number = math.nan if match is None else float(match[1])
            if match is not None and self.expected:
                number = self._expected(
                    label, logits[self._token_at(ids, match.start(1))]
                )
            scores[name] = number if label.low <= number <= label.high else math.nan
        value = (
            scores[self.form.value]
            if self.form.value
            else sum(scores.values()) / len(scores)
        )
        return ParsedAnswer(answer, scores, value)

    def _expected(self, label: ScoreField, logits_V: Tensor) -> float:
        digits = range(math.ceil(label.low), math.floor(label.high) + 1)
        ids = [
            self.tokenizer.encode(str(digit), add_special_tokens=False)[-1]
            for digit in digits
        ]
        share = logits_V.double()[ids].softmax(dim=0)
        return float(share @ torch.tensor(list(digits), dtype=torch.float64))

    def _token_at(self, ids: list[int], place: int) -> int:
        """The token in which the answer's character number ``place`` stands."""

        def written(count: int) -> int:
            return len(self.tokenizer.decode(ids[:count], skip_special_tokens=True))

        return bisect.bisect_right(range(len(ids) + 1), place, key=written) - 1
