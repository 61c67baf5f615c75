"""Objectives of the GRPO loop: how a rollout with advantages becomes optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from alignment.forward_update import AveragedPolicy, ForwardUpdate
from alignment.policy_update import PolicyUpdate

if TYPE_CHECKING:
    from torch import Tensor

    from alignment.advantages import Advantages
    from alignment.config import GrpoConfig
    from alignment.prompts import PromptBatch
    from common.types import Engine, Generator, Group


class Objective(Protocol):
    """What the loop asks of an objective.

    cfg  Settings; the weight of the KL term may change between two updates.
    old  The policy that samples, where it is another one than that of the update.
    """

    cfg: GrpoConfig
    old: AveragedPolicy | None

    def sampling_policy(self) -> AbstractContextManager[None]:
        """Inside, the generator is the policy that samples."""
        ...

    def train(
        self, groups: Sequence[Group], advantages: Advantages, batch: PromptBatch
    ) -> dict[str, float]:
        """Take the optimizer steps of a rollout and return metrics over all ranks."""
        ...


def build_objective(
    cfg: GrpoConfig,
    *,
    generator: Generator,
    engine: Engine,
    levels: Sequence[float],
    first_member: int,
    old: AveragedPolicy | None,
    grad_norm: Callable[[], float | Tensor | None],
) -> PolicyUpdate | ForwardUpdate:
    """Build the objective that a config names.

    levels        noise levels of forward objectives
    first_member  number within its group of this rank's first member
    old           policy that samples, where `GrpoConfig.has_old_policy`

    Raises ValueError if the old policy is missing.
    """
    if cfg.objective == "policy":
        return PolicyUpdate(
            cfg, generator=generator, engine=engine, grad_norm=grad_norm
        )
    # a copy of the weights, only where another policy samples
    if cfg.has_old_policy and old is None:
        raise ValueError(
            "grpo.forward.old_policy or updates above 1 needs an old policy: pass "
            "old=OldPolicy(cfg.forward.old_policy.decay, generator.module)"
        )
    return ForwardUpdate(
        cfg,
        generator=generator,
        engine=engine,
        levels=levels,
        first_member=first_member,
        old=old if cfg.has_old_policy else None,
        grad_norm=grad_norm,
    )
