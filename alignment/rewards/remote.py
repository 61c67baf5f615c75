"""A reward that servers compute (launch/serve.py): on other machines, shared by many runs."""

from __future__ import annotations

import asyncio
import os
import random
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import httpx
import torch
from tenacity import RetryCallState, Retrying, retry_if_exception_type

from alignment.rewards import wire
from alignment.rewards.addresses import check_address
from common.log import say
from common.types import RewardUnavailableError, Score

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
# Statuses of trouble that may pass. Any other refusal would be the same again.
RETRIED = (408, 429, 500, 502, 503, 504)
# A reply with scores: 207 says that some of the videos have none.
SCORED = (200, 207)
# A reply is numbers and texts; anything larger is not of our server.
MAX_REPLY_BYTES = 64 << 20
# A server that does not answer gets no requests for so long, while others do.
LEFT_OUT_S = 30.0
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 20.0
# A host that drops packets never answers, so connecting has a limit of its own.
_CONNECT_S = 10.0


class RemoteError(RewardUnavailableError):
    """The server refused a request, or did not answer it within the deadline."""


class _TryAgainError(Exception):
    """An attempt failed in a way that may pass.

    wait_s    The pause that the server asks for.
    no_pause  True when another server can be tried immediately.
    """

    def __init__(
        self, problem: str, *, wait_s: float = 0.0, no_pause: bool = False
    ) -> None:
        super().__init__(problem)
        self.wait_s = wait_s
        self.no_pause = no_pause


