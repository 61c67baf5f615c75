"""Train the tiny Qwen3-VL to describe the shapes world, and to answer as annotated examples do.

It learns to describe: what a prompt asks for and what a video shows, line by line, from renders
and from videos of the tiny Wan. The form of the answer, five scores and an overall one, it learns
from `ANNOTATED` examples whose scores are wrong in a fifth of the cases (`toy.annotator`). It
never sees a preference, the people's utility, the oracle's total or a held-out combination, and
its renders have other sizes than those of every test.

Prompt and video are drawn apart (each attribute agrees by chance or with probability `AGREE`),
because a model whose prompts always match copies the prompt and never looks at the video.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from rm.model import DeScore
from rm.prompt import CONTROL_TOKENS, IM_END, PromptTemplate, parse_answer
from rm.video import PreparedVideo, VideoSettings, prepare
from toy.lessons import (
    ANNOTATED,
    ASPECTS,
    PIECES,
    UNCLEAR,
    Lesson,
    Teaching,
    agreeing,
    annotated_examples,
    answer_text,
    describing,
    description,
    examples,
    word_of,
)
from toy.make_pairs import load_generator, spoilt, write_cots
from toy.measure import compare, observe
from toy.tokenizer import train_tokenizer
from toy.training import Fit, cached, fit
from toy.world import (
    SUB_DIMENSIONS,
    VALUES,
    Attributes,
    caption,
    captions,
    random_scenes,
    render,
    split_attributes,
    training_attributes,
)

TEMPLATE = PromptTemplate(before="prompt: {prompt}\nvideo:", after="\njudge:")
SETTINGS = VideoSettings(
    fps=8.0,
    min_frames=4,
    max_frames=8,
    min_pixels=256,
    max_pixels=1024,
    patch_size=4,
)
# Weight of the tokens that name what is seen and of the answer: a small part of the text, and
# nearly all its information.
SEEN_WEIGHT = 3.0

# The first stage trains the vision tower.
EYE_BATCH = 48
EYE_STEPS = 1000
EYE_PEAK = 2e-3
# Then it describes (name, steps, peak rate, share of videos of the tiny Wan): renders, later half
# and half.
BATCH = 32
PHASES = (("qwen", 1200, 2e-3, 0.0), ("qwen_wan", 1400, 1e-3, 0.5))
# At last it answers: half of every batch are annotated examples, and the rest go on describing.
ANSWER_STEPS = 600
ANSWER_PEAK = 6e-4
WAN_VIDEOS = 4000
WAN_HELDOUT = 512
# Videos of the tiny Wan that are sampled together, with one guidance scale.
CHUNK = 40


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer on the training captions, a chain of thought of each, fixed text."""
    rng = random.Random("qwen tokenizer")
    train, _ = split_attributes()
    cots = []
    for attributes in train:
        shown = training_attributes(rng)
        answer = answer_text(compare(attributes, shown).scores)
        cots.append(description(attributes, shown) + answer)

    # The fixed text is repeated so that its words become tokens.
    names = " ".join(SUB_DIMENSIONS)
    template = f"{TEMPLATE.before}{TEMPLATE.after}"
    fixed = f"{template}user\nassistant\n 1.5 seconds> {UNCLEAR} {names}"
    texts = captions(train) + cots + [fixed] * 400
    return train_tokenizer(
        texts,
        size=490,
        special=CONTROL_TOKENS,
        words=PIECES,
        pad="<|endoftext|>",
        eos=IM_END,
        end_with_eos=False,
    )


def new_model() -> DeScore:
    """Build 1.3 million random parameters in the stock classes.

    The vocabulary has 512 rows, of which the last ones are free.
    """
    # Tokens that the configs name.
    tokenizer = build_tokenizer()
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in CONTROL_TOKENS}
    vision_config = {
        "depth": 3,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_heads": 4,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 128,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [1],
    }
    text_config = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
        "pad_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids[IM_END],
        "tie_word_embeddings": True,
    }
    config = Qwen3VLConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )

    # Half of the patch filters (out, RGB, 2, 4, 4) start as differences of a patch's two frames.
    # The camera moves stripes of low contrast by a pixel or two; without this start the
    # brightness of the room hides them.
    torch.manual_seed(0)
    backbone = Qwen3VLForConditionalGeneration(config)
    filters = backbone.model.visual.patch_embed.proj.weight.data
    filters[::2, :, 1] = -filters[::2, :, 0]
    filters[::2] *= 4.0
    query_id = max(tokenizer.get_vocab().values()) + 1
    return DeScore(backbone, tokenizer, TEMPLATE, SETTINGS, query_id)


