"""What makes the parts of a plan smaller: settings of that very run which are not set yet and help on so many ranks.

Every one is tried on the run's schema, so that what is advised can be typed as it stands.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.config import ConfigError, load
from common.run_record import plain
from launch.planning.known_models import QWEN3_VL
from launch.planning.runs import is_descore, judged_at_once
from launch.schemas.pairs import DpoRun, PairsRun
from launch.schemas.training import ColdStartRun, DualRlRun, GrpoRun

if TYPE_CHECKING:
    from generator.config import GeneratorConfig

SMALL_FRAMES, SMALL_SIZE = 33, (240, 416)  # of configs/sizes/240x416x33.yaml
SMALL_JUDGE = "Qwen/Qwen3-VL-2B-Instruct"
SERVER = "http://HOST:8900"


@dataclass(frozen=True)
class Less:
    """``settings``: one or several words ``a.b=c`` each, any of which helps. ``hint``: what no setting does."""

    settings: tuple[str, ...] = ()
    hint: str = ""

    def __str__(self) -> str:
        return "; ".join(filter(None, [", or ".join(self.settings), self.hint]))


def advice(cfg: Any, ranks: int) -> dict[str, Less]:
    """By the names that `launch.planning.runs` gives its parts; a part without advice is not there."""
    if isinstance(cfg, GrpoRun):
        found = _grpo(cfg, ranks)
    elif isinstance(cfg, DpoRun):
        found = _dpo(cfg, ranks)
    elif isinstance(cfg, PairsRun):
        found = _pairs(cfg)
    else:
        found = _judge(cfg, ranks)
    tried = {part: _tried(cfg, less) for part, less in found.items()}
    return {part: less for part, less in tried.items() if less.settings or less.hint}


def _tried(cfg: Any, less: Less) -> Less:
    """Without what the schema refuses, in the hint too."""
    refused = any("=" in word and not is_new(cfg, word) for word in less.hint.split())
    return Less(
        tuple(words for words in less.settings if is_new(cfg, words)),
        "" if refused else less.hint,
    )


def is_new(cfg: Any, words: str) -> bool:
    """Whether the schema takes ``a.b=c d=e`` over this config, and it is another config then."""
    settings = {name: value for name, value in plain(cfg).items() if value != {}}
    given = [
        f"{name}={json.dumps(value).replace('Infinity', '.inf')}"
        for name, value in settings.items()
    ]
    try:
        changed = load(type(cfg), None, [*given, *words.split()])
    except ConfigError:
        return False
    return bool(plain(changed) != plain(cfg))


def _training(
    name: str, zero_stage: int, ranks: int, *, whole: str = ""
) -> dict[str, Less]:
    """Of `launch.planning.runs.training_parts`. ``whole`` trains an adapter instead of all weights; empty if one is."""

    def split(stage: int, *words: str) -> Less:
        own = [f"zero_stage={stage}"] if ranks > 1 and zero_stage < stage else []
        shared = zero_stage >= stage or bool(own)
        return Less(
            (*own, *filter(None, words)),
            "more ranks" if shared else f"more ranks, with zero_stage={stage}",
        )

    return {
        f"{name}: weights": split(3),
        f"{name}: gradients": split(2, whole),
        f"{name}: optimizer": split(1, whole),
        f"{name}: optimizer's step": split(1, whole),
    }


def _grpo(cfg: GrpoRun, ranks: int) -> dict[str, Less]:
    own = cfg.grpo.group_size // cfg.grpo.ranks_per_group
    whole = "generator.lora.rank=128" if cfg.generator.lora is None else ""
    found = _training("transformer", cfg.zero_stage, ranks, whole=whole)
    found |= _sampling("rollout", cfg.generator, own)
    found["text encoder: weights"] = Less(("cache_prompts=true",))
    found["average of the trained weights"] = Less(("ema=null",))
    found["frozen copy for KL"] = Less(
        ("grpo.kl_weight=0", whole or "generator.lora.rank=128")
    )
    found["update: activations"] = _activations(cfg.generator)
    return found | _rewards(cfg.rewards, own)


def _dpo(cfg: DpoRun, ranks: int) -> dict[str, Less]:
    whole = "generator.lora.rank=128" if cfg.generator.lora is None else ""
    own = ["dpo.micro_batch=1"] if cfg.dpo.micro_batch > 1 else []
    own += (
        []
        if cfg.generator.gradient_checkpointing
        else ["generator.gradient_checkpointing=true"]
    )
    # the videos' size is that of the pairs
    update = Less(tuple(own), "" if own else "pairs of smaller videos")
    return {
        **_training("transformer", cfg.zero_stage, ranks, whole=whole),
        "update: activations": update,
    }


def _pairs(cfg: PairsRun) -> dict[str, Less]:
    count = cfg.pairs.candidates
    return {
        **_sampling("sampling", cfg.generator, count),
        **_rewards(cfg.rewards, count),
    }


def _judge(cfg: ColdStartRun | DualRlRun, ranks: int) -> dict[str, Less]:
    checkpointing = (
        [] if cfg.gradient_checkpointing else ["gradient_checkpointing=true"]
    )
    # without dropout, which dual RL refuses; its rates are in configs/gpus/dual_rl_1.yaml
    whole = "lora.rank=64 lora.dropout=0" if cfg.lora is None else ""
    found = _training("judge", cfg.zero_stage, ranks, whole=whole)
    if isinstance(cfg, ColdStartRun):
        batch = ["cold_start.micro_batch=1"] if cfg.cold_start.micro_batch > 1 else []
        weights = found["judge: weights"]
        if cfg.base in QWEN3_VL:
            found["judge: weights"] = Less(
                (*weights.settings, f"base={SMALL_JUDGE}"), weights.hint
            )
        pixels = (
            [f"video.max_pixels={cfg.video.max_pixels // 2}"]
            if cfg.video is not None
            else []
        )
        return found | {
            "update: activations": Less(tuple([*checkpointing, *batch] or pixels))
        }
    how = cfg.dual_rl
    rows = ["dual_rl.micro_batch=1"] if how.micro_batch > 1 else []
    rows += (
        ["dual_rl.cots_per_row=1"] if (how.cots_per_row or how.group_size) > 1 else []
    )
    split = ["zero_stage=3"] if ranks > 1 and cfg.zero_stage < 3 else []
    found["frozen copy for KL"] = Less((*split, "dual_rl.kl_weight=0", whole))
    found["chains: keys and values"] = Less(
        (f"dual_rl.group_size={how.group_size // 2}",)
    )
    found["update: activations"] = Less((*checkpointing, *rows))
    return found


def _sampling(name: str, cfg: GeneratorConfig, videos: int) -> dict[str, Less]:
    """Fewer at once; where it is one already, smaller videos."""
    rollout = min(cfg.rollout_batch or videos, videos) > 1
    decoding = min(cfg.decode_batch or videos, videos) > 1
    return {
        f"{name}: activations": Less(
            ("generator.rollout_batch=1",) if rollout else _smaller_videos(cfg)
        ),
        "decoding: activations": Less(
            ("generator.decode_batch=1",) if decoding else _smaller_videos(cfg)
        ),
    }


def _activations(cfg: GeneratorConfig) -> Less:
    return Less(
        _smaller_videos(cfg)
        if cfg.gradient_checkpointing
        else ("generator.gradient_checkpointing=true",)
    )


def _smaller_videos(cfg: GeneratorConfig) -> tuple[str, ...]:
    height, width = SMALL_SIZE
    frames = (
        [f"generator.num_frames={SMALL_FRAMES}"]
        if cfg.num_frames > SMALL_FRAMES
        else []
    )
    smaller = cfg.height * cfg.width > height * width
    return (
        *frames,
        *([f"generator.height={height} generator.width={width}"] if smaller else []),
    )


def _rewards(rewards: Mapping[str, Any], videos: int) -> dict[str, Less]:
    """A DeScore of its own process, on another GPU; a smaller batch."""
    found = {}
    for name, reward in rewards.items():
        if not is_descore(name, reward):
            continue
        key = f"rewards.{name}"
        url = f"{key}.url={SERVER}" + (
            f" {key}.kind=remote" if reward.kind is not None else ""
        )
        # options are those of a DeScore, which a remote reward would refuse, and no word can take them away
        served = (
            Less((url,))
            if not reward.options
            else Less((), f"{key} in a yaml of its own: url: {SERVER}")
        )
        found[f"reward {name}: weights"] = served
        if judged_at_once(reward, videos) > 1:
            found[f"reward {name}: activations, cache"] = Less(
                (f"{key}.options.batch=1",), "not beside a url"
            )
    return found
