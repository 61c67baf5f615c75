"""Make an update of each loop at the models' true size, on random weights.

Each part returns the plan of ``--dry-run``, the trained module, and figures for the JSON.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from alignment.pair_store import LatentPair, PairSet, write_pairs
from alignment.rewards.brightness import Brightness
from common.config import load
from common.video_io import write_mp4
from experiments.runner import ROOT
from generator import adapter
from generator.config import GeneratorConfig
from generator.wan import WanGenerator
from launch import cold_start as cold_start_command
from launch.planning.known_models import QWEN3_VL, WAN, WAN_VAE
from launch.planning.models import Lengths
from launch.planning.plan import DEVICES, Plan, Where
from launch.planning.runs import plan_dpo, plan_grpo, plan_reward_model
from launch.schemas.pairs import DpoRun
from launch.schemas.training import ColdStartRun, GrpoRun
from launch.training import dpo_loop, grpo_loop
from rm.data import Pair
from rm.model import DeScore
from rm.prompt import DEFAULT_TEMPLATE, VIDEO_PAD, token_id
from rm.scorer import DeScoreScorer
from rm.video import prepare

FullSizeResult = tuple[Plan, nn.Module, dict[str, Any]]

# Inputs of all parts.
PROMPT = "A paper boat drifts down a gutter in the rain."
COT = "word " * 40
# A small video: memory is mostly weights.
WAN_SIZE = (
    "generator.height=128",
    "generator.width=128",
    "generator.num_frames=9",
    "generator.dtype=float32",
)
REWARD_MODEL = "Qwen/Qwen3-VL-2B-Instruct"
# The device of the plans.
WHERE = Where(DEVICES["h100"])
# Tokens of the prompt, before padding to 512.
TEXT_TOKENS = 24


def grpo(folder: Path) -> FullSizeResult:
    """Make an update of configs/wan/grpo.yaml on two videos, with brightness as reward."""
    # Two videos of three steps with guidance.
    words = [
        *WAN_SIZE,
        f"run_dir={folder}",
        "prompts_per_step=1",
        "grpo.group_size=2",
        "generator.sampler.num_steps=3",
        "generator.sampler.stochastic_range=1",
        "rewards.descore.weight=0",
        "rewards.brightness.weight=1",
    ]
    cfg = load(GrpoRun, ROOT / "configs/wan/grpo.yaml", words)

    # DeScore is measured by another part.
    cfg = replace(cfg, rewards={"brightness": cfg.rewards["brightness"]})
    generator = random_wan(cfg.generator)
    loop = grpo_loop.loop_of(cfg, [PROMPT], generator, {"brightness": Brightness()})

    # The update.
    embeddings = {
        PROMPT: random_embedding(0),
        cfg.generator.sampler.negative_prompt: random_embedding(1),
    }
    with generator.given_prompts(embeddings):
        metrics = loop.step(0).metrics

    facts = {
        "grad_norm": metrics["train/grad_norm"],
        "not_finite": loop.engine.pop_skipped_count(),
    }
    return plan_grpo(cfg, WHERE), generator.module, facts


def dpo(folder: Path) -> FullSizeResult:
    """Make a step of configs/wan/dpo.yaml on a stored pair of random latents."""
    store = folder / "pairs"

    # The first step has its full learning rate.
    words = [
        *WAN_SIZE,
        f"run_dir={folder}",
        f"pairs={store}",
        "dpo.pairs_per_step=1",
        "optimizer.warmup_steps=0",
    ]
    cfg = load(DpoRun, ROOT / "configs/wan/dpo.yaml", words)

    # Store the pair.
    latents = []
    for seed in (2, 3):
        draw = torch.Generator().manual_seed(seed)
        latents.append(torch.randn(16, 3, 16, 16, generator=draw))
    pair = LatentPair(PROMPT, *latents, random_embedding(0))
    write_pairs(store, iter([pair]), per_shard=1, dtype=torch.float32, about={})

    # The step.
    generator = random_wan(cfg.generator, vae=False)
    loop = dpo_loop.loop_of(cfg, PairSet(store), generator, accumulation=1)
    metrics = loop.step(0)
    facts = {
        "loss": metrics["train/loss"],
        "grad_norm": metrics["train/grad_norm"],
    }
    return plan_dpo(cfg, WHERE), generator.module, facts


def cold_start(folder: Path) -> FullSizeResult:
    """Score video files, with and without a CoT, and make a step of stage 1 on a pair."""
    # A CoT of four tokens ends before it is complete.
    words = [
        f"base={REWARD_MODEL}",
        f"run_dir={folder}",
        "dtype=float32",
        "cold_start.pairs_per_step=1",
        "data.train=none.csv",
        "generation.max_new_tokens=4",
        "zero_stage=1",
        "optimizer.warmup_steps=0",
    ]
    cfg = load(ColdStartRun, ROOT / "configs/wan/cold_start.yaml", words)
    files = _write_videos(folder)
    model = random_descore(cfg)

    # Score without a CoT, then with a CoT that its limit cuts off, which gives NaN.
    without_cot = DeScoreScorer(model, cots=0).score(files, [PROMPT] * 2)
    with_cot = DeScoreScorer(model).score(files[:1], [PROMPT])
    unscored = bool(with_cot.value_B.isnan().all())

    # A step of stage 1.
    video = prepare(files[0], model.settings)
    tokens = len(model.encode(PROMPT, video, COT).ids)
    pair = Pair(PROMPT, *files, COT, COT, 1)
    loop, engine = cold_start_command.loop_of(
        cfg, [pair], model.train(), accumulation=1
    )
    metrics = loop.step(0)
    facts = {
        "rewards": [round(value, 4) for value in without_cot.value_B.tolist()],
        "unfinished_chain": "not judged" if unscored else "JUDGED",
        "loss": metrics["train/loss"],
        "grad_norm": metrics["train/grad_norm"],
        "tokens": tokens,
    }

    # The plan counts the CoT as part of the prompt. Four patches make a token.
    frames, height, width = video.grid
    video_tokens = frames * height * width // 4
    text_tokens = tokens - video_tokens
    lengths = Lengths(video.grid, video_tokens, prompt=text_tokens, chain=0)
    plan = plan_reward_model(cfg, WHERE, lengths)
    return plan, engine.module, facts


def _write_videos(folder: Path) -> list[Path]:
    """Write two videos of random colours, 128 x 128 pixels and 8 frames."""
    files = [folder / "A.mp4", folder / "B.mp4"]
    for seed, file in enumerate(files):
        draw = torch.Generator().manual_seed(seed)
        small = torch.randint(0, 256, (8, 8, 8, 3), generator=draw, dtype=torch.uint8)
        large = small.repeat_interleave(16, 1).repeat_interleave(16, 2)
        write_mp4(file, large, 4.0)
    return files


def random_wan(cfg: GeneratorConfig, *, vae: bool = True) -> WanGenerator:
    """Make Wan of its published size with random weights and without a text encoder."""

    # The published size on random weights.
    torch.manual_seed(0)
    transformer = WanTransformer3DModel.from_config(WAN[cfg.path]).eval()
    transformer.enable_gradient_checkpointing()

    # The last layer starts as zeros, which would hide the layers before it.
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.02)
    decoder = None
    if vae:
        decoder = AutoencoderKLWan.from_config(WAN_VAE).eval()
        decoder.requires_grad_(requires_grad=False)

    # Prompts are given as embeddings.
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=decoder,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=cfg.sampler.shift),
    )
    module = adapter.attach(transformer, cfg.lora, seed=0).eval()
    return WanGenerator(cfg, pipeline, module, torch.device("cpu"))


def random_descore(cfg: ColdStartRun) -> DeScore:
    """Make DeScore of its published size with random weights and a small tokenizer."""
    torch.manual_seed(0)
    folder = ROOT / "assets" / "shapes" / "qwen"
    tokenizer = AutoTokenizer.from_pretrained(folder.as_posix())

    config = Qwen3VLConfig(
        **QWEN3_VL[REWARD_MODEL],
        video_token_id=token_id(tokenizer, VIDEO_PAD),
    )
    return DeScore(
        Qwen3VLForConditionalGeneration(config).eval(),
        tokenizer,
        DEFAULT_TEMPLATE,
        cfg.video,
        max(tokenizer.get_vocab().values()) + 1,
        cfg.generation,
    )


def random_embedding(seed: int) -> Tensor:
    """Draw the text encoder's output for a prompt: (L, D) without padding."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(TEXT_TOKENS, 4096, generator=draw)
