"""Longcat-GRPO, Flow-DPO and rewards.

`from alignment import GrpoLoop, DpoLoop` loads the modules behind these names when they are
first used.
"""

from common.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "DpoConfig": "alignment.config",
        "DpoLoop": "alignment.dpo",
        "GrpoConfig": "alignment.config",
        "GrpoLoop": "alignment.grpo",
        "RewardConfig": "alignment.config",
        "build_rewards": "alignment.rewards",
    },
)
