"""Measure rollout, update, decoding and evaluation of a generator against the own route.

Each function returns numbers by name. A gap is a relative difference; gaps of the variants of
`own_route.VARIANTS` tell which mistake explains a difference from the policy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common import gaussian
from common.distributed import seeded_generator
from generator.prompts import count_tokens
from launch.diagnosis.own_route import OwnRoute, gaps, rms
from launch.diagnosis.reward_measures import pixel_mistakes

if TYPE_CHECKING:
    from torch import Tensor

    from common.types import Group, Step

# Members of a replayed group: two tell whether members differ.
MEMBERS = 2
# A gap above this wants its explanation.
NOTABLE = 1e-5


def replay(
    own: OwnRoute,
    prompt: str,
    seed: int,
    *,
    other: str,
    step: int,
) -> dict[str, float]:
    """Sample a small group again, and compute everything about it another way.

    other  another prompt of the step, with which embeddings may have been mixed up
    """
    # The last of two prompts, which may be mixed up on the way.
    *_, group = own.generator.rollout(
        [other, prompt] if other != prompt else [prompt],
        group_size=MEMBERS,
        seeds=[seed + 1, seed] if other != prompt else [seed],
        iteration=step,
    )
    # Without embeddings of its own a route has nothing to compare.
    found = {}
    if own.knows(prompt, other):
        found |= embeddings(own, prompt, other)
        found |= _rollout(own, group, seed, other)
        found |= _adapter_effect(own, group, prompt, seed, step)
        found |= _walks(own, group, seed, other)
    return found


def _rollout(own: OwnRoute, group: Group, seed: int, other: str) -> dict[str, float]:
    """The transition of rollout and update at a stochastic step, and their log-probs."""
    generator = own.generator
    # The first stochastic step, with the noise of its seeds.
    step = group.steps[0]
    shape = tuple(step.next_GCFHW.shape[1:])
    noises = [seed_noise(shape, seed, "member", g) for g in range(group.size)]
    xi_GCFHW = torch.stack(noises).to(step.next_GCFHW.device)

    # 1. The mean that the rollout used: what is left of its result without its noise.
    sampled_GCFHW = step.next_GCFHW - step.std * xi_GCFHW
    with torch.no_grad():
        update = generator.transition(group.prompt, step)
        again = generator.transition(group.prompt, step)
    velocities = own.velocities(step.latent_MCFHW, step.sigma, group.prompt, other)
    means = {
        name: generator.kernel.transition(
            step.latent_MCFHW,
            v_MCFHW,
            step.sigma,
            step.sigma_next,
        ).mean
        for name, v_MCFHW in velocities.items()
    }
    found = _velocity_gaps("rollout", sampled_GCFHW, means, velocities, step)
    found |= _velocity_gaps("update", update.mean, means, velocities, step)
    # Noise of another size lies on the line from the mean through the seeds' noise.
    noised_GCFHW = means["policy"] + step.std * xi_GCFHW
    strength, rest = place_on_line(step.next_GCFHW, means["policy"], noised_GCFHW)
    found["rollout/strength/noise"] = strength
    found["rollout/beside/noise"] = rest / (rms(velocities["policy"]) * step.gain)
    added = rms(step.next_GCFHW - means["policy"]) / step.std
    found["rollout/noise"] = added
    found["update/repeat"] = rms(update.mean - again.mean) / rms(update.mean)

    # 2. Log-probs in fp64, from the noise alone and from the update's mean.
    exact_G = _log_density(step.std * xi_GCFHW, step.std)
    found["rollout/log_prob_gap"] = _largest(step.log_prob_G.cpu() - exact_G.cpu())
    log_prob_G = gaussian.log_prob(update, step.next_GCFHW)
    exact_G = _log_density(step.next_GCFHW.double() - update.mean.double(), step.std)
    found["update/log_prob_gap"] = _largest(log_prob_G.cpu() - exact_G.cpu())

    # 3. The noise level lies on the grid, and members went different ways.
    grid = own.sigmas()
    found["rollout/sigma_gap"] = min(abs(step.sigma - sigma) for sigma in grid)
    apart = rms(step.next_GCFHW[0] - step.next_GCFHW[1])
    found["rollout/members_apart"] = apart / (math.sqrt(2) * step.std)

    # 4. How far training has moved the policy, and how much the prompt matters.
    if "reference" in velocities:
        moved = rms(velocities["policy"] - velocities["reference"])
        found["adapter/drift"] = moved / rms(velocities["reference"])
    if other != group.prompt:
        changed = rms(velocities["policy"] - velocities["other-prompt"])
        found["text/effect"] = changed / rms(velocities["policy"])
    return found


def _velocity_gaps(
    name: str,
    mean: Tensor,
    means: Mapping[str, Tensor],
    velocities: Mapping[str, Tensor],
    step: Step,
) -> dict[str, float]:
    """Differences of a mean from every variant's, in units of the policy's velocity."""
    size = rms(velocities["policy"]) * step.gain
    found = {
        f"{name}/gap/{variant}": rms(mean - variant_mean) / size
        for variant, variant_mean in means.items()
    }
    # Guidance or adapter of another strength lie on a line with those of strength 0 and 1.
    for variant in ("unguided", "reference"):
        if variant not in means:
            continue
        strength, rest = place_on_line(mean, means[variant], means["policy"])
        found[f"{name}/strength/{variant}"] = strength
        found[f"{name}/beside/{variant}"] = rest / size
    return found


def place_on_line(x: Tensor, start: Tensor, end: Tensor) -> tuple[float, float]:
    """Where the point of the line nearest to x lies (0 is start, 1 is end), and x's rms distance.

    NaN and NaN where start and end are one point.
    """
    # x may hold several samples with one start and end.
    along = (end - start).double().expand_as(x)
    length = float(along.square().sum())
    if length == 0:
        return math.nan, math.nan
    offset = (x - start).double()
    place = float((offset * along).sum()) / length
    return place, rms(offset - place * along)


def _adapter_effect(
    own: OwnRoute,
    group: Group,
    prompt: str,
    seed: int,
    step: int,
) -> dict[str, float]:
    """How far rollout and update change when the adapter is switched off; 0 is no effect."""
    generator = own.generator
    if generator.cfg.lora is None:
        return {}
    # The same seeds with the adapter switched off.
    with torch.no_grad(), generator.reference():
        (base,) = generator.rollout(
            [prompt],
            group_size=MEMBERS,
            seeds=[seed],
            iteration=step,
        )
        transition = generator.transition(prompt, group.steps[0])
    with torch.no_grad():
        policy = generator.transition(prompt, group.steps[0])
    # In units of the latents.
    size = rms(group.clean_GCFHW)
    return {
        "rollout/adapter_effect": rms(group.clean_GCFHW - base.clean_GCFHW) / size,
        "update/adapter_effect": rms(policy.mean - transition.mean) / size,
    }


def _walks(
    own: OwnRoute,
    group: Group,
    seed: int,
    other: str,
) -> dict[str, float]:
    """Prefix and tail around the stochastic steps, where nothing makes them less exact."""
    sampler = own.generator.cfg.sampler
    if sampler.attention is not None or own.generator.cfg.dtype != "float32":
        return {}
    grid = own.sigmas()
    found = {}
    # From the noise to the first stochastic step.
    first = group.steps[0]
    sigmas = [sigma for sigma in grid if sigma >= first.sigma - 1e-9]
    start = seed_noise(own.generator.latent_shape, seed, "noise")[None]
    if sampler.initial_noise == "shared" and len(sigmas) == 1:
        found["rollout/start_gap"] = rms(first.latent_MCFHW.cpu() - start) / rms(start)
    elif sampler.initial_noise == "shared":
        found |= _walk_gaps(
            own,
            "prefix",
            first.latent_MCFHW,
            start.to(own.generator.device),
            sigmas,
            group.prompt,
            other,
        )

    # From the last stochastic step to the video.
    last = group.steps[-1]
    sigmas = [sigma for sigma in grid if sigma <= last.sigma_next + 1e-9]
    fewer = sampler.tail_steps is not None and sampler.tail_steps < len(sigmas) - 1
    other_tail = sampler.tail_guidance is not None or sampler.tail_solver != "euler"
    cached = sampler.tail_cache > 1 or sampler.tail_attention is not None
    if len(sigmas) > 1 and not (fewer or other_tail or cached):
        found |= _walk_gaps(
            own,
            "tail",
            group.clean_GCFHW,
            last.next_GCFHW,
            sigmas,
            group.prompt,
            other,
        )
    return found


def seed_noise(shape: Sequence[int], *purpose: object) -> Tensor:
    """The noise that a seed and its purpose decide, fp32 on the CPU."""
    return torch.randn(tuple(shape), generator=seeded_generator(*purpose))


def embeddings(own: OwnRoute, prompt: str, other: str) -> dict[str, float]:
    """The generator's embeddings of two prompts against the text encoder's."""
    # In one batch, whose order may be wrong.
    ours_BLD = own.generator.prompts.get(
        [prompt, other],
        device=own.generator.device,
        dtype=torch.float32,
    )
    own_BLD = torch.cat([own.embedding_1LD[prompt], own.embedding_1LD[other]]).float()
    return {"text/gap": rms(ours_BLD.cpu() - own_BLD) / rms(own_BLD)}


def cut_prompts(own: OwnRoute) -> dict[str, float]:
    """The share of the known prompts that are longer than what the text encoder reads."""
    cfg = own.generator.cfg
    prompts = [prompt for prompt in own.embedding_1LD if prompt != own.negative]
    # A name on the hub has no tokenizer to count with.
    if not prompts or not (Path(cfg.path) / "tokenizer").is_dir():
        return {}
    tokens = count_tokens(prompts, cfg.path)
    cut = [count for count in tokens if count > cfg.max_sequence_length]
    return {"text/cut": len(cut) / len(tokens)}


def evaluation(
    own: OwnRoute,
    video_1TYXC: Tensor,
    prompt: str,
    seed: int,
    *,
    other: str,
) -> dict[str, float]:
    """Compare a video of an evaluation with walks over the training grid, in levels of 255."""
    # The evaluation starts from the noise of its seed.
    noise = seed_noise(own.generator.latent_shape, seed, "noise")[None]
    x_1CFHW = noise.to(own.generator.device)
    found = {}
    for variant in own.variants_of_walks():
        clean_1CFHW = own.walk(
            x_1CFHW,
            own.sigmas(),
            prompt,
            variant=variant,
            other=other,
        )
        found[f"evaluation/gap/{variant}"] = mean_gap(
            own.decode(clean_1CFHW),
            video_1TYXC,
        )
    return found


def _walk_gaps(
    own: OwnRoute,
    name: str,
    clean_BCFHW: Tensor,
    start_BCFHW: Tensor,
    sigmas: Sequence[float],
    prompt: str,
    other: str,
) -> dict[str, float]:
    """Gaps of a walk's end; variants are only walked where the policy's differs."""
    # The policy first: most runs need no other walk.
    ends = {}
    variants = ["policy"]
    found: dict[str, float] = {}
    for variant in variants:
        ends[variant] = own.walk(
            start_BCFHW,
            sigmas,
            prompt,
            variant=variant,
            other=other,
        )
        found = gaps(clean_BCFHW, ends)
        if variant == "policy" and found["policy"] > NOTABLE:
            variants += own.variants_of_walks()[1:]
    return {f"{name}/gap/{variant}": gap for variant, gap in found.items()}


def decoding(own: OwnRoute, clean_GCFHW: Tensor) -> dict[str, float]:
    """Decoded bytes by two routes, and how well the VAE finds its latents again."""
    # Levels of 255, and a relative error of the latents.
    ours_GTYXC = own.generator.decode(clean_GCFHW)
    own_GTYXC = own.decode(clean_GCFHW)
    again_GCFHW = own.encode(own_GTYXC)
    found = {
        "decode/gap/policy": mean_gap(ours_GTYXC, own_GTYXC),
        "vae/round_trip": rms(again_GCFHW - clean_GCFHW) / rms(clean_GCFHW),
    }
    for name, changed in pixel_mistakes(own_GTYXC).items():
        if changed.shape == ours_GTYXC.shape:
            found[f"decode/gap/{name}"] = mean_gap(ours_GTYXC, changed)
    return found


def scored(own: OwnRoute, video_GTYXC: Tensor, clean_GCFHW: Tensor) -> dict[str, float]:
    """Compare videos that were scored with the samples that are trained."""
    return {"scored/gap": mean_gap(video_GTYXC, own.decode(clean_GCFHW))}


def mean_gap(one: Tensor, other: Tensor) -> float:
    """MEAN difference of two videos, in levels of 255."""
    return float((one.float() - other.float()).abs().mean())


def _log_density(difference_GCFHW: Tensor, std: float) -> Tensor:
    """Log-density of a Gaussian from x - mean, MEAN over elements, in fp64 -> (G,)."""
    squared_G = difference_GCFHW.double().square().flatten(1).mean(dim=1)
    return -squared_G / (2 * std**2) - math.log(std * math.sqrt(2 * math.pi))


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())
