"""A reward that a server computes (launch/serve.py): another machine, another environment, shared by many runs."""

from __future__ import annotations

import os
import random
import time
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar

import httpx
import torch

from alignment.rewards import wire
from common.log import say
from common.types import RewardUnavailableError, Score

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
RETRIED = (
    408,
    429,
    500,
    502,
    503,
    504,
)  # what may pass; any other refusal would be the same again
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 20.0
_CONNECT_S = 10.0  # a host that drops packets says nothing at all


class RemoteError(RewardUnavailableError):
    """The server could not be made to score within the deadline, or refused."""


class RemoteReward:
    """Sends frames as they are and takes the numbers back bit for bit.

    url         http://host:port of the server, which is asked at once what it has
    model       which of its rewards; null is the only one it has
    deadline_s  for one call, all attempts and pauses together
    start_deadline_s  the same for that first question, where it is shorter: so long a server may take to come up
    on_failure  "fail" raises RemoteError, so that a run stops with its checkpoint; "skip_group" says NaN, "could not
                judge", for these videos: their groups learn nothing from this reward and are counted
    token_env   name of the environment variable that holds the server's token

    A refused connection, a broken reply and the statuses of `RETRIED` are tried again with growing, jittered pauses, or
    after what Retry-After says. A reply that is not exactly one number or null for each video of this very request is
    broken: never is a score made up.
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
        self.name, self.url, self.deadline_s, self.on_failure = (
            name,
            url.rstrip("/"),
            deadline_s,
            on_failure,
        )
        self.sleep, self.now, self.jitter = sleep, now, random.Random(name)
        token = os.environ.get(token_env)
        self.client = httpx.Client(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            trust_env=False,
        )
        self.model = self._find(model, within_s=min(start_deadline_s, deadline_s))

    def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        name = uuid.uuid4().hex  # every attempt is the same request, so an answer to an earlier one is as good
        body = wire.encode_request(
            video_BTYXC, prompts, fps=fps, model=self.model, id=name
        )

        def read(reply: httpx.Response) -> Score:
            return wire.decode_reply(
                reply.content, videos=len(prompts), model=self.model, id=name
            )

        try:
            sent = {"content": body, "headers": {"Content-Type": wire.SAFETENSORS}}
            return self._attempt(
                "POST", "/v1/score", read, within_s=self.deadline_s, **sent
            )
        except RemoteError as error:
            if self.on_failure == "fail":
                raise
            say(f"{self.name}: {len(prompts)} videos are not judged: {error}")
            return Score(torch.full((len(prompts),), float("nan")))

    def _find(self, model: str | None, *, within_s: float) -> str:
        """The server's reward of that name. Raises RemoteError when it is not healthy, ValueError when it has none."""

        def read(reply: httpx.Response) -> list[str]:
            return [str(one) for one in reply.json()["models"]]

        def tell(problem: str) -> None:
            say(
                f"waiting for the reward server at {self.url}, up to {within_s:g} s: {problem}"
            )

        offered = self._attempt(
            "GET", "/v1/models", read, within_s=within_s, at_first_failure=tell
        )
        if model is None and len(offered) == 1:
            return offered[0]
        if model not in offered:
            raise ValueError(
                f"the server has {', '.join(offered)}; model says {model!r}"
            )
        return model

    def _attempt(
        self,
        method: str,
        path: str,
        read: Callable[[httpx.Response], T],
        *,
        within_s: float,
        at_first_failure: Callable[[str], None] | None = None,
        **options: object,
    ) -> T:
        """Ask until an answer can be read or the deadline is over."""
        end, pause = self.now() + within_s, _FIRST_PAUSE_S
        while True:
            wait = pause * (0.5 + self.jitter.random())
            left = max(0.1, end - self.now())
            try:
                limits = httpx.Timeout(left, connect=min(left, _CONNECT_S))
                reply = self.client.request(
                    method, self.url + path, timeout=limits, **options
                )
                if reply.status_code == 200:
                    return read(reply)
                problem = f"status {reply.status_code}: {reply.text[:200]}"
                if reply.status_code not in RETRIED:
                    raise RemoteError(f"{self.url}{path}: {problem}")
                wait = max(wait, _seconds(reply.headers.get("Retry-After")))
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            except (
                ValueError,
                KeyError,
                TypeError,
            ) as error:  # WireError, or JSON of another form
                problem = str(error)
            if self.now() + wait >= end:
                raise RemoteError(
                    f"{self.url}{path}: gave up after {within_s:g} s: {problem}"
                )
            if at_first_failure is not None:
                at_first_failure(problem)
                at_first_failure = None
            self.sleep(wait)
            pause = min(2 * pause, _LONGEST_PAUSE_S)


def _seconds(text: str | None) -> float:
    return float(text) if text is not None and text.isdecimal() else 0.0