@lru_cache(maxsize=1)
def generated(wan: Path, cache: Path) -> tuple[Tensor, list[Attributes]]:
    """Sample `WAN_VIDEOS` videos of the tiny Wan and return them with their prompts' attributes.

    Guidance goes from weak to strong, and every sixth video has spoilt latents. Prompts are of
    training combinations only. The videos are sampled once and read from ``cache`` afterwards.
    """
    rng = random.Random("wan videos")
    train, _ = split_attributes()
    wishes = [rng.choice(train) for _ in range(WAN_VIDEOS)]

    def sample() -> Tensor:
        chunks = []
        starts = range(0, WAN_VIDEOS, CHUNK)
        for number, start in enumerate(tqdm(starts, desc="sampling", mininterval=5)):
            guidance = (1.0, 1.5, 3.0)[number % 3]
            generator = load_generator(
                f"generator.path={wan}",
                f"generator.sampler.guidance_scale={guidance}",
            )

            # Prompts and seeds of this chunk.
            part = wishes[start : start + CHUNK]
            prompts = [caption(wish, wording=rng.randrange(4)) for wish in part]
            seeds = [rng.getrandbits(62) for _ in prompts]
            clean = generator.sample(prompts, seeds=seeds)

            # Every sixth video is spoilt.
            for row in range(0, len(clean), 6):
                clean[row] = spoilt(clean[row], rng)
            chunks.append(generator.decode(clean))
        return torch.cat(chunks)

    return cached(cache, "video", sample), wishes


def text_loss(model: DeScore, lesson: Lesson) -> Tensor:
    """Cross entropy of the texts, and of the end token where a text is whole.

    Weighted MEAN over the tokens of all videos.
    """
    prepared = _prepare(lesson.videos)
    encoded = []
    targets = []
    weights = []
    counts = []
    columns = zip(lesson.prompts, prepared, lesson.texts, lesson.ends, strict=True)
    for prompt, inputs, text, is_whole in columns:
        item = model.encode(prompt, inputs, text)
        encoded.append(item)
        ids = list(item.cot_ids)
        if is_whole:
            ids.append(model.tokenizer.eos_token_id)
        targets += ids
        weights += _token_weights(model, ids)
        counts.append(len(ids))

    # Position i predicts token i + 1.
    hidden_BLD = model.hidden(model.batch(encoded, prepared, query=False))
    rows = []
    for i, (item, count) in enumerate(zip(encoded, counts, strict=True)):
        first = len(item.prompt_ids) - 1
        rows.append(hidden_BLD[i, first : first + count])
    logits = model.backbone.lm_head(torch.cat(rows))
    loss = F.cross_entropy(logits, torch.tensor(targets), reduction="none")
    weight = torch.tensor(weights)
    return (loss * weight).sum() / weight.sum()


def _prepare(videos: Tensor) -> list[PreparedVideo]:
    return [prepare(video, SETTINGS, fps=8.0) for video in videos]


def _token_weights(model: DeScore, ids: Sequence[int]) -> list[float]:
    """Weight the tokens from " seen" to the end of its line, and the answer, by `SEEN_WEIGHT`."""
    newline = model.tokenizer.encode("\n")[0]
    seen = model.tokenizer.encode(" seen")[0]
    answer = model.tokenizer.encode(PIECES[0])[0]
    weights = []
    inside = False
    for token in ids:
        inside = inside and token != newline
        weights.append(SEEN_WEIGHT if inside else 1.0)
        inside = inside or token in (seen, answer)
    return weights


