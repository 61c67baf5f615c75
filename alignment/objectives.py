"""Objectives of the GRPO loop: how a rollout with advantages becomes optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from alignment.forward_update import ForwardUpdate
from alignment.old_policy import OldPolicy
from alignment.policy_update import PolicyUpdate

if TYPE_CHECKING:
    from torch import Tensor

    from alignment.advantages import Advantages
    from alignment.config import GrpoConfig
    from alignment.prompts import PromptBatch
    from common.types import Engine, Generator, Group


class Objective(Protocol):
    """What the loop asks of an objective.

    old  The policy that samples, whose average belongs into a checkpoint; None without one.
    """

    old: OldPolicy | None

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
    grad_norm: Callable[[], float | Tensor | None],
) -> PolicyUpdate | ForwardUpdate:
    """Build the objective that a config names; all ranks must call this.

    levels        noise levels of forward objectives
    first_member  number within its group of this rank's first member
    """
    if cfg.objective == "policy":
        return PolicyUpdate(
            cfg, generator=generator, engine=engine, grad_norm=grad_norm
        )
    old = None
    if cfg.has_old_policy:
        old = OldPolicy(cfg.forward.old_policy, generator.module)
    return ForwardUpdate(
        cfg,
        generator=generator,
        engine=engine,
        levels=levels,
        first_member=first_member,
        old=old,
        grad_norm=grad_norm,
    )
