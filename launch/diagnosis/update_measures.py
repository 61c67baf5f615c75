"""Measure an optimizer step: the gradient over ranks, what it moved, and whether it helped."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from alignment.grpo_losses import StepWeights, weights_of_steps
from common import gaussian
from common.distributed import differing_ranks, gather_objects, world_size

if TYPE_CHECKING:
    from torch import Tensor, nn

    from alignment.config import GrpoConfig
    from alignment.prompts import PromptBatch
    from common.types import Generator, Group

# A matrix whose gradient is smaller than this part of the largest may stand still.
SMALL_GRADIENT = 1e-3
# The KL term must have this part of the policy term's gradient, or its factor is rounding.
KL_TELLS = 3e-3


class GradientRecorder:
    """Adds up the gradients of a step on this rank, before the engine averages them."""

    def __init__(self, module: nn.Module) -> None:
        self.total: dict[str, Tensor] = {}
        # Of the step's first backward, which is that of the first group.
        self.first: dict[str, Tensor] = {}
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
            self.first[name] = gradient.cpu().clone()

    def start(self) -> None:
        """Begin a step."""
        self.total = {}
        self.first = {}
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
        self.first = {}


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

    def look(
        self,
        gradients: Mapping[str, Tensor],
        *,
        rate: float,
    ) -> dict[str, float]:
        """Measure all trained weights. All ranks must call this.

        gradients  of this step, by name
        rate       the learning rate
        """
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
        found = {"weights/still": _standing(self.before, now, gradients)}
        self.before = now
        # rms per weight, absolute and in learning rates.
        found |= {
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

    @contextmanager
    def put_back(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the module has these weights; its own come back to the bit."""
        own = {name: p.detach().clone() for name, p in trained(self.module).items()}
        self._write(weights)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in trained(self.module).items():
            parameter.copy_(weights[name])

    def _copies(self) -> dict[str, Tensor]:
        copies = {}
        for name, parameter in trained(self.module).items():
            copies[name] = parameter.detach().float().cpu().clone()
        return copies


def _standing(
    before: Mapping[str, Tensor],
    now: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
) -> float:
    """Share of the matrices with a gradient in which no number moved."""
    norms = {name: float(gradient.norm()) for name, gradient in gradients.items()}
    largest = max(norms.values(), default=0.0)
    # A gradient near 0 may round away.
    pushed = [name for name in now if norms.get(name, 0.0) > SMALL_GRADIENT * largest]
    still = [name for name in pushed if torch.equal(before[name], now[name])]
    return len(still) / max(1, len(pushed))


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


def loss_terms(
    generator: Generator,
    module: nn.Module,
    cfg: GrpoConfig,
    group: Group,
    advantage_G: Tensor,
    weights: StepWeights,
    first: Mapping[str, Tensor],
) -> dict[str, float]:
    """Explain the gradient of a step's first backward by the two terms of the loss.

        first = a g_policy + b g_kl,     g_policy = d/dw -lambda mean_g[A_g log p_g]
                                         g_kl = d/dw beta lambda_KL KL

    by least squares, at the weights before the update. ``group`` is the first of the step. Both
    factors are those of the engine, equal and positive, if the loss is right:

    loss/policy    a |g_policy| / |first|: 1, or -1 with a turned sign
    loss/kl_factor b / a: 1; only where the KL term is large enough to tell
    loss/rest      what neither of them explains, relative to |first|
    kl/pull        |g_kl|
    """
    # The two terms, as `grpo_group_loss` weighs them, by formulas of their own.
    step = group.steps[0]
    policy = generator.transition(group.prompt, step)
    difference_GCFHW = step.next_GCFHW.to(policy.mean.device) - policy.mean
    log_prob_G = -difference_GCFHW.square().flatten(1).mean(1) / (2 * policy.std**2)
    gain = (advantage_G.to(log_prob_G.device) * log_prob_G).mean()
    found = {}
    parameters = trained(module)
    policy_gradient = _gradient(-weights.policy * gain, parameters)
    kl_gradient: dict[str, Tensor] = {}
    if cfg.kl_weight > 0:
        policy = generator.transition(group.prompt, step)
        with torch.no_grad(), generator.reference():
            reference = generator.transition(group.prompt, step)
        apart = (policy.mean - reference.mean).square().mean() / (2 * policy.std**2)
        kl_gradient = _gradient(cfg.kl_weight * weights.kl * apart, parameters)
        found["kl/pull"] = math.sqrt(_dot(kl_gradient, kl_gradient))

    # Least squares with one or two columns.
    size = math.sqrt(_dot(first, first))
    of_policy = math.sqrt(_dot(policy_gradient, policy_gradient))
    if size == 0 or of_policy == 0:
        return found
    columns = [policy_gradient]
    if found.get("kl/pull", 0.0) > KL_TELLS * of_policy:
        columns.append(kl_gradient)
    factors = _fit(first, columns)
    rest = dict(first)
    for factor, column in zip(factors, columns, strict=True):
        rest = {name: rest[name] - factor * column[name] for name in rest}
    found["loss/policy"] = factors[0] * of_policy / size
    found["loss/rest"] = math.sqrt(_dot(rest, rest)) / size
    if len(factors) > 1 and factors[0] != 0:
        found["loss/kl_factor"] = factors[1] / factors[0]
    return found


