"""The chat that the reward model reads, and the parsers of its answers. No torch here.

Training, generation and scoring share this layout::

    <|im_start|>user NEWLINE {before, with the prompt} {video} {after} <|im_end|> NEWLINE
    <|im_start|>assistant NEWLINE {cot} <Reward>

    video = "<{t:.1f} seconds><|vision_start|><|video_pad|>*n<|vision_end|>" for each temporal
            patch, t the mean time of its frames, n = h * w / merge_size^2

The masked variant has no ``cot``. `<Reward>` is an id without a string (see `rm.model`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.files import check_text, write_json
from common.schema import config, read_section

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The sub-dimensions that a chain of thought (CoT) scores.
DIMENSIONS = ("subject", "dynamics", "camera", "environment", "style")
PROMPT_SLOT = "{prompt}"

# Tokens of Qwen3-VL's chat. They are placed by id, never by text.
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
VISION_START = "<|vision_start|>"
VIDEO_PAD = "<|video_pad|>"
VISION_END = "<|vision_end|>"
CONTROL_TOKENS = (
    IM_START,
    IM_END,
    VISION_START,
    VISION_END,
    VIDEO_PAD,
    "<|image_pad|>",
    "<|endoftext|>",
)


@config
class PromptTemplate:
    """The instruction, saved with the checkpoint as ``prompt.json``.

    The video stands between ``before``, which holds a ``{prompt}`` slot, and ``after``. Other
    braces are ordinary text.
    """

    before: str
    after: str

    def __post_init__(self) -> None:
        if self.before.count(PROMPT_SLOT) != 1 or PROMPT_SLOT in self.after:
            raise ValueError(
                f"PromptTemplate.before must contain {PROMPT_SLOT} exactly once, "
                "PromptTemplate.after must not contain it"
            )
        check_text(self.before, "'before'")
        check_text(self.after, "'after'")

    def fill(self, prompt: str) -> str:
        """Put a prompt into the slot of ``before``; braces in the prompt stay as they are."""
        left, right = self.before.split(PROMPT_SLOT)
        return left + prompt + right

    def save(self, path: str | Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> PromptTemplate:
        """Read a prompt.json. Raises ValueError, with the file, for other keys."""
        return read_section(cls, path)


@dataclass(frozen=True)
class Encoded:
    """Token ids of a sequence, with its parts known by position.

    prompt_ids  Everything up to and including "<|im_start|>assistant\\n".
    cot_ids     The CoT without end-of-turn token; empty in the masked variant.
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
    """Tokenise the chat about a video.

    video_grid  (t, h, w) in patches; ``times`` has t entries, in seconds.
    cot         None or "" for the masked variant; a trailing end-of-turn string is dropped.

    The text between two control tokens is tokenised in one piece, so an ordinary prompt gives
    the ids of the rendered string. Control tokens are placed by id, so no prompt can spell them.
    """
    frames, height, width = video_grid
    if len(times) != frames:
        raise ValueError(f"encode: {len(times)} times for {frames} temporal patches")

    # Ids of the control tokens.
    video_pad = token_id(tokenizer, VIDEO_PAD)
    im_start = token_id(tokenizer, IM_START)
    im_end = token_id(tokenizer, IM_END)
    vision_start = token_id(tokenizer, VISION_START)
    vision_end = token_id(tokenizer, VISION_END)
    pads = [video_pad] * (height * width // merge_size**2)

    # The user's turn: the text before the video joins the first time stamp.
    ids = [im_start]
    text = "user\n" + template.fill(prompt)
    for time in times:
        ids += encode_text(tokenizer, f"{text}<{time:.1f} seconds>")
        ids += [vision_start, *pads, vision_end]
        text = ""
    ids += encode_text(tokenizer, template.after)
    ids.append(im_end)

    # The start of the model's turn.
    ids += encode_text(tokenizer, "\n")
    ids.append(im_start)
    ids += encode_text(tokenizer, "assistant\n")
    return Encoded(tuple(ids), tuple(encode_cot(tokenizer, cot)))


def encode_cot(tokenizer: PreTrainedTokenizerBase, cot: str | None) -> list[int]:
    """Tokenise a CoT, without its end-of-turn token."""
    if not cot:
        return []
    return encode_text(tokenizer, cot.rstrip().removesuffix(IM_END))


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenise ordinary text.

    A special token that is spelled in it is cut after its first character, so it stays text.
    """
    # Strings that the tokenizer would turn into special tokens.
    names = set(CONTROL_TOKENS)
    for token in tokenizer.added_tokens_decoder.values():
        if token.special:
            names.add(token.content)

    # Cut between the first character and the rest of each, wherever they meet.
    places = []
    for name in names:
        if len(name) > 1:
            first = re.escape(name[0])
            rest = re.escape(name[1:])
            places.append(f"(?<={first})(?={rest})")
    ids: list[int] = []
    for piece in re.split("|".join(places), text):
        ids += tokenizer.encode(piece, add_special_tokens=False)
    return ids


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Look up a control token. Raises ValueError if the tokenizer does not have it."""
    number = tokenizer.get_added_vocab().get(token)
    if number is None:
        number = tokenizer.get_vocab().get(token)
    if number is None:
        raise ValueError(
            f"the tokenizer has no token {token!r}: "
            "DeScore needs the Qwen3-VL chat and vision tokens"
        )
    return number


@dataclass(frozen=True)
class Answer:
    """The ``<answer>`` block of a CoT.

    scores   2, 1, 0, or None for N/A; a dimension with another value is left out.
    overall  The stated overall score, not the reward; None if it is not a finite number.
    """

    scores: Mapping[str, int | None]
    overall: float | None


def parse_answer(text: str) -> Answer | None:
    """Parse the last complete ``<answer>`` block of any text.

    Returns None without a block of JSON that has ``dimensional_scores``. "2" and 2 are the same
    score; the JSON may stand in a code fence.
    """
    raw = _answer_json(text)
    if not isinstance(raw.get("dimensional_scores"), dict):
        return None
    return Answer(_scores(raw["dimensional_scores"]), _number(raw.get("overall_score")))


def parse_scores(
    text: str,
) -> tuple[Mapping[str, int | None], Mapping[str, int | None]] | None:
    """Parse the ground-truth scores of both videos of a pair from any text.

    They are ``video_1_scores`` and ``video_2_scores`` of the answer block; keys may be in upper
    case. Returns None without such a block, or if either has no usable dimension.
    """
    raw = _lower_keys(_answer_json(text))
    first = _scores(_lower_keys(raw.get("video_1_scores")))
    second = _scores(_lower_keys(raw.get("video_2_scores")))
    if not first or not second:
        return None
    return first, second


def preference_word(text: str) -> str:
    """Find ``gsb_result`` in the answer block of any text, "" without one; see `rm.labels`."""
    word = _lower_keys(_answer_json(text)).get("gsb_result")
    return word if isinstance(word, str) else ""


def _lower_keys(raw: object) -> dict[str, object]:
    """A table's answer with its keys in lower case: people write "Subject" too."""
    if not isinstance(raw, dict):
        return {}
    lower = {key.strip().lower(): value for key, value in raw.items()}
    # a key in the right spelling wins
    return lower | {key: raw[key] for key in raw if key in lower}


def _answer_json(text: str) -> dict[str, object]:
    """The JSON object in the last complete ``<answer>`` block, empty if there is none.

    An object that says a key twice contradicts itself and is none.
    """
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start < 0:
        return {}
    body = text[start + len("<answer>") : end].strip()
    if body.startswith("```"):
        body = body.removeprefix("```").removeprefix("json").removesuffix("```")
    try:
        raw = json.loads(body, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError):
        return {}
    return raw if isinstance(raw, dict) else {}


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Build a JSON object. Raises ValueError for a key that stands twice."""
    read = dict(pairs)
    if len(read) < len(pairs):
        raise ValueError("a key stands twice")
    return read


def _scores(raw: object) -> dict[str, int | None]:
    """Scores of our dimensions: 2, 1, 0 or None for N/A; other values are left out."""
    scores: dict[str, int | None] = {}
    if not isinstance(raw, dict):
        return scores
    for name in DIMENSIONS:
        value = raw.get(name, "")
        if isinstance(value, str) and value.strip().upper() in ("N/A", "NA"):
            value = None
        number = _number(value)
        if value is None:
            scores[name] = None
        elif number in (0.0, 1.0, 2.0):
            scores[name] = int(number)
    return scores


def _number(value: object) -> float | None:
    """A finite number, from a number or its text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


DEFAULT_TEMPLATE = PromptTemplate(
    before="""You are a professional judge of how well a video follows the text it was generated \
from. You judge alignment with the text only, not beauty.

Text prompt: {prompt}

Video:
""",
    after="""

Work in two steps.

Step 1. Think aloud, in three stages.
(1) Read the prompt: list every element it asks for, and say for each abstract word what would \
be visible on screen.
(2) Look at the video: describe objectively what is there - the subject, its exact actions, the \
camera, the surroundings, the look - and any artefact or misspelled text.
(3) Compare the two along five dimensions.
  Primary:
  - subject: identity, number, attributes and relations of what the prompt is about
  - dynamics: actions, motion and their order
  Secondary:
  - camera: shot, viewpoint and camera movement
  - environment: place, background, light and weather
  - style: artistic style, colours and mood
  Score each one "2" (fully met), "1" (partly met), "0" (missed), or "N/A" if the prompt asks \
nothing of it.

Then choose an overall score from 1.00 to 5.00:
  5.00        both primary dimensions are 2 and every secondary one is 2 or N/A
  4.00-4.99   both primary dimensions are 2, flaws in secondary dimensions only
  3.00-3.99   one primary dimension is 1, or the secondary flaws are plain to see
  2.00-2.99   one primary dimension is 0
  1.00-1.99   both primary dimensions are 0

Step 2. Give the result, and no reasoning, in exactly this form:
<answer>
```json
{"dimensional_scores": {"subject": "2", "dynamics": "1", "camera": "N/A", "environment": "2", \
"style": "2"}, "overall_score": "3.50"}
```
</answer>""",
)
