"""What the fake runs on."""

from __future__ import annotations

import os


class Platform:
    """As `vllm.platforms.interface.Platform`."""

    def is_sleep_mode_available(self) -> bool:
        return os.environ.get("FAKE_VLLM") != "no sleep"


current_platform = Platform()
