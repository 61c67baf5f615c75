"""A reward that a server computes (launch/serve.py): on another machine, shared by many runs."""

from __future__ import annotations

import os
import random
import time
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar

import httpx
import torch
from tenacity import RetryCallState, Retrying, retry_if_exception_type

from alignment.rewards import wire
from common.log import say
from common.types import RewardUnavailableError, Score

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
# Statuses of trouble that may pass. Any other refusal would be the same again.
RETRIED = (408, 429, 500, 502, 503, 504)
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 20.0
# A host that drops packets never answers, so connecting has a limit of its own.
_CONNECT_S = 10.0


class RemoteError(RewardUnavailableError):
    """The server refused a request, or did not answer it within the deadline."""


class _TryAgainError(Exception):
    """An attempt failed in a way that may pass. ``wait_s`` is what the server asked for."""

    def __init__(self, problem: str, wait_s: float = 0.0) -> None:
        super().__init__(problem)
        self.wait_s = wait_s


class RemoteReward:
    """Sends frames to a reward server, and returns its numbers bit for bit.

    url         http://host:port of the server. Its rewards are requested on construction.
    model       The server's reward to use; null for the only reward that it has.
    deadline_s  The limit for a call, all attempts and pauses together.
    start_deadline_s  The same for the first request, where it is shorter: a server may take so
                long to start.
    on_failure  "fail" raises RemoteError, so that a run stops with its checkpoint; "skip_group"
                scores these videos NaN: their groups learn nothing from this reward, and they
                are counted.
    token_env   The environment variable that holds the server's token.

    A refused connection, a broken reply and the statuses of `RETRIED` are tried again with
    growing, jittered pauses, or after the server's Retry-After. A reply is broken unless it has
    exactly a number or null for each video of this very request: a failed request never yields
    a score.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str = "remote",
        model: str | None = None,
        deadline_s: float = 600.0,
        start_deadline_s: float = 60.0,
        on_failure: Literal["fail", "skip_group"] = "fail",
        token_env: str = "REWARD_SERVER_TOKEN",
        sleep: Callable[[float], None] = time.sleep,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        if on_failure not in ("fail", "skip_group"):
            raise ValueError(
                f"on_failure must be fail or skip_group, got {on_failure!r}"
            )
        self.name = name
        self.url = url.rstrip("/")
        self.deadline_s = deadline_s
        self.on_failure = on_failure
        self.sleep = sleep
        self.now = now
        self.jitter = random.Random(name)
        # the token travels in a header, never in the config
        token = os.environ.get(token_env)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.client = httpx.Client(headers=headers, trust_env=False)
        # a server that is absent is found out before training starts
        self.model = self._find(model, within_s=min(start_deadline_s, deadline_s))

    def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        # every attempt sends the same request, so the answer to an earlier attempt is as good
        request_id = uuid.uuid4().hex
        content = wire.encode_request(
            video_BTYXC, prompts, fps=fps, model=self.model, id=request_id
        )

        def read(reply: httpx.Response) -> Score:
            return wire.decode_reply(
                reply.content, videos=len(prompts), model=self.model, id=request_id
            )

        try:
            return self._request(
                "POST",
                "/v1/score",
                read,
                within_s=self.deadline_s,
                content=content,
                headers={"Content-Type": wire.SAFETENSORS},
            )
        except RemoteError as error:
            if self.on_failure == "fail":
                raise
            # skip_group: NaN, never a made-up score
            say(f"{self.name}: {len(prompts)} videos are not scored: {error}")
            return Score(torch.full((len(prompts),), float("nan")))

    def _find(self, model: str | None, *, within_s: float) -> str:
        """Return the server's reward of that name, waiting for a server that is starting.

        Raises RemoteError when the server does not answer, ValueError when it has no such
        reward.
        """

        def read(reply: httpx.Response) -> list[str]:
            return [str(name) for name in reply.json()["models"]]

        def report(problem: str) -> None:
            say(
                f"waiting for the reward server at {self.url}, up to {within_s:g} s: {problem}"
            )

        offered = self._request(
            "GET", "/v1/models", read, within_s=within_s, at_first_failure=report
        )
        # a server with a single reward needs no name
        if model is None and len(offered) == 1:
            return offered[0]
        if model not in offered:
            raise ValueError(
                f"the server has the rewards {', '.join(offered)}, but model is {model!r}"
            )
        return model

    def _request(
        self,
        method: str,
        path: str,
        read: Callable[[httpx.Response], T],
        *,
        within_s: float,
        at_first_failure: Callable[[str], None] | None = None,
        **options: object,
    ) -> T:
        """Repeat a request until its reply can be read. Raises RemoteError at the deadline."""
        end = self.now() + within_s

        def too_late(state: RetryCallState) -> bool:
            return self.now() + state.upcoming_sleep >= end

        def give_up(state: RetryCallState) -> T:
            problem = state.outcome.exception()
            raise RemoteError(
                f"{self.url}{path}: gave up after {within_s:g} s: {problem}"
            )

        def before_sleep(state: RetryCallState) -> None:
            if at_first_failure is not None and state.attempt_number == 1:
                at_first_failure(str(state.outcome.exception()))

        retrying = Retrying(
            retry=retry_if_exception_type(_TryAgainError),
            wait=self._pause,
            stop=too_late,
            retry_error_callback=give_up,
            before_sleep=before_sleep,
            sleep=self.sleep,
        )
        return retrying(self._attempt, method, path, read, end=end, **options)

    def _pause(self, state: RetryCallState) -> float:
        """Seconds before the next attempt: doubling, jittered, at least the server's wish."""
        # bounded, so that 2**n stays a small number
        doublings = min(state.attempt_number - 1, 10)
        pause = min(_FIRST_PAUSE_S * 2**doublings, _LONGEST_PAUSE_S)
        jittered = pause * (0.5 + self.jitter.random())
        return max(jittered, state.outcome.exception().wait_s)

    def _attempt(
        self,
        method: str,
        path: str,
        read: Callable[[httpx.Response], T],
        *,
        end: float,
        **options: object,
    ) -> T:
        """Send a request once. Raises _TryAgainError for what may pass, else RemoteError."""
        # an attempt may take what is left of the deadline
        left = max(0.1, end - self.now())
        limits = httpx.Timeout(left, connect=min(left, _CONNECT_S))
        url = self.url + path
        try:
            reply = self.client.request(method, url, timeout=limits, **options)
            if reply.status_code == 200:
                return read(reply)
        except httpx.TransportError as error:
            raise _TryAgainError(f"{type(error).__name__}: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            # a WireError, or JSON of another form
            raise _TryAgainError(str(error)) from error

        problem = f"status {reply.status_code}: {reply.text[:200]}"
        if reply.status_code not in RETRIED:
            raise RemoteError(f"{url}: {problem}")
        raise _TryAgainError(problem, _seconds(reply.headers.get("Retry-After")))


def _seconds(text: str | None) -> float:
    return float(text) if text is not None and text.isdecimal() else 0.0
