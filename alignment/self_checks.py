"""Check generator and rewards before a run trains: a few seconds against days of lost work.

Each check returns a `Finding` whose message says what is wrong and what to do. No check draws
from a global random generator or changes a weight, so a run is the same with and without them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from alignment.reward_check import (
    MUST,
    UNFAMILIAR,
    RewardClip,
    check,
    not_sensible,
    reads_prompt,
)
from common import gaussian
from common.distributed import derive_seed, differing_ranks, world_size

if TYPE_CHECKING:
    from torch import Tensor, nn

    from common.types import Generator, RewardModel

# Limits of |ratio - 1| before any update.
REPLAY_LIMIT = {"float32": 1e-4, "bfloat16": 1e-3}
# Relative difference from the stock pipeline, which mixes guidance in bf16.
STOCK_LIMIT = {"float32": 1e-5, "bfloat16": 5e-2}
# Relative difference of a gradient, by the dtype of what is exchanged.
SHARED_LIMIT = {"float32": 1e-4, "bfloat16": 5e-2}
# Rank correlation of a reward's scores of videos by two decoders.
DECODERS_LIMIT = 0.8
# In units of the scores' spread: kernels may round differently by place in a batch.
PERMUTATION_LIMIT = 1e-3


@dataclass(frozen=True)
class Finding:
    """The result of a check, and advice when it failed. A ``fatal`` failure stops the run."""

    name: str
    ok: bool
    fact: str
    advice: str
    fatal: bool = True

    @property
    def message(self) -> str:
        """The result as a console line."""
        advice = "" if self.ok else f"; {self.advice}"
        return f"{self.name}: {self.fact}{advice}"


def first_ratio(
    generator: Generator,
    prompt: str,
    *,
    dtype: str,
    fatal: bool = True,
    group_size: int = 2,
    seed: int | None = None,
    on_policy: bool = False,
) -> Finding:
    """Check that sampling and training agree on log-probs: before any update every ratio is 1.

    on_policy         The loss takes the update's log-prob for the rollout's, which this check
                      justifies: the stochastic step is computed by the same module.
    group_size, seed  Those of a group of the run check its own batch: kernels may round otherwise
                      at another size.
    """
    # a rollout, as training makes it
    if seed is None:
        seed = derive_seed(0, "self-check")
    (group,) = generator.rollout([prompt], group_size=group_size, seeds=[seed])
    worst = 0.0
    with torch.no_grad():
        for step in group.steps:
            # the same steps, as the update computes them
            policy = generator.transition(group.prompt, step)
            log_prob_G = gaussian.log_prob(policy, step.next_GCFHW)
            ratio_G = (log_prob_G - step.log_prob_G.to(log_prob_G.device)).exp()
            worst = max(worst, float((ratio_G - 1).abs().max()))
    limit = REPLAY_LIMIT[dtype]
    fact = f"max |ratio - 1| before any update is {worst:.1e}, allowed {limit:g}"
    if on_policy:
        fact += "; with one update a rollout the loss takes it as 1"
    return Finding(
        name="first ratio",
        ok=worst <= limit,
        fact=fact,
        advice="sampling and training compute different velocities: is guidance_in_update off, "
        "dropout on, or the dtype different?",
        fatal=fatal,
    )


def stock_trajectory(gap: Callable[[], float], *, dtype: str) -> Finding:
    """Check that our ODE sampler agrees with the stock pipeline; ``gap`` measures the relative
    difference.
    """
    difference = gap()
    limit = STOCK_LIMIT[dtype]
    return Finding(
        name="noiseless sampling",
        ok=difference <= limit,
        fact=f"differs from the stock pipeline by {difference:.1e}, allowed {limit:g}",
        advice="the run would train another model than people sample from: "
        "check the folder's scheduler and text encoder",
    )


def shared_tokens(gap: Callable[[], float], *, dtype: str) -> Finding:
    """Check that ranks which share the tokens of a sample compute the gradient of one rank.

    ``gap`` measures the relative difference.
    """
    difference = gap()
    limit = SHARED_LIMIT[dtype]
    return Finding(
        name="context parallelism",
        ok=difference <= limit,
        fact=f"the gradient differs from that of one rank by {difference:.1e}, allowed {limit:g}",
        advice="the attention backend goes wrong on shared tokens: choose another, or "
        "generator.context_parallel=1",
    )


def same_weights(module: nn.Module) -> Finding:
    """Check that all ranks start from the same trained weights."""
    # frozen weights come from the same files
    trained = {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    odd = differing_ranks(trained)
    fact = f"the same on {world_size()}"
    if odd:
        fact = f"ranks {odd} of {world_size()} differ from rank 0"
    return Finding(
        name="weights across ranks",
        ok=not odd,
        fact=fact,
        advice="is a new adapter drawn from an unseeded generator, or a checkpoint read by "
        "some ranks only?",
    )


def permutation(
    reward: RewardModel, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
) -> Finding:
    """Check that scores follow their videos when the batch is reversed."""
    plain_B = reward.score(video_BTYXC, prompts, fps=fps).value_B
    reversed_B = reward.score(video_BTYXC.flip(0), prompts[::-1], fps=fps).value_B
    again_B = reversed_B.flip(0)

    # compare the videos that have a score both times, in units of the scores' spread
    scored = plain_B[plain_B.isfinite()]
    spread = float(scored.std(correction=0)) if scored.numel() else 0.0
    comparable_B = plain_B.isfinite() & again_B.isfinite()
    worst = 0.0
    if comparable_B.any():
        worst = float((plain_B - again_B)[comparable_B].abs().max())
    same_missing = torch.equal(plain_B.isfinite(), again_B.isfinite())

    missing = "" if same_missing else ", and other videos have no score"
    return Finding(
        name=f"order of a batch, {reward.name}",
        ok=same_missing and worst <= PERMUTATION_LIMIT * max(spread, 1e-6),
        fact=f"in reverse order scores move by {worst:.1e}, their spread is {spread:.1e}{missing}",
        advice="the reward answers for the wrong videos, mixes the videos of a batch, or rounds "
        "differently by place",
        # a smaller change may be a chain of thought that went another way on another kernel
        fatal=worst > spread,
    )


def decoders_agree(
    reward: RewardModel,
    small_BTYXC: Tensor,
    whole_BTYXC: Tensor,
    prompts: Sequence[str],
    *,
    fps: float,
    members: int,
) -> Finding:
    """Check that videos of a small decoder are ordered as those of the VAE, by this reward.

    By Spearman's rank correlation of the finite scores, MEAN over groups of ``members`` videos:
    videos of several prompts differ by more than GRPO sees. A failure is only a warning: few
    videos prove little, and a reward that takes few values has none.
    """
    small_B = reward.score(small_BTYXC, prompts, fps=fps).value_B.double()
    whole_B = reward.score(whole_BTYXC, prompts, fps=fps).value_B.double()
    found = []
    for small_M, whole_M in zip(
        small_B.split(members), whole_B.split(members), strict=True
    ):
        scored_M = small_M.isfinite() & whole_M.isfinite()
        small, whole = small_M[scored_M], whole_M[scored_M]
        correlation = rank_correlation(small, whole)
        if correlation is None and len(whole.unique()) > 1:
            # it no longer tells videos apart that it does tell apart by the VAE
            correlation = 0.0
        if correlation is not None:
            found.append(correlation)
    levels = (small_BTYXC.float() - whole_BTYXC.float()).abs().mean()

    mean = sum(found) / len(found) if found else None
    shown = "undefined" if mean is None else f"{mean:.3f}"
    return Finding(
        name=f"scoring decoder, {reward.name}",
        ok=mean is None or mean >= DECODERS_LIMIT,
        fact="rank correlation of its scores with those of the VAE's videos, within groups of "
        f"{members}, is {shown} on {len(small_B)} videos, and pixels differ by "
        f"{float(levels):.1f} of 255; allowed {DECODERS_LIMIT:g}",
        advice="the run would train on another order: use a better generator.scoring_decoder, or "
        "check the scaling of its latents",
        fatal=False,
    )


def rank_correlation(one_B: Tensor, other_B: Tensor) -> float | None:
    """Spearman's rank correlation, ties at their MEAN rank; None where a side is constant."""
    ranks = []
    for value_B in (one_B, other_B):
        below_BB = value_B[:, None] > value_B
        same_BB = value_B[:, None] == value_B
        rank_B = below_BB.sum(dim=1) + 0.5 * same_BB.sum(dim=1)
        ranks.append(rank_B - rank_B.mean())
    lengths = [float(rank_B.norm()) for rank_B in ranks]
    if not all(lengths):
        return None
    return float((ranks[0] * ranks[1]).sum()) / (lengths[0] * lengths[1])


