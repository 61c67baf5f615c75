"""Schema of the guards of a GRPO run. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from common.schema import NonEmptyText, PositiveFloat, PositiveInt, config

if TYPE_CHECKING:
    from alignment.config import RewardConfig


@config
class GuardsConfig:
    """Guards against rewards that are hacked: an alarm, a KL budget, saturation as a metric.

    heldout_reward  a reward of weight 0 that evaluations compare with its best evaluation so
                    far, prompt by prompt; null compares none.
    z               the alarm needs a mean change below -z standard errors. The best of many
                    evaluations is a lucky one too: at 2, clean runs can raise the alarm;
    patience        and that in so many evaluations in a row, while the trained rewards have
                    risen.
    on_alarm        "warn" prints it once, "stop" ends the run after the next step, with its
                    checkpoint and final weights.
    kl_target       the KL that grpo.kl_weight is adapted to, in the unit of the metric
                    train/kl; null keeps the weight.
    """

    heldout_reward: NonEmptyText | None = None
    z: PositiveFloat = 3.0
    patience: PositiveInt = 2
    on_alarm: Literal["warn", "stop"] = "warn"
    kl_target: PositiveFloat | None = None


def check_guards(
    guards: GuardsConfig | None,
    rewards: Mapping[str, RewardConfig],
    *,
    kl_weight: float,
    has_evaluation: bool,
) -> None:
    """Raise ValueError for guards that have nothing to work on, naming the key."""
    # Nothing is watched.
    if guards is None:
        return
    name = guards.heldout_reward
    # The alarm compares a reward that is measured and never trained on.
    if name is not None:
        if name not in rewards:
            raise ValueError(
                f"guards.heldout_reward={name} is none of the rewards {', '.join(rewards)}"
            )
        if rewards[name].weight != 0:
            raise ValueError(
                f"guards.heldout_reward={name} must not be trained on: set "
                f"rewards.{name}.weight=0"
            )
        if not has_evaluation:
            raise ValueError(
                "guards.heldout_reward needs held-out prompts: set evaluation.prompts"
            )
    # Without a KL term no reference is computed, so there is no KL either.
    if guards.kl_target is not None and kl_weight == 0:
        raise ValueError(
            "guards.kl_target needs a KL term to adapt: set grpo.kl_weight above 0"
        )
