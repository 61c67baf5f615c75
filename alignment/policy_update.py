"""GRPO's policy update: the loss of each group at its stochastic steps, and optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from alignment.grpo_losses import (
    StepWeights,
    grpo_group_loss,
    update_metrics,
    weights_of_steps,
)
from common import gaussian
from common.log import say
from common.updates import backward_and_step

if TYPE_CHECKING:
    from torch import Tensor

    from alignment.advantages import Advantages
    from alignment.config import GrpoConfig
    from common.types import Engine, Generator, Group, LossOutput, Step


class PolicyUpdate:
    """Longcat-GRPO's update (LongCat-Video 2510.22200, equation 8): tensors of a rollout in.

    engine     It must accumulate a backward per group and stochastic step of this rank.
    grad_norm  Returns the gradient's norm before clipping, or None, after an optimizer step.
    """

    def __init__(
        self,
        cfg: GrpoConfig,
        *,
        generator: Generator,
        engine: Engine,
        grad_norm: Callable[[], float | Tensor | None] = lambda: None,
    ) -> None:
        self.cfg = cfg
        self.generator = generator
        self.engine = engine
        self.grad_norm = grad_norm

    def train(
        self, groups: Sequence[Group], advantages: Advantages
    ) -> dict[str, float]:
        """Take the optimizer steps of a rollout, and return the MEAN of their metrics."""
        updates = [self.update(groups, advantages) for _ in range(self.cfg.updates)]
        metrics = {}
        for name in updates[0]:
            values = [update[name] for update in updates]
            metrics[name] = sum(values) / len(values)
        return metrics

    def update(
        self, groups: Sequence[Group], advantages: Advantages
    ) -> dict[str, float]:
        """Take one optimizer step: a backward per group and stochastic step.

        Without an advantage on any rank there is no optimizer step at all: KL has no policy
        step to hold back, and Adam would still move the weights by momentum and decay. A loss
        that is not finite is reported; what happens to its gradient is decided by the engine.
        """
        if not advantages.anything_to_learn:
            return {"train/skipped": 1.0}
        outputs = []
        weights = iter(
            weights_of_steps(
                [step for group in groups for step in group.steps],
                form=self.cfg.reweight,
                normalize=self.cfg.normalize_step_weights,
            )
        )
        for group, advantage_G in zip(groups, advantages.advantage_PM, strict=True):
            for step in group.steps:
                output = self.loss(group.prompt, step, advantage_G, next(weights))
                if not math.isfinite(output.metrics["loss"]):
                    say(f"the loss is {output.metrics['loss']} for {group.prompt!r}")

                # the engine counts backwards and steps the optimizer on the last of them
                backward_and_step(self.engine, output.loss)
                outputs.append(output)

        # the engine knows the norm since its optimizer step
        metrics = update_metrics(outputs, self.grad_norm())
        return {**metrics, "train/skipped": 0.0}

    def loss(
        self, prompt: str, step: Step, advantage_G: Tensor, weights: StepWeights
    ) -> LossOutput:
        """Compute `grpo_group_loss` of a group at a stochastic step, in a single forward.

        With one update a rollout the policy that sampled is the policy of now: its log-prob is
        that of this forward, detached, and the ratio is 1 by construction.
        """
        # the reference first, so that the policy's activations are not held meanwhile
        reference = None
        if self.cfg.kl_weight > 0:
            with torch.no_grad(), self.generator.reference():
                reference = self.generator.transition(prompt, step)
        policy = self.generator.transition(prompt, step)
        # how likely the sampled latents are under the policy of now
        log_prob_G = gaussian.log_prob(policy, step.next_GCFHW)
        kl = None if reference is None else gaussian.kl_same_std(policy, reference)
        return grpo_group_loss(
            log_prob_G,
            step.log_prob_G.to(log_prob_G.device),
            advantage_G.to(log_prob_G.device),
            kl,
            policy_weight=weights.policy,
            kl_weight_scaled=self.cfg.kl_weight * weights.kl,
            clip_low=self.cfg.clip_low,
            clip_high=self.cfg.clip_high,
            on_policy=self.cfg.updates == 1,
        )