def sense(
    reward: RewardModel,
    video_BTYXC: Tensor,
    prompts: Sequence[str],
    *,
    fps: float,
) -> Finding:
    """Check that most videos score lower with wrong prompts, and with their pixels shuffled.

    Of a reward that does not read the prompt nothing is required. A failure is only a warning: few
    videos prove little. Raises ValueError if all prompts are equal.
    """
    # the right videos, and spoilt ones
    clips = [
        RewardClip(video_TYXC, fps, prompt)
        for video_TYXC, prompt in zip(video_BTYXC, prompts, strict=True)
    ]
    results = check(reward, clips, cases=(*MUST, *UNFAMILIAR))
    counted = [
        f"{result.case}: {result.description}"
        for result in results
        if result.case in MUST
    ]
    # pure noise is a fact for the curious, not a test
    unfamiliar = [
        f"{result.case}, which reward models rarely saw: {result.description}"
        for result in results
        if result.case in UNFAMILIAR
    ]
    no_scores = all(result.scored == 0 for result in results)
    kind = "has no score" if no_scores else "reads the prompt"
    if not reads_prompt(results):
        kind = "does not read the prompt, so neither case has to lower its score"
    advice = (
        f"most should fall; {len(prompts)} videos prove little, but a wrong fps, prompt format or "
        "checkpoint looks like this"
    )
    return Finding(
        name=f"sense, {reward.name}",
        ok=not no_scores and not not_sensible(results),
        fact="; ".join([kind, *counted, *unfamiliar]),
        advice="no video could be scored" if no_scores else advice,
        fatal=False,
    )
