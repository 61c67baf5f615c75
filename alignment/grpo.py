"""Longcat-GRPO (LongCat-Video 2510.22200, section 3.3) and its sisters: one step, from prompts to metrics.

The loop knows the Protocols of `common.types` only: any generator, any rewards, any engine. Every rank owns whole
groups, or with ``ranks_per_group`` the same members of each; rewards are gathered, and each rank computes the same
advantages from them and keeps its own. M is the number of a group's members on one rank, G where groups are whole.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from alignment.grpo_losses import StepWeights, grpo_group_loss, step_weights
from alignment.rewards.errors import NamedReward
from common import faults, gaussian
from common.distributed import (
    gather_rows,
    max_over_ranks,
    mean_over_ranks,
    raise_on_all,
    rank,
    sum_over_ranks,
    world_size,
)
from common.log import say
from common.policy_gradient import group_advantages, group_std
from common.types import RewardUnavailableError, Score

if TYPE_CHECKING:
    from torch import Tensor

    from alignment.config import GrpoConfig
    from alignment.prompts import PromptBatch, PromptSchedule
    from common.gaussian import Gaussian
    from common.types import Engine, Generator, Group, LossOutput, RewardModel, Step

PATIENCE = 3  # steps of a process after which something must have been judged


@dataclass(frozen=True)
class ScoredRollout:
    """What this rank rolled out (B = P * M, group-major), and what the rewards say of it."""

    groups: list[Group]
    video_BTYXC: Tensor
    scores: Mapping[str, Score]


@dataclass(frozen=True)
class Advantages:
    """Rewards turned into advantages: (P, M) of this rank, and metrics over all ranks."""

    advantage_PM: Tensor
    anything_to_learn: bool  # the same on all ranks
    means: dict[str, float]
    details: dict[str, float]


@dataclass(frozen=True)
class StepResult:
    """What one step did: metrics over all ranks, and this rank's samples (B = P * M, group-major)."""

    metrics: dict[str, float]
    batch: PromptBatch
    video_BTYXC: Tensor
    scores: Mapping[str, Score]
    advantage_PM: Tensor


def backwards_per_update(
    cfg: GrpoConfig, prompts_per_step: int, *, ranks: int, steps_per_group: int
) -> int:
    """How often the loop calls ``engine.backward`` for one optimizer step: the engine's gradient accumulation.

    prompts_per_step  groups of one step over all ranks
    """
    groups = prompts_per_step * cfg.ranks_per_group // ranks
    members = cfg.group_size // cfg.ranks_per_group
    return groups * steps_per_group * (members if cfg.update == "per_member" else 1)


