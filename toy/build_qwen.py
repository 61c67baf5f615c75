"""The tiny Qwen3-VL: it learns from nothing to see the shapes world and to write a judgement in the official format.

First renders, clean and degraded, then also videos of the tiny Wan, which is what it will be asked about.
Language-model loss on the chain of thought only. Prompt and video are drawn apart (each attribute agrees by chance or
with probability `AGREE`), since a model whose prompts always match copies the prompt and never looks.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from common.config import load
from generator.config import GeneratorConfig
from generator.wan import WanGenerator
from launch.compose import build_generator
from launch.schemas.training import SampleRun
from rm.config import Generation
from rm.generate import generate
from rm.model import DeScore
from rm.prompt import CONTROL_TOKENS, IM_END, PromptTemplate, parse_answer
from rm.video import VideoSettings, prepare
from toy.make_pairs import spoilt
from toy.tokenizer import train_tokenizer
from toy.training import fit
from toy.world import (
    SUB_DIMENSIONS,
    VALUES,
    Attributes,
    all_attributes,
    caption,
    captions,
    compare,
    observe,
    random_attributes,
    random_scene,
    render,
    split_attributes,
)

TEMPLATE = PromptTemplate(before="prompt: {prompt}\nvideo:", after="\njudge:")
SETTINGS = VideoSettings(
    fps=8.0, min_frames=4, max_frames=8, min_pixels=256, max_pixels=1024, patch_size=4
)
UNCLEAR = "unclear"
BATCH, STEPS, PEAK = 32, 1200, 2e-3
WAN_VIDEOS, WAN_HELDOUT, WAN_STEPS, WAN_PEAK, CHUNK = 4000, 512, 1400, 1e-3, 40
SAMPLE_CONFIG = Path("configs/shapes/sample.yaml")
EYE_BATCH, EYE_STEPS, EYE_PEAK = 48, 1000, 2e-3
AGREE = 0.35
SEEN_WEIGHT = 3.0  # of the tokens that say what is seen: a sixth of the text, nearly all of its information

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
    """Wanted beside seen, line by line, then the scores: comparing is easy once both stand in the text."""

    def words(attributes: Attributes, names: Sequence[str]) -> str:
        return " ".join(getattr(attributes, name) or UNCLEAR for name in names)

    lines = [
        f"{d} asked {words(wish, names)} seen {words(seen, names)}\n"
        for d, names in _ASPECTS.items()
    ]
    verdict = compare(wish, seen)
    digits = [str(verdict.scores[name]) for name in SUB_DIMENSIONS]
    overall = f"{1 + 4 * verdict.total:.2f}"
    return "".join(lines) + "".join(
        p + v for p, v in zip(_PIECES, [*digits, overall, ""], strict=True)
    )


def build_tokenizer() -> object:
    rng = random.Random("qwen tokenizer")
    thoughts = [chain_of_thought(a, random_attributes(rng)) for a in all_attributes()]
    fixed = f"{TEMPLATE.before}{TEMPLATE.after}user\nassistant\n 1.5 seconds> {UNCLEAR} {' '.join(SUB_DIMENSIONS)}"
    texts = [*captions(all_attributes()), *thoughts, *[fixed] * 400]
    return train_tokenizer(
        texts,
        size=490,
        special=CONTROL_TOKENS,
        words=_PIECES,
        pad="<|endoftext|>",
        eos=IM_END,
        end_with_eos=False,
    )


def new_judge() -> DeScore:
    """1.3 million random parameters in the stock classes; 512 rows, the last ones free."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tokenizer = build_tokenizer()
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in CONTROL_TOKENS}
    config = Qwen3VLConfig(
        vision_config={
            "depth": 3, "hidden_size": 96, "intermediate_size": 256, "num_heads": 4, "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 128,
            "num_position_embeddings": 64, "deepstack_visual_indexes": [1],
        },
        text_config={
            "vocab_size": 512, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True,
            },
            "pad_token_id": ids["<|endoftext|>"], "eos_token_id": ids[IM_END], "tie_word_embeddings": True,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    backbone = Qwen3VLForConditionalGeneration(config)
    # Half of the patch filters start as differences of a patch's two frames: the camera moves stripes of low contrast
    # by a pixel or two, which is lost beside the brightness of the room otherwise.
    filters = backbone.model.visual.patch_embed.proj.weight.data  # (out, RGB, 2, 4, 4)
    filters[::2, :, 1] = -filters[::2, :, 0]
    filters[::2] *= 4.0
    query_id = max(tokenizer.get_vocab().values()) + 1
    return DeScore(backbone, tokenizer, TEMPLATE, SETTINGS, query_id)


def degrade(video_BTYXC: Tensor, rng: random.Random) -> Tensor:
    """Blur, noise, a frozen clip, an empty room: what generators do wrong, so that the judge has seen it."""
    out = video_BTYXC.clone()
    for i in range(len(out)):
        kind = rng.random()
        if kind < 0.20:
            x = out[i].float().permute(0, 3, 1, 2)
            if rng.random() < 0.6:
                x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
            x = x + rng.uniform(0, 14) * torch.randn(x.shape)
            out[i] = x.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        elif kind < 0.23:
            out[i] = out[i, rng.randrange(out.shape[1])]
        elif kind < 0.26:
            out[i] = out[i].float().mean(-1, keepdim=True).round().to(torch.uint8)
        elif kind < 0.30:  # a ghost: two videos laid over each other
            out[i] = (
                (out[i].float() * 0.5 + out[rng.randrange(len(out))].float() * 0.5)
                .round()
                .to(torch.uint8)
            )
    return out


def agreeing(
    attributes: Attributes, rng: random.Random, probability: float
) -> Attributes:
    """The same with each attribute kept with a probability, drawn anew otherwise."""
    other = random_attributes(rng)
    return Attributes(
        **{
            k: getattr(attributes if rng.random() < probability else other, k)
            for k in VALUES
        }
    )


def examples(
    count: int, rng: random.Random, *, clean: bool
) -> tuple[Tensor, list[Attributes]]:
    """Videos and what each was asked to show; a wish agrees with its scene in about half of the attributes."""
    scenes = [random_scene(random_attributes(rng), rng) for _ in range(count)]
    wishes = []
    for scene in scenes:
        wishes.append(agreeing(scene.attributes, rng, AGREE))
    video = render(scenes)
    return (video if clean else degrade(video, rng)), wishes


def generated(wan: Path, cache: Path, *, count: int) -> tuple[Tensor, list[Attributes]]:
    """Videos of the tiny Wan and what they were asked to show: weak to strong guidance, some with spoilt latents.

    What a judge must read in the end is not rendered. Training combinations only; sampled once, kept in ``cache``.
    """
    rng = random.Random("wan videos")
    train, _ = split_attributes()
    wishes = [rng.choice(train) for _ in range(count)]
    if not cache.exists():
        chunks = []
        for start in tqdm(range(0, count, CHUNK), desc="sampling", mininterval=5):
            guidance = (1.0, 1.5, 3.0)[start // CHUNK % 3]
            config = load(
                SampleRun,
                SAMPLE_CONFIG,
                ["out=unused", "prompts=unused", f"generator.path={wan}"],
            ).generator
            sampler = dataclasses.replace(config.sampler, guidance_scale=guidance)
            generator = generator_at(dataclasses.replace(config, sampler=sampler))
            prompts = [
                caption(wish, wording=rng.randrange(4))
                for wish in wishes[start : start + CHUNK]
            ]
            clean = generator.sample(
                prompts, seeds=[rng.getrandbits(62) for _ in prompts]
            )
            for row in range(0, len(clean), 6):
                clean[row] = spoilt(clean[row], rng)
            chunks.append(generator.decode(clean))
        save_file({"video": torch.cat(chunks)}, cache)
    return load_file(cache)["video"], wishes


@lru_cache(maxsize=3)
def generator_at(config: GeneratorConfig) -> WanGenerator:
    return build_generator(config)


def think_loss(
    judge: DeScore, videos: Tensor, wishes: Sequence[Attributes], rng: random.Random
) -> Tensor:
    """Cross entropy of the right chain of thought and its end token, weighted MEAN over their tokens."""
    prepared = [prepare(video, SETTINGS, fps=8.0) for video in videos]
    encoded, targets, weights = [], [], []
    for video, ready, wish in zip(videos, prepared, wishes, strict=True):
        seen = observe(video).attributes
        item = judge.encode(
            caption(wish, wording=rng.randrange(4)), ready, chain_of_thought(wish, seen)
        )
        encoded.append(item)
        targets.append(torch.tensor([*item.cot_ids, judge.tokenizer.eos_token_id]))
        weights.append(torch.tensor(_weights(judge, item.cot_ids)))
    batch = judge.batch(encoded, prepared, query=False)
    hidden_BLD = judge.hidden(batch)
    rows = [
        hidden_BLD[i, len(e.prompt_ids) - 1 : len(e.ids)] for i, e in enumerate(encoded)
    ]
    logits = judge.backbone.lm_head(torch.cat(rows))
    weight = torch.cat(weights)
    return (
        F.cross_entropy(logits, torch.cat(targets), reduction="none") * weight
    ).sum() / weight.sum()


class Eye(nn.Module):
    """The vision tower with a small classifier on all its output tokens: it learns to see before it learns to talk.

    Without this, words come first and the language model settles on guessing what is hard to see (direction, camera).
    """

    def __init__(self, judge: DeScore) -> None:
        super().__init__()
        self.tower = judge.backbone.model.visual
        classes = sum(len(values) for values in VALUES.values())
        self.right: dict[
            str, float
        ] = {}  # accuracy of the last batch by attribute, at the deeper depth
        width = (
            32 * 128
        )  # 32 merged tokens a video, at each of the two depths the language model gets
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 128), nn.GELU(), nn.Linear(128, classes))
            for _ in range(2)
        )

    def loss(self, videos: Tensor, truths: Sequence[Attributes]) -> Tensor:
        """Cross entropy, MEAN over videos, attributes and depths."""
        prepared = [prepare(video, SETTINGS, fps=8.0) for video in videos]
        patches, grid = (
            torch.cat([p.patches for p in prepared]),
            torch.tensor([p.grid for p in prepared]),
        )
        output = self.tower(patches, grid_thw=grid)
        losses, self.right = [], {}
        for head, features in zip(
            self.heads, (output.pooler_output, *output.deepstack_features), strict=True
        ):
            logits, start = head(features.reshape(len(prepared), -1)), 0
            for name, values in VALUES.items():
                target = torch.tensor(
                    [values.index(getattr(truth, name)) for truth in truths]
                )
                part = logits[:, start : start + len(values)]
                losses.append(F.cross_entropy(part, target))
                self.right[name] = (part.argmax(-1) == target).float().mean().item()
                start += len(values)
        return torch.stack(losses).mean()


