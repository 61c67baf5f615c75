"""The judge's chat: template, tokenising by position, and the parser of its answer. No torch.

One layout for training, generation and scoring (so that the three never differ)::

    <|im_start|>user NEWLINE {before, with the prompt filled in} {video} {after} <|im_end|> NEWLINE
    <|im_start|>assistant NEWLINE {cot} <Reward>

    video = one "<{t:.1f} seconds><|vision_start|><|video_pad|>*n<|vision_end|>" per temporal patch,
            t the mean time of its frames, n = h * w / merge_size^2

The masked variant has no ``cot``. `<Reward>` is an id, not a string: no text can spell it (see `rm.model`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DIMENSIONS = ("subject", "dynamics", "camera", "environment", "style")
PROMPT_SLOT = "{prompt}"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, VIDEO_PAD, VISION_END = (
    "<|vision_start|>",
    "<|video_pad|>",
    "<|vision_end|>",
)
CONTROL_TOKENS = (
    IM_START,
    IM_END,
    VISION_START,
    VISION_END,
    VIDEO_PAD,
    "<|image_pad|>",
    "<|endoftext|>",
)


@dataclass(frozen=True)
class PromptTemplate:
    """The instruction: the video stands between ``before`` (which holds one ``{prompt}`` slot) and ``after``.

    Saved with the checkpoint as ``prompt.json``. Other braces are ordinary text.
    """

    before: str
    after: str

    def __post_init__(self) -> None:
        found = self.before.count(PROMPT_SLOT)
        if found != 1:
            raise ValueError(
                f"PromptTemplate.before must contain {PROMPT_SLOT} exactly once, found {found}"
            )
        if PROMPT_SLOT in self.after:
            raise ValueError(
                f"PromptTemplate.after must not contain {PROMPT_SLOT}: the slot belongs in `before`"
            )

    def fill(self, prompt: str) -> str:
        """``before`` with the prompt in its slot; a ``{prompt}`` inside the prompt stays as it is."""
        left, right = self.before.split(PROMPT_SLOT)
        return left + prompt + right

    def save(self, path: str | Path) -> None:
        Path(path).write_text(
            json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n",
            encoding="utf-8",
        )

    @classmethod
    def load(cls, path: str | Path) -> PromptTemplate:
        """ValueError, naming the file, if a key is missing or unknown."""
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(raw, dict) or set(raw) != {"before", "after"}:
            raise ValueError(
                f"{path}: a prompt template has the keys 'before' and 'after', got {raw!r:.80}"
            )
        return cls(**raw)


@dataclass(frozen=True)
class Encoded:
    """Token ids of one sequence, its parts known by position.

    prompt_ids  everything up to and including "<|im_start|>assistant\\n"
    cot_ids     the chain of thought without end-of-turn token; empty in the masked variant
    The reward reads ``prompt_ids + cot_ids + (query_id,)``; the language model learns ``... + (eos_id,)``.
    """

    prompt_ids: tuple[int, ...]
    cot_ids: tuple[int, ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        return self.prompt_ids + self.cot_ids


def encode(
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate,
    prompt: str,
    video_grid: Sequence[int],
    times: Sequence[float],
    cot: str | None = None,
    *,
    merge_size: int = 2,
) -> Encoded:
    """Ids of one judged video.

    video_grid  (t, h, w) in patches; ``times`` has t entries, in seconds
    cot         None or "" for the masked variant; a trailing end-of-turn string is dropped

    The text between two control tokens is tokenised as one piece, so a harmless prompt gives exactly the ids of the
    rendered string, while control tokens are placed by id: whatever the prompt says, it cannot spell one.
    """
    frames, height, width = video_grid
    if len(times) != frames:
        raise ValueError(f"encode: {len(times)} times for {frames} temporal patches")
    pads = [token_id(tokenizer, VIDEO_PAD)] * (height * width // merge_size**2)
    vision_start, vision_end = (
        token_id(tokenizer, VISION_START),
        token_id(tokenizer, VISION_END),
    )
    im_start, im_end = token_id(tokenizer, IM_START), token_id(tokenizer, IM_END)

    ids = [im_start]
    text = "user\n" + template.fill(prompt)
    for time in times:
        ids += encode_text(tokenizer, f"{text}<{time:.1f} seconds>")
        ids += [vision_start, *pads, vision_end]
        text = ""
    ids += encode_text(tokenizer, template.after)
    ids += [
        im_end,
        *encode_text(tokenizer, "\n"),
        im_start,
        *encode_text(tokenizer, "assistant\n"),
    ]
    return Encoded(tuple(ids), tuple(encode_cot(tokenizer, cot)))


def encode_cot(tokenizer: PreTrainedTokenizerBase, cot: str | None) -> list[int]:
    """Ids of a chain of thought, without its end-of-turn token."""
    return encode_text(tokenizer, cot.rstrip().removesuffix(IM_END)) if cot else []


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of ordinary text: a special token spelled in it is cut after its first character, so it stays text."""
    if not text:
        return []
    special = {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special
    }
    names = sorted({*special, *CONTROL_TOKENS}, key=len, reverse=True)
    pattern = re.compile("|".join(re.escape(name) for name in names if len(name) > 1))
    ids: list[int] = []
    while (match := pattern.search(text)) is not None:
        cut = match.start() + 1
        ids += tokenizer.encode(text[:cut], add_special_tokens=False)
        text = text[cut:]
    return ids + tokenizer.encode(text, add_special_tokens=False)


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Id of a control token; ValueError if the tokenizer does not know it as one token."""
    found = tokenizer.get_added_vocab().get(token)
    if found is None:
        found = tokenizer.get_vocab().get(token)
    if found is None:
        raise ValueError(
            f"the tokenizer has no token {token!r}; DeScore needs the Qwen3-VL chat and vision tokens"
        )
    return found


@dataclass(frozen=True)
class Answer:
    """What the judge wrote in its ``<answer>`` block.

    scores   2, 1, 0, or None for N/A; a dimension that is missing or has any other value is absent
    overall  the written overall score, not the reward; None if missing or not a finite number
    """

    scores: Mapping[str, int | None]
    overall: float | None


def parse_answer(text: str) -> Answer | None:
    """Parse the last complete ``<answer>`` block; None if there is none or it is not JSON with ``dimensional_scores``.

    "2" and 2 are the same score; the JSON may stand in a code fence. Never raises, whatever the text.
    """
    raw = _answer_json(text)
    if raw is None or not isinstance(raw.get("dimensional_scores"), dict):
        return None
    return Answer(_scores(raw["dimensional_scores"]), _number(raw.get("overall_score")))


def parse_scores(
    text: str,
) -> tuple[Mapping[str, int | None], Mapping[str, int | None]] | None:
    """What is right for both videos of a pair: ``video_1_scores`` and ``video_2_scores`` of the answer block.

    None if there is no such block or one of the two has no usable dimension. Never raises, whatever the text.
    """
    raw = _answer_json(text)
    if raw is None:
        return None
    both = [raw.get(key) for key in ("video_1_scores", "video_2_scores")]
    first, second = (
        _scores(value) if isinstance(value, dict) else {} for value in both
    )
    return (first, second) if first and second else None


def parse_preference(text: str) -> int | None:
    """``gsb_result`` of the answer block: 1 for "Video 1 is better" or "A", -1 for the other, 0 for any other word.

    None if there is no such block or no word in it. Never raises, whatever the text.
    """
    word = (_answer_json(text) or {}).get("gsb_result")
    if not isinstance(word, str) or not word.strip():
        return None
    return {"Video 1 is better": 1, "A": 1, "Video 2 is better": -1, "B": -1}.get(
        word.strip(), 0
    )


def _answer_json(text: str) -> dict[str, object] | None:
    """The JSON object in the last complete ``<answer>`` block, which may stand in a code fence."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start < 0:
        return None
    body = text[start + len("<answer>") : end].strip()
    if body.startswith("```"):
        body = body.removeprefix("```").removeprefix("json").removesuffix("```")
    try:
        raw = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return raw if isinstance(raw, dict) else None