class GrpoLoop:
    """The state of a run is the generator's weights and the engine's; a step is a function of its number.

    rewards    name -> model. ``weights[name]`` multiplies its advantages; 0 scores and logs without training
    engine     must accumulate `backwards_per_update` gradients before it takes a step
    fps        of the generator's videos, for the rewards
    grad_norm  asked after each optimizer step, if given: the norm before clipping, or None
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
        grad_norm: Callable[[], float | Tensor | None] | None = None,
    ) -> None:
        if set(rewards) != set(weights):
            raise ValueError(
                f"rewards {sorted(rewards)} and weights {sorted(weights)} must have the same names"
            )
        self.cfg, self.generator, self.engine, self.prompts = (
            cfg,
            generator,
            engine,
            prompts,
        )
        self.rewards = {
            name: NamedReward(name, reward) for name, reward in rewards.items()
        }
        self.weights, self.fps, self.grad_norm = weights, fps, grad_norm
        self.mute_steps: int | None = (
            0  # since the start, in which nothing was judged; None once something was
        )
        self.members = cfg.group_size // cfg.ranks_per_group
        if cfg.ranks_per_group > 1 and (
            whole := [
                n for n, one in rewards.items() if getattr(one, "group_level", False)
            ]
        ):
            raise ValueError(
                f"ranks_per_group={cfg.ranks_per_group}: {', '.join(whole)} must see a whole group on one rank"
            )

    def step(self, step: int) -> StepResult:
        """Optimizer step number ``step`` (from 0), on prompts_per_step groups over all ranks.

        Raises RewardUnavailableError on every rank, nothing having been trained, when a reward raises on one, whatever
        it is; and when in the first `PATIENCE` steps no reward with a weight has judged anything.
        """
        clock = PhaseTimer()
        batch = self.prompts.at(step).share(
            rank() // self.cfg.ranks_per_group, self.blocks()
        )
        roll = self.roll_side_by_side if self.cfg.overlap_scoring else self.roll
        problem = None
        try:
            rolled = roll(batch, step, clock)
        except RewardUnavailableError as error:
            problem = error
        raise_on_all(problem)
        judgement = self.judge(rolled.scores, groups=len(rolled.groups))
        self.check_that_something_is_judged(judgement)
        with clock("update"):
            trained = [
                self.update(rolled.groups, judgement) for _ in range(self.cfg.updates)
            ]
            trained = {
                name: sum(one[name] for one in trained) / len(trained)
                for name in trained[0]
            }
        timing = clock.metrics(videos=len(rolled.video_BTYXC))
        metrics = {**judgement.means, **trained, **timing, **judgement.details}
        return StepResult(
            metrics, batch, rolled.video_BTYXC, rolled.scores, judgement.advantage_PM
        )

    def check_that_something_is_judged(self, judgement: Advantages) -> None:
        """A judge that says nothing at the start will say nothing later. All ranks find the same."""
        trained = [name for name, weight in self.weights.items() if weight != 0]
        mute = [
            name for name in trained if math.isnan(judgement.means[f"reward/{name}"])
        ]
        if self.mute_steps is None or not mute or len(mute) < len(trained):
            self.mute_steps = None
            return
        self.mute_steps += 1
        if self.mute_steps == PATIENCE:
            names = ", ".join(f"rewards.{name}" for name in trained)
            raise RewardUnavailableError(
                f"in {PATIENCE} steps since this start {names} judged no video, all scores are NaN or None: nothing is "
                "learned"
            )

    def blocks(self) -> int:
        """How many sets of ranks there are that share groups; every rank is one by itself by default."""
        return world_size() // self.cfg.ranks_per_group

    def roll(self, batch: PromptBatch, step: int, clock: PhaseTimer) -> ScoredRollout:
        """Sample, decode and score everything of ``batch``."""
        groups, video_BTYXC = self.sample(batch.prompts, batch.seeds, step, clock)
        scores = {}
        for name, reward in self.rewards.items():
            with clock(f"score/{name}"):
                scores[name] = self.score(reward, video_BTYXC, _prompts_of(groups))
        return ScoredRollout(groups, video_BTYXC, scores)

    def roll_side_by_side(
        self, batch: PromptBatch, step: int, clock: PhaseTimer
    ) -> ScoredRollout:
        """The same, where a thread scores a group while the next is sampled. A reward sees one group at a time."""
        groups: list[Group] = []
        videos: list[Tensor] = []
        pending: list[Future[dict[str, Score]]] = []
        with ThreadPoolExecutor(1) as scorer:
            for prompt, seed in zip(batch.prompts, batch.seeds, strict=True):
                own, video_BTYXC = self.sample([prompt], [seed], step, clock)
                pending.append(
                    scorer.submit(self.score_aside, video_BTYXC, _prompts_of(own))
                )
                groups += own
                videos.append(video_BTYXC)
            with clock("score/wait"):
                found = [one.result() for one in pending]
        scores = {
            name: Score.concat([one[name] for one in found]) for name in self.rewards
        }
        return ScoredRollout(groups, torch.cat(videos), scores)

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], step: int, clock: PhaseTimer
    ) -> tuple[list[Group], Tensor]:
        """This rank's members of each prompt's group, and their videos (B, T, Y, X, 3)."""
        first = rank() % self.cfg.ranks_per_group * self.members
        with clock("rollout"):
            groups = self.generator.rollout(
                prompts,
                group_size=self.members,
                seeds=seeds,
                iteration=step,
                first_member=first,
            )
        with clock("decode"):
            # group by group: the same batches, and so the same bytes, however many ranks share the groups
            return groups, torch.cat(
                [self.generator.decode(group.clean_GCFHW) for group in groups]
            )

    @torch.no_grad()
    def score_aside(
        self, video_BTYXC: Tensor, prompts: Sequence[str]
    ) -> dict[str, Score]:
        """All rewards, on a CUDA stream of this thread's own where there is CUDA."""
        with (
            torch.cuda.stream(torch.cuda.Stream())
            if torch.cuda.is_available()
            else nullcontext()
        ):
            return {
                name: self.score(one, video_BTYXC, prompts)
                for name, one in self.rewards.items()
            }

    def score(
        self, reward: RewardModel, video_BTYXC: Tensor, prompts: Sequence[str]
    ) -> Score:
        """All at once, or group by group where the reward says that it is ``group_level``."""
        faults.point("reward")
        if not getattr(reward, "group_level", False):
            return reward.score(video_BTYXC, prompts, fps=self.fps)
        parts = zip(
            video_BTYXC.split(self.members),
            range(0, len(prompts), self.members),
            strict=True,
        )
        return Score.concat(
            [
                reward.score(v, prompts[i : i + self.members], fps=self.fps)
                for v, i in parts
            ]
        )

    def judge(self, scores: Mapping[str, Score], *, groups: int) -> Advantages:
        """A = sum_k w_k A_k, each reward normalised by itself first (equations 9 and 10), over all ranks' groups.

        A NaN is "not judged": it counts in no mean, its member gets 0 from that reward. Each rank's (P, M) rows are
        gathered, so the largest spread goes over the groups of all ranks and the order of ranks changes nothing.
        """
        means, details = {}, {}
        total_PG = torch.zeros(groups * self.blocks(), self.cfg.group_size)
        for name, score in scores.items():
            reward_PG = self.whole_groups(
                score.value_B.float().view(groups, self.members)
            )
            means[f"reward/{name}"] = _mean(reward_PG)
            for part, value_B in score.parts.items():
                details[f"reward/{name}.{part}"] = _mean(gather_rows(value_B.float()))
            details |= {
                f"reward/{name}_{key}": value
                for key, value in _spread(reward_PG).items()
            }
            advantage_PG = group_advantages(
                reward_PG, scale=self.cfg.scale, eps=self.cfg.advantage_eps
            )
            total_PG += self.weights[name] * advantage_PG
        if self.cfg.advantage_clip is not None:
            total_PG = total_PG.clamp(-self.cfg.advantage_clip, self.cfg.advantage_clip)
        details["train/advantage_abs"] = float(total_PG.abs().mean())
        block, place = divmod(rank(), self.cfg.ranks_per_group)
        own_PM = total_PG[block * groups :][:groups, place * self.members :][
            :, : self.members
        ]
        return Advantages(own_PM, bool(total_PG.any()), means, details)

    def whole_groups(self, value_PM: Tensor) -> Tensor:
        """(P, M) of every rank -> (groups of all ranks, G). Rank b R + i holds members i M.. of the groups of block b,
        with R = ``ranks_per_group``.
        """
        groups, members = value_PM.shape
        rows_BRPM = gather_rows(value_PM).view(
            self.blocks(), self.cfg.ranks_per_group, groups, members
        )
        return rows_BRPM.transpose(1, 2).reshape(
            self.blocks() * groups, self.cfg.group_size
        )

    def update(self, groups: list[Group], judgement: Advantages) -> dict[str, float]:
        """One optimizer step: a backward for each group (or member), the same number on every rank.

        Without a single advantage on any rank there is no step at all: KL has no policy step to hold back, and Adam
        would still move the weights by its momentum and decay. A loss that is no number is told; what becomes of its
        gradient is the engine's affair.
        """
        if not judgement.anything_to_learn:
            return {"train/skipped": 1.0}
        outputs, mean = [], self.mean_weights(groups)
        for group, advantage_G in zip(groups, judgement.advantage_PM, strict=True):
            for step in group.steps:
                weights = self.weights_of(step, mean)
                reference = self.reference_transition(group.prompt, step)
                for members, law in self.laws(group.prompt, step):
                    output = self.loss(
                        step, members, law, reference, advantage_G, weights
                    )
                    if not math.isfinite(output.metrics["loss"]):
                        say(
                            f"the loss is {output.metrics['loss']} for {group.prompt!r}"
                        )
                    faults.point("backward")
                    self.engine.backward(output.loss)
                    faults.point("update")
                    self.engine.step()  # the engine counts backwards and steps the optimizer on the last one
                    outputs.append(output)
        return self.update_metrics(outputs)

    def laws(self, prompt: str, step: Step) -> Iterator[tuple[slice, Gaussian]]:
        """The law of ``next``, with grad, and the members it is for: one forward for all, or one for each."""
        if self.cfg.update == "collapsed":
            yield slice(None), self.generator.transition(prompt, step)
        else:
            for member in range(step.size):
                yield (
                    slice(member, member + 1),
                    self.generator.transition(prompt, step, member),
                )

    def reference_transition(self, prompt: str, step: Step) -> Gaussian | None:
        """The same law under the frozen reference, None when no KL is asked for."""
        if self.cfg.kl_weight == 0.0:
            return None
        with torch.no_grad(), self.generator.reference():
            return self.generator.transition(prompt, step)

    def weights_of(self, step: Step, mean: StepWeights | None = None) -> StepWeights:
        """See `alignment.grpo_losses.step_weights`; ``mean`` divides them."""
        found = step_weights(
            step.std,
            sigma=step.sigma,
            sigma_next=step.sigma_next,
            gain=step.gain,
            form=self.cfg.reweight,
        )
        return (
            found
            if mean is None
            else StepWeights(found.policy / mean.policy, found.kl / mean.kl)
        )

    def mean_weights(self, groups: list[Group]) -> StepWeights | None:
        """MEAN over the groups and steps of all ranks, None where weights are taken as they are."""
        if not self.cfg.normalize_step_weights:
            return None
        found = [self.weights_of(step) for group in groups for step in group.steps]
        return StepWeights(
            *(
                sum_over_ranks(sum(w)) / sum_over_ranks(len(found))
                for w in zip(*found, strict=True)
            )
        )

    def loss(
        self,
        step: Step,
        members: slice,
        law: Gaussian,
        reference: Gaussian | None,
        advantage_G: Tensor,
        weights: StepWeights,
    ) -> LossOutput:
        """`grpo_group_loss` of some members of a group at one of its steps."""
        log_prob_G = gaussian.log_prob(law, step.next_GCFHW[members])
        if reference is not None and len(reference.mean) > len(law.mean):
            reference = gaussian.Gaussian(reference.mean[members], reference.std)
        return grpo_group_loss(
            log_prob_G,
            step.log_prob_G[members].to(log_prob_G.device),
            advantage_G[members].to(log_prob_G.device),
            None if reference is None else gaussian.kl_same_std(law, reference),
            policy_weight=weights.policy,
            kl_weight_scaled=self.cfg.kl_weight * weights.kl,
            clip_low=self.cfg.clip_low,
            clip_high=self.cfg.clip_high,
        )

    def update_metrics(self, outputs: list[LossOutput]) -> dict[str, float]:
        """MEAN over all ranks' backwards, but the maximum of the ratio's deviation."""
        own = {}
        norm = self.grad_norm() if self.grad_norm is not None else None
        if norm is not None:
            own["train/grad_norm"] = float(norm)
        for key in ("kl", "loss", "ratio_mean", "clip_frac"):
            if key in outputs[0].metrics:
                own[f"train/{key}"] = sum(
                    output.metrics[key] for output in outputs
                ) / len(outputs)
        deviation = max_over_ranks(
            max(output.metrics["ratio_dev"] for output in outputs)
        )
        return {
            **mean_over_ranks(own),
            "train/ratio_max_dev": deviation,
            "train/skipped": 0.0,
        }


