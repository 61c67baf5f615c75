"""The registry of rewards: by kind from here, from a user's file, or from an installed package.

To add a reward, write a file in this folder and an entry in `REWARDS` below. brightness.py is
the smallest reward, plugin.py describes rewards outside this repository. A factory imports its
reward when it is called, so that reading the names costs nothing.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.rewards.addresses import check_address
from common.plugin_file import check_target
from common.types import RewardUnavailableError

if TYPE_CHECKING:
    from alignment.config import RewardConfig
    from common.types import RewardModel


def _brightness(cfg: RewardConfig) -> RewardModel:
    return _make("brightness:Brightness", cfg)


def _dynamics(cfg: RewardConfig) -> RewardModel:
    return _make("motion:Dynamics", cfg)


def _smoothness(cfg: RewardConfig) -> RewardModel:
    return _make("motion:Smoothness", cfg)


def _descore(cfg: RewardConfig) -> RewardModel:
    folder = _checkpoint(cfg, "a descore reward", "the folder of a trained DeScore")
    return _make("descore:DeScoreReward", cfg, folder)


def _videoreward(cfg: RewardConfig) -> RewardModel:
    folder = _checkpoint(cfg, "a videoreward reward", _CONVERTED)
    return _make("videoreward:VideoReward", cfg, folder)


def _hpsv3(cfg: RewardConfig) -> RewardModel:
    folder = _checkpoint(cfg, "a hpsv3 reward", _CONVERTED)
    return _make("hpsv3:HPSv3", cfg, folder)


def _similarity(cfg: RewardConfig) -> RewardModel:
    what = "the folder or hub name of a CLIP or SigLIP"
    model = _checkpoint(cfg, "a similarity reward", what)
    _check_folder(model)
    return _make("similarity:Similarity", cfg, model)


def _generative(cfg: RewardConfig) -> RewardModel:
    what = "the folder or hub name of its model"
    model = _checkpoint(cfg, "a generative reward", what)
    _check_folder(model)
    return _make("generative:Generative", cfg, model)


def _remote(cfg: RewardConfig) -> RewardModel:
    if not cfg.urls:
        raise ValueError(
            "a remote reward needs `url`, the address of a server (launch/serve.py)"
        )
    return _make("remote:RemoteReward", cfg, cfg.urls)


def _named(name: str, cfg: RewardConfig) -> RewardConfig:
    """The reward with its name in the run among its options, unless the user gave one."""
    return replace(cfg, options={"name": name, **cfg.options})


REWARDS: dict[str, Callable[[RewardConfig], RewardModel]] = {
    "descore": _descore,
    "brightness": _brightness,
    "dynamics": _dynamics,
    "smoothness": _smoothness,
    "similarity": _similarity,
    "videoreward": _videoreward,
    "hpsv3": _hpsv3,
    "generative": _generative,
    "remote": _remote,
}
# Kinds of earlier versions, and what to write instead.
RENAMED_KINDS = {"shapes": "target: toy/oracle.py:ShapesOracle"}
_CONVERTED = "the folder that launch/convert_reward.py wrote"


def build_rewards(configs: Mapping[str, RewardConfig]) -> dict[str, RewardModel]:
    """Load every reward of a run, name -> reward model.

    Raises ValueError, with a message that begins with ``rewards.NAME``, for what a user can
    correct: an unknown kind or option, missing files or packages, a server that does not
    answer, and anything that a user's file raises.
    """
    return {name: _build(name, cfg) for name, cfg in configs.items()}


def check_group_size(rewards: Mapping[str, RewardModel], size: int) -> None:
    """Raise ValueError for a reward that cannot compare as many videos of a prompt."""
    for name, reward in rewards.items():
        # most rewards score videos one by one
        check_size = getattr(reward, "check_group_size", None)
        if check_size is None:
            continue
        try:
            check_size(size)
        except ValueError as error:
            raise ValueError(f"rewards.{name}: {error}") from error


def factory_of(name: str, cfg: RewardConfig) -> Callable[[RewardConfig], RewardModel]:
    """Return the factory of a run's reward. Nothing of the reward is imported or run yet.

    Raises ValueError for an unknown kind, with the nearest known kind, for a target that is no
    file, and for a url that is no address.
    """
    from alignment.rewards import plugin
    from alignment.rewards.errors import reward_errors

    # a file of the user
    if cfg.target is not None:
        check_target(f"rewards.{name}.target", cfg.target)
        return lambda cfg: plugin.from_file(name, cfg.target, cfg.options)

    # a reward of this folder
    for url in cfg.urls:
        check_address(name, url)
    kind = cfg.kind or ("remote" if cfg.url is not None else name)
    if kind in REWARDS:
        return REWARDS[kind]

    # a reward of an installed package
    others = plugin.installed()
    if kind not in others:
        raise ValueError(_unknown_kind(name, kind, [*REWARDS, *others]))

    def from_package(cfg: RewardConfig) -> RewardModel:
        with reward_errors(name, ValueError):
            return plugin.as_reward(name, others[kind].load(), cfg.options)

    return from_package


def _unknown_kind(name: str, kind: str, known: list[str]) -> str:
    # a typo, or a kind of an earlier version
    close = difflib.get_close_matches(kind, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    if kind in RENAMED_KINDS:
        hint = f"; use {RENAMED_KINDS[kind]} instead"
    return f"rewards.{name}: unknown kind {kind!r}, known are {', '.join(known)}{hint}"


def _build(name: str, cfg: RewardConfig) -> RewardModel:
    from alignment.rewards.errors import format_error

    try:
        factory = factory_of(name, cfg)
        # a server may have a reward of that name
        if factory is _remote:
            cfg = _named(name, cfg)
        return factory(cfg)
    except (ValueError, OSError, ImportError, RewardUnavailableError) as error:
        raise ValueError(format_error(name, error, file=cfg.checkpoint)) from error


def _make(path: str, cfg: RewardConfig, *arguments: Any) -> RewardModel:
    """Call a class of this folder, ``module:Class``, with the reward's options.

    Raises ValueError for options that the class, or what it passes them on to, does not take.
    """
    from alignment.rewards.plugin import check_options

    # the heavy import happens here
    module_name, _, class_name = path.partition(":")
    module = importlib.import_module(f"alignment.rewards.{module_name}")
    reward_class = getattr(module, class_name)
    check_options(reward_class, cfg.options)
    # checkpoint and url are keys of the reward, not options
    positional = list(inspect.signature(reward_class).parameters)[: len(arguments)]
    taken = sorted(cfg.options.keys() & set(positional))
    if taken:
        raise ValueError(
            f"options has {', '.join(taken)}, which is a key of the reward: "
            "write it beside options, not inside"
        )
    try:
        return reward_class(*arguments, **cfg.options)
    except TypeError as error:
        # an option that the class passes on, for example to DeScoreScorer.load
        for option in cfg.options:
            if f"unexpected keyword argument '{option}'" in str(error):
                raise ValueError(
                    f"{class_name} takes no such option: {error}"
                ) from error
        raise


def _checkpoint(cfg: RewardConfig, reward: str, what: str) -> str:
    if cfg.checkpoint is None:
        raise ValueError(f"{reward} needs `checkpoint`, {what}")
    return cfg.checkpoint


def _check_folder(checkpoint: str) -> None:
    """Raise ValueError for a missing folder whose path cannot be a hub name instead."""
    path = Path(checkpoint)
    is_path = path.is_absolute() or checkpoint.startswith(".") or len(path.parts) > 2
    if is_path and not path.is_dir():
        raise ValueError(f"there is no folder {checkpoint}")
