"""Wrap the errors of rewards, which may be anything, with the reward's name in the run."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from common.plugin_file import place_in
from common.types import RewardUnavailableError

if TYPE_CHECKING:
    from torch import Tensor

    from common.types import RewardModel, Score

# Errors whose message says enough without the name of their class.
PLAIN_ERRORS = (ValueError, OSError, ImportError, RewardUnavailableError)


class RewardFailedError(RewardUnavailableError):
    """A reward raised an error, which is the ``__cause__`` on the rank where it happened."""


class NamedReward:
    """A reward under its name in the run's ``rewards``.

    Raises RewardFailedError for whatever the reward raises, and for a number of scores that is
    not the number of videos: the run can then stop with a checkpoint, on all ranks.
    """

    def __init__(self, name: str, reward: RewardModel) -> None:
        self.name = name
        self.reward = reward
        self.group_level = bool(getattr(reward, "group_level", False))

    def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        with reward_errors(self.name, RewardFailedError):
            score = contained_score(self.reward, video_BTYXC, prompts, fps=fps)
            check_count(self.name, len(score.value_B), len(prompts))
            return score


def contained_score(
    reward: RewardModel, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
) -> Score:
    """Call a reward so that nothing but its scores and its errors comes out.

    Every command calls rewards through this function. Raises what the reward raises, where that
    is an Exception; RuntimeError for sys.exit, StopIteration and the like, which would end loops
    and processes without a word; ValueError for numbers or texts that cannot be used.
    """
    try:
        with contained():
            return _checked(reward.score(video_BTYXC, prompts, fps=fps))
    except StopIteration as error:
        # a for loop around this call would take it for its end
        raise RuntimeError("the reward raised StopIteration") from error
    except BaseException as error:
        if isinstance(error, Exception | KeyboardInterrupt):
            raise
        kind = type(error).__name__
        raise RuntimeError(f"the reward raised {kind}: {text_of(error)}") from error


@contextmanager
def contained() -> Iterator[None]:
    """Undo what a reward does to the process: its folder, torch's modes, its end.

    A call of sys.exit inside becomes a RuntimeError: on a single rank it would end the run with
    exit code 0, which looks like success.
    """
    import torch

    dtype = torch.get_default_dtype()
    device = torch.get_default_device()
    try:
        # both contexts restore what they found
        with contextlib.chdir("."), torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    except SystemExit as error:
        raise RuntimeError(f"the reward called sys.exit({error.code!r})") from error
    finally:
        torch.set_default_dtype(dtype)
        # a default device, the CPU too, is a mode that costs every later call and that
        # torch.compile cannot trace: none stays where none was
        if device.type == "cpu":
            torch.set_default_device(None)
        elif torch.get_default_device() != device:
            torch.set_default_device(device)


def _checked(score: Score) -> Score:
    """Return a score whose numbers are dense fp32 on the CPU and whose texts can be written.

    Raises ValueError for complex or sparse numbers, for texts that are no strings, and for names
    of parts that no table could show.
    """
    value_B = _numbers("value_B", score.value_B)
    parts = {}
    for name, part_B in score.parts.items():
        if not isinstance(name, str) or not name or not name.isprintable():
            raise ValueError(
                f"a part of the score is called {name!r}, want a printable text"
            )
        parts[name] = _numbers(name, part_B)
    return type(score)(value_B, parts, _texts(score.texts), _texts(score.reasons))


def _texts(texts: Sequence[str]) -> list[str]:
    """Texts that can be written to a file: half of an emoji cannot."""
    written = []
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(
                f"a text of the score is a {type(text).__name__}, not a str"
            )
        written.append(text.encode("utf-8", errors="replace").decode())
    return written


def text_of(error: BaseException) -> str:
    """The message of an error; traceback knows what to do where a user's class has none."""
    return traceback.format_exception_only(error)[0].strip().partition(": ")[2]


def _numbers(name: str, number_B: Tensor) -> Tensor:
    import torch

    if number_B.is_complex() or number_B.layout is not torch.strided:
        raise ValueError(
            f"{name} of the score is {number_B.dtype}, {number_B.layout}: "
            "want a dense tensor of real numbers"
        )
    if number_B.is_meta:
        raise ValueError(f"{name} of the score has no data: it is on the meta device")
    return number_B.detach().to("cpu", torch.float32)


@contextmanager
def reward_errors(
    name: str, failure: type[Exception], *, file: str | None = None
) -> Iterator[None]:
    """Turn every error inside into a ``failure`` with a `format_error` message and its cause.

    This is the only place that catches every Exception, because a user's code may raise
    anything. Nothing is swallowed: the error is raised again. torch.OutOfMemoryError stays as
    it is, since callers know what to do about it.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise failure(format_error(name, error, file=file)) from error


def format_error(name: str, error: BaseException, *, file: str | None = None) -> str:
    """Format an error as ``rewards.NAME: file:line: Kind: message`` on one line.

    ``file`` is the user's file: its line is named when the error passed through it, else the
    file alone. The kind is left out where the message says enough.
    """
    text = " ".join(text_of(error).split())
    if text.startswith(f"rewards.{name}"):
        return text
    kind = type(error).__name__
    if isinstance(error, SyntaxError):
        place = place_in(file or "", error)
        return f"rewards.{name}: {place}: {kind}: {error.msg}"

    # the place in the user's file
    line = "" if file is None else place_in(file, error)
    place = f"{line}: " if line else ""
    if not line and file and file not in text:
        place = f"{file}: "

    # what happened
    if line or not text or not isinstance(error, PLAIN_ERRORS):
        text = f"{kind}: {text}"
    return f"rewards.{name}: {place}{text}"


def check_count(name: str, scores: int, videos: int) -> None:
    """Raise ValueError unless there is a score for each video."""
    if scores != videos:
        plural = "" if scores == 1 else "s"
        raise ValueError(
            f"rewards.{name}: score returned {scores} number{plural} for {videos} videos"
        )
