"""The HTTP application of launch/serve.py: authorisation, size limits, scoring.

`alignment.rewards.wire` defines the format of requests and replies.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from alignment.rewards import wire
from common.types import Score
from launch.schemas.server import LOOPBACK
from launch.server.batching import Batcher, QueueFullError

if TYPE_CHECKING:
    from common.types import RewardModel
    from launch.schemas.server import ServeRun


T = TypeVar("T")
# The JSON form for /openapi.json, which FastAPI cannot see: the body is read by hand.
SCORE_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {
            wire.JSON: {
                "schema": {
                    "type": "object",
                    "required": ["model", "prompts", "videos"],
                    "properties": {
                        "id": {"type": "string"},
                        "model": {"type": "string"},
                        "prompts": {"type": "array", "items": {"type": "string"}},
                        "videos": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "properties": {
                                    "mp4": {"type": "string", "format": "byte"},
                                    "frames": {"type": "string", "format": "byte"},
                                    "shape": {
                                        "type": "array",
                                        "items": {"type": "integer"},
                                    },
                                    "fps": {"type": "number"},
                                },
                            },
                        },
                    },
                }
            },
            wire.SAFETENSORS: {"schema": {"type": "string", "format": "binary"}},
        },
    },
    "responses": {
        "200": {"description": "every video has a score"},
        "207": {"description": "some videos have an error instead of a score"},
        "422": {
            "description": "no video could be scored, or the request breaks the format"
        },
    },
}
# No answer can reach a client that has gone: the status is for the log.
CLIENT_GONE = 499


def create_app(
    rewards: Mapping[str, RewardModel], cfg: ServeRun, *, token: str | None
) -> FastAPI:
    """Build the application with /health, /v1/models, /v1/score and /metrics.

    With a token, all but /health require it as ``Bearer``. A single thread scores for all models,
    since they share a device. Bodies are read up to ``max_body_mb`` and no further. Raises
    ValueError for a reward that needs whole groups: requests of several clients share a batch.
    A reward that finds its groups by the prompts of a call, a DeScore that thinks when unsure, is
    served: it gets each request alone, and clients send it whole groups.
    """
    by_prompt = compare_by_prompt(rewards)
    # Every model has a queue, and a single thread scores for all.
    executor = ThreadPoolExecutor(1, thread_name_prefix="reward")
    batchers = {
        name: Batcher(
            reward,
            executor=executor,
            # a single video fills the batch, so that no request joins another
            max_videos=1 if name in by_prompt else cfg.batch_videos,
            max_waiting=cfg.max_waiting,
            wait_s=cfg.wait_ms / 1000,
        )
        for name, reward in rewards.items()
    }

    # The batchers live as long as the server.
    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(batcher.run()) for batcher in batchers.values()]
        yield
        for task in tasks:
            task.cancel()
        executor.shutdown(wait=False, cancel_futures=True)

    # There is no interactive page: it would load scripts from elsewhere.
    app = FastAPI(
        title="Reward server",
        lifespan=running,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json" if cfg.openapi else None,
    )
    limits = wire.RequestLimits(
        max_frames=cfg.max_frames,
        max_videos=cfg.max_videos,
        max_bytes=cfg.max_decoded_mb << 20,
    )
    memory = MemoryBudget(cfg.max_memory_mb << 20)
    # As many requests as the memory can hold at their largest are decoded together.
    largest = cfg.max_body_mb + cfg.max_decoded_mb
    decoding = asyncio.Semaphore(min(4, max(1, cfg.max_memory_mb // largest // 2)))

    # Otherwise a web page could make a browser request it under another host name.
    if cfg.host in LOOPBACK:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])

    # Clients read {"error": ...} instead of FastAPI's {"detail": ...}.
    @app.exception_handler(AnyHTTPException)
    async def problem(_: Request, error: AnyHTTPException) -> Response:
        return JSONResponse(
            {"error": error.detail},
            status_code=error.status_code,
            headers=error.headers,
        )

    async def decode(body: bytes, kind: str, account: MemoryAccount) -> wire.Request:
        # Decoding takes long enough to hold up other requests.
        try:
            async with decoding:
                # an mp4 may grow up to the limit, but how far is known only afterwards
                account.at_least(len(body) + limits.max_bytes)
                decoded = await asyncio.to_thread(
                    wire.decode_request, body, kind, limits
                )
        except wire.WireError as error:
            raise HTTPException(422, str(error)) from error
        account.settle(decoded_bytes(decoded))
        return decoded

    def authorise(request: Request) -> None:
        # Comparing in constant time does not reveal how much of a token is right.
        given = request.headers.get("Authorization", "").encode()
        if token and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise HTTPException(401, "a bearer token is required")

    # Health checks carry no token.
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        authorise(request)
        compared = {"by_prompt": by_prompt} if by_prompt else {}
        return JSONResponse({"models": list(rewards), **compared})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        authorise(request)
        return PlainTextResponse(metrics_text(batchers))

    @app.post("/v1/score", openapi_extra=SCORE_SCHEMA)
    async def score(request: Request) -> Response:
        authorise(request)
        with memory.account() as account:
            body = await read_body(
                request,
                account,
                limit=cfg.max_body_mb << 20,
                timeout_s=cfg.body_timeout_s,
            )
            decoded = await decode(
                body, request.headers.get("Content-Type", ""), account
            )
            del body

            # score, unless the client goes first
            batcher = batchers.get(decoded.model)
            if batcher is None:
                raise HTTPException(
                    404, f"no model {decoded.model!r:.80}; there are {list(batchers)}"
                )
            try:
                reply = await unless_gone(request, score_request(decoded, batcher))
            except QueueFullError as error:
                raise HTTPException(429, str(error), {"Retry-After": "1"}) from error
        return JSONResponse(reply, status_code=reply_status(reply))

    return app


def compare_by_prompt(rewards: Mapping[str, RewardModel]) -> list[str]:
    """Names of the rewards that compare the videos of a prompt within a request.

    Raises ValueError for a reward that needs exactly the videos of a group in a call.
    """
    names = []
    for name, reward in rewards.items():
        if getattr(reward, "groups_by_prompt", False):
            names.append(name)
        elif getattr(reward, "group_level", False):
            raise ValueError(
                f"rewards.{name} has group_level = True: it needs exactly the videos of a group "
                "in a call, which a server cannot give it; use it inside the training run"
            )
    return names


def decoded_bytes(request: wire.Request) -> int:
    """Bytes of the frames of a request."""
    videos = [item.video_TYXC for item in request.items]
    return sum(video_TYXC.nbytes for video_TYXC in videos if video_TYXC is not None)


def reply_status(reply: Mapping[str, Any]) -> int:
    """200 when every video was read and scored, 207 when some were not, 422 when none was."""
    failed = reply["failed"]
    if failed == 0:
        return 200
    return 422 if failed == len(reply["errors"]) else 207


async def read_body(
    request: Request, account: MemoryAccount, *, limit: int, timeout_s: float
) -> bytes:
    """Read the body into the request's account.

    Raises HTTPException 413 as soon as the body exceeds ``limit`` bytes, announced or not, 408
    when it takes longer than ``timeout_s`` seconds, and 429 when the server's memory is taken.
    """
    # The announced size, before anything is read.
    too_large = HTTPException(413, f"the body may have at most {limit >> 20} MB")
    announced = request.headers.get("Content-Length", "0")
    if not announced.isdecimal() or int(announced) > limit:
        raise too_large
    account.add(int(announced))

    # A client may announce less than it sends.
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
                account.at_least(len(body))
    except TimeoutError as error:
        raise HTTPException(408, f"the body took over {timeout_s:g} s") from error
    return bytes(body)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await the work, and cancel it when the client closes the connection.

    Raises HTTPException with `CLIENT_GONE` in that case, so that nothing is computed for nobody.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise HTTPException(CLIENT_GONE, "the client has gone")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnected(request: Request) -> None:
    # the body is read: the only message left is the disconnect
    while (await request.receive())["type"] != "http.disconnect":
        pass


class MemoryBudget:
    """Bytes that all requests may hold together."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    @contextmanager
    def account(self) -> Iterator[MemoryAccount]:
        """Account for a request; its bytes are free again afterwards."""
        account = MemoryAccount(self)
        try:
            yield account
        finally:
            self.held -= account.held


