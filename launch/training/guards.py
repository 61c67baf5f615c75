"""Guards of a GRPO run: state that outlives a step and lies in the checkpoint.

A held-out reward's paired test, a KL budget, the saturation of rewards, and the audit of rewards
that think when unsure. All ranks see the same numbers, so that all of them decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.drift import adapted_kl_weight, mean_of_finite, paired_change
from common import checkpoint
from common.distributed import sum_over_ranks
from common.log import say

if TYPE_CHECKING:
    from alignment.grpo import GrpoLoop, StepResult
    from alignment.rewards.errors import NamedReward
    from engine.trainer import StepReport, TrainingTask
    from launch.evaluation.results_table import Row
    from launch.schemas.guards import GuardsConfig
    from launch.schemas.training import GrpoRun

# Steps whose spread is the measure of saturation, and the share of the past in its average.
FIRST_STEPS = 10
DECAY = 0.9
# The confidence of the audit where a threshold has none of its own.
AUDIT_DELTA = 0.05
STATE = "guards"


@dataclass
class HeldoutAlarm:
    """Compares a held-out reward with its best evaluation so far, prompt by prompt.

    An evaluation is bad if the MEAN change is below -z standard errors while the trained rewards
    have risen since the best one. ``patience`` bad evaluations in a row raise the alarm.
    """

    z: float
    patience: int
    best: list[float | None] = field(default_factory=list)
    trained_at_best: float = math.nan
    bad: int = 0

    def check(self, judged: Sequence[float | None], trained: float) -> dict[str, float]:
        """Take an evaluation: the held-out reward by prompt, and the MEAN of the trained ones.

        Metrics are the change, its z, the bad evaluations in a row, and 1 for an alarm.
        """
        # The first evaluation is the best so far.
        if not self.best or mean_of_finite(judged) > mean_of_finite(self.best):
            self.best = list(judged)
            self.trained_at_best = trained
        change = paired_change(judged, self.best)
        # A fall of both is no hacking: the policy gets worse at what it is trained on.
        is_bad = change.z < -self.z and trained > self.trained_at_best
        self.bad = self.bad + 1 if is_bad else 0
        return {
            "guard/heldout_change": change.mean,
            "guard/heldout_z": change.z,
            "guard/bad_evaluations": float(self.bad),
            "guard/alarm": float(self.bad >= self.patience),
        }


@dataclass
class Saturation:
    """How far a reward's median spread within groups has fallen since the first steps.

    EMA of the median / MEAN of the medians of the first 10 steps: 1 at the start, 0 for a reward
    that no longer tells the videos of a group apart.
    """

    first_sum: float = 0.0
    count: int = 0
    average: float = math.nan

    def add(self, median: float) -> float:
        """Take the median of a step, and return the saturation; NaN leaves it as it was."""
        if math.isfinite(median):
            # The measure, then the average of now.
            if self.count < FIRST_STEPS:
                self.first_sum += median
                self.count += 1
            past = median if math.isnan(self.average) else self.average
            self.average = DECAY * past + (1 - DECAY) * median
        if self.count == 0 or self.first_sum == 0:
            return math.nan
        return self.average / (self.first_sum / self.count)


@dataclass
class AuditCount:
    """Audited groups of a reward that thinks when unsure, and those whose order was another."""

    groups: int = 0
    losses: int = 0
    always: bool = False


class RunGuards:
    """All guards of a run. Without a ``guards`` section it has the audit of thinking alone.

    stop  The alarm has been raised and is to end the run.
    """

    def __init__(
        self, cfg: GuardsConfig | None, loop: GrpoLoop, weights: Mapping[str, float]
    ) -> None:
        # What is watched, and what is trained.
        self.cfg = cfg
        self.loop = loop
        self.trained = {name: weight for name, weight in weights.items() if weight != 0}
        self.first_kl_weight = loop.cfg.kl_weight
        self.kl_weight = loop.cfg.kl_weight
        # The state, which `state` writes and `restore` reads.
        self.saturations: dict[str, Saturation] = {}
        self.alarm: HeldoutAlarm | None = None
        self.stop = False
        if cfg is not None:
            self.saturations = {name: Saturation() for name in self.trained}
            if cfg.heldout_reward is not None:
                self.alarm = HeldoutAlarm(cfg.z, cfg.patience)
        self.audited = _adaptive_rewards(loop.rewards)
        self.audits = {name: AuditCount() for name in self.audited}

    @property
    def are_any(self) -> bool:
        """Whether there is anything to watch."""
        return self.cfg is not None or bool(self.audits)

    def after_evaluation(self, rows: Sequence[Row]) -> dict[str, float]:
        """Take the rewards of an evaluation, {reward: value} of every held-out prompt."""
        if self.alarm is None or not rows:
            return {}
        # The trained rewards as the advantages weigh them.
        trained = 0.0
        for name, weight in self.trained.items():
            trained += weight * mean_of_finite([row.get(name) for row in rows])
        name = self.cfg.heldout_reward
        metrics = self.alarm.check([row.get(name) for row in rows], trained)

        # Say it when the alarm is raised, not at every evaluation after.
        if self.alarm.bad == self.alarm.patience:
            say(
                f"WARNING: the held-out reward {name} has fallen by "
                f"{-metrics['guard/heldout_change']:.4g} since its best evaluation (z = "
                f"{metrics['guard/heldout_z']:.1f}) while the trained rewards rose: the policy "
                "exploits the trained rewards; take an earlier checkpoint"
            )
            self.stop = self.cfg.on_alarm == "stop"
        return metrics

    def after_step(self, result: StepResult) -> dict[str, float]:
        """Take a step of the loop, and set the KL weight and the thinking of the next."""
        metrics = {}
        # 1. How well each trained reward still tells the videos of a group apart.
        for name, saturation in self.saturations.items():
            median = result.metrics[f"reward/{name}_group_std_median"]
            metrics[f"guard/saturation.{name}"] = saturation.add(median)
        # 2. The KL weight of the next step; a skipped step has no KL.
        if self.cfg is not None and self.cfg.kl_target is not None:
            metrics["guard/kl_weight"] = self.kl_weight
            self.kl_weight = adapted_kl_weight(
                self.kl_weight,
                result.metrics.get("train/kl", math.nan),
                target=self.cfg.kl_target,
                first=self.first_kl_weight,
            )
            self.loop.set_kl_weight(self.kl_weight)
        # 3. Whether fast scores may go on.
        for name in self.audits:
            metrics |= self._audit(name, result)
        return metrics

    def _audit(self, name: str, result: StepResult) -> dict[str, float]:
        """Count the audited groups of all ranks; end fast scoring that breaks its bound.

        Each step tests again, so that over a long run a sound threshold may fall too: the reward
        model then thinks more than it needs to.
        """
        from rm.adaptive import AUDIT
        from rm.cascade import clopper_pearson_lower

        # Every video of a group has the outcome of its group.
        count = self.audits[name]
        part_B = result.scores[name].parts.get(AUDIT)
        outcomes: list[float] = []
        if part_B is not None:
            first_P = part_B.view(-1, self.loop.cfg.group_size)[:, 0]
            outcomes = first_P[first_P.isfinite()].tolist()
        count.groups += round(sum_over_ranks(len(outcomes)))
        count.losses += round(sum_over_ranks(sum(outcomes)))

        # The lower bound of the risk against what the threshold promises.
        scorer = self.audited[name]
        threshold = scorer.thinking.threshold_of(self.loop.cfg.group_size)
        delta = AUDIT_DELTA if threshold.method == "crc" else threshold.delta
        lower = 0.0
        if count.groups:
            lower = clopper_pearson_lower(count.losses, count.groups, delta=delta)
        if lower > threshold.alpha and not count.always:
            say(
                f"WARNING: rewards.{name} thinks about everything from now on: in the audit "
                f"{count.losses} of {count.groups} groups had another order, more than "
                f"alpha={threshold.alpha:g} allows; calibrate it on the policy's own videos"
            )
            count.always = True
            scorer.always = True
        return {
            f"thinking/{name}_audited": float(count.groups),
            f"thinking/{name}_lower_bound": lower,
            f"thinking/{name}_always": float(count.always),
        }

    # ------------------------------------------------------------------ the checkpoint

    def state(self) -> dict[str, Any]:
        """JSON for a checkpoint; NaN becomes null."""
        # The best evaluation, prompt by prompt.
        alarm = None
        if self.alarm is not None:
            alarm = {
                "best": [_json(value) for value in self.alarm.best],
                "trained_at_best": _json(self.alarm.trained_at_best),
                "bad": self.alarm.bad,
            }
        # Sums and averages of the trained rewards.
        saturations = {}
        for name, saturation in self.saturations.items():
            average = _json(saturation.average)
            saturations[name] = [saturation.first_sum, saturation.count, average]
        audits = {}
        for name, count in self.audits.items():
            audits[name] = [count.groups, count.losses, count.always]
        return {
            "kl_weight": self.kl_weight,
            "alarm": alarm,
            "saturations": saturations,
            "audits": audits,
        }

    def restore(self, folder: Path) -> None:
        """Take the state of a checkpoint; guards that it does not know start anew."""
        saved = checkpoint.load_state(folder).get(STATE)
        if saved is None:
            return
        # The weight that the next step would have had.
        if self.cfg is not None and self.cfg.kl_target is not None:
            self.kl_weight = saved["kl_weight"]
            self.loop.set_kl_weight(self.kl_weight)
        alarm = saved["alarm"]
        if self.alarm is not None and alarm is not None:
            self.alarm.best = alarm["best"]
            self.alarm.trained_at_best = _number(alarm["trained_at_best"])
            self.alarm.bad = alarm["bad"]
        # Rewards that this run has too.
        for name, (first_sum, count, average) in saved["saturations"].items():
            if name in self.saturations:
                self.saturations[name] = Saturation(first_sum, count, _number(average))
        for name, values in saved["audits"].items():
            if name in self.audits:
                self.audits[name] = AuditCount(*values)
                self.audited[name].always = self.audits[name].always

    def guard(self, task: TrainingTask) -> TrainingTask:
        """Watch the steps of a task, and keep this state in its checkpoints."""
        if not self.are_any:
            return task
        return replace(
            task,
            step=lambda number: self._watched(task.step, number),
            state=lambda: {**task.state(), STATE: self.state()},
            restore=lambda folder: self._restored(task, folder),
        )

    def _watched(self, step: Callable[[int], StepReport], number: int) -> StepReport:
        report = step(number)
        metrics = {**report.metrics, **self.after_step(report.result)}
        return replace(report, metrics=metrics, stop=report.stop or self.stop)

    def _restored(self, task: TrainingTask, folder: Path) -> None:
        # What the task restores comes first: its engine and loop.
        task.restore(folder)
        self.restore(folder)


def guards_of(run: GrpoRun, loop: GrpoLoop) -> RunGuards:
    """Build the guards of a run."""
    weights = {name: reward.weight for name, reward in run.rewards.items()}
    return RunGuards(run.guards, loop, weights)


def _adaptive_rewards(rewards: Mapping[str, NamedReward]) -> dict[str, Any]:
    """Scorers of this process that think when unsure, by the name of their reward."""
    scorers = {}
    for name, named in rewards.items():
        scorer = getattr(named.reward, "scorer", None)
        if hasattr(scorer, "thinking") and named.group_level:
            scorers[name] = scorer
    return scorers


def _json(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else value