def _scores(raw: Mapping[str, object]) -> dict[str, int | None]:
    """Our dimensions only: 2, 1, 0 however written, None for N/A; anything else is left out."""
    scores: dict[str, int | None] = {}
    for name in DIMENSIONS:
        value = raw.get(name, "")
        if value is None or (
            isinstance(value, str) and value.strip().upper() in ("N/A", "NA")
        ):
            scores[name] = None
        elif (number := _number(value)) in (0.0, 1.0, 2.0):
            scores[name] = int(number)
    return scores


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


DEFAULT_TEMPLATE = PromptTemplate(
    before="""You are a professional judge of how well a video follows the text it was generated from. \
You judge alignment with the text only, not beauty.

Text prompt: {prompt}

Video:
""",
    after="""

Work in two steps.

Step 1. Think aloud, in three stages.
(1) Read the prompt: list every element it asks for, and say for each abstract word what would be visible on screen.
(2) Look at the video: describe objectively what is there - the subject, its exact actions, the camera, the \
surroundings, the look - and any artefact or misspelled text.
(3) Compare the two along five dimensions.
  Primary:
  - subject: identity, number, attributes and relations of what the prompt is about
  - dynamics: actions, motion and their order
  Secondary:
  - camera: shot, viewpoint and camera movement
  - environment: place, background, light and weather
  - style: artistic style, colours and mood
  Score each one "2" (fully met), "1" (partly met), "0" (missed), or "N/A" if the prompt asks nothing of it.

Then choose an overall score from 1.00 to 5.00:
  5.00        both primary dimensions are 2 and every secondary one is 2 or N/A
  4.00-4.99   both primary dimensions are 2, flaws in secondary dimensions only
  3.00-3.99   one primary dimension is 1, or the secondary flaws are plain to see
  2.00-2.99   one primary dimension is 0
  1.00-1.99   both primary dimensions are 0

Step 2. Give the result, and no reasoning, in exactly this form:
<answer>
```json
{"dimensional_scores": {"subject": "2", "dynamics": "1", "camera": "N/A", "environment": "2", "style": "2"}, \
"overall_score": "3.50"}
```
</answer>""",
)
