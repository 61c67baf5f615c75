"""TODO."""

from __future__ import annotations

from dataclasses import dataclass

from alignment.config import RewardConfig
from common.config import check
from launch.schemas.training import check_rewards

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServeRun:
    """A reward server.

    rewards       name -> reward, the models it offers; weights are ignored
    token_env     name of the environment variable with the token; needed for any host but loopback
    batch_videos  at most so many videos are scored together
    wait_ms       how long a request waits for others to go with it
    max_waiting   requests in the queue of one model; one more is told to come again (429)
    max_body_mb, max_frames, max_videos  of one request
    """

    rewards: dict[str, RewardConfig]
    host: str = "127.0.0.1"
    port: int = 8900
    token_env: str = "REWARD_SERVER_TOKEN"
    batch_videos: int = 32
    wait_ms: float = 10.0
    max_waiting: int = 64
    max_body_mb: int = 512
    max_frames: int = 512
    max_videos: int = 64

    def __post_init__(self) -> None:
        positive = (
            "batch_videos",
            "max_waiting",
            "max_body_mb",
            "max_frames",
            "max_videos",
        )
        problems = [
            f"{n} must be at least 1, got {getattr(self, n)}"
            for n in positive
            if getattr(self, n) < 1
        ]
        if not 0 <= self.port <= 65535:
            problems.append(f"port must be in 0..65535, got {self.port}")
        if self.wait_ms < 0:
            problems.append(f"wait_ms must be at least 0, got {self.wait_ms}")
        if not self.rewards:
            problems.append("rewards must name at least one reward, got none")
        check("ServeRun", problems)
        check_rewards(self.rewards)
