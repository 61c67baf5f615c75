"""One request to the application of launch/serve.py, without a network."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import FastAPI


def ask_once(app: FastAPI) -> None:
    """Send videos to the first model of a reward server and wait for the scores.

    Raises RuntimeError for an answer other than scores.
    """
    asyncio.run(_ask(app))


async def _ask(app: FastAPI) -> None:
    import httpx

    from alignment.rewards import wire
    from common import progress
    from launch.rehearsal.stand_ins import FPS, SCORED_VIDEOS, request_videos

    # The queue of every model runs while the application does.
    transport = httpx.ASGITransport(app)
    client = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")
    async with app.router.lifespan_context(app), client:
        progress.enter("request")
        models = (await client.get("/v1/models")).json()
        prompts = [f"Boat {i} drifts." for i in range(SCORED_VIDEOS)]
        body = wire.encode_request(
            request_videos(SCORED_VIDEOS),
            prompts,
            fps=FPS,
            model=_first(models),
            id="rehearsal",
        )
        headers = {"content-type": wire.SAFETENSORS}
        reply = await client.post(
            "/v1/score", content=body, headers=headers, timeout=None
        )
    if reply.status_code != 200:
        raise RuntimeError(f"the server answered {reply.status_code}: {reply.text}")


def _first(models: Any) -> str:
    """The name of the first model that a server lists."""
    listed = models["models"] if isinstance(models, dict) else models
    first = listed[0]
    return first["name"] if isinstance(first, dict) else first