class MemoryAccount:
    """The bytes of a request."""

    def __init__(self, budget: MemoryBudget) -> None:
        self.budget = budget
        self.held = 0

    def add(self, count: int) -> None:
        """Take bytes. Raises HTTPException 429 when the server has too few left."""
        budget = self.budget
        if budget.held + count > budget.limit:
            raise HTTPException(
                429,
                f"the requests in work hold {budget.held >> 20} MB of "
                f"{budget.limit >> 20} MB; try again later",
                {"Retry-After": "1"},
            )
        budget.held += count
        self.held += count

    def at_least(self, count: int) -> None:
        """Take what is missing to ``count`` bytes."""
        self.add(max(0, count - self.held))

    def settle(self, count: int) -> None:
        """Hold exactly ``count`` bytes, fewer than before."""
        self.budget.held += count - self.held
        self.held = count


async def score_request(request: wire.Request, batcher: Batcher) -> dict[str, object]:
    """Score a request's valid videos, those of equal size and rate together.

    Invalid videos, and those that the reward rejects with a ValueError, get their error instead.
    """
    # Group the valid videos.
    errors: list[str | None] = [item.error for item in request.items]
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, item in enumerate(request.items):
        if item.video_TYXC is not None:
            key = (tuple(item.video_TYXC.shape), item.fps)
            groups.setdefault(key, []).append(i)

    async def score_group(places: list[int]) -> Score | None:
        videos = [request.items[i].video_TYXC for i in places]
        prompts = [request.prompts[i] for i in places]
        fps = request.items[places[0]].fps
        try:
            return await batcher.score(torch.stack(videos), prompts, fps=fps)
        except ValueError as error:
            # Anything else is a failure of the server: status 500.
            for i in places:
                errors[i] = str(error)[:500]
            return None

    # The batcher may combine the groups with other requests.
    places = list(groups.values())
    scores = await asyncio.gather(*map(score_group, places))
    scored = []
    for group, score in zip(places, scores, strict=True):
        if score is not None:
            scored.append((group, score))
    batcher.stats.failed_videos += sum(error is not None for error in errors)
    return wire.encode_reply(request, Score.placed(len(request.items), scored), errors)


def metrics_text(batchers: Mapping[str, Batcher]) -> str:
    """Return the counts of all models in the text format that Prometheus reads."""
    # Each model has its own labels.
    lines = []
    for name, batcher in batchers.items():
        stats = batcher.stats
        label = f'{{model="{name}"}}'
        lines += [
            f"reward_requests_total{label} {stats.requests}",
            f"reward_videos_total{label} {stats.videos}",
            f"reward_batches_total{label} {stats.batches}",
            f"reward_failed_total{label} {stats.failed}",
            f"reward_failed_videos_total{label} {stats.failed_videos}",
            f"reward_waiting{label} {batcher.queue.qsize()}",
        ]
        for q in (0.5, 0.95):
            label = f'{{model="{name}",quantile="{q}"}}'
            lines.append(f"reward_seconds{label} {stats.quantile(q):.6f}")
    return "\n".join(lines) + "\n"
