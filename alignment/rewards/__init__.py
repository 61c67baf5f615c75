"""Reward plug-ins: by name from here, by ``target`` from a user's own file, or by name from an installed package.

To add one here, write a file beside this one and an entry below; see brightness.py for the shape, plugin.py for the rest.

A factory imports its plug-in when it is called, so that looking at the names costs nothing.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from common.types import RewardUnavailableError

if TYPE_CHECKING:
    from alignment.config import RewardConfig
    from common.types import RewardModel

_WEB_ADDRESS = re.compile(r"https?://[^/\s]")


def _descore(cfg: RewardConfig) -> RewardModel:
    from alignment.rewards.descore import DeScoreReward

    if cfg.checkpoint is None:
        raise ValueError(
            "a descore reward needs `checkpoint`, the folder of a trained DeScore"
        )
    return _made(DeScoreReward, cfg, cfg.checkpoint)


def _brightness(cfg: RewardConfig) -> RewardModel:
    from alignment.rewards.brightness import Brightness

    return _made(Brightness, cfg)


def _dynamics(cfg: RewardConfig) -> RewardModel:
    from alignment.rewards.motion import Dynamics

    return _made(Dynamics, cfg)


def _smoothness(cfg: RewardConfig) -> RewardModel:
    from alignment.rewards.motion import Smoothness

    return _made(Smoothness, cfg)


def _niqe(cfg: RewardConfig) -> RewardModel:
    from alignment.rewards.niqe import Niqe

    return _made(Niqe, cfg)


def _similarity(cfg: RewardConfig) -> RewardModel:
    from alignment.rewards.similarity import Similarity

    return _made(
        Similarity,
        cfg,
        _folder_or_hub_name(cfg, "a similarity reward", "a CLIP or SigLIP"),
    )


def _videoreward(cfg: RewardConfig) -> RewardModel:
    from alignment.rewards.videoreward import VideoReward

    return _made(VideoReward, cfg, _converted("videoreward", cfg))


def _hpsv3(cfg: RewardConfig) -> RewardModel:
    from alignment.rewards.hpsv3 import HPSv3

    return _made(HPSv3, cfg, _converted("hpsv3", cfg))


def _generative(cfg: RewardConfig) -> RewardModel:
    from alignment.rewards.generative import Generative

    return _made(
        Generative, cfg, _folder_or_hub_name(cfg, "a generative reward", "its model")
    )


def _folder_or_hub_name(cfg: RewardConfig, what: str, model: str) -> str:
    if cfg.checkpoint is None:
        raise ValueError(
            f"{what} needs `checkpoint`, the folder or hub name of {model}"
        )
    path = Path(cfg.checkpoint)
    if not path.is_dir() and (
        path.is_absolute() or cfg.checkpoint.startswith(".") or len(path.parts) > 2
    ):
        raise ValueError(
            f"there is no folder {cfg.checkpoint}"
        )  # and no name on a hub looks like it
    return cfg.checkpoint


def _converted(name: str, cfg: RewardConfig) -> str:
    if cfg.checkpoint is None:
        raise ValueError(
            f"a {name} reward needs `checkpoint`, the folder that launch/convert_reward.py wrote"
        )
    return cfg.checkpoint


def _made(
    found: Callable[..., RewardModel], cfg: RewardConfig, *given: str
) -> RewardModel:
    """A class of ours with the options. Raises ValueError for those that it, or what it hands them on to, lacks."""
    from alignment.rewards.plugin import check_options

    check_options(found, cfg.options)
    if taken := sorted(
        cfg.options.keys()
        & set(list(inspect.signature(found).parameters)[: len(given)])
    ):
        raise ValueError(
            f"options has {', '.join(taken)}, which is a key beside options"
        )
    try:
        return found(*given, **cfg.options)
    except TypeError as error:
        if not any(
            f"unexpected keyword argument '{name}'" in str(error)
            for name in cfg.options
        ):
            raise
        raise ValueError(
            f"options has what {found.__name__} does not take: {error}"
        ) from error


def _remote(cfg: RewardConfig) -> RewardModel:
    from alignment.rewards.remote import RemoteReward

    if cfg.url is None:
        raise ValueError(
            "a remote reward needs `url`, the address of a server (launch/serve.py)"
        )
    return _made(RemoteReward, cfg, cfg.url)


REWARDS: dict[str, Callable[[RewardConfig], RewardModel]] = {
    "descore": _descore,
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

    Raises ValueError for an unknown kind, with the nearest known one, for a target that is no file, and for a url that
    is no address.
    """
    from alignment.rewards import plugin
    from alignment.rewards.errors import reward_errors

    if cfg.target is not None:
        plugin.check_target(name, cfg.target)
        return lambda cfg: plugin.from_file(name, cfg.target, cfg.options)
    if cfg.url is not None and not _WEB_ADDRESS.match(cfg.url):
        raise ValueError(
            f"rewards.{name}.url must be http://host:port, got {cfg.url!r}"
        )
    kind = cfg.kind or ("remote" if cfg.url is not None else name)
    if kind in REWARDS:
        return REWARDS[kind]
    others = plugin.installed()
    if kind in others:

        def from_package(cfg: RewardConfig) -> RewardModel:
            with reward_errors(name, ValueError):
                return plugin.as_reward(name, others[kind].load(), cfg.options)

        return from_package
    known = [*REWARDS, *others]
    close = difflib.get_close_matches(kind, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"rewards.{name}: unknown kind {kind!r}, known are {', '.join(known)}{hint}"
    )


def build_rewards(configs: Mapping[str, RewardConfig]) -> dict[str, RewardModel]:
    """name -> reward model, loaded. Raises ValueError, in a sentence that begins with ``rewards.NAME``, for what a user
    can mend: an unknown kind, options it does not take, files or packages that are missing, a server that is not there,
    and anything that a file of the user's own raises.
    """
    return {name: _built(name, cfg) for name, cfg in configs.items()}


def _built(name: str, cfg: RewardConfig) -> RewardModel:
    from alignment.rewards.errors import format_error

    try:
        return factory_of(name, cfg)(cfg)
    except (ValueError, OSError, ImportError, RewardUnavailableError) as error:
        raise ValueError(format_error(name, error, file=cfg.checkpoint)) from error
