"""Where a trained folder comes from, as far as its run folder says so in words that may be published.

Only numbers, switches, plain words and hub names are taken: no path, no address and no free text of a config.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.reporting.data import config, metrics

_WORD = re.compile(r"[A-Za-z][\w.-]{0,39}")
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_METHODS = {"dpo": "Flow-DPO", "rwr": "Flow-RWR", "sft": "supervised fine-tuning"}
_GENERATOR = (
    "height",
    "width",
    "num_frames",
    "fps",
    "dtype",
    "lora.rank",
    "lora.alpha",
)
_SAMPLER = (
    "num_steps",
    "shift",
    "stochastic",
    "stochastic_range",
    "kernel",
    "noise_level",
    "max_std",
)
_WAN = tuple(
    f"generator.{key}"
    for key in (
        *_GENERATOR,
        *(f"sampler.{k}" for k in _SAMPLER),
        "sampler.guidance_scale",
    )
)
_SCHEDULE = ("optimizer.max_grad_norm", "optimizer.warmup_steps")
_OPTIMIZER = ("optimizer.lr", "optimizer.weight_decay", *_SCHEDULE)
_JUDGE = (
    *(f"lr.{part}" for part in ("llm", "vision", "merger", "query", "head")),
    "lora.rank",
    "lora.alpha",
    "dtype",
)
_SETTINGS = {
    "grpo": (
        *(
            "steps",
            "prompts_per_step",
            "grpo.group_size",
            "grpo.scale",
            "grpo.kl_weight",
            "grpo.reweight",
        ),
        *(*_WAN, *_OPTIMIZER, "ema.decay", "seed"),
    ),
    "dpo": (
        *(
            "dpo.method",
            "dpo.beta",
            "dpo.beta_schedule",
            "dpo.noise",
            "dpo.pairs_per_step",
            "dpo.epochs",
        ),
        *(*_WAN, *_OPTIMIZER, "ema.decay", "seed"),
    ),
    "cold_start": (
        *(
            "cold_start.pairs_per_step",
            "cold_start.epochs",
            "cold_start.theta",
            "cold_start.masking.probability",
        ),
        *("cold_start.weight_decay", *_JUDGE, *_SCHEDULE, "seed"),
    ),
    "dual_rl": (
        *(
            "dual_rl.pairs_per_step",
            "dual_rl.group_size",
            "dual_rl.steps",
            "dual_rl.kl_weight",
            "dual_rl.bt_weight",
        ),
        *("dual_rl.weight_decay", *_JUDGE, *_SCHEDULE, "seed"),
    ),
}
_MEASURED = re.compile(
    r"(reward/\w+|heldout/\w+|eval(_stock)?/\w+|train/(loss|accuracy|kl))"
)
_SPREADS = ("_std", "_std_max", "_std_median", "zero_spread", "_unscored")


@dataclass(frozen=True)
class Change:
    """A logged quantity: MEAN of its first and of its last ``over`` values."""

    name: str
    first: float
    last: float
    over: int


@dataclass(frozen=True)
class Origin:
    """What there is to say. All empty for a folder without a run.

    algorithm   "GRPO", "Flow-DPO", "DeScore, stage 1", ...; None if unknown
    base_model  hub name of what was trained, None when it is only known by a local folder
    base_path   what the config calls it, for this machine alone
    settings    dotted key of config.yaml -> value
    rewards     name -> weight
    """

    algorithm: str | None = None
    base_model: str | None = None
    base_path: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    rewards: Mapping[str, float] = field(default_factory=dict)
    changes: tuple[Change, ...] = ()
    steps: int = 0


def origin_of(trained: Path) -> Origin:
    """Of final/, final_ema/ or checkpoints/step-N/trained. ValueError when the run's config.yaml cannot be read."""
    run = run_folder(trained)
    cfg = config(run)
    kind = next((name for name in _SETTINGS if name in cfg), None)
    if kind is None:
        return Origin()
    method = at(cfg, "dpo.method")
    stages = {"grpo": "GRPO", "dpo": _METHODS.get(method, "Flow-DPO")}
    stages |= {"cold_start": "DeScore, stage 1", "dual_rl": "DeScore, stage 2"}
    rows = [row for row in metrics(run) if row.get("step", 0) < _steps_until(trained)]
    path = _base_of(cfg)
    values = {key: _public(at(cfg, key)) for key in _SETTINGS[kind]}
    rewards = cfg.get("rewards") or {}
    return Origin(
        algorithm=stages[kind],
        base_model=path if is_hub_name(path) else None,
        base_path=path,
        settings={key: value for key, value in values.items() if value is not None},
        rewards={
            name: float(entry.get("weight", 1.0))
            for name, entry in rewards.items()
            if _WORD.fullmatch(name) and isinstance(entry, dict)
        },
        changes=tuple(changes(rows)),
        steps=_steps(rows),
    )


def _steps(rows: Iterable[Mapping[str, float]]) -> int:
    """Training steps: a last line may hold nothing but an evaluation after all of them."""
    return len(
        {
            row["step"]
            for row in rows
            if "step" in row and any(name.startswith("train/") for name in row)
        }
    )


def _steps_until(trained: Path) -> float:
    """Steps that a checkpoint of a run was saved after, as its folder is called; without bound for its end."""
    where = trained.resolve()
    found = (
        re.fullmatch(r"step-(\d+)", where.parent.name)
        if where.name == "trained"
        else None
    )
    return int(found[1]) if found else math.inf


def run_folder(trained: Path) -> Path | None:
    """The nearest folder above with a config.yaml, as deep as runs put what they trained."""
    above = trained.resolve().parents[:3]
    return next(
        (folder for folder in above if (folder / "config.yaml").is_file()), None
    )


def is_hub_name(path: str | None) -> bool:
    """OWNER/NAME, and no folder of this machine."""
    return (
        path is not None
        and _HUB_NAME.fullmatch(path) is not None
        and not Path(path).exists()
    )


def changes(rows: Iterable[Mapping[str, float]]) -> list[Change]:
    """Of rewards, held-out measurements and the loss. Ten values at each end, or one where there are fewer than 20."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if (
                _MEASURED.fullmatch(name)
                and not name.endswith(_SPREADS)
                and math.isfinite(value)
            ):
                values.setdefault(name, []).append(value)
    ends = {name: 10 if len(own) >= 20 else 1 for name, own in values.items()}
    return [
        Change(
            name,
            sum(own[: ends[name]]) / ends[name],
            sum(own[-ends[name] :]) / ends[name],
            ends[name],
        )
        for name, own in sorted(values.items())
    ]


def at(cfg: Mapping[str, Any], dotted: str) -> Any:
    """The value at a.b.c, None where there is none."""
    value: Any = cfg
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _base_of(cfg: Mapping[str, Any], hops: int = 4) -> str | None:
    """What was trained: a generator, a judge's base, or what the judge that was trained further began as."""
    path = at(cfg, "generator.path") or cfg.get("base")
    if path is None and isinstance(earlier := cfg.get("checkpoint"), str):
        before = (
            config(run_folder(Path(earlier))) if hops and Path(earlier).is_dir() else {}
        )
        return (_base_of(before, hops - 1) if before else None) or earlier
    return path if isinstance(path, str) else None


def _public(value: Any) -> str | None:
    """Numbers, switches and plain words; None for anything that could be a path or a sentence."""
    if isinstance(value, bool | int | float):
        return f"{value:g}" if isinstance(value, float) else str(value).lower()
    return value if isinstance(value, str) and _WORD.fullmatch(value) else None
