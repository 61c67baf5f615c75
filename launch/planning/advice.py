"""Settings that make the parts of a plan smaller.

Every setting is tried on the run's schema, so that a user can type it as printed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from common.config import ConfigError, load
from common.run_record import plain
from generator.config import GeneratorConfig
from launch.planning.known_models import QWEN3_VL
from launch.planning.runs import is_descore
from launch.schemas.pairs import DpoRun, PairsRun
from launch.schemas.training import ColdStartRun, DualRlRun, GrpoRun

SERVER = "http://HOST:8900"
# configs/sizes/240x416x33.yaml
SMALL_FRAMES = 33
SMALL_HEIGHT = 240
SMALL_WIDTH = 416

Advice = dict[str, Sequence[str]]


def advice(cfg: Any, ranks: int) -> Advice:
    """List by part what makes it smaller: ``a.b=c`` settings, and phrases without "=".

    The keys are the names of the parts in `launch.planning.runs`. Settings that the schema refuses
    or that are set already are left out, and so are parts without advice.
    """
    if isinstance(cfg, GrpoRun):
        candidates = _grpo(cfg, ranks)
    elif isinstance(cfg, DpoRun):
        candidates = _dpo(cfg, ranks)
    elif isinstance(cfg, PairsRun):
        candidates = _sampling("sampling", cfg.generator) | _rewards(cfg.rewards)
    else:
        candidates = _reward_model(cfg, ranks)

    usable = {}
    for part, proposals in candidates.items():
        kept = [words for words in proposals if "=" not in words or is_new(cfg, words)]
        if kept:
            usable[part] = tuple(kept)
    return usable


def is_new(cfg: Any, words: str) -> bool:
    """Whether the schema accepts the settings ``a.b=c d=e``, and they change this config."""
    given = []
    for name, value in plain(cfg).items():
        if value != {}:
            given.append(f"{name}={json.dumps(value).replace('Infinity', '.inf')}")
    try:
        changed = load(type(cfg), None, [*given, *words.split()])
    except ConfigError:
        return False
    return bool(plain(changed) != plain(cfg))


def _grpo(cfg: GrpoRun, ranks: int) -> Advice:
    adapter = [] if cfg.generator.lora else ["generator.lora.rank=128"]
    checkpointing = "generator.gradient_checkpointing=true"
    return {
        **_training("transformer", cfg.zero_stage, ranks, adapter),
        **_sampling("rollout", cfg.generator),
        "text encoder: weights": ["cache_prompts=true"],
        "average of the trained weights": ["ema=null"],
        "frozen copy for KL": ["grpo.kl_weight=0", *adapter],
        "update: activations": [checkpointing, *_smaller_videos(cfg.generator)],
        **_rewards(cfg.rewards),
    }


def _dpo(cfg: DpoRun, ranks: int) -> Advice:
    adapter = [] if cfg.generator.lora else ["generator.lora.rank=128"]
    return {
        **_training("transformer", cfg.zero_stage, ranks, adapter),
        "update: activations": [
            "dpo.micro_batch=1",
            "generator.gradient_checkpointing=true",
            "pairs of smaller videos",
        ],
    }


def _reward_model(cfg: ColdStartRun | DualRlRun, ranks: int) -> Advice:
    # Dual RL refuses dropout.
    adapter = [] if cfg.lora else ["lora.rank=64 lora.dropout=0"]
    parts = _training("reward model", cfg.zero_stage, ranks, adapter)
    if isinstance(cfg, DualRlRun):
        group_size = cfg.dual_rl.group_size
        parts["frozen copy for KL"] = ["dual_rl.kl_weight=0", *adapter]
        parts["chains of thought: keys and values"] = [
            f"dual_rl.group_size={group_size // 2}"
        ]
        parts["update: activations"] = [
            "gradient_checkpointing=true",
            "dual_rl.micro_batch=1",
            "dual_rl.cots_per_row=1",
        ]
        return parts

    if cfg.base in QWEN3_VL:
        smaller = "base=Qwen/Qwen3-VL-2B-Instruct"
        parts["reward model: weights"] = [*parts["reward model: weights"], smaller]
    parts["update: activations"] = [
        "gradient_checkpointing=true",
        "cold_start.micro_batch=1",
    ]
    if cfg.video is not None:
        pixels = f"video.max_pixels={cfg.video.max_pixels // 2}"
        parts["update: activations"] = [*parts["update: activations"], pixels]
    return parts


def _training(name: str, zero_stage: int, ranks: int, adapter: Sequence[str]) -> Advice:
    """Advise on `launch.planning.plan.training_parts`: split over ranks, or train an adapter."""

    def split(stage: int) -> list[str]:
        zero = [f"zero_stage={stage}"] if zero_stage < stage else []
        return zero if zero and ranks > 1 else ["more ranks"]

    return {
        f"{name}: weights": split(3),
        f"{name}: gradients": [*split(2), *adapter],
        f"{name}: optimizer": [*split(1), *adapter],
        f"{name}: optimizer's step": [*split(1), *adapter],
    }


def _sampling(name: str, cfg: GeneratorConfig) -> Advice:
    smaller = _smaller_videos(cfg)
    return {
        f"{name}: activations": ["generator.rollout_batch=1", *smaller],
        "decoding: activations": ["generator.decode_batch=1", *smaller],
    }


def _smaller_videos(cfg: GeneratorConfig) -> list[str]:
    settings = []
    if cfg.num_frames > SMALL_FRAMES:
        settings.append(f"generator.num_frames={SMALL_FRAMES}")
    if cfg.height * cfg.width > SMALL_HEIGHT * SMALL_WIDTH:
        settings.append(
            f"generator.height={SMALL_HEIGHT} generator.width={SMALL_WIDTH}"
        )
    return settings


def _rewards(rewards: Mapping[str, Any]) -> Advice:
    """Advise to move a DeScore to a server, or to score fewer videos together."""
    parts: Advice = {}
    for name, reward in rewards.items():
        if not is_descore(name, reward):
            continue
        key = f"rewards.{name}"
        if reward.kind is None and not reward.options:
            served = f"{key}.url={SERVER}"
        else:
            # A remote reward refuses the kind and the options of a DeScore.
            served = "a reward server (launch/serve.py) on another GPU"
        parts[f"reward {name}: weights"] = [served]
        parts[f"reward {name}: activations, cache"] = [f"{key}.options.batch=1"]
    return parts
