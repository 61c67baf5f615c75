"""A user's reward: a function or an object from a file, or from an installed package.

    def score(video_BTYXC, prompts):          # uint8 (B, T, Y, X, 3), a prompt for each
        return video_BTYXC.float().mean((1, 2, 3, 4))     # B numbers, higher is better

NaN or None means "could not be scored". The function may also take fps= and options. A class,
which is called with the options, or an object with such a ``score`` works too; each may also
return a `common.types.Score`. With an attribute ``group_level = True`` the loop calls it once
for each group, with exactly the members of that group: for win rates within a group.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from alignment.rewards.errors import check_count, contained, reward_errors
from common.plugin_file import check_target, file_of, load_target
from common.types import Score

if TYPE_CHECKING:
    from torch import Tensor

    from common.types import RewardModel

# Packages offer rewards under this group of entry points: name = "package.module:factory".
GROUP = "video_alignment.rewards"


class FunctionReward:
    """A function, or an object's ``score``, as a `common.types.RewardModel`.

    The function must return a `Score`, or a number for each video. It gets a copy of the videos,
    so that writing into them changes nothing for the rewards after it. Raises ValueError for a
    function that cannot be called with videos, prompts and these options.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        options: Mapping[str, Any],
        *,
        group_level: bool = False,
    ) -> None:
        # wrong options are found before the first video is sampled
        check_options(function, options)
        signature = inspect.signature(function)
        self.name = name
        self.function = function
        self.options = dict(options)
        self.group_level = group_level
        self.takes_fps = _takes_any(signature) or "fps" in signature.parameters
        try:
            signature.bind(None, None, **self._keywords(0.0))
        except TypeError as error:
            raise ValueError(
                f"{_name_of(function)} cannot be called with videos and prompts: {error}"
            ) from error

    def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        import torch

        # a Score, or numbers in any form
        returned = self.function(
            video_BTYXC.clone(), list(prompts), **self._keywords(fps)
        )
        if isinstance(returned, Score):
            score = returned
        else:
            values = self._numbers(returned, len(prompts))
            score = Score(torch.tensor(values, dtype=torch.float32))
        check_count(self.name, len(score.value_B), len(prompts))
        return score

    def _keywords(self, fps: float) -> dict[str, Any]:
        return {**self.options, "fps": fps} if self.takes_fps else self.options

    def _numbers(self, returned: Any, videos: int) -> list[float]:
        """Convert to a list of floats: None is NaN, a single number a list of one."""
        is_scalar = getattr(returned, "ndim", 1) == 0
        if is_scalar or not isinstance(returned, Iterable):
            returned = [returned]
        # these can be iterated, but not in the order of the videos or not as numbers
        if isinstance(returned, Mapping | Set | str | bytes | bytearray):
            raise ValueError(
                f"rewards.{self.name}: score returned a {type(returned).__name__}, "
                f"want a list or a tensor of {videos} numbers"
            )
        # float() of a row of a tensor is a RuntimeError
        try:
            return [math.nan if value is None else float(value) for value in returned]
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            # name what was returned instead of numbers
            kind = type(returned).__name__
            if hasattr(returned, "shape"):
                kind = f"{kind} of shape {tuple(returned.shape)}"
            raise ValueError(
                f"rewards.{self.name}: score returned a {kind} for {videos} videos, "
                f"not a number for each: {error}"
            ) from error


def check_options(function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the known options, for those that a function does not take."""
    signature = inspect.signature(function)
    unknown = sorted(options.keys() - signature.parameters.keys())
    if not unknown or _takes_any(signature):
        return
    # list the options that there are
    known = []
    for name, parameter in signature.parameters.items():
        optional = parameter.default is not parameter.empty
        keyword_only = parameter.kind is parameter.KEYWORD_ONLY
        if name != "fps" and (optional or keyword_only):
            known.append(name)
    hint = f"its options are {', '.join(known)}" if known else "it has no options"
    raise ValueError(f"{_name_of(function)} takes no {', '.join(unknown)}; {hint}")


def from_file(name: str, target: str, options: Mapping[str, Any]) -> RewardModel:
    """Run the file of a target, and make a reward of the attribute that it names.

    Raises ValueError when the attribute is no reward, and for whatever the file raises, with
    the line.
    """
    key = f"rewards.{name}.target"
    check_target(key, target)
    with reward_errors(name, ValueError, file=file_of(target)), contained():
        plugin = load_target(key, target, module=f"_video_alignment_own_reward_{name}")
        return as_reward(name, plugin, options)


def as_reward(name: str, plugin: Any, options: Mapping[str, Any]) -> RewardModel:
    """Make a reward of a class, an object with a ``score``, or a function.

    A class is called with the options. Raises ValueError for anything else, and for options
    that it does not take.
    """
    # a class: make its object
    if inspect.isclass(plugin):
        check_options(plugin, options)
        plugin = plugin(**options)
        options = {}
    # an object with a score, or a function
    group_level = bool(getattr(plugin, "group_level", False))
    if callable(getattr(plugin, "score", None)):
        if options:
            raise ValueError(f"an object takes no options, got {', '.join(options)}")
        return FunctionReward(name, plugin.score, {}, group_level=group_level)
    if callable(plugin):
        return FunctionReward(name, plugin, options, group_level=group_level)
    raise ValueError(
        f"{type(plugin).__name__} is neither a function nor an object with a method score"
    )


def installed() -> dict[str, EntryPoint]:
    """Return what installed packages offer under the entry point group, by name."""
    return {point.name: point for point in entry_points(group=GROUP)}


def _takes_any(signature: inspect.Signature) -> bool:
    """True for a signature with **options."""
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def _name_of(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)
