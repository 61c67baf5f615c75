"""Schema of launch/serve.py. No torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from common.schema import NonNegativeFloat, PositiveInt, config
from launch.schemas.rewards import ScoringRewards

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@config
class ServeRun:
    """A reward server.

    rewards       name -> reward model that it offers; weights are ignored.
    token_env     environment variable with the token, which any host but loopback needs.
    batch_videos  at most so many videos are scored together.
    wait_ms       how long a request waits for others that can share its batch.
    max_waiting   requests in a model's queue; further requests get status 429.
    max_body_mb   size of a request.
    max_frames    frames of a video.
    max_videos    videos of a request.
    """

    rewards: ScoringRewards
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8900
    token_env: str = "REWARD_SERVER_TOKEN"
    batch_videos: PositiveInt = 32
    wait_ms: NonNegativeFloat = 10.0
    max_waiting: PositiveInt = 64
    max_body_mb: PositiveInt = 512
    max_frames: PositiveInt = 512
    max_videos: PositiveInt = 64