def _weights(judge: DeScore, cot_ids: Sequence[int]) -> list[float]:
    newline, seen = judge.tokenizer.encode("\n")[0], judge.tokenizer.encode(" seen")[0]
    weights, inside = [], False
    for token in cot_ids:
        inside = inside and token != newline
        weights.append(SEEN_WEIGHT if inside else 1.0)
        inside = inside or token == seen
    return [*weights, 1.0]


@torch.no_grad()
def evaluate(
    judge: DeScore, videos: Tensor, wishes: Sequence[Attributes], *, seed: int
) -> dict[str, float]:
    """Greedy chains of thought on held-out videos: per attribute the share read as the oracle reads it, and parsed."""
    rng = random.Random(seed)
    judge.eval()
    counts = dict.fromkeys([*VALUES, "parsed", "scores"], 0)
    for start in range(0, len(videos), 64):
        part, asked = videos[start : start + 64], wishes[start : start + 64]
        prepared = [prepare(video, SETTINGS, fps=8.0) for video in part]
        encoded = [
            judge.encode(caption(w, wording=rng.randrange(4)), ready)
            for w, ready in zip(asked, prepared, strict=True)
        ]
        written = generate(
            judge,
            judge.batch(encoded, prepared, query=False),
            Generation(max_new_tokens=96, repetition_penalty=1.0),
        )
        for row, (video, wish) in enumerate(zip(part, asked, strict=True)):
            text = judge.tokenizer.decode(written.ids(row))
            truth = observe(video).attributes
            answer = parse_answer(text)
            lines = {
                line.split()[0]: line.split()
                for line in text.splitlines()
                if " seen " in line
            }
            for dimension, names in _ASPECTS.items():
                words = lines.get(dimension, [])
                said = words[words.index("seen") + 1 :] if "seen" in words else []
                for name, word in zip(names, [*said, "", ""], strict=False):
                    counts[name] += word == (getattr(truth, name) or UNCLEAR)
            counts["parsed"] += answer is not None
            counts["scores"] += (
                answer is not None
                and dict(answer.scores) == compare(wish, truth).scores
            )
    return {name: count / len(videos) for name, count in counts.items()}


