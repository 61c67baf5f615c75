"""Serve rewards over HTTP, for many runs, from another environment or another machine.

    python launch/serve.py --config configs/wan/serve.yaml
    deepspeed launch/grpo.py --config configs/wan/grpo.yaml \\
        rewards.descore.url=http://127.0.0.1:8900

Listens on loopback. Any other ``host`` requires a token, which is taken from the environment
variable that ``token_env`` names. Requests hold the videos, as frames or mp4: the server fetches no
address and reads no pickle.
"""

from __future__ import annotations

import os

from common.cli import exit_with_error, user_errors
from launch.command import run_command
from launch.schemas.server import LOOPBACK, ServeRun


def main() -> None:
    run_command(
        ServeRun,
        lambda command: serve_rewards(command.cfg),
        description=__doc__,
    )


def serve_rewards(cfg: ServeRun) -> None:
    """Serve until stopped. Exits with code 2 for a host other than loopback without a token."""
    # Without a token, only this machine may connect.
    token = os.environ.get(cfg.token_env) or None
    if cfg.host not in LOOPBACK and token is None:
        exit_with_error(
            f"host {cfg.host} can be reached from other machines: "
            f"set {cfg.token_env} to a token that clients send"
        )

    # Import the heavy modules only for a valid config.
    from launch.compose import build_rewards, quiet

    quiet()
    import uvicorn

    from common.log import say
    from launch.server.app import create_app

    names = ", ".join(cfg.rewards)
    say(f"loading {names}")
    with user_errors():
        app = create_app(build_rewards(cfg.rewards), cfg, token=token)
    say(f"serving {names} on http://{cfg.host}:{cfg.port}")
    # Accepted requests are answered before the end; a second signal ends immediately.
    uvicorn.run(
        app,
        host=cfg.host,
        port=cfg.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=cfg.shutdown_s,
    )


if __name__ == "__main__":
    main()
