"""Serve rewards over HTTP: one copy for many runs, in an environment or on a machine of its own.

    python launch/serve.py --config configs/wan/serve.yaml
    deepspeed launch/grpo.py --config configs/wan/grpo.yaml rewards.descore.url=http://127.0.0.1:8900

On loopback unless ``host`` says otherwise, and then only with a token, taken from the environment variable that
``token_env`` names. Videos come as frames or mp4 in the request itself; no address is fetched and no pickle read.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from alignment.config import RewardConfig
from launch.command import read_command
from launch.refuse import refuse, refusing
from launch.runs import check, check_rewards

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
        positive = ("batch_videos", "max_waiting", "max_body_mb", "max_frames", "max_videos")
        problems = [f"{n} must be at least 1, got {getattr(self, n)}" for n in positive if getattr(self, n) < 1]
        if not 0 <= self.port <= 65535:
            problems.append(f"port must be in 0..65535, got {self.port}")
        if self.wait_ms < 0:
            problems.append(f"wait_ms must be at least 0, got {self.wait_ms}")
        if not self.rewards:
            problems.append("rewards must name at least one reward, got none")
        check("ServeRun", problems)
        check_rewards(self.rewards)


def main() -> None:
    serve(read_command(ServeRun, description=__doc__.splitlines()[0]).cfg)


def serve(cfg: ServeRun) -> None:
    """Until it is stopped; exit with code 2 for another host than loopback without a token."""
    token = os.environ.get(cfg.token_env) or None
    if cfg.host not in LOOPBACK and token is None:
        refuse(f"host {cfg.host} can be reached from elsewhere: set {cfg.token_env} to a token that clients send")
    from launch.compose import build_rewards, quiet

    quiet()
    import uvicorn

    from common.log import say
    from launch.reward_server import create_app

    say(f"loading {', '.join(cfg.rewards)}")
    with refusing():
        app = create_app(build_rewards(cfg.rewards), cfg, token=token)
    say(f"serving {', '.join(cfg.rewards)} on http://{cfg.host}:{cfg.port}")
    uvicorn.run(app, host=cfg.host, port=cfg.port, log_level="warning", access_log=False, timeout_graceful_shutdown=10)


if __name__ == "__main__":
    main()
