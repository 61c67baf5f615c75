"""The edge to code that may raise anything, a user's file and a reward's `score`: named, and a run can end in order."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from common.types import RewardUnavailableError

if TYPE_CHECKING:
    from torch import Tensor

    from common.types import RewardModel, Score


class RewardFailedError(RewardUnavailableError):
    """A reward raised something; what it was is the ``__cause__`` on the rank where it happened."""


@contextmanager
def reward_errors(
    name: str, failure: type[Exception], *, file: str | None = None
) -> Iterator[None]:
    """Inside, every error becomes a ``failure`` of one sentence that names ``rewards.NAME``, chained to the error.

    file  whose lines are worth naming: the user's own

    The one place that catches every Exception, for what a stranger's code raises is not known. Nothing is swallowed:
    it is raised again. Memory that runs out stays what it is, others know what to do.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise failure(format_error(name, error, file=file)) from error


def format_error(name: str, error: BaseException, *, file: str | None = None) -> str:
    """``rewards.NAME: file:line: Kind: message`` on one line; without the kind where the message alone says enough.

    file  whose line is named, where one of its lines raised, or which is named in front of the message
    """
    text = " ".join(str(error).split())
    if text.startswith(f"rewards.{name}"):
        return text
    if isinstance(error, SyntaxError):
        return f"rewards.{name}: {error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    lines = [
        one.lineno
        for one in traceback.extract_tb(error.__traceback__)
        if file and _same(one.filename, file)
    ]
    place = (
        f"{file}:{lines[-1]}: "
        if lines
        else f"{file}: "
        if file and file not in text
        else ""
    )
    plain = (
        isinstance(error, (ValueError, OSError, ImportError, RewardUnavailableError))
        and not lines
        and text
    )
    return (
        f"rewards.{name}: {place}{text if plain else f'{type(error).__name__}: {text}'}"
    )


def _same(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()


class NamedReward:
    """A reward under its name in the run's ``rewards``. Raises RewardFailedError for whatever its `score` raises, and
    for a number of scores that is not the number of videos: the run may stop with a checkpoint, on all ranks.
    """

    def __init__(self, name: str, reward: RewardModel) -> None:
        self.name, self.reward = name, reward
        self.group_level = bool(getattr(reward, "group_level", False))

    def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        with reward_errors(self.name, RewardFailedError):
            score = self.reward.score(video_BTYXC, prompts, fps=fps)
            check_count(self.name, len(score.value_B), len(prompts))
        return score


def check_count(name: str, numbers: int, videos: int) -> None:
    """ValueError unless there is one number for each video."""
    if numbers != videos:
        raise ValueError(
            f"rewards.{name}: score said {numbers} number{'s' * (numbers != 1)} for {videos} videos"
        )
