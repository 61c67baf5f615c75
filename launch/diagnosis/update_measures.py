"""Measure an optimizer step: the gradient over ranks, what it moved, and whether it helped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from alignment.grpo_losses import weights_of_steps
from common import gaussian
from common.distributed import differing_ranks, gather_objects, world_size

if TYPE_CHECKING:
    from torch import Tensor, nn

    from alignment.config import GrpoConfig
    from alignment.grpo import StepResult
    from alignment.prompts import PromptBatch
    from common.types import Generator, Group


class GradientRecorder:
    """Adds up the gradients of a step on this rank, before the engine averages them."""

    def __init__(self, module: nn.Module) -> None:
        self.total: dict[str, Tensor] = {}
        self.active = False
        self._handles = []
        # A hook on the tensor: it sees each backward, before ZeRO reduces it.
        for name, parameter in trained(module).items():
            handle = parameter.register_hook(lambda g, name=name: self._add(name, g))
            self._handles.append(handle)

    def _add(self, name: str, gradient: Tensor) -> None:
        if not self.active:
            return
        # Accumulated in fp32, whatever the engine accumulates in.
        gradient = gradient.detach().float()
        if name in self.total:
            self.total[name] += gradient
        else:
            self.total[name] = gradient.clone()

    def start(self) -> None:
        """Begin a step."""
        self.total = {}
        self.active = True

    def norm(self) -> float:
        """The norm of the MEAN over ranks. All ranks must call this."""
        self.active = False
        square = 0.0
        # A rank may lack the gradient of a parameter that it did not use.
        names = sorted(set().union(*gather_objects(list(self.total))))
        for name in names:
            square += float(_mean_over_ranks(self.total[name]).double().square().sum())
        return math.sqrt(square)

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self.total = {}


def _mean_over_ranks(x: Tensor) -> Tensor:
    if world_size() == 1:
        return x
    # all_gather and not all_reduce: the latter may be what is broken.
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts).mean(dim=0)


class WeightRecorder:
    """Tells how far the trained weights moved since the last look."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.before = self._copies()

    def look(self, *, rate: float) -> dict[str, float]:
        """Measure all trained weights; ``rate`` is the learning rate. All ranks must call this."""
        now = self._copies()
        # Squares over all weights, and over each of the adapter's matrices.
        moved = 0.0
        count = 0
        norms = {"lora_A": 0.0, "lora_B": 0.0}
        numbers = {"lora_A": 0, "lora_B": 0}
        for name, weight in now.items():
            moved += float((weight - self.before[name]).double().square().sum())
            count += weight.numel()
            for matrix in norms:
                if matrix in name:
                    norms[matrix] += float(weight.double().square().sum())
                    numbers[matrix] += 1
        self.before = now
        # rms per weight, absolute and in learning rates.
        found = {
            "weights/moved": math.sqrt(moved / max(1, count)),
            "weights/moved_per_rate": math.sqrt(moved / max(1, count))
            / max(rate, 1e-30),
            "weights/ranks_apart": float(len(differing_ranks(now))),
        }
        # Matrices of the adapter that nobody trains.
        frozen = 0
        for name, parameter in self.module.named_parameters():
            if "lora_" in name and not parameter.requires_grad:
                frozen += 1
        found["adapter/frozen"] = float(frozen)
        for matrix, square in norms.items():
            found[f"adapter/{matrix}_norm"] = math.sqrt(square)
            found[f"adapter/{matrix}_trained"] = float(numbers[matrix])
        return found

    def _copies(self) -> dict[str, Tensor]:
        copies = {}
        for name, parameter in trained(self.module).items():
            copies[name] = parameter.detach().float().cpu().clone()
        return copies


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name."""
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def gain(
    generator: Generator,
    cfg: GrpoConfig,
    groups: Sequence[Group],
    advantage_PM: Tensor,
) -> dict[str, float]:
    """Whether an update made what is rewarded more likely: the advantage of the new log-probs.

        gain = sum w A (log p_new - log p_old) / sum |w A (log p_new - log p_old)|

    over all members and stochastic steps, in [-1, 1]. A gradient step raises it above 0. All
    ranks must call this, and the result is over all of them.
    """
    weights = iter(
        weights_of_steps(
            [step for group in groups for step in group.steps],
            form=cfg.reweight,
            normalize=cfg.normalize_step_weights,
        )
    )
    # The old log-probs are those that the rollout recorded.
    signed = 0.0
    absolute = 0.0
    for group, advantage_G in zip(groups, advantage_PM, strict=True):
        for step in group.steps:
            policy = generator.transition(group.prompt, step)
            log_prob_G = gaussian.log_prob(policy, step.next_GCFHW)
            change_G = (log_prob_G - step.log_prob_G).double().cpu()
            term_G = next(weights).policy * advantage_G.double().cpu() * change_G
            signed += float(term_G.sum())
            absolute += float(term_G.abs().sum())
    # Over all ranks, since they made the update together.
    sums = gather_objects((signed, absolute))
    total = sum(size for _, size in sums)
    return {"update/gain": sum(part for part, _ in sums) / total if total else 0.0}


def kl_pull(
    generator: Generator,
    module: nn.Module,
    cfg: GrpoConfig,
    group: Group,
) -> dict[str, float]:
    """Norm of the gradient of a group's KL term, as the loss weighs it."""
    if cfg.kl_weight == 0:
        return {}
    # The KL term as `grpo_group_loss` weighs it.
    step = group.steps[0]
    (weights,) = weights_of_steps([step], form=cfg.reweight, normalize=False)
    with torch.no_grad(), generator.reference():
        reference = generator.transition(group.prompt, step)
    policy = generator.transition(group.prompt, step)
    kl = gaussian.kl_same_std(policy, reference).mean()
    loss = cfg.kl_weight * weights.kl * kl
    # Not backward(), which would add to the engine's gradients.
    gradients = torch.autograd.grad(
        loss,
        list(trained(module).values()),
        allow_unused=True,
    )
    square = sum(float(g.double().square().sum()) for g in gradients if g is not None)
    return {"kl/pull": math.sqrt(square)}


def repeats(
    result: StepResult,
    before: PromptBatch | None,
    groups: Sequence[Group],
) -> dict[str, float]:
    """Shares of seeds that another rank or the previous step has, and of equal videos."""
    # The same seed twice is the same video twice.
    seeds = list(result.batch.seeds)
    everyone = [seed for part in gather_objects(seeds) for seed in part]
    found = {"batch/repeated": 1 - len(set(everyone)) / max(1, len(everyone))}
    if before is not None:
        old = set(before.seeds)
        found["batch/as_before"] = sum(seed in old for seed in seeds) / len(seeds)
    # Members of a group start from one latent and end apart.
    first = groups[0].clean_GCFHW
    apart = float((first[0] - first[-1]).abs().max())
    found["batch/members_apart"] = apart
    return found
