"""Collect from a run's folder how a model was trained, in words that may be published.

Only numbers, switches, plain words and hub names are taken: no path, no address and no free text
of a config.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.reporting.data import columns, config, metrics

# Texts that cannot be a path, an address or a sentence.
PLAIN_WORD = re.compile(r"[A-Za-z][\w.-]{0,39}")
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
DPO_METHODS = {
    "dpo": "Flow-DPO",
    "rwr": "Flow-RWR",
    "sft": "supervised fine-tuning",
}
# Settings that several kinds of runs share.
GENERATOR_SETTINGS = (
    "generator.height",
    "generator.width",
    "generator.num_frames",
    "generator.fps",
    "generator.dtype",
    "generator.lora.rank",
    "generator.lora.alpha",
    "generator.sampler.num_steps",
    "generator.sampler.shift",
    "generator.sampler.stochastic",
    "generator.sampler.stochastic_range",
    "generator.sampler.kernel",
    "generator.sampler.noise_level",
    "generator.sampler.max_std",
    "generator.sampler.guidance_scale",
    "optimizer.lr",
    "optimizer.weight_decay",
    "optimizer.max_grad_norm",
    "optimizer.warmup_steps",
    "ema.decay",
    "seed",
)
DESCORE_SETTINGS = (
    "lr.llm",
    "lr.vision",
    "lr.merger",
    "lr.query",
    "lr.head",
    "lora.rank",
    "lora.alpha",
    "dtype",
    "optimizer.max_grad_norm",
    "optimizer.warmup_steps",
    "seed",
)
# The kind of a run is the section that its config has; these settings go into the card.
SETTINGS = {
    "grpo": (
        "steps",
        "prompts_per_step",
        "grpo.group_size",
        "grpo.scale",
        "grpo.kl_weight",
        "grpo.reweight",
        *GENERATOR_SETTINGS,
    ),
    "dpo": (
        "dpo.method",
        "dpo.beta",
        "dpo.beta_schedule",
        "dpo.noise",
        "dpo.pairs_per_step",
        "dpo.epochs",
        *GENERATOR_SETTINGS,
    ),
    "cold_start": (
        "cold_start.pairs_per_step",
        "cold_start.epochs",
        "cold_start.theta",
        "cold_start.masking.probability",
        "cold_start.weight_decay",
        *DESCORE_SETTINGS,
    ),
    "dual_rl": (
        "dual_rl.pairs_per_step",
        "dual_rl.group_size",
        "dual_rl.steps",
        "dual_rl.kl_weight",
        "dual_rl.bt_weight",
        "dual_rl.weight_decay",
        *DESCORE_SETTINGS,
    ),
}
# Rewards, held-out measurements and the loss, but not their spreads.
LOGGED = re.compile(
    r"(reward/\w+|heldout/\w+|eval(_stock)?/\w+|train/(loss|accuracy|kl))"
)
SPREADS = ("_std", "_std_max", "_std_median", "zero_spread", "_unscored")


@dataclass(frozen=True)
class LoggedChange:
    """A logged quantity: the MEAN of its first and of its last ``over`` values."""

    name: str
    first: float
    last: float
    over: int


@dataclass(frozen=True)
class Provenance:
    """How a model was trained; everything is empty for a folder without a run.

    algorithm   "GRPO", "Flow-DPO", "DeScore, stage 1", ...; None if unknown.
    base_model  The hub name of the model that was trained; None if it was a local folder.
    base_path   The same as the config gives it, perhaps a local folder. It is not published.
    settings    Maps a dotted key of config.yaml to its value.
    rewards     Maps a reward's name to its weight.
    """

    algorithm: str | None = None
    base_model: str | None = None
    base_path: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    rewards: Mapping[str, float] = field(default_factory=dict)
    changes: tuple[LoggedChange, ...] = ()
    steps: int = 0


def read_provenance(trained: Path) -> Provenance:
    """Collect the provenance of final/, final_ema/ or checkpoints/step-N/trained.

    ValueError when the run's config.yaml cannot be read.
    """
    # The run's config says what it trained.
    run = run_folder(trained)
    cfg = config(run)
    kind = next((name for name in SETTINGS if name in cfg), None)
    if kind is None:
        return Provenance()

    # Take the settings and rewards that may be published.
    algorithms = {
        "grpo": "GRPO",
        "dpo": DPO_METHODS.get(_value_at(cfg, "dpo.method"), "Flow-DPO"),
        "cold_start": "DeScore, stage 1",
        "dual_rl": "DeScore, stage 2",
    }
    settings = {}
    for key in SETTINGS[kind]:
        value = _publishable(_value_at(cfg, key))
        if value is not None:
            settings[key] = value
    rewards = {}
    for name, entry in (cfg.get("rewards") or {}).items():
        if PLAIN_WORD.fullmatch(name) and isinstance(entry, dict):
            rewards[name] = float(entry.get("weight", 1.0))

    # A checkpoint knows the steps before it. The last line of a run may hold an evaluation only.
    until = _steps_until(trained)
    rows = [row for row in metrics(run) if row.get("step", 0) < until]
    steps = set()
    for row in rows:
        if "step" in row and any(name.startswith("train/") for name in row):
            steps.add(row["step"])

    # Publish the base's name only if it is on the hub.
    base = _base_path(cfg)
    return Provenance(
        algorithm=algorithms[kind],
        base_model=base if is_hub_name(base) else None,
        base_path=base,
        settings=settings,
        rewards=rewards,
        changes=tuple(logged_changes(rows)),
        steps=len(steps),
    )


def run_folder(trained: Path) -> Path | None:
    """Return the nearest of three folders above that has a config.yaml."""
    # RUN/final, or RUN/checkpoints/step-N/trained.
    for folder in trained.resolve().parents[:3]:
        if (folder / "config.yaml").is_file():
            return folder
    return None


def is_hub_name(path: str | None) -> bool:
    """Return whether a path is OWNER/NAME, and not a folder of this machine."""
    # A local folder may look like a hub name.
    if path is None or Path(path).exists():
        return False
    return HUB_NAME.fullmatch(path) is not None


def logged_changes(rows: Iterable[Mapping[str, float]]) -> list[LoggedChange]:
    """Compare both ends of each logged quantity: ten values, or a single value below 20."""
    changes = []
    for name, values in sorted(columns(rows).items()):
        if not LOGGED.fullmatch(name) or name.endswith(SPREADS):
            continue
        # Average both ends.
        over = 10 if len(values) >= 20 else 1
        first = sum(values[:over]) / over
        last = sum(values[-over:]) / over
        changes.append(LoggedChange(name, first, last, over))
    return changes


def _steps_until(trained: Path) -> float:
    """Return the step of a checkpoint's folder, infinity for the end of a run."""
    # Checkpoints are checkpoints/step-N/trained.
    folder = trained.resolve()
    match = re.fullmatch(r"step-(\d+)", folder.parent.name)
    if folder.name != "trained" or match is None:
        return math.inf
    return int(match[1])


def _value_at(cfg: Mapping[str, Any], dotted_key: str) -> Any:
    """Return the value at a.b.c, None if it is missing."""
    value: Any = cfg
    for key in dotted_key.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _base_path(cfg: Mapping[str, Any]) -> str | None:
    """Return the model that training began with, through at most four earlier runs.

    A DeScore of stage 2 began as the checkpoint of stage 1, whose config names the base.
    """
    path = None
    # The number of hops is limited, in case a config names its own folder.
    for _ in range(5):
        base = _value_at(cfg, "generator.path") or cfg.get("base")
        if base is not None:
            return base if isinstance(base, str) else path
        earlier = cfg.get("checkpoint")
        if not isinstance(earlier, str):
            return path
        path = earlier
        cfg = config(run_folder(Path(earlier))) if Path(earlier).is_dir() else {}
    return path


def _publishable(value: Any) -> str | None:
    """Return a number, switch or plain word as text; None for possible paths and sentences."""
    # bool is a kind of int.
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, str) and PLAIN_WORD.fullmatch(value):
        return value
    return None