class PhaseTimer:
    """Wall-clock seconds of named phases; a phase may come again."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # else a phase would only measure how fast it queued its kernels
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def metrics(self, *, videos: int) -> dict[str, float]:
        """MEAN seconds over ranks by phase, and the rate of all ranks together. ``videos`` is this rank's number."""
        total = time.perf_counter() - self.start
        own = {f"seconds/{phase}": value for phase, value in self.seconds.items()}
        metrics = mean_over_ranks({**own, "seconds/step": total})
        return {
            **metrics,
            "videos_per_second": sum_over_ranks(videos) / metrics["seconds/step"],
        }


def _prompts_of(groups: Sequence[Group]) -> list[str]:
    return [group.prompt for group in groups for _ in range(group.size)]


def _mean(value: Tensor) -> float:
    """MEAN over what was judged, NaN if nothing was."""
    judged = value[value.isfinite()]
    return float(judged.double().mean()) if judged.numel() else math.nan


def _spread(reward_PG: Tensor) -> dict[str, float]:
    """How well a reward tells videos apart: population std over all of them, and of each group, see `group_std`."""
    judged = reward_PG[reward_PG.isfinite()].double()
    std_P = group_std(reward_PG)
    return {
        "std": float(judged.std(correction=0)) if judged.numel() else math.nan,
        "group_std_max": float(std_P.max()),
        "group_std_median": float(std_P.median()),
        "zero_spread": float((std_P == 0.0).double().mean()),
        "unjudged": float((~reward_PG.isfinite()).sum()),
    }
