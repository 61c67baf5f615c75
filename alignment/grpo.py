"""Longcat-GRPO (LongCat-Video 2510.22200, section 3.3) and related algorithms: one training step.

The loop uses the Protocols of `common.types` only: any generator, any rewards, any engine.
Every rank holds whole groups, or with ``ranks_per_group`` some members of each group of its
shard (`alignment.rank_groups`). M is the number of a group's members on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from alignment.advantages import group_relative_advantages
from alignment.objectives import build_objective
from alignment.rank_groups import RankGroups
from alignment.rewards.errors import NamedReward
from alignment.scoring import FlatRewardGuard, Scorer, SilentRewardGuard
from alignment.timing import PhaseTimer
from common.types import text_of

if TYPE_CHECKING:
    from torch import Tensor

    from alignment.config import GrpoConfig
    from alignment.forward_update import AveragedPolicy
    from alignment.prompts import PromptBatch, PromptSchedule
    from common.types import (
        Engine,
        Generator,
        Group,
        RewardModel,
        Score,
    )


@dataclass(frozen=True)
class StepResult:
    """Metrics of a step over all ranks, and the samples of this rank (B = P * M, group-major).

    Of ranks that hold the same samples, each has the groups that it decoded and scored.

    video_BTYXC  The videos that rewards saw, of the first groups that were to be kept; None if
                 none were.
    groups       The rollouts of this rank, if they were to be kept.
    shown_BTYXC  The videos to show, where rewards saw those of a small decoder; else None.
    """

    metrics: dict[str, float]
    batch: PromptBatch
    video_BTYXC: Tensor | None
    scores: Mapping[str, Score]
    advantage_PM: Tensor
    groups: Sequence[Group] = ()
    shown_BTYXC: Tensor | None = None


def backwards_per_update(
    cfg: GrpoConfig, prompts_per_step: int, *, ranks: int, steps_per_group: int
) -> int:
    """Return the engine's gradient accumulation: backwards of an optimizer step on each rank.

    ``prompts_per_step`` is the number of groups of a step over all ranks. Ranks that compute
    each sample together count as one of ``ranks``. ``steps_per_group`` is the number of
    stochastic steps, which forward objectives do not have.
    """
    groups = prompts_per_step * cfg.ranks_per_group // ranks
    if cfg.objective == "policy":
        return groups * steps_per_group
    return groups * cfg.samples_per_group // cfg.forward.micro_batch


class GrpoLoop:
    """The GRPO training loop. Its state is the weights: a step is a function of its number.

    rewards    The reward models by name.
    weights    The factor of each reward's advantages; 0 scores and logs without training.
    engine     It must accumulate `backwards_per_update` gradients before it takes a step.
    fps        The frame rate of the generator's videos, for the rewards.
    ranks_per_sample  How many consecutive ranks compute each sample together; the engine must
               then sum their gradients.
    levels     The noise levels that a forward objective trains, of the rollout's own grid.
    old        The policy that samples, where `GrpoConfig.has_old_policy`.
    grad_norm  Returns the gradient's norm before clipping, or None, after an optimizer step.
    """

    def __init__(
        self,
        cfg: GrpoConfig,
        *,
        generator: Generator,
        rewards: Mapping[str, RewardModel],
        weights: Mapping[str, float],
        engine: Engine,
        prompts: PromptSchedule,
        fps: float,
        ranks_per_sample: int = 1,
        levels: Sequence[float] = (),
        old: AveragedPolicy | None = None,
        grad_norm: Callable[[], float | Tensor | None] = lambda: None,
    ) -> None:
        self.cfg = cfg
        self.generator = generator
        self.rewards = {
            name: NamedReward(name, reward) for name, reward in rewards.items()
        }
        self.weights = weights
        self.engine = engine
        self.prompts = prompts
        self.fps = fps
        # how ranks share groups, and stops for rewards that teach nothing
        self.ranks = RankGroups(cfg.group_size, cfg.ranks_per_group, ranks_per_sample)
        self.ranks.check(self.rewards.values())
        self.objective = build_objective(
            cfg,
            generator=generator,
            engine=engine,
            levels=levels,
            old=old,
            first_member=self.ranks.first_member,
            grad_norm=grad_norm,
        )
        self.silent_guard = SilentRewardGuard(weights)
        self.flat_guard = FlatRewardGuard(weights, patience=cfg.flat_reward_patience)

    def step(
        self,
        step: int,
        *,
        keep_groups: int = 0,
        show_groups: int = 0,
        keep_rollouts: bool = False,
    ) -> StepResult:
        """One optimizer step: sample groups, score them, normalise the rewards, update.

        ``step`` counts from 0. Frames are let go once they are scored, except those of the first
        ``keep_groups`` groups of this rank; latents and log-probs are, without ``keep_rollouts``.
        The first ``show_groups`` are decoded by the VAE too, where rewards have another decoder.
        Raises RewardUnavailableError on every rank, before anything is trained, when a reward
        fails on any rank, and by `SilentRewardGuard` and `FlatRewardGuard`.
        """
        timer = PhaseTimer()
        batch = self.batch(step)
        scored = self.ranks.scored_groups(len(batch.prompts))
        scorer = Scorer(
            self.rewards,
            fps=self.fps,
            group_size=self.ranks.members,
            groups=len(scored),
            videos_per_call=self.cfg.videos_per_call,
            timer=timer,
            overlap=self.cfg.overlap_scoring,
        )
        with scorer:
            # 1. Sample G videos per prompt from the current policy, or the objective's old one.
            with self.objective.sampling_policy():
                groups, video_BTYXC, shown_BTYXC = self.sample(
                    batch,
                    step,
                    scorer,
                    timer,
                    keep_groups=keep_groups,
                    show_groups=show_groups if self.has_scoring_decoder else 0,
                )

            # 2. Score every video with every reward; NaN means "could not be scored".
            scores = scorer.scores()

        # 3. Group-relative advantages over all ranks (LongCat-Video, equations 9 and 10).
        advantages = group_relative_advantages(
            scores, self.weights, self.cfg, self.ranks, groups=len(groups)
        )
        self.silent_guard.check(advantages.means, scores)
        self.flat_guard.check(advantages.means, advantages.details)

        # 4. The objective's backwards: one per group and stochastic step, then an optimizer step.
        with timer("update"):
            train_metrics = self.objective.train(groups, advantages, batch)

        metrics = {
            # the console line shows the first of these
            **advantages.means,
            **train_metrics,
            **timer.metrics(videos=advantages.advantage_PM.numel()),
            **advantages.details,
        }
        return StepResult(
            metrics,
            batch.take(scored),
            video_BTYXC,
            scores,
            advantages.advantage_PM[list(scored)],
            groups if keep_rollouts else (),
            shown_BTYXC,
        )

    def set_kl_weight(self, weight: float) -> None:
        """Change the weight of the KL term, from the next update on."""
        self.cfg = replace(self.cfg, kl_weight=weight)
        self.objective.cfg = self.cfg

    def batch(self, step: int) -> PromptBatch:
        """Return the prompts of a step that this rank's shard samples."""
        return self.prompts.at(step).share(self.ranks.shard_index, self.ranks.shards)

    def sample(
        self,
        batch: PromptBatch,
        step: int,
        scorer: Scorer,
        timer: PhaseTimer,
        *,
        keep_groups: int,
        show_groups: int = 0,
    ) -> tuple[list[Group], Tensor | None, Tensor | None]:
        """Sample this rank's members of every group; decode and hand on those that it scores.

        Returns the groups, the videos (B, T, Y, X, 3) of the first ``keep_groups`` scored, and
        those of the first ``show_groups`` by the VAE.
        """
        groups: list[Group] = []
        kept: list[Tensor] = []
        shown: list[Tensor] = []
        # an overlapping scorer works on each prompt's group while the next is sampled
        parts = batch.single_prompts() if self.cfg.overlap_scoring else [batch]
        for part in parts:
            with timer("rollout"):
                sampled = self.generator.rollout(
                    part.prompts,
                    group_size=self.ranks.members,
                    seeds=part.seeds,
                    iteration=step,
                    first_member=self.ranks.first_member,
                )
            # decoding group by group gives the same bytes however many ranks share the groups
            scored = self.ranks.scored_groups(len(batch.prompts))
            for group in sampled:
                groups.append(group)
                if len(groups) - 1 not in scored:
                    # another rank of the same samples scores it
                    continue
                with timer("decode"):
                    video_GTYXC = self.decode_to_score(group.clean_GCFHW)
                if len(kept) < keep_groups:
                    kept.append(video_GTYXC)
                if len(shown) < show_groups:
                    # a second time, by the VAE
                    shown.append(self.generator.decode(group.clean_GCFHW))
                scorer.add(video_GTYXC, _prompts_of([group]))
                # not held while the next group is decoded
                del video_GTYXC
        return groups, _joined(kept), _joined(shown)

    @property
    def has_scoring_decoder(self) -> bool:
        """Whether rewards see frames of another decoder than evaluation and samples."""
        return getattr(self.generator, "scoring_decoder", None) is not None

    def decode_to_score(self, clean_GCFHW: Tensor) -> Tensor:
        """The video (G, T, Y, X, 3) that rewards see; a generator may have a decoder for them."""
        generator = self.generator
        decode = getattr(generator, "decode_to_score", generator.decode)
        return decode(clean_GCFHW)


def _joined(videos: Sequence[Tensor]) -> Tensor | None:
    """All videos together; None where there are none."""
    return torch.cat(list(videos)) if videos else None


def _prompts_of(groups: Sequence[Group]) -> list[str]:
    """Return the text of every video of these groups."""
    return [text_of(group.prompt) for group in groups for _ in range(group.size)]
