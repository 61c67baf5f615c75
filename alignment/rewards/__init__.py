"""Reward plug-ins by name. To add one, write a file beside this one and an entry here; see brightness.py for the shape.

A factory imports its plug-in when it is called, so that looking at the names costs nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alignment.config import RewardConfig
    from common.types import RewardModel


def _descore(cfg: RewardConfig) -> RewardModel:
    from alignment.rewards.descore import DeScoreReward

    if cfg.checkpoint is None:
        raise ValueError("a descore reward needs `checkpoint`, the folder of a trained DeScore")
    return DeScoreReward(cfg.checkpoint, **cfg.options)


def _shapes(cfg: RewardConfig) -> RewardModel:
    from alignment.rewards.shapes import ShapesOracle

    return ShapesOracle(**cfg.options)


def _brightness(cfg: RewardConfig) -> RewardModel:
    from alignment.rewards.brightness import Brightness

    return Brightness(**cfg.options)


REWARDS: dict[str, Callable[[RewardConfig], RewardModel]] = {
    "descore": _descore,
    "shapes": _shapes,
    "brightness": _brightness,
}


def factory_of(name: str, cfg: RewardConfig) -> Callable[[RewardConfig], RewardModel]:
    """The factory a run's reward asks for. Raises ValueError for an unknown kind, with the nearest known one."""
    kind = cfg.kind or name
    if kind not in REWARDS:
        close = difflib.get_close_matches(kind, REWARDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"rewards.{name}: unknown kind {kind!r}, known are {', '.join(REWARDS)}{hint}")
    return REWARDS[kind]


def build_rewards(configs: Mapping[str, RewardConfig]) -> dict[str, RewardModel]:
    """name -> reward model, loaded. Raises ValueError for an unknown kind, TypeError for options it does not take."""
    return {name: factory_of(name, cfg)(cfg) for name, cfg in configs.items()}
