"""Schema of launch/serve.py. No torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from common.schema import NonNegativeFloat, PositiveFloat, PositiveInt, config
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
    max_decoded_mb  size of a request's decoded frames: a small mp4 can hold large ones.
    max_memory_mb   bodies and decoded frames of all requests together; further requests get
                  status 429.
    max_frames    frames of a video.
    max_videos    videos of a request.
    body_timeout_s  how long a client may take to send a request.
    shutdown_s    how long accepted requests may take after the server is told to stop.
    openapi       serve /openapi.json, which describes the JSON form.
    """

    rewards: ScoringRewards
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8900
    token_env: str = "REWARD_SERVER_TOKEN"
    batch_videos: PositiveInt = 32
    wait_ms: NonNegativeFloat = 10.0
    max_waiting: PositiveInt = 64
    max_body_mb: PositiveInt = 512
    max_decoded_mb: PositiveInt = 4096
    max_memory_mb: PositiveInt = 16384
    max_frames: PositiveInt = 512
    max_videos: PositiveInt = 64
    body_timeout_s: PositiveFloat = 60.0
    shutdown_s: PositiveInt = 600
    openapi: bool = False

    def __post_init__(self) -> None:
        needed = self.max_body_mb + self.max_decoded_mb
        if self.max_memory_mb < needed:
            raise ValueError(
                f"max_memory_mb={self.max_memory_mb} must hold a request of max_body_mb and "
                f"max_decoded_mb, {needed} MB"
            )
