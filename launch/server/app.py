"""The HTTP side of launch/serve.py: who may ask, how much, and what is answered. The format is `alignment.rewards.wire`."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import torch
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from alignment.rewards import wire
from common.types import Score
from launch.schemas.server import LOOPBACK
from launch.server.batching import Batcher, QueueFullError

if TYPE_CHECKING:
    from common.types import RewardModel
    from launch.schemas.server import ServeRun


class TooLargeError(ValueError):
    """A body beyond the limit."""


def create_app(
    rewards: Mapping[str, RewardModel], cfg: ServeRun, *, token: str | None
) -> FastAPI:
    """/health, /v1/models, /v1/score and /metrics. With a token all but /health ask for it as ``Bearer``.

    One thread scores for all models: they share a device. Bodies are read up to ``max_body_mb`` and no further.
    """
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

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(batcher.run()) for batcher in batchers.values()]
        yield
        for task in tasks:
            task.cancel()
        executor.shutdown(wait=False, cancel_futures=True)

    # neither an interactive page nor a schema: nothing but these four addresses
    app = FastAPI(lifespan=running, docs_url=None, redoc_url=None, openapi_url=None)
    if (
        cfg.host in LOOPBACK
    ):  # else a web page could make a browser ask for it under a name of its own
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])

    def refused(request: Request) -> Response | None:
        given = request.headers.get("Authorization", "")
        if token is not None and not hmac.compare_digest(
            given.encode(), f"Bearer {token}".encode()
        ):
            return _problem(401, "a bearer token is needed")
        return None

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        return refused(request) or JSONResponse({"models": list(rewards)})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        return refused(request) or PlainTextResponse(describe(batchers))

    @app.post("/v1/score")
    async def score(request: Request) -> Response:
        if answer := refused(request):
            return answer
        try:
            body = await read_body(request, limit=cfg.max_body_mb << 20)
            limits = {"max_frames": cfg.max_frames, "max_videos": cfg.max_videos}
            kind = request.headers.get("Content-Type", "")
            asked = await asyncio.get_running_loop().run_in_executor(
                None, lambda: wire.decode_request(body, kind, **limits)
            )
            if asked.model not in batchers:
                return _problem(
                    404,
                    f"there is no model {asked.model!r:.80}, but {', '.join(batchers)}",
                )
            return JSONResponse(await answer_of(asked, batchers[asked.model]))
        except TooLargeError as error:
            return _problem(413, str(error))
        except wire.WireError as error:
            return _problem(422, str(error))
        except QueueFullError as error:
            return _problem(429, str(error), {"Retry-After": "1"})

    return app


async def read_body(request: Request, *, limit: int) -> bytes:
    """All of it. Raises TooLargeError as soon as it is more than ``limit`` bytes, announced or not."""
    announced = request.headers.get("Content-Length", "0")
    if not announced.isdecimal() or int(announced) > limit:
        raise TooLargeError(f"a body of at most {limit >> 20} MB is allowed")
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise TooLargeError(f"a body of at most {limit >> 20} MB is allowed")
        chunks.append(chunk)
    return b"".join(chunks)


async def answer_of(asked: wire.Request, batcher: Batcher) -> dict[str, object]:
    """Score the sound items, those of one size and rate together; the others keep their error."""
    errors: list[str | None] = [item.error for item in asked.items]
    kinds: dict[tuple[object, ...], list[int]] = {}
    for i, item in enumerate(asked.items):
        if item.video_TYXC is not None:
            kinds.setdefault((tuple(item.video_TYXC.shape), item.fps), []).append(i)

    async def one(places: list[int]) -> Score | None:
        video_BTYXC = torch.stack([asked.items[i].video_TYXC for i in places])
        try:
            return await batcher.score(
                video_BTYXC,
                [asked.prompts[i] for i in places],
                fps=asked.items[places[0]].fps,
            )
        except ValueError as error:  # of these videos or prompts; anything else is the server's own failure
            for i in places:
                errors[i] = str(error)[:500]
            return None

    found = await asyncio.gather(*(one(places) for places in kinds.values()))
    judged = [
        (places, score)
        for places, score in zip(kinds.values(), found, strict=True)
        if score is not None
    ]
    return wire.encode_reply(asked, Score.placed(len(asked.items), judged), errors)


def describe(batchers: Mapping[str, Batcher]) -> str:
    """Figures in the text format that Prometheus reads."""
    lines = []
    for name, batcher in batchers.items():
        label, found = f'{{model="{name}"}}', batcher.figures
        for key in ("requests", "videos", "batches", "failed"):
            lines.append(f"reward_{key}_total{label} {getattr(found, key)}")
        lines.append(f"reward_waiting{label} {batcher.queue.qsize()}")
        for q in (0.5, 0.95):
            lines.append(
                f'reward_seconds{{model="{name}",quantile="{q}"}} {found.quantile(q):.6f}'
            )
    return "\n".join(lines) + "\n"


def _problem(
    status: int, text: str, headers: Mapping[str, str] | None = None
) -> Response:
    return JSONResponse(
        {"error": text}, status_code=status, headers=dict(headers or {})
    )