class Eye(nn.Module):
    """The vision tower with small classifiers on its output tokens.

    It learns to see before it learns to write. Without this stage the words come first, and the
    language model settles on guessing what is hard to see (direction, camera). ``accuracy`` is
    that of the last batch by attribute, at the last of the two depths.
    """

    def __init__(self, model: DeScore) -> None:
        super().__init__()
        self.tower = model.backbone.model.visual
        self.accuracy: dict[str, float] = {}
        classes = sum(len(values) for values in VALUES.values())
        # 32 merged tokens a video, at each of the two depths that the language model reads.
        width = 32 * 128
        heads = []
        for _ in range(2):
            layers = (
                nn.Linear(width, 128),
                nn.GELU(),
                nn.Linear(128, classes),
            )
            heads.append(nn.Sequential(*layers))
        self.heads = nn.ModuleList(heads)

    def loss(self, videos: Tensor, truths: Sequence[Attributes]) -> Tensor:
        """Cross entropy, MEAN over videos, attributes and depths."""
        # The tower's output at its two depths.
        prepared = _prepare(videos)
        patches = torch.cat([inputs.patches for inputs in prepared])
        grid = torch.tensor([inputs.grid for inputs in prepared])
        output = self.tower(patches, grid_thw=grid)
        depths = (output.pooler_output, *output.deepstack_features)

        # A softmax over the values of each attribute.
        sizes = [len(values) for values in VALUES.values()]
        losses = []
        for head, features in zip(self.heads, depths, strict=True):
            logits = head(features.reshape(len(prepared), -1))
            parts = logits.split(sizes, dim=1)
            for name, part in zip(VALUES, parts, strict=True):
                target = _labels(truths, name)
                losses.append(F.cross_entropy(part, target))
                right = part.argmax(-1) == target
                self.accuracy[name] = right.float().mean().item()
        return torch.stack(losses).mean()


def _labels(truths: Sequence[Attributes], name: str) -> Tensor:
    values = VALUES[name]
    return torch.tensor([values.index(getattr(truth, name)) for truth in truths])


@torch.no_grad()
def evaluate(
    model: DeScore, videos: Tensor, wishes: Sequence[Attributes], *, seed: int
) -> dict[str, float]:
    """Compare greedy chains of thought with the oracle on held-out videos.

    Returns shares of the videos: by attribute, read as the oracle reads it; ``parsed``, answers
    in the right format; ``scores``, right sub-dimension scores.
    """
    rng = random.Random(seed)
    model.eval()
    counts: dict[str, float] = dict.fromkeys([*VALUES, "parsed", "scores"], 0)
    for start in range(0, len(videos), 64):
        part = videos[start : start + 64]
        part_wishes = wishes[start : start + 64]
        prepared = _prepare(part)
        prompts = [caption(wish, wording=rng.randrange(4)) for wish in part_wishes]

        # Count the right words and the right scores.
        cots = write_cots(model, prompts, prepared)
        for cot, video, wish in zip(cots, part, part_wishes, strict=True):
            truth = observe(video).attributes
            for name, word in _seen_words(cot).items():
                counts[name] += int(word == word_of(truth, name))
            answer = parse_answer(cot)
            if answer is not None:
                counts["parsed"] += 1
                for name, score in compare(wish, truth).scores.items():
                    counts["scores"] += int(answer.scores.get(name) == score)
    counts["scores"] /= len(SUB_DIMENSIONS)
    return {name: count / len(videos) for name, count in counts.items()}


def _seen_words(cot: str) -> dict[str, str]:
    """Words that a chain of thought writes for the attributes it saw; of two lines the first."""
    lines = {}
    for line in cot.splitlines():
        if " seen " in line:
            words = line.split()
            lines.setdefault(words[0], words)

    # The words after "seen" belong to the attributes of the line, in their order.
    seen = {}
    for dimension, names in ASPECTS.items():
        words = lines.get(dimension, [])
        if "seen" in words:
            after = words[words.index("seen") + 1 :]
            seen.update(zip(names, after, strict=False))
    return seen


