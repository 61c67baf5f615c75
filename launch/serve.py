"""Serve rewards over HTTP: one copy for many runs, in an environment or on a machine of its own.

    python launch/serve.py --config configs/wan/serve.yaml
    deepspeed launch/grpo.py --config configs/wan/grpo.yaml rewards.descore.url=http://127.0.0.1:8900

On loopback unless ``host`` says otherwise, and then only with a token, taken from the environment variable that
``token_env`` names. Videos come as frames or mp4 in the request itself; no address is fetched and no pickle read.
"""

from __future__ import annotations

import os

from common.cli import exit_with_error, user_errors
from launch.command import read_command
from launch.schemas.server import LOOPBACK, ServeRun


def main() -> None:
    serve(read_command(ServeRun, description=__doc__.splitlines()[0]).cfg)


def serve(cfg: ServeRun) -> None:
    """Until it is stopped; exit with code 2 for another host than loopback without a token."""
    token = os.environ.get(cfg.token_env) or None
    if cfg.host not in LOOPBACK and token is None:
        exit_with_error(
            f"host {cfg.host} can be reached from elsewhere: set {cfg.token_env} to a token that clients send"
        )
    from launch.compose import build_rewards, quiet

    quiet()
    import uvicorn

    from common.log import say
    from launch.server.app import create_app

    say(f"loading {', '.join(cfg.rewards)}")
    with user_errors():
        app = create_app(build_rewards(cfg.rewards), cfg, token=token)
    say(f"serving {', '.join(cfg.rewards)} on http://{cfg.host}:{cfg.port}")
    uvicorn.run(
        app,
        host=cfg.host,
        port=cfg.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=10,
    )


if __name__ == "__main__":
    main()