class RemoteReward:
    """Sends frames to reward servers, and returns their numbers bit for bit.

    url         http://host:port of a server, or a list of them. The videos of a call are shared
                out among the servers. Their rewards are requested on construction.
    model       The server's reward to use; null for the one called ``name``, else for the only
                reward that it has.
    deadline_s  The limit for a call, all attempts and pauses together.
    start_deadline_s  The same for the first request, where it is shorter: a server may take so
                long to start.
    on_failure  "fail" raises RemoteError, so that a run stops with its checkpoint; "skip_group"
                scores these videos NaN: their groups learn nothing from this reward, and they
                are counted.
    token_env   The environment variable that holds the servers' token.

    A refused connection, a broken reply and the statuses of `RETRIED` are tried again with
    growing, jittered pauses, or after the server's Retry-After. With several servers, the next
    attempt goes to another, and a server without an answer is left out for `LEFT_OUT_S` seconds.
    A reply is broken unless it has exactly a number or null for each video of this very request:
    a failed request never yields a score.
    """

    def __init__(
        self,
        url: str | Sequence[str],
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
        # the addresses, in the order of the config
        urls = [url] if isinstance(url, str) else list(url)
        for address in urls:
            check_address(name, address)
        self.name = name
        self.urls = [address.rstrip("/") for address in urls]
        self.left_out_until = dict.fromkeys(self.urls, float("-inf"))
        self.deadline_s = deadline_s
        self.on_failure = on_failure
        self.sleep = sleep
        self.now = now
        self.jitter = random.Random(name)
        self.headers = _headers(token_env)
        # whether a server compares the videos of a prompt, which must then share a request
        self.group_level = False
        # a server that is absent is found out before training starts
        self.model = self._find(model, within_s=min(start_deadline_s, deadline_s))

    def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        # a consecutive share of the videos for each server that answers
        count = len(prompts)
        shares = max(1, min(len(self._servers()), count))
        if self.group_level:
            shares = 1
        bounds = [count * i // shares for i in range(shares + 1)]

        def score_share(share: int) -> Score:
            places = slice(bounds[share], bounds[share + 1])
            return self._score_share(
                share, video_BTYXC[places], prompts[places], fps=fps
            )

        if shares == 1:
            return score_share(0)
        with ThreadPoolExecutor(shares) as pool:
            return Score.concat(list(pool.map(score_share, range(shares))))

    def _score_share(
        self, share: int, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        """Score videos with a single request. The share decides which server is tried first."""
        # every attempt sends the same request, so the answer to an earlier attempt is as good
        request_id = uuid.uuid4().hex
        content = wire.encode_request(
            video_BTYXC, prompts, fps=fps, model=self.model, id=request_id
        )

        def read(body: bytes) -> wire.Reply:
            return wire.decode_reply(
                body, videos=len(prompts), model=self.model, id=request_id
            )

        try:
            reply = self._request(
                "POST",
                "/v1/score",
                read,
                first=share,
                within_s=self.deadline_s,
                content=content,
            )
        except RemoteError as error:
            if self.on_failure == "fail":
                raise
            # skip_group: NaN, never a made-up score
            say(f"{self.name}: {len(prompts)} videos are not scored: {error}")
            return Score(torch.full((len(prompts),), float("nan")))

        # single videos that the server could not score
        problems = [error for error in reply.errors if error is not None]
        if problems:
            say(
                f"{self.name}: {len(problems)} of {len(prompts)} videos could not be scored; "
                f"the first error is: {problems[0]:.200}"
            )
        return reply.score

    def _find(self, model: str | None, *, within_s: float) -> str:
        """Return the servers' reward of that name, waiting for servers that are starting.

        With several servers, those that do not answer are left out while others do. Raises
        RemoteError when no server answers, ValueError when one has no such reward.
        """

        def read(body: bytes) -> list[str]:
            reply = wire.read_json(body)
            by_prompt.update(str(name) for name in reply.get("by_prompt", ()))
            return [str(name) for name in reply["models"]]

        by_prompt: set[str] = set()

        problems = []
        for url in self.urls:

            def report(problem: str, url: str = url) -> None:
                say(
                    f"waiting for the reward server at {url}, up to {within_s:g} s: {problem}"
                )

            try:
                offered = self._request(
                    "GET",
                    "/v1/models",
                    read,
                    urls=[url],
                    within_s=within_s,
                    at_first_failure=report,
                )
            except RemoteError as error:
                problems.append(error)
                self._leave_out(url)
                continue
            # the reward of the same name, or the only one
            if model is None and self.name in offered:
                model = self.name
            elif model is None and len(offered) == 1:
                model = offered[0]
            if model not in offered:
                raise ValueError(
                    f"the server {url} has the rewards {', '.join(offered)}: set "
                    f"rewards.{self.name}.options.model to one of them"
                    + (f", not {model!r}" if model is not None else "")
                )
        if len(problems) == len(self.urls):
            raise problems[0]
        self.group_level = model in by_prompt
        return model

    def _servers(self) -> list[str]:
        """The servers that answer; all of them when none does."""
        now = self.now()
        answering = [url for url in self.urls if self.left_out_until[url] <= now]
        return answering or self.urls

    def _leave_out(self, url: str) -> None:
        if len(self.urls) > 1:
            say(f"{self.name}: the server {url} is left out for {LEFT_OUT_S:g} s")
            self.left_out_until[url] = self.now() + LEFT_OUT_S

    def _request(
        self,
        method: str,
        path: str,
        read: Callable[[bytes], T],
        *,
        within_s: float,
        urls: Sequence[str] | None = None,
        first: int = 0,
        content: bytes | None = None,
        at_first_failure: Callable[[str], None] | None = None,
    ) -> T:
        """Repeat a request until its reply can be read. Raises RemoteError at the deadline.

        Attempt n goes to server ``first + n`` of those that answer, or of ``urls``.
        """
        end = self.now() + within_s
        attempts = 0
        url = ""

        def attempt() -> T:
            # the next server
            nonlocal attempts, url
            servers = urls or self._servers()
            url = servers[(first + attempts) % len(servers)]
            attempts += 1
            # it may take what is left of the deadline
            left = max(0.1, end - self.now())
            body = self._attempt(method, url, path, content, left)
            try:
                return read(body)
            except (ValueError, KeyError, TypeError) as error:
                # a WireError, or JSON of another form
                raise _TryAgainError(str(error)) from error

        def too_late(state: RetryCallState) -> bool:
            return self.now() + state.upcoming_sleep >= end

        def give_up(state: RetryCallState) -> T:
            problem = state.outcome.exception()
            raise RemoteError(f"{url}{path}: gave up after {within_s:g} s: {problem}")

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
        return retrying(attempt)

    def _pause(self, state: RetryCallState) -> float:
        """Seconds before the next attempt: doubling, jittered, at least the server's wish."""
        failure = state.outcome.exception()
        if failure.no_pause:
            return 0.0
        # bounded, so that 2**n stays a small number
        doublings = min(state.attempt_number - 1, 10)
        pause = min(_FIRST_PAUSE_S * 2**doublings, _LONGEST_PAUSE_S)
        jittered = pause * (0.5 + self.jitter.random())
        return max(jittered, failure.wait_s)

    def _attempt(
        self, method: str, url: str, path: str, content: bytes | None, left_s: float
    ) -> bytes:
        """Send a request once, and return the body of the reply.

        Raises _TryAgainError for trouble that may pass, RemoteError for a refusal.
        """
        try:
            status, wait_s, body = _run(
                self._exchange(method, url + path, content, left_s)
            )
        except (httpx.HTTPError, TimeoutError) as error:
            # no answer, perhaps another server has
            self._leave_out(url)
            raise _TryAgainError(
                f"{type(error).__name__}: {error}",
                no_pause=url not in self._servers(),
            ) from error
        if status in SCORED:
            return body
        problem = f"status {status}: {body[:200].decode(errors='replace')}"
        if status not in RETRIED:
            raise RemoteError(f"{url}{path}: {problem}")
        raise _TryAgainError(problem, wait_s=wait_s)

    async def _exchange(
        self, method: str, url: str, content: bytes | None, left_s: float
    ) -> tuple[int, float, bytes]:
        """Return status, Retry-After and body of a reply. TimeoutError after ``left_s`` seconds.

        The limits of httpx are for a single read, so a reply that drips would have no end.
        """
        limits = httpx.Timeout(left_s, connect=min(left_s, _CONNECT_S))
        async with (
            asyncio.timeout(left_s),
            httpx.AsyncClient(headers=self.headers, trust_env=False) as client,
            client.stream(method, url, content=content, timeout=limits) as reply,
        ):
            # bytes as they come: nothing is unpacked, so a small reply stays small
            body = bytearray()
            async for chunk in reply.aiter_raw():
                body += chunk
                if len(body) > MAX_REPLY_BYTES:
                    raise _TryAgainError(
                        f"a reply of more than {MAX_REPLY_BYTES >> 20} MB"
                    )
            wait_s = _seconds(reply.headers.get("Retry-After"))
            return reply.status_code, wait_s, bytes(body)


def _headers(token_env: str) -> dict[str, str]:
    """Headers of every request. The token travels here, never in the config."""
    headers = {"Content-Type": wire.SAFETENSORS, "Accept-Encoding": "identity"}
    token = os.environ.get(token_env)
    if not token:
        return headers
    if not token.isascii() or not token.isprintable():
        raise ValueError(
            f"the token in {token_env} has characters that no HTTP header can hold: "
            "letters, digits and punctuation are possible, without a line break"
        )
    return {**headers, "Authorization": f"Bearer {token}"}


def _seconds(text: str | None) -> float:
    return float(text) if text is not None and text.isdecimal() else 0.0


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, also inside a running event loop (a notebook's)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()
