"""A user's own reward: a function or an object from a file outside the repository, or from an installed package.

    def score(video_BTYXC, prompts):          # uint8 (B, T, Y, X, 3), one prompt each; may take fps= as well
        return video_BTYXC.float().mean((1, 2, 3, 4))     # B numbers, higher is better, NaN = could not judge

A class, called with the options, or an object with such a ``score`` does as well; each may also say a
`common.types.Score`. ``group_level = True`` on it makes the loop call it once for each group, with all its members and
nobody else's: for win rates within a group.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.rewards.errors import check_count, reward_errors
from common.types import Score

if TYPE_CHECKING:
    from torch import Tensor

    from common.types import RewardModel

GROUP = "video_alignment.rewards"  # of entry points: name = "package.module:factory"


class FunctionReward:
    """A function, or an object's ``score``, as a `RewardModel`. It must say a `Score`, or one number for each video."""

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        options: Mapping[str, Any],
        *,
        group_level: bool = False,
    ) -> None:
        self.name, self.function, self.options, self.group_level = (
            name,
            function,
            dict(options),
            group_level,
        )
        check_options(function, self.options)
        parameters = inspect.signature(function).parameters
        takes_all = any(
            p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
        )
        self.takes_fps = takes_all or "fps" in parameters
        try:
            inspect.signature(function).bind(None, None, **self._given(0.0))
        except TypeError as error:
            raise ValueError(
                f"{_called(function)} cannot be called with videos and prompts: {error}"
            ) from error

    def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        import torch

        said = self.function(video_BTYXC, list(prompts), **self._given(fps))
        if isinstance(said, Score):
            check_count(self.name, len(said.value_B), len(prompts))
            return said
        values = self._numbers(said, len(prompts))
        check_count(self.name, len(values), len(prompts))
        return Score(torch.tensor(values, dtype=torch.float32))

    def _given(self, fps: float) -> dict[str, Any]:
        return {**self.options, "fps": fps} if self.takes_fps else self.options

    def _numbers(self, said: Any, videos: int) -> list[float]:
        """What was said, None as NaN. One number alone is a list of one."""
        alone = not isinstance(said, Iterable) or getattr(said, "ndim", 1) == 0
        try:
            return [
                math.nan if value is None else float(value)
                for value in ([said] if alone else said)
            ]
        except (
            TypeError,
            ValueError,
            RuntimeError,
        ) as error:  # RuntimeError: a tensor of several, row by row
            shape = getattr(said, "shape", None)
            what = type(said).__name__ + (
                "" if shape is None else f" of shape {tuple(shape)}"
            )
            raise ValueError(
                f"rewards.{self.name}: score said a {what} for {videos} videos, not one number for each: {error}"
            ) from error


def check_options(found: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """ValueError for options that a function or a class does not take, with those that it does."""
    parameters = inspect.signature(found).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    if unknown := sorted(options.keys() - parameters.keys()):
        taken = [
            k
            for k, p in parameters.items()
            if k != "fps" and (p.default is not p.empty or p.kind is p.KEYWORD_ONLY)
        ]
        hint = (
            f"; its options are {', '.join(taken)}" if taken else "; it has no options"
        )
        raise ValueError(f"{_called(found)} takes no {', '.join(unknown)}{hint}")


def check_target(name: str, target: str) -> None:
    """Look at ``file.py:attribute`` without running it. Raises ValueError when it cannot be one."""
    file, _, attribute = target.rpartition(":")
    if not file.endswith(".py") or not attribute.isidentifier():
        raise ValueError(
            f"rewards.{name}.target must be path/to/file.py:name, got {target!r}"
        )
    if not Path(file).is_file():
        raise ValueError(f"rewards.{name}.target: there is no file {file}")


def from_file(name: str, target: str, options: Mapping[str, Any]) -> RewardModel:
    """Run the file and make a reward of what the target names. Raises ValueError when that is none, and for whatever
    the file raises, with the line.
    """
    check_target(name, target)
    file, _, attribute = target.rpartition(":")
    module_name = f"own_reward_{name}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up
    with reward_errors(name, ValueError, file=file):
        spec.loader.exec_module(module)
        if not hasattr(module, attribute):
            close = difflib.get_close_matches(attribute, vars(module), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"rewards.{name}.target: {file} has no {attribute!r}{hint}"
            )
        return as_reward(name, getattr(module, attribute), options)


def as_reward(name: str, found: Any, options: Mapping[str, Any]) -> RewardModel:
    """A class is called with the options; its object, one that is ready, and a function are wrapped alike. Raises
    ValueError for what is none of them, and for options that it does not take.
    """
    if inspect.isclass(found):
        check_options(found, options)
        found, options = found(**options), {}
    group_level = bool(getattr(found, "group_level", False))
    if callable(score := getattr(found, "score", None)):
        if options:
            raise ValueError(f"an object takes no options, got {', '.join(options)}")
        return FunctionReward(name, score, {}, group_level=group_level)
    if callable(found):
        return FunctionReward(name, found, options, group_level=group_level)
    raise ValueError(
        f"{type(found).__name__} is neither a function nor has it a method score"
    )


def installed() -> dict[str, EntryPoint]:
    """What packages offer under the entry point group."""
    return {one.name: one for one in entry_points(group=GROUP)}


def _called(found: Any) -> str:
    return getattr(found, "__name__", type(found).__name__)