def _gradient(
    loss: Tensor, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    # Not backward(), which would add to the engine's gradients.
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    found = {}
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        used = torch.zeros_like(parameter) if gradient is None else gradient
        found[name] = used.float().cpu()
    return found


def _dot(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Inner product over the parameters that both have, in fp64."""
    total = 0.0
    for name in one:
        if name in other:
            total += float((one[name].double() * other[name].double()).sum())
    return total


def _fit(
    target: Mapping[str, Tensor], columns: Sequence[Mapping[str, Tensor]]
) -> list[float]:
    """The factors of the columns whose sum is nearest to the target."""
    normal = torch.tensor([[_dot(a, b) for b in columns] for a in columns])
    right = torch.tensor([_dot(column, target) for column in columns])
    return (
        torch.linalg.lstsq(normal.double(), right.double()[:, None])
        .solution[:, 0]
        .tolist()
    )


def repeats(
    batch: PromptBatch,
    before: PromptBatch | None,
    known: Sequence[str],
) -> dict[str, float]:
    """Seeds and prompts of a step that occur twice, or that the step before had.

    known  all prompts of the run
    """
    # Over all ranks; the same seed twice is the same noise twice.
    parts = gather_objects((list(batch.seeds), list(batch.prompts)))
    seeds = [seed for part, _ in parts for seed in part]
    prompts = [prompt for _, part in parts for prompt in part]
    found = {
        "batch/repeated": 1 - len(set(seeds)) / max(1, len(seeds)),
        "batch/prompts": len(set(prompts)) / min(len(prompts), len(set(known))),
        "batch/prompts_known": float(len(set(known))),
        "batch/groups": float(len(prompts)),
    }
    if before is not None:
        found["batch/as_before"] = _share(batch.seeds, before.seeds)
        found["batch/prompts_as_before"] = _share(batch.prompts, before.prompts)
    return found


def _share(items: Sequence[object], others: Sequence[object]) -> float:
    known = set(others)
    return sum(item in known for item in items) / len(items)


def samples(
    groups: Sequence[Group], before: set[str]
) -> tuple[dict[str, float], set[str]]:
    """Compare the samples of a step with each other, and with those of the step before.

    Returns the numbers, and the samples' fingerprints for the next step.
    """
    found = {}
    seen: set[str] = set()
    twins = 0
    apart = []
    for group in groups:
        # Members of a group start from one latent and end apart.
        prints = [_fingerprint(clean_CFHW) for clean_CFHW in group.clean_GCFHW]
        twins += len(prints) - len(set(prints) - seen)
        seen |= set(prints)
        first = group.clean_GCFHW[0].float()
        last = group.clean_GCFHW[-1].float()
        apart.append(float((first - last).norm() / first.norm().clamp(min=1e-12)))
    count = sum(group.size for group in groups)
    found["samples/twins"] = twins / count
    found["samples/apart"] = statistics.median(apart)
    found["samples/as_before"] = len(seen & before) / count
    # Noise levels at which the step learns.
    levels = {round(group.steps[0].sigma, 6) for group in groups}
    found["samples/level_min"] = min(levels)
    found["samples/level_max"] = max(levels)
    return found, seen


def _fingerprint(x: Tensor) -> str:
    numbers = x.detach().float().cpu().contiguous().numpy()
    return hashlib.sha256(numbers.tobytes()).hexdigest()
