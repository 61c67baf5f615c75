"""The update of forward objectives: flow matching on a rollout's clean latents by advantage."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from alignment.forward_losses import awm_loss, dgpo_loss, nft_loss
from common.distributed import mean_over_ranks, seeded_generator
from common.log import say
from common.types import LossOutput
from common.updates import backward_and_step

if TYPE_CHECKING:
    from torch import Tensor

    from alignment.advantages import Advantages
    from alignment.config import GrpoConfig
    from alignment.prompts import PromptBatch
    from common.types import Engine, Generator, Group


class AveragedPolicy(Protocol):
    """A policy whose weights follow the trained ones (`engine.old_policy.OldPolicy`)."""

    def swapped_in(self) -> AbstractContextManager[None]:
        """Inside, the module runs with these weights."""
        ...

    def update(self) -> None:
        """Follow the weights of one more update of the policy."""
        ...


@dataclass(frozen=True)
class NoisedSamples:
    """Samples of a backward: clean latents of one prompt, each with a noise and its level.

    Noise is fp32 on the CPU, drawn from the seed of the prompt, the number of the member, of
    the level and of the update: the same on every rank and in every micro-batch. With dgpo the
    members of a group share levels and noises.
    """

    prompt: str
    clean_BCFHW: Tensor
    noise_BCFHW: Tensor
    sigma_B: Tensor
    advantage_B: Tensor

    @property
    def prompts(self) -> list[str]:
        """The prompt of every sample."""
        return [self.prompt] * len(self.sigma_B)


class ForwardUpdate:
    """The update of objective nft, awm or dgpo (`alignment.forward_losses`).

    engine        It must accumulate `GrpoConfig.samples_per_group` / micro_batch backwards per
                  group of this rank.
    levels        The noise levels that are trained.
    first_member  The number within its group of this rank's first member.
    old           The policy that samples; None if it is the policy of the update.

    Raises ValueError for a generator without ``flow_velocity``.
    """

    def __init__(
        self,
        cfg: GrpoConfig,
        *,
        generator: Generator,
        engine: Engine,
        levels: Sequence[float],
        first_member: int = 0,
        old: AveragedPolicy | None = None,
        grad_norm: Callable[[], float | Tensor | None] = lambda: None,
    ) -> None:
        if not hasattr(generator, "flow_velocity"):
            raise ValueError(
                f"grpo.objective={cfg.objective} needs a generator with flow_velocity, see "
                "docs/add-a-generator.md"
            )
        self.cfg = cfg
        self.generator = generator
        self.engine = engine
        self.levels = list(levels)
        self.first_member = first_member
        self.old = old
        self.grad_norm = grad_norm

    def sampling_policy(self) -> AbstractContextManager[None]:
        """Inside, the generator is the old policy."""
        return nullcontext() if self.old is None else self.old.swapped_in()

    def train(
        self, groups: Sequence[Group], advantages: Advantages, batch: PromptBatch
    ) -> dict[str, float]:
        """Take the optimizer steps of a rollout, let the old policy follow, return MEAN metrics."""
        # every update draws its own levels and noises
        updates = []
        for number in range(self.cfg.updates):
            updates.append(self.update(groups, advantages, batch.seeds, number=number))
        if self.old is not None:
            self.old.update()
        # MEAN over the updates
        metrics = {}
        for name in updates[0]:
            values = [update[name] for update in updates]
            metrics[name] = sum(values) / len(values)
        return metrics

    def update(
        self,
        groups: Sequence[Group],
        advantages: Advantages,
        seeds: Sequence[int],
        *,
        number: int = 0,
    ) -> dict[str, float]:
        """Take one optimizer step: a backward per micro-batch of noised latents.

        Without an advantage on any rank there is no optimizer step, see `PolicyUpdate.update`.
        """
        if not advantages.anything_to_learn:
            return {"train/skipped": 1.0}
        parts = zip(groups, advantages.advantage_PM, seeds, strict=True)
        batches = [
            batch
            for group, advantage_M, seed in parts
            for batch in self.noised(group, advantage_M, seed, number=number)
        ]

        # 1. Velocities of the old policy, all of them in one swap of weights.
        old: list[Tensor | None] = [None] * len(batches)
        if self.old is not None:
            with torch.no_grad(), self.old.swapped_in():
                old = [self.velocity(batch).cpu() for batch in batches]

        # 2. A backward for each micro-batch, and the optimizer step on the last.
        outputs = []
        for batch, v_old_BCFHW in zip(batches, old, strict=True):
            output = self.loss(batch, v_old_BCFHW)
            if not math.isfinite(output.metrics["loss"]):
                say(f"the loss is {output.metrics['loss']} for {batch.prompt!r}")
            backward_and_step(self.engine, output.loss)
            outputs.append(output)

        # 3. MEAN over the backwards of all ranks.
        norm = self.grad_norm()
        means = {} if norm is None else {"train/grad_norm": float(norm)}
        for name in outputs[0].metrics:
            total = sum(output.metrics[name] for output in outputs)
            means[f"train/{name}"] = total / len(outputs)
        return {**mean_over_ranks(means), "train/skipped": 0.0}

    def noised(
        self, group: Group, advantage_M: Tensor, seed: int, *, number: int = 0
    ) -> Iterator[NoisedSamples]:
        """Noise the members of a group, each at its levels, in micro-batches.

        With dgpo a micro-batch is the whole group at one level and noise.
        """
        # a row per member and level
        rows = []
        count = self.cfg.forward.timesteps_per_sample
        shared = self.cfg.objective == "dgpo"
        for place in range(len(group.clean_GCFHW)):
            # members who share levels and noises draw those of the first
            member = 0 if shared else self.first_member + place
            draw = seeded_generator(seed, "levels", member, number)
            order = torch.randperm(len(self.levels), generator=draw).tolist()
            rows += [(place, member, level) for level in order[:count]]
        if shared:
            rows.sort(key=lambda row: row[2])
        # what a sample is made of does not depend on the other samples
        clean = []
        noise = []
        sigma = []
        advantage = []
        for place, member, level in rows:
            clean_CFHW = group.clean_GCFHW[place]
            draw = seeded_generator(seed, "forward", member, level, number)
            noise.append(torch.randn(clean_CFHW.shape, generator=draw))
            clean.append(clean_CFHW)
            sigma.append(self.levels[level])
            advantage.append(advantage_M[place])
        # cut into micro-batches, which may hold several members
        size = self.cfg.forward.micro_batch
        for first in range(0, len(clean), size):
            part = slice(first, first + size)
            yield NoisedSamples(
                group.prompt,
                torch.stack(clean[part]),
                torch.stack(noise[part]),
                torch.tensor(sigma[part]),
                torch.stack(advantage[part]),
            )

    def velocity(self, batch: NoisedSamples) -> Tensor:
        """The policy's velocity of noised latents, with the guidance of the rollout."""
        return self.generator.flow_velocity(
            batch.clean_BCFHW, batch.noise_BCFHW, batch.sigma_B, batch.prompts
        )

    def loss(self, batch: NoisedSamples, v_old_BCFHW: Tensor | None) -> LossOutput:
        """Compute the objective and the KL term of a micro-batch; MEAN over its samples.

            loss = objective + kl_weight mean( (v_theta - v_ref)^2 )

        Without ``v_old_BCFHW`` the old policy is the policy of now, detached. The objective dgpo
        itself needs v_ref, so that it reports the KL without a weight as well.
        """
        # the reference first, so that the policy's activations are not held meanwhile
        reference = None
        if self.cfg.has_reference:
            with torch.no_grad(), self.generator.reference():
                reference = self.velocity(batch)
        v_BCFHW = self.velocity(batch)
        # on-policy nothing more is computed
        if v_old_BCFHW is None:
            v_old_BCFHW = v_BCFHW.detach()
        output = self.objective(
            batch, v_BCFHW, v_old_BCFHW.to(v_BCFHW.device), reference
        )
        loss = output.loss
        metrics = dict(output.metrics)
        if reference is not None:
            kl = (v_BCFHW - reference).square().mean()
            loss = loss + self.cfg.kl_weight * kl
            metrics["kl"] = float(kl.detach())
        return LossOutput(loss, {"loss": float(loss.detach()), **metrics})

    def objective(
        self,
        batch: NoisedSamples,
        v_BCFHW: Tensor,
        v_old_BCFHW: Tensor,
        v_ref_BCFHW: Tensor | None = None,
    ) -> LossOutput:
        """Compute the loss of nft, awm or dgpo from velocities."""
        how = self.cfg.forward
        device = v_BCFHW.device
        # v = eps - x_0
        noise_BCFHW = batch.noise_BCFHW.to(device)
        target_BCFHW = noise_BCFHW - batch.clean_BCFHW.to(device)
        velocities = (v_BCFHW, v_old_BCFHW, target_BCFHW)
        sigma_B = batch.sigma_B.to(device)
        advantage_B = batch.advantage_B.to(device)
        if self.cfg.objective == "dgpo":
            return dgpo_loss(
                v_BCFHW, v_ref_BCFHW, target_BCFHW, advantage_B, beta=how.group_beta
            )
        if self.cfg.objective == "nft":
            return nft_loss(
                *velocities,
                sigma_B,
                advantage_B,
                beta=how.beta,
                advantage_clip=self.cfg.advantage_clip,
                adaptive_weight=how.adaptive_weight,
            )
        return awm_loss(
            *velocities,
            sigma_B,
            advantage_B,
            weighting=how.weighting,
            clip_low=self.cfg.clip_low,
            clip_high=self.cfg.clip_high,
            proximal_weight=how.proximal_weight,
        )
