"""What the tiny Qwen3-VL is taught: videos, prompts, and the texts to write about them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from toy.annotator import RIGHT, annotate, overall_score
from toy.measure import compare, observe
from toy.world import (
    SUB_DIMENSIONS,
    Attributes,
    caption,
    mix_attributes,
    random_attributes,
    random_scenes,
    redrawn,
    render,
)

UNCLEAR = "unclear"
# Probability with which an attribute of a prompt is that of its video.
AGREE = 0.35
# Number of annotated examples.
ANNOTATED = 2000
ASPECTS = {
    "subject": ("color", "shape"),
    "dynamics": ("motion",),
    "camera": ("camera",),
    "environment": ("background",),
    "style": ("style",),
}
PIECES = [
    '<answer>{"dimensional_scores": {"subject": "',
    *(f'", "{name}": "' for name in SUB_DIMENSIONS[1:]),
    '"}, "overall_score": "',
    '"}</answer>',
]


@dataclass(frozen=True)
class Teaching:
    """What a base model learns to write; the defaults are those of the shipped one.

    described  Sub-dimensions that get a line of the description.
    right      Share of the annotated scores that are right.
    shuffled   Give every annotated example the scores of another one: a control, from which
               nothing can be learned about what a score means.
    """

    described: tuple[str, ...] = SUB_DIMENSIONS
    right: float = RIGHT
    shuffled: bool = False


def description(
    wish: Attributes, seen: Attributes, described: Sequence[str] = SUB_DIMENSIONS
) -> str:
    """Write the wanted and the seen attributes line by line."""
    text = ""
    for dimension in described:
        names = ASPECTS[dimension]
        wanted = " ".join(word_of(wish, name) for name in names)
        shown = " ".join(word_of(seen, name) for name in names)
        text += f"{dimension} asked {wanted} seen {shown}\n"
    return text


def answer_text(scores: Mapping[str, int]) -> str:
    """Write the answer block of five scores and the overall score that follows from them."""
    # In pieces that are a token each.
    digits = [str(scores[name]) for name in SUB_DIMENSIONS]
    text = ""
    overall = f"{overall_score(scores):.2f}"
    for piece, value in zip(PIECES, [*digits, overall, ""], strict=True):
        text += piece + value
    return text


def word_of(attributes: Attributes, name: str) -> str:
    return getattr(attributes, name) or UNCLEAR


def degrade(video_BTYXC: Tensor, rng: random.Random) -> Tensor:
    """Spoil a third of the videos as generators do: blur, noise, a still, no colour, a ghost."""
    out = video_BTYXC.clone()
    for i in range(len(out)):
        kind = rng.random()
        if kind < 0.20:
            out[i] = _blur_and_noise(out[i], rng)
        elif kind < 0.23:
            # A still: every frame is the same.
            out[i] = out[i, rng.randrange(out.shape[1])]
        elif kind < 0.26:
            grey = out[i].float().mean(-1, keepdim=True)
            out[i] = grey.round()
        elif kind < 0.30:
            # A ghost: two videos laid over each other.
            other = out[rng.randrange(len(out))]
            mixed = out[i].float() * 0.5 + other.float() * 0.5
            out[i] = mixed.round()
    return out


def _blur_and_noise(video_TYXC: Tensor, rng: random.Random) -> Tensor:
    frames = video_TYXC.float().permute(0, 3, 1, 2)
    if rng.random() < 0.6:
        frames = F.avg_pool2d(frames, 3, 1, 1, count_include_pad=False)
    frames = frames + rng.uniform(0, 14) * torch.randn(frames.shape)
    return frames.round().clamp(0, 255).permute(0, 2, 3, 1)


def agreeing(
    attributes: Attributes, rng: random.Random, probability: float
) -> Attributes:
    """Keep each attribute with a probability and draw it anew otherwise.

    The result is no held-out combination.
    """

    def draw(rng: random.Random) -> Attributes:
        other = random_attributes(rng)
        return mix_attributes(other, attributes, rng, share=probability)

    return redrawn(draw, rng)


def examples(
    count: int, rng: random.Random, *, clean: bool
) -> tuple[Tensor, list[Attributes]]:
    """Render videos and draw prompts that agree with them in about half of the attributes."""
    scenes = random_scenes(count, rng)
    wishes = [agreeing(scene.attributes, rng, AGREE) for scene in scenes]
    video = render(scenes)
    if not clean:
        video = degrade(video, rng)
    return video, wishes


@dataclass(frozen=True)
class Lesson:
    """Videos with prompts and the texts to write; ``ends`` says which texts are whole."""

    videos: Tensor
    prompts: list[str]
    texts: list[str]
    ends: list[bool]

    def take(self, rows: Sequence[int]) -> Lesson:
        """Some of the videos with their texts."""
        return Lesson(
            self.videos[list(rows)],
            [self.prompts[row] for row in rows],
            [self.texts[row] for row in rows],
            [self.ends[row] for row in rows],
        )

    def __add__(self, other: Lesson) -> Lesson:
        return Lesson(
            torch.cat([self.videos, other.videos]),
            self.prompts + other.prompts,
            self.texts + other.texts,
            self.ends + other.ends,
        )


def describing(
    videos: Tensor,
    wishes: Sequence[Attributes],
    rng: random.Random,
    described: Sequence[str] = SUB_DIMENSIONS,
) -> Lesson:
    """Descriptions of videos. What comes after them is left open."""
    prompts = [caption(wish, wording=rng.randrange(4)) for wish in wishes]
    texts = []
    for video, wish in zip(videos, wishes, strict=True):
        shown = observe(video).attributes
        texts.append(description(wish, shown, described))
    return Lesson(videos, prompts, texts, [False] * len(texts))


def annotated_examples(
    wan_videos: Tensor, wan_wishes: Sequence[Attributes], teaching: Teaching
) -> Lesson:
    """`ANNOTATED` examples, half renders and half videos of the tiny Wan; always the same."""
    rng = random.Random("annotated")
    # The noise of `degrade` comes from torch, as in a training step.
    torch.manual_seed(0)
    rendered, wishes = examples(ANNOTATED // 2, rng, clean=False)
    videos = torch.cat([rendered, wan_videos[: ANNOTATED // 2]])
    wishes += [agreeing(wish, rng, 0.7) for wish in wan_wishes[: ANNOTATED // 2]]

    # The annotator's scores.
    scores = []
    for video, wish in zip(videos, wishes, strict=True):
        right = compare(wish, observe(video).attributes).scores
        scores.append(annotate(right, rng, teaching.right))
    if teaching.shuffled:
        rng.shuffle(scores)
    lesson = describing(videos, wishes, rng, teaching.described)
    texts = [a + answer_text(b) for a, b in zip(lesson.texts, scores, strict=True)]
    return Lesson(videos, lesson.prompts, texts, [True] * len(texts))
