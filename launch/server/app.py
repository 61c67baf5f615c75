"""The HTTP application of launch/serve.py: authorisation, size limits, scoring.

`alignment.rewards.wire` defines the format of requests and replies.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import torch
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from alignment.rewards import wire
from common.types import Score
from launch.schemas.server import LOOPBACK
from launch.server.batching import Batcher, QueueFullError

if TYPE_CHECKING:
    from common.types import RewardModel
    from launch.schemas.server import ServeRun


class BodyTooLargeError(ValueError):
    """A request's body is larger than the limit."""


def create_app(
    rewards: Mapping[str, RewardModel], cfg: ServeRun, *, token: str | None
) -> FastAPI:
    """Build the application with /health, /v1/models, /v1/score and /metrics.

    With a token, all but /health require it as ``Bearer``. A single thread scores for all models,
    since they share a device. Bodies are read up to ``max_body_mb`` and no further.
    """
    # Every model has a queue, and a single thread scores for all.
    executor = ThreadPoolExecutor(1, thread_name_prefix="reward")
    batchers = {
        name: Batcher(
            reward,
            executor=executor,
            max_videos=cfg.batch_videos,
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

    # There are neither an interactive page nor a schema: only these four addresses.
    app = FastAPI(
        lifespan=running,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )

    # Otherwise a web page could make a browser request it under another host name.
    if cfg.host in LOOPBACK:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])

    # Clients read {"error": ...} instead of FastAPI's {"detail": ...}.
    @app.exception_handler(HTTPException)
    async def problem(_: Request, error: HTTPException) -> Response:
        return JSONResponse(
            {"error": error.detail},
            status_code=error.status_code,
            headers=error.headers,
        )

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
        return JSONResponse({"models": list(rewards)})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        authorise(request)
        return PlainTextResponse(metrics_text(batchers))

    @app.post("/v1/score")
    async def score(request: Request) -> Response:
        authorise(request)
        try:
            body = await read_body(request, limit=cfg.max_body_mb << 20)
            # Decoding takes long enough to hold up other requests.
            decoded = await asyncio.to_thread(
                wire.decode_request,
                body,
                request.headers.get("Content-Type", ""),
                max_frames=cfg.max_frames,
                max_videos=cfg.max_videos,
            )
            batcher = batchers.get(decoded.model)
            if batcher is None:
                raise HTTPException(
                    404, f"no model {decoded.model!r:.80}; there are {list(batchers)}"
                )
            return JSONResponse(await score_request(decoded, batcher))
        except BodyTooLargeError as error:
            raise HTTPException(413, str(error)) from error
        except wire.WireError as error:
            raise HTTPException(422, str(error)) from error
        except QueueFullError as error:
            raise HTTPException(429, str(error), {"Retry-After": "1"}) from error

    return app


async def read_body(request: Request, *, limit: int) -> bytes:
    """Read the body. BodyTooLargeError as soon as it exceeds ``limit`` bytes, announced or not."""
    # The announced size, before anything is read.
    too_large = BodyTooLargeError(f"the body may have at most {limit >> 20} MB")
    announced = request.headers.get("Content-Length", "0")
    if not announced.isdecimal() or int(announced) > limit:
        raise too_large

    # A client may announce less than it sends.
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return bytes(body)


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
            # Anything else is a failure of the server.
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
            f"reward_waiting{label} {batcher.queue.qsize()}",
        ]
        for q in (0.5, 0.95):
            label = f'{{model="{name}",quantile="{q}"}}'
            lines.append(f"reward_seconds{label} {stats.quantile(q):.6f}")
    return "\n".join(lines) + "\n"
