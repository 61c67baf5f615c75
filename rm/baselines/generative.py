"""Reward models that write their scores as text: VideoScore2, UnifiedReward, and models like them.

VideoScore2 is arXiv 2509.22799, UnifiedReward is arXiv 2503.05236. A Qwen2-VL or Qwen2.5-VL reads
the video and an instruction and writes an answer; the numbers after known labels are its scores.
Nothing is trained here, and there is no head. A score that cannot be read is NaN.
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

from common.files import TRANSFORMERS_PATTERNS, model_folder
from common.memory import default_device
from common.strict_loading import errors_of, load_pretrained
from rm.baselines.load_published import CLIP_COLOURS, VIDEO_MIN_PIXELS, read_instruction
from rm.baselines.qwen2_vl import PADS, chat_ids, frame_indices_qwen_utils
from rm.config import VideoSettings
from rm.prompt import token_id
from rm.video import preprocess

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl")
# A label may be followed by other words of its line, then a colon or "is", and the number, which
# may be bold or in brackets. A range of numbers (3-4) is no score.
NUMBER = (
    r"[^:：\n]*(?:[:：=|]|\bis\b)[\s*_`\[(<]*"
    r"(-?\d+(?:\.\d+)?)(?!\d|\.\d| ?[-–~] ?\d)"
)
# What stands between the words of a label in Markdown or in a key.
BETWEEN_WORDS = r"[\s*_]+"
THOUGHT_STARTS = "<think>"
THOUGHT_ENDS = "</think>"


@dataclass(frozen=True)
class ScoreField:
    """A number in the answer: the words before it, and the limits it must lie between."""

    words: str
    low: float
    high: float

    def find(self, answer: str) -> re.Match[str] | None:
        """Find the last number after the words: a chain of thought may name an earlier score."""
        words = BETWEEN_WORDS.join(re.escape(word) for word in self.words.split())
        pattern = re.compile(words + NUMBER, re.IGNORECASE)
        # Scores in the model's thought are provisional.
        start = max(0, answer.rfind(THOUGHT_ENDS))
        matches = list(pattern.finditer(answer, start))
        return matches[-1] if matches else None


@dataclass(frozen=True)
class AnswerFormat:
    """The scores of an answer, by name. ``value`` names the reward; None is the MEAN of all."""

    labels: Mapping[str, ScoreField]
    value: str | None = None

    def __post_init__(self) -> None:
        if not self.labels:
            raise ValueError("an answer format needs at least one label")
        # The reward is one of the scores.
        if self.value is not None and self.value not in self.labels:
            raise ValueError(
                f"value={self.value!r} is none of {', '.join(self.labels)}"
            )
        for name, label in self.labels.items():
            if not label.low < label.high:
                raise ValueError(f"label {name}: low must lie below high")


# The answers that the published instructions ask for.
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
    """An answer and its scores; NaN stands for a score that is missing or out of its limits.

    problem  says why the answer has no value, and is empty where it has one
    """

    answer: str
    scores: Mapping[str, float]
    value: float
    problem: str = ""


class GenerativeRewardModel:
    """A Qwen2-VL or Qwen2.5-VL with an instruction, whose answer holds the scores.

    form      The labels of the answer.
    expected  Replaces the written digit by the mean of all digits under the model's probabilities
              at that token, because integer scores tie and ties teach nothing. Only for formats
              of integers up to 9.
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

        folder = model_folder(checkpoint, "config.json", patterns=TRANSFORMERS_PATTERNS)
        with errors_of(folder, "config and tokenizer"):
            config = AutoConfig.from_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        if config.model_type not in MODEL_TYPES:
            raise ValueError(
                f"{checkpoint}: model_type is {config.model_type!r}, "
                f"this reads {' and '.join(MODEL_TYPES)}"
            )
        for name, label in form.labels.items():
            if expected and (label.low < 0 or label.high > 9):
                raise ValueError(
                    f"expected=true reads single digits, but label {name} allows more"
                )

        # Load the frozen model.
        self.instruction = read_instruction(instruction)
        self.form = form
        self.expected = expected
        self.max_new_tokens = max_new_tokens
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        model: Any = load_pretrained(
            AutoModelForImageTextToText,
            folder,
            dtype=getattr(torch, dtype),
            device=device or default_device(),
        )
        self.model = model.requires_grad_(requires_grad=False).eval()

        # Frames are cut into patches as the vision tower expects.
        vision = config.vision_config
        self.settings = VideoSettings(
            fps=fps,
            min_pixels=min(VIDEO_MIN_PIXELS, max_pixels),
            max_pixels=max_pixels,
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            temporal_patch_size=vision.temporal_patch_size,
            **CLIP_COLOURS,
        )

    def inputs(
        self,
        frames_TYXC: Tensor,
        prompt: str,
        *,
        fps: float,
    ) -> dict[str, Tensor]:
        """Return the model's inputs: ids, patches, and the patches' places in space and time."""
        # The frames that the published model would read.
        settings = self.settings
        seen = frame_indices_qwen_utils(len(frames_TYXC), fps, settings)
        pixels = preprocess(frames_TYXC[seen], settings)

        # The sequence has a placeholder for every merged patch.
        pad = token_id(self.tokenizer, PADS["video"])
        pads = [pad] * (math.prod(pixels.grid) // settings.merge_size**2)
        ids = chat_ids(self.tokenizer, pads, self.instruction, prompt)
        ids_1L = torch.tensor([ids])
        inputs = {
            "input_ids": ids_1L,
            "attention_mask": torch.ones_like(ids_1L),
            "mm_token_type_ids": (ids_1L == pad).int() * 2,
            "pixel_values_videos": pixels.patches.to(self.model.dtype),
            "video_grid_thw": torch.tensor([pixels.grid]),
        }
        # The temporal positions of Qwen2.5-VL are times.
        if self.model.config.model_type == "qwen2_5_vl":
            duration = len(frames_TYXC) / fps
            seconds = settings.temporal_patch_size * duration / len(seen)
            inputs["second_per_grid_ts"] = torch.tensor([seconds])
        return {name: value.to(self.model.device) for name, value in inputs.items()}

    @torch.no_grad()
    def judge(
        self,
        frames_TYXC: Tensor,
        prompt: str,
        *,
        fps: float,
    ) -> ParsedAnswer:
        """Generate the answer for a video greedily, and read its scores."""
        # Greedy, so that a video always gets the same answer.
        inputs = self.inputs(frames_TYXC, prompt, fps=fps)
        out = self.model.generate(
            **inputs,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=self.expected,
        )
        # Keep the new tokens only.
        ids = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        logits = out.logits if self.expected else []
        if not self._is_finished(ids):
            return self._unfinished(ids)
        return self.parse(ids, [step_1V[0].float().cpu() for step_1V in logits])

    def _is_finished(self, ids: list[int]) -> bool:
        """True if an answer ended by itself, and not in the middle of a thought."""
        ends = self.model.generation_config.eos_token_id
        if ends is None:
            ends = self.tokenizer.eos_token_id
        ended = bool(ids) and ids[-1] in (ends if isinstance(ends, list) else [ends])
        answer = self.tokenizer.decode(ids, skip_special_tokens=True)
        thinking = answer.rfind(THOUGHT_STARTS) > answer.rfind(THOUGHT_ENDS)
        return (ended or len(ids) < self.max_new_tokens) and not thinking

    def _unfinished(self, ids: list[int]) -> ParsedAnswer:
        """An answer whose numbers may be provisional: every score is NaN."""
        answer = self.tokenizer.decode(ids, skip_special_tokens=True)
        scores = dict.fromkeys(self.form.labels, math.nan)
        problem = (
            f"the answer is unfinished after {len(ids)} tokens "
            f"(options.max_new_tokens={self.max_new_tokens})"
        )
        return ParsedAnswer(answer, scores, math.nan, problem)

    def parse(self, ids: list[int], logits: list[Tensor]) -> ParsedAnswer:
        """Read the scores of an answer. ``logits`` (V,) of each token are for ``expected``."""
        # Read each field of the answer's form.
        answer = self.tokenizer.decode(ids, skip_special_tokens=True)
        scores = {}
        for name, label in self.form.labels.items():
            score = math.nan
            match = label.find(answer)
            # A missing or impossible number is NaN, never a made-up score.
            if match is not None:
                score = float(match[1])
                if self.expected:
                    token = self._token_at(ids, match.start(1))
                    score = self._expected_digit(label, logits[token])
            scores[name] = score if label.low <= score <= label.high else math.nan
        # The reward is NaN if a score that it needs is.
        if self.form.value is None:
            value = sum(scores.values()) / len(scores)
        else:
            value = scores[self.form.value]
        problem = ""
        if math.isnan(value):
            unread = [name for name, score in scores.items() if math.isnan(score)]
            problem = (
                f"the answer holds no score within its limits: {', '.join(unread)}"
            )
        return ParsedAnswer(answer, scores, value, problem)

    def _expected_digit(self, label: ScoreField, logits_V: Tensor) -> float:
        """Return sum_d d p(d), the probabilities normalised over the digits that are allowed."""
        # Only the digits between the limits can be meant.
        digits = range(math.ceil(label.low), math.floor(label.high) + 1)
        ids = [
            self.tokenizer.encode(str(digit), add_special_tokens=False)[-1]
            for digit in digits
        ]
        probabilities = logits_V.double()[ids].softmax(dim=0)
        return float(probabilities @ torch.tensor(list(digits), dtype=torch.float64))

    def _token_at(self, ids: list[int], character: int) -> int:
        """Return the place of the token that holds a character of the answer."""

        def decoded_length(count: int) -> int:
            return len(self.tokenizer.decode(ids[:count], skip_special_tokens=True))

        # Binary search: the decoded length grows with the number of tokens.
        counts = range(len(ids) + 1)
        return bisect.bisect_right(counts, character, key=decoded_length) - 1
