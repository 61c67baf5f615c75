"""Collect from a run's folder how a model was trained, in words that may be published.

Only numbers, switches, plain words and hub names are taken: no path, no address and no free text
of a config.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import safe_yaml
from common.run_record import value_at
from launch.reporting.data import columns, config, metrics

# Texts that cannot be a path, an address or a sentence.
PLAIN_WORD = re.compile(r"[A-Za-z][\w.-]{0,39}")
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
DPO_METHODS = {
    "dpo": "Flow-DPO",
    "rwr": "Flow-RWR",
    "sft": "supervised fine-tuning",
}
# The kind of a run is the section that its config has; these settings go into the card.
FILE = Path(__file__).parents[1] / "templates" / "card_settings.yaml"
SETTINGS: dict[str, list[str]] = {}
for _kind, _parts in safe_yaml.parse(FILE.read_text(encoding="utf-8")).value.items():
    SETTINGS[_kind] = list(itertools.chain.from_iterable(_parts))
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
        "dpo": DPO_METHODS.get(value_at(cfg, "dpo.method"), "Flow-DPO"),
        "cold_start": "DeScore, stage 1",
        "dual_rl": "DeScore, stage 2",
    }
    settings = {
        key: text
        for key in SETTINGS[kind]
        if (text := _publishable(value_at(cfg, key))) is not None
    }
    rewards = {}
    for name, entry in (cfg.get("rewards") or {}).items():
        if PLAIN_WORD.fullmatch(name) and isinstance(entry, dict):
            rewards[name] = float(entry.get("weight", 1.0))

    # A checkpoint knows the steps before it. The last line of a run may hold an evaluation only.
    until = _steps_until(trained)
    rows = [row for row in metrics(run) if row.get("step", 0) < until]
    steps = {
        row["step"]
        for row in rows
        if "step" in row and any(name.startswith("train/") for name in row)
    }

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


def _base_path(cfg: Mapping[str, Any]) -> str | None:
    """Return the model that training began with, through at most four earlier runs.

    A DeScore of stage 2 began as the checkpoint of stage 1, whose config names the base.
    """
    path = None
    # The number of hops is limited, in case a config names its own folder.
    for _ in range(5):
        base = value_at(cfg, "generator.path") or cfg.get("base")
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