def build(out: Path, work: Path, *, steps: int | None) -> dict[str, float]:
    """Train on renders, measure on 512 held-out ones, save to ``out/qwen``."""
    judge = new_judge()
    judge.query.requires_grad_(requires_grad=False)
    judge.head.requires_grad_(requires_grad=False)

    eye = Eye(judge)

    def eye_loss_at(step: int) -> Tensor:
        rng = random.Random(f"eye-{step}")
        scenes = [random_scene(random_attributes(rng), rng) for _ in range(EYE_BATCH)]
        return eye.loss(render(scenes), [scene.attributes for scene in scenes])

    fit(
        "eye",
        eye,
        eye_loss_at,
        steps=steps or EYE_STEPS,
        peak=EYE_PEAK,
        work=work,
        evaluate=lambda: eye.right,
    )

    def loss_at(step: int) -> Tensor:
        rng = random.Random(f"qwen-{step}")
        videos, wishes = examples(BATCH, rng, clean=False)
        return think_loss(judge, videos, wishes, rng)

    def check(count: int, seed: int) -> dict[str, float]:
        videos, wishes = examples(count, random.Random(seed), clean=True)
        return evaluate(judge, videos, wishes, seed=seed)

    fit(
        "qwen",
        judge,
        loss_at,
        steps=steps or STEPS,
        peak=PEAK,
        work=work,
        evaluate=lambda: check(64, 1),
        slow=".visual.",
    )

    videos, asked = generated(
        out / "wan", work / "wan_videos.safetensors", count=WAN_VIDEOS
    )
    unseen, unseen_asked = videos[-WAN_HELDOUT:], asked[-WAN_HELDOUT:]

    def wan_loss_at(step: int) -> Tensor:
        rng = random.Random(f"qwen_wan-{step}")
        rows = [rng.randrange(WAN_VIDEOS - WAN_HELDOUT) for _ in range(BATCH // 2)]
        rendered, wishes = examples(BATCH - len(rows), rng, clean=False)
        wishes += [agreeing(asked[row], rng, 0.7) for row in rows]
        return think_loss(judge, torch.cat([rendered, videos[rows]]), wishes, rng)

    def check_both(count: int) -> dict[str, float]:
        on_wan = evaluate(judge, unseen[:count], unseen_asked[:count], seed=3)
        return check(count, 2) | {
            f"wan_{name}": value for name, value in on_wan.items()
        }

    fit(
        "qwen_wan",
        judge,
        wan_loss_at,
        steps=steps or WAN_STEPS,
        peak=WAN_PEAK,
        work=work,
        evaluate=lambda: check_both(64),
        slow=".visual.",
    )
    save(judge, out / "qwen")
    return check_both(512)


def save(judge: DeScore, path: Path) -> None:
    """A stock Qwen3-VL folder, in fp16 for its size, with the judge's template and video settings beside it."""
    copy.deepcopy(judge.backbone).half().save_pretrained(path)
    judge.tokenizer.save_pretrained(path)
    judge.template.save(path / "prompt.json")
    judge.settings.save(path / "video.json")