@dataclass(frozen=True)
class Course:
    """Where a base model is trained: ``out`` holds the tiny Wan, ``work`` unfinished stages.

    ``steps`` replaces the steps of every stage, for a trial.
    """

    out: Path
    work: Path
    steps: int | None = None

    def fit(
        self,
        stage: tuple[str, int, float],
        model: DeScore,
        lesson_at: Callable[[random.Random], Lesson],
    ) -> None:
        """Train a stage (name, steps, peak rate) on lessons that are drawn from its step."""
        name, steps, peak = stage

        def loss_at(step: int) -> Tensor:
            lesson = lesson_at(random.Random(f"{name}-{step}"))
            return text_loss(model, lesson)

        settings = Fit(name, self.steps or steps, peak, self.work, slow=".visual.")
        fit(settings, model, loss_at, lambda: self.measure(model, 64))

    def wan(self) -> tuple[Tensor, list[Attributes]]:
        """Videos of the tiny Wan."""
        return generated(self.out / "wan", self.work / "wan_videos.safetensors")

    def draw(
        self,
        rng: random.Random,
        *,
        count: int,
        share: float,
        described: Sequence[str] = SUB_DIMENSIONS,
    ) -> Lesson:
        """Draw ``count`` videos to describe, a share of them videos of the tiny Wan."""
        sampled = round(count * share)
        videos, wishes = examples(count - sampled, rng, clean=False)
        if sampled:
            wan_videos, wan_wishes = self.wan()
            known = WAN_VIDEOS - WAN_HELDOUT
            rows = [rng.randrange(known) for _ in range(sampled)]
            videos = torch.cat([videos, wan_videos[rows]])
            wishes += [agreeing(wan_wishes[row], rng, 0.7) for row in rows]
        return describing(videos, wishes, rng, described)

    def measure(self, model: DeScore, count: int) -> dict[str, float]:
        """Evaluate on new renders and on the last videos of the Wan, which nothing trains on."""
        rendered, wishes = examples(count, random.Random(2), clean=True)
        measured = evaluate(model, rendered, wishes, seed=2)
        wan_videos, wan_wishes = self.wan()
        first = WAN_VIDEOS - WAN_HELDOUT
        unseen = slice(first, first + count)
        on_wan = evaluate(model, wan_videos[unseen], wan_wishes[unseen], seed=3)
        return measured | {f"wan_{name}": value for name, value in on_wan.items()}


def build(out: Path, work: Path, *, steps: int | None) -> dict[str, float]:
    """Train in four stages, save to ``out/qwen`` and measure on 512 held-out videos."""
    course = Course(out, work, steps)
    model = taught(course, "qwen_answer", Teaching())
    save(model, out / "qwen")
    return course.measure(model, 512)


def build_shuffled(out: Path, work: Path, *, steps: int | None) -> dict[str, float]:
    """Train the last stage on shuffled annotations, and measure as `build` does; saves nothing."""
    course = Course(out, work, steps)
    model = taught(course, "qwen_shuffled", Teaching(shuffled=True))
    return course.measure(model, 512)


def taught(course: Course, name: str, teaching: Teaching) -> DeScore:
    """Train a new model to see, to describe and to answer; ``name`` is that of the last stage."""
    # The query and the head belong to score training, not to this model.
    model = new_model()
    model.query.requires_grad_(requires_grad=False)
    model.head.requires_grad_(requires_grad=False)
    train_eye(model, course.work, steps=course.steps or EYE_STEPS)
    for phase, steps, peak, share in PHASES:
        draw = partial(course.draw, count=BATCH, share=share)
        course.fit((phase, steps, peak), model, draw)

    # Half annotated examples, half descriptions.
    annotated = annotated_examples(*course.wan(), teaching)

    def lesson_at(rng: random.Random) -> Lesson:
        rows = [rng.randrange(ANNOTATED) for _ in range(BATCH // 2)]
        other = course.draw(
            rng, count=BATCH // 2, share=0.5, described=teaching.described
        )
        return annotated.take(rows) + other

    course.fit((name, ANSWER_STEPS, ANSWER_PEAK), model, lesson_at)
    return model


def train_eye(model: DeScore, work: Path, *, steps: int) -> None:
    """Train the vision tower on clean renders."""
    eye = Eye(model)

    def loss_at(step: int) -> Tensor:
        rng = random.Random(f"eye-{step}")
        scenes = random_scenes(EYE_BATCH, rng)
        truths = [scene.attributes for scene in scenes]
        return eye.loss(render(scenes), truths)

    fit(Fit("eye", steps, EYE_PEAK, work), eye, loss_at, lambda: eye.accuracy)


def save(model: DeScore, path: Path) -> None:
    """Save a stock Qwen3-VL folder in fp16, with the prompt template and the video settings."""
    copy.deepcopy(model.backbone).half().save_pretrained(path)
    model.tokenizer.save_pretrained(path)
    model.template.save(path / "prompt.json")
    model.settings.save(path / "video.json")
