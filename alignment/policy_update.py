"""GRPO's policy update: the loss of each group at its stochastic steps, and optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch

from alignment.grpo_losses import (
    StepWeights,
    TrustRegion,
    grpo_group_loss,
    trust_metrics,
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
    from alignment.prompts import PromptBatch
    from common.gaussian import Gaussian
    from common.types import Engine, Generator, Group, LossOutput, Step

# Share of ratios above 1, among members of positive advantage, below which a run is told.
FEW_ABOVE = 0.05


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
        self.warned = False
        # the policy of the update samples
        self.old = None

    def sampling_policy(self) -> AbstractContextManager[None]:
        """Inside, the generator is the policy that samples, which is that of the update."""
        return nullcontext()

    def train(
        self, groups: Sequence[Group], advantages: Advantages, _: PromptBatch
    ) -> dict[str, float]:
        """Take the optimizer steps of a rollout, and return the MEAN of their metrics.

        Those of `trust_metrics` are of the updates after the first.
        """
        # the first update has ratios of 1
        updates = [self.update(groups, advantages)]
        for _ in range(1, self.cfg.updates):
            updates.append(self.update(groups, advantages, later=True))
        metrics = {}
        for name in updates[-1]:
            values = [update[name] for update in updates if name in update]
            metrics[name] = sum(values) / len(values)
        self._warn_of_one_side(metrics)
        return metrics

    def _warn_of_one_side(self, metrics: dict[str, float]) -> None:
        """Say once if hardly any plain ratio of a good member is above 1."""
        # NaN without such a member, and absent with one update
        share = metrics.get("train/ratio_above_positive", math.nan)
        if self.warned or self.cfg.ratio == "normalized" or not share < FEW_ABOVE:
            return
        self.warned = True
        say(
            f"{share:.0%} of the ratios of members with a positive advantage are above 1 in the "
            "later updates: the clip holds back negative advantages only; use "
            "grpo.ratio=normalized or grpo.updates=1"
        )

    def update(
        self, groups: Sequence[Group], advantages: Advantages, *, later: bool = False
    ) -> dict[str, float]:
        """Take one optimizer step: a backward per group and stochastic step.

        Without an advantage on any rank there is no optimizer step at all: KL has no policy
        step to hold back, and Adam would still move the weights by momentum and decay. A loss
        that is not finite is reported; what happens to its gradient is decided by the engine.
        ``later`` updates on a rollout have the `trust_metrics` too.
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
        if later:
            metrics |= trust_metrics(outputs)
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
            trust=self.trust_region(step, policy),
        )

    def trust_region(self, step: Step, policy: Gaussian) -> TrustRegion | None:
        """Compare the policy of now with the one that sampled; None with one update a rollout.

        Raises ValueError if the generator does not record the means of its transitions.
        """
        if self.cfg.updates == 1:
            return None
        if step.mean_MCFHW is None:
            raise ValueError(
                f"grpo.updates={self.cfg.updates} needs Step.mean_MCFHW, which this generator "
                "does not record: use grpo.updates=1"
            )
        # the transition that sampled, from its record
        sampled = gaussian.Gaussian(step.mean_MCFHW.to(policy.mean.device), step.std)
        return TrustRegion(
            gaussian.kl_same_std(policy, sampled),
            step.std,
            normalized=self.cfg.ratio == "normalized",
            divergence_clip=self.cfg.divergence_clip,
        )
