"""A user's own reward: a function or an object from a file outside the repository, or from an installed package.

    def score(video_BTYXC, prompts):          # uint8 (B, T, Y, X, 3), one prompt each; may take fps= as well
        return video_BTYXC.float().mean((1, 2, 3, 4))     # B numbers, higher is better, NaN = could not judge

A class or an object with ``score`` (`common.types.RewardModel`) does as well. ``group_level = True`` on either makes
the loop call it once for each group, with all its members and nobody else's: for win rates within a group.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.types import Score

if TYPE_CHECKING:
    from torch import Tensor

    from common.types import RewardModel

GROUP = "video_alignment.rewards"  # of entry points: name = "package.module:factory"


class FunctionReward:
    """A function as a `RewardModel`. What it returns must be a `Score`, or one number for each video."""

    def __init__(self, name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        self.name, self.function, self.options = name, function, dict(options)
        self.group_level = bool(getattr(function, "group_level", False))
        parameters = inspect.signature(function).parameters
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self.takes_fps = takes_all or "fps" in parameters
        if unknown := [] if takes_all else sorted(self.options.keys() - parameters.keys()):
            raise TypeError(f"rewards.{name}: {function.__name__} takes no {', '.join(unknown)}")

    def score(self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float) -> Score:
        import torch

        options = {**self.options, "fps": fps} if self.takes_fps else self.options
        said = self.function(video_BTYXC, list(prompts), **options)
        if isinstance(said, Score):
            return said
        values = [float("nan") if value is None else float(value) for value in said]
        if len(values) != len(prompts):
            raise ValueError(f"rewards.{self.name}: {len(values)} numbers for {len(prompts)} videos")
        return Score(torch.tensor(values, dtype=torch.float32))


def check_target(name: str, target: str) -> None:
    """Look at ``file.py:attribute`` without running it. Raises ValueError when it cannot be one."""
    file, _, attribute = target.rpartition(":")
    if not file.endswith(".py") or not attribute.isidentifier():
        raise ValueError(f"rewards.{name}.target must be path/to/file.py:name, got {target!r}")
    if not Path(file).is_file():
        raise ValueError(f"rewards.{name}.target: there is no file {file}")


def from_file(name: str, target: str, options: Mapping[str, Any]) -> RewardModel:
    """Run the file and make a reward of what the target names. Raises ValueError when that is none."""
    check_target(name, target)
    file, _, attribute = target.rpartition(":")
    module_name = f"own_reward_{name}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    if not hasattr(module, attribute):
        raise ValueError(f"rewards.{name}.target: {file} has no {attribute}")
    return as_reward(name, getattr(module, attribute), options)


def as_reward(name: str, found: Any, options: Mapping[str, Any]) -> RewardModel:
    """A class is called with the options, an object with ``score`` is taken as it is, a function is wrapped."""
    if inspect.isclass(found):
        found, options = found(**options), {}
    if callable(getattr(found, "score", None)):
        if options:
            raise TypeError(f"rewards.{name}: an object takes no options, got {', '.join(options)}")
        if not hasattr(found, "name"):
            found.name = name
        return found
    if callable(found):
        return FunctionReward(name, found, options)
    raise ValueError(f"rewards.{name}: {type(found).__name__} is neither a function nor has it a method score")


def installed() -> dict[str, EntryPoint]:
    """What packages offer under the entry point group."""
    return {one.name: one for one in entry_points(group=GROUP)}
