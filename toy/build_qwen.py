"""Train the tiny Qwen3-VL to see the shapes world and to write chains of thought about it.

It first learns from renders, clean and degraded, then also from videos of the tiny Wan, which it
will score in the end. The language-model loss covers the chain of thought only. Prompt and video
are drawn apart (each attribute agrees by chance or with probability `AGREE`), because a model
whose prompts always match copies the prompt and never looks at the video.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from functools import partial
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
from toy.make_pairs import load_generator, spoilt, write_cots
from toy.measure import compare, observe
from toy.tokenizer import train_tokenizer
from toy.training import Fit, cached, fit
from toy.world import (
    SUB_DIMENSIONS,
    VALUES,
    Attributes,
    all_attributes,
    caption,
    captions,
    mix_attributes,
    random_attributes,
    random_scenes,
    render,
    split_attributes,
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
UNCLEAR = "unclear"
# Probability with which an attribute of a prompt is that of its video.
AGREE = 0.35
# Weight of the tokens that name what is seen: a sixth of the text, nearly all its information.
SEEN_WEIGHT = 3.0

# The first stage trains the vision tower.
EYE_BATCH = 48
EYE_STEPS = 1000
EYE_PEAK = 2e-3
# Then (name, steps, peak rate, share of videos of the tiny Wan): renders, later half and half.
BATCH = 32
PHASES = (("qwen", 1200, 2e-3, 0.0), ("qwen_wan", 1400, 1e-3, 0.5))
WAN_VIDEOS = 4000
WAN_HELDOUT = 512
# Videos of the tiny Wan that are sampled together, with one guidance scale.
CHUNK = 40

_ASPECTS = {
    "subject": ("color", "shape"),
    "dynamics": ("motion",),
    "camera": ("camera",),
    "environment": ("background",),
    "style": ("style",),
}
_PIECES = [
    '<answer>{"dimensional_scores": {"subject": "',
    *(f'", "{name}": "' for name in SUB_DIMENSIONS[1:]),
    '"}, "overall_score": "',
    '"}</answer>',
]


def chain_of_thought(wish: Attributes, seen: Attributes) -> str:
    """Write the wanted and the seen attributes line by line, then the scores."""
    # The attributes first, so that the scores follow from them.
    text = ""
    for dimension, names in _ASPECTS.items():
        wanted = " ".join(_word(wish, name) for name in names)
        shown = " ".join(_word(seen, name) for name in names)
        text += f"{dimension} asked {wanted} seen {shown}\n"

    # The scores, in pieces that are a token each.
    score = compare(wish, seen)
    digits = [str(score.scores[name]) for name in SUB_DIMENSIONS]
    overall = f"{1 + 4 * score.total:.2f}"
    for piece, value in zip(_PIECES, [*digits, overall, ""], strict=True):
        text += piece + value
    return text


def _word(attributes: Attributes, name: str) -> str:
    return getattr(attributes, name) or UNCLEAR


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer on all captions, 864 chains of thought and the fixed text."""
    rng = random.Random("qwen tokenizer")
    cots = []
    for attributes in all_attributes():
        cots.append(chain_of_thought(attributes, random_attributes(rng)))

    # The fixed text is repeated so that its words become tokens.
    names = " ".join(SUB_DIMENSIONS)
    template = f"{TEMPLATE.before}{TEMPLATE.after}"
    fixed = f"{template}user\nassistant\n 1.5 seconds> {UNCLEAR} {names}"
    texts = captions(all_attributes()) + cots + [fixed] * 400
    return train_tokenizer(
        texts,
        size=490,
        special=CONTROL_TOKENS,
        words=_PIECES,
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
    """Keep each attribute with a probability and draw it anew otherwise."""
    return mix_attributes(random_attributes(rng), attributes, rng, share=probability)


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


def cot_loss(
    model: DeScore, videos: Tensor, wishes: Sequence[Attributes], rng: random.Random
) -> Tensor:
    """Cross entropy of the right chain of thought and its end token.

    Weighted MEAN over the tokens of all videos.
    """
    # Encode the prompts with the right chains of thought.
    prepared = _prepare(videos)
    encoded = []
    targets = []
    weights = []
    for video, inputs, wish in zip(videos, prepared, wishes, strict=True):
        cot = chain_of_thought(wish, observe(video).attributes)
        prompt = caption(wish, wording=rng.randrange(4))
        item = model.encode(prompt, inputs, cot)
        encoded.append(item)
        targets += [*item.cot_ids, model.tokenizer.eos_token_id]
        weights += _token_weights(model, item.cot_ids)

    # Position i predicts token i + 1.
    hidden_BLD = model.hidden(model.batch(encoded, prepared, query=False))
    rows = []
    for i, item in enumerate(encoded):
        first = len(item.prompt_ids) - 1
        rows.append(hidden_BLD[i, first : len(item.ids)])
    logits = model.backbone.lm_head(torch.cat(rows))
    loss = F.cross_entropy(logits, torch.tensor(targets), reduction="none")
    weight = torch.tensor(weights)
    return (loss * weight).sum() / weight.sum()


def _prepare(videos: Tensor) -> list[PreparedVideo]:
    return [prepare(video, SETTINGS, fps=8.0) for video in videos]


def _token_weights(model: DeScore, cot_ids: Sequence[int]) -> list[float]:
    """Weight the tokens between " seen" and the end of its line by `SEEN_WEIGHT`."""
    newline = model.tokenizer.encode("\n")[0]
    seen = model.tokenizer.encode(" seen")[0]
    weights = []
    inside = False
    for token in cot_ids:
        inside = inside and token != newline
        weights.append(SEEN_WEIGHT if inside else 1.0)
        inside = inside or token == seen
    return [*weights, 1.0]


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
    in the right format; ``scores``, answers with all scores right.
    """
    rng = random.Random(seed)
    model.eval()
    counts = dict.fromkeys([*VALUES, "parsed", "scores"], 0)
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
                counts[name] += int(word == _word(truth, name))
            answer = parse_answer(cot)
            if answer is not None:
                counts["parsed"] += 1
                right = dict(answer.scores) == compare(wish, truth).scores
                counts["scores"] += int(right)
    return {name: count / len(videos) for name, count in counts.items()}


def _seen_words(cot: str) -> dict[str, str]:
    """Words that a chain of thought writes for the attributes it saw; of two lines the last."""
    lines = {}
    for line in cot.splitlines():
        if " seen " in line:
            words = line.split()
            lines[words[0]] = words

    # The words after "seen" belong to the attributes of the line, in their order.
    seen = {}
    for dimension, names in _ASPECTS.items():
        words = lines.get(dimension, [])
        if "seen" in words:
            after = words[words.index("seen") + 1 :]
            seen.update(zip(names, after, strict=False))
    return seen


def build(out: Path, work: Path, *, steps: int | None) -> dict[str, float]:
    """Train in three stages, save to ``out/qwen`` and measure on 512 held-out videos."""
    # The query and the head belong to score training, not to this model.
    model = new_model()
    model.query.requires_grad_(requires_grad=False)
    model.head.requires_grad_(requires_grad=False)
    train_eye(model, work, steps=steps or EYE_STEPS)
    videos, wishes = generated(out / "wan", work / "wan_videos.safetensors")

    def loss_at(step: int, *, name: str, share: float) -> Tensor:
        rng = random.Random(f"{name}-{step}")
        count = round(BATCH * share)
        rows = [rng.randrange(WAN_VIDEOS - WAN_HELDOUT) for _ in range(count)]
        rendered, mixed = examples(BATCH - count, rng, clean=False)
        mixed += [agreeing(wishes[row], rng, 0.7) for row in rows]
        return cot_loss(model, torch.cat([rendered, videos[rows]]), mixed, rng)

    # The last videos of the tiny Wan are not trained on.
    unseen = videos[-WAN_HELDOUT:]
    unseen_wishes = wishes[-WAN_HELDOUT:]

    def check(count: int) -> dict[str, float]:
        rendered, mixed = examples(count, random.Random(2), clean=True)
        measured = evaluate(model, rendered, mixed, seed=2)
        on_wan = evaluate(model, unseen[:count], unseen_wishes[:count], seed=3)
        return measured | {f"wan_{name}": value for name, value in on_wan.items()}

    for name, phase_steps, peak, share in PHASES:
        settings = Fit(name, steps or phase_steps, peak, work, slow=".visual.")
        loss = partial(loss_at, name=name, share=share)
        fit(settings, model, loss, lambda: check(64))
    save(model, out / "qwen")
    return check(512)


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
