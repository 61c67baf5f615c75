"""Reward plug-ins: by name from here, by ``target`` from a user's own file, or by name from an installed package.

To add one here, write a file beside this one and an entry below; see brightness.py for the shape, own.py for the rest.

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


def _dynamics(cfg: RewardConfig) -> RewardModel:
    from alignment.rewards.motion import Dynamics

    return Dynamics(**cfg.options)


def _smoothness(cfg: RewardConfig) -> RewardModel:
    from alignment.rewards.motion import Smoothness

    return Smoothness(**cfg.options)


def _niqe(cfg: RewardConfig) -> RewardModel:
    from alignment.rewards.niqe import Niqe

    return Niqe(**cfg.options)


def _similarity(cfg: RewardConfig) -> RewardModel:
    from alignment.rewards.similarity import Similarity

    if cfg.checkpoint is None:
        raise ValueError("a similarity reward needs `checkpoint`, the folder or hub name of a CLIP or SigLIP")
    return Similarity(cfg.checkpoint, **cfg.options)


def _videoreward(cfg: RewardConfig) -> RewardModel:
    from alignment.rewards.videoreward import VideoReward

    return VideoReward(_converted("videoreward", cfg), **cfg.options)


def _hpsv3(cfg: RewardConfig) -> RewardModel:
    from alignment.rewards.hpsv3 import HPSv3

    return HPSv3(_converted("hpsv3", cfg), **cfg.options)


def _generative(cfg: RewardConfig) -> RewardModel:
    from alignment.rewards.generative import Generative

    if cfg.checkpoint is None:
        raise ValueError("a generative reward needs `checkpoint`, the folder or hub name of its model")
    return Generative(cfg.checkpoint, **cfg.options)


def _converted(name: str, cfg: RewardConfig) -> str:
    if cfg.checkpoint is None:
        raise ValueError(f"a {name} reward needs `checkpoint`, the folder that launch/convert_reward.py wrote")
    return cfg.checkpoint


def _remote(cfg: RewardConfig) -> RewardModel:
    from alignment.rewards.remote import RemoteReward

    if cfg.url is None:
        raise ValueError("a remote reward needs `url`, the address of a server (launch/serve.py)")
    return RemoteReward(cfg.url, **cfg.options)


REWARDS: dict[str, Callable[[RewardConfig], RewardModel]] = {
    "descore": _descore,
    "shapes": _shapes,
    "brightness": _brightness,
    "dynamics": _dynamics,
    "smoothness": _smoothness,
    "similarity": _similarity,
    "niqe": _niqe,
    "videoreward": _videoreward,
    "hpsv3": _hpsv3,
    "generative": _generative,
    "remote": _remote,
}


def factory_of(name: str, cfg: RewardConfig) -> Callable[[RewardConfig], RewardModel]:
    """The factory a run's reward asks for. Nothing of the reward is imported or run yet.

    Raises ValueError for an unknown kind, with the nearest known one, and for a target that is no file.
    """
    from alignment.rewards import own

    if cfg.target is not None:
        own.check_target(name, cfg.target)
        return lambda cfg: own.from_file(name, cfg.target, cfg.options)
    kind = cfg.kind or ("remote" if cfg.url is not None else name)
    if kind in REWARDS:
        return REWARDS[kind]
    others = own.installed()
    if kind in others:
        return lambda cfg: own.as_reward(name, others[kind].load(), cfg.options)
    known = [*REWARDS, *others]
    close = difflib.get_close_matches(kind, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"rewards.{name}: unknown kind {kind!r}, known are {', '.join(known)}{hint}")


def build_rewards(configs: Mapping[str, RewardConfig]) -> dict[str, RewardModel]:
    """name -> reward model, loaded. Raises ValueError for an unknown kind, TypeError for options it does not take."""
    return {name: factory_of(name, cfg)(cfg) for name, cfg in configs.items()}
