"""Guards of a GRPO run: alarms, the KL budget, saturation, the audit, and their checkpoint."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.config import load
from common.types import Score
from engine.trainer import StepReport, TrainingTask
from launch.schemas.guards import GuardsConfig
from launch.schemas.training import GrpoRun
from launch.training.guards import HeldoutAlarm, RunGuards, Saturation
from rm.cascade import clopper_pearson_lower
from tests.launch.processes import ROOT, run
from tests.launch.test_grpo import numbers
from tests.rm.test_adaptive import GROUPS, RULE

WEIGHTS = {"good": 1.0, "people": 0.0}


class FakeLoop:
    """The loop's parts that guards use."""

    def __init__(self, *, scorer: Any = None) -> None:
        self.cfg = SimpleNamespace(kl_weight=0.1, group_size=3)
        self.weights: list[float] = []
        reward = SimpleNamespace(scorer=scorer)
        named = SimpleNamespace(reward=reward, group_level=scorer is not None)
        self.rewards = {"good": named}

    def set_kl_weight(self, weight: float) -> None:
        self.weights.append(weight)


def result_of(**metrics: float) -> Any:
    named = {"reward/good_group_std_median": 1.0, **metrics}
    return SimpleNamespace(metrics=named, scores={"good": Score(torch.zeros(6))})


def rows_of(people: list[float], good: float) -> list[dict[str, float]]:
    return [{"people": value, "good": good} for value in people]


# ------------------------------------------------------------------ the alarm


def test_alarm_needs_two_falls_in_a_row_while_the_trained_reward_rises() -> None:
    alarm = HeldoutAlarm(z=2.0, patience=2)
    high = [1.0, 1.2, 1.1, 0.9]
    low = [0.5, 0.6, 0.5, 0.45]
    assert alarm.check(high, 1.0)["guard/alarm"] == 0
    assert alarm.check(low, 2.0)["guard/bad_evaluations"] == 1
    # a fall with the trained reward is no sign of hacking
    assert alarm.check(low, 0.5)["guard/bad_evaluations"] == 0
    assert alarm.check(low, 2.0)["guard/alarm"] == 0
    found = alarm.check(low, 2.0)
    assert found["guard/alarm"] == 1
    assert found["guard/heldout_change"] == pytest.approx((2.05 - 4.2) / 4)
    assert found["guard/heldout_z"] < -2


def test_alarm_compares_with_the_best_evaluation() -> None:
    """From 0 up to 2 and down to 1: below the best, though above the first."""
    alarm = HeldoutAlarm(z=2.0, patience=1)
    assert alarm.check([0.0, 0.1], 0.0)["guard/alarm"] == 0
    assert alarm.check([2.0, 2.1], 1.0)["guard/alarm"] == 0
    assert alarm.check([1.0, 1.15], 2.0)["guard/alarm"] == 1
    assert alarm.best == [2.0, 2.1]


def test_alarm_comes_after_the_peak_of_a_hacked_reward_and_never_in_clean_runs() -> (
    None
):
    """Ten clean runs that rise to a plateau, three that fall after evaluation 8.

    The noise is new in every evaluation, which is worse than the same seeds each time.
    """

    def alarms(seed: int, *, hacked: bool) -> list[int]:
        rng = random.Random(seed)
        prompts = [rng.gauss(0, 1) for _ in range(32)]
        alarm = HeldoutAlarm(GuardsConfig().z, patience=2)
        found = []
        for number in range(20):
            level = min(number, 8) * 0.2
            if hacked:
                level -= max(0, number - 8) * 0.3
            judged = [prompt + level + rng.gauss(0, 0.3) for prompt in prompts]
            if alarm.check(judged, number)["guard/alarm"]:
                found.append(number)
        return found

    for seed in range(10):
        assert alarms(seed, hacked=False) == []
    for seed in range(3):
        # two evaluations in a row after the peak at 8, of which the first may be too small a fall
        assert alarms(seed, hacked=True)[0] in (10, 11)


def test_alarm_stops_the_run_only_where_it_is_told_to() -> None:
    for action, stops in (("warn", False), ("stop", True)):
        cfg = GuardsConfig(heldout_reward="people", patience=1, on_alarm=action)
        guards = RunGuards(cfg, FakeLoop(), WEIGHTS)
        guards.after_evaluation(rows_of([1.0, 1.1, 1.2], 0.0))
        assert not guards.stop
        guards.after_evaluation(rows_of([0.0, 0.05, 0.1], 1.0))
        assert guards.stop == stops


# ------------------------------------------------------------------ budget and saturation


def test_kl_budget_sets_the_weight_of_the_next_step() -> None:
    loop = FakeLoop()
    guards = RunGuards(GuardsConfig(kl_target=0.2), loop, WEIGHTS)
    found = guards.after_step(result_of(**{"train/kl": 1.0}))
    assert found["guard/kl_weight"] == 0.1
    found = guards.after_step(result_of(**{"train/kl": 1.0}))
    assert found["guard/kl_weight"] == pytest.approx(0.15)
    # a step without an update has no KL
    guards.after_step(result_of())
    assert loop.weights == pytest.approx([0.15, 0.225, 0.225])


def test_saturation_is_the_spread_against_the_first_ten_steps() -> None:
    saturation = Saturation()
    assert [saturation.add(2.0) for _ in range(10)] == pytest.approx([1.0] * 10)
    # EMA 0.9: (0.9 x 2 + 0.1 x 0) / 2, then (0.9 x 1.8) / 2
    assert saturation.add(0.0) == pytest.approx(0.9)
    assert saturation.add(math.nan) == pytest.approx(0.9)
    assert saturation.add(0.0) == pytest.approx(0.81)


# ------------------------------------------------------------------ the audit of thinking


def audited(outcomes: list[float]) -> Any:
    part_B = torch.tensor(outcomes).repeat_interleave(3)
    score = Score(torch.zeros(len(part_B)), {"audit": part_B})
    return SimpleNamespace(metrics={}, scores={"good": score})


def test_audit_ends_fast_scoring_once_the_lower_bound_passes_alpha() -> None:
    """alpha 0.02, delta 0.05: 1 of 3 groups has the lower bound 0.017, 2 of 5 have 0.076."""
    assert GROUPS.alpha == 0.02
    scorer = SimpleNamespace(thinking=RULE, always=False)
    guards = RunGuards(None, FakeLoop(scorer=scorer), WEIGHTS)
    assert guards.are_any
    found = guards.after_step(audited([1.0, math.nan, 0.0, 0.0]))
    assert found["thinking/good_audited"] == 3
    assert found["thinking/good_lower_bound"] == pytest.approx(
        clopper_pearson_lower(1, 3, delta=0.05)
    )
    assert not scorer.always
    found = guards.after_step(audited([1.0, 0.0]))
    assert found["thinking/good_always"] == 1
    assert scorer.always


# ------------------------------------------------------------------ checkpoint


def task_of(step: Any = None, **options: Any) -> TrainingTask:
    return TrainingTask(
        label="x", steps=4, engine=None, step=step, export=lambda: None, **options
    )


def test_state_of_all_guards_comes_back_from_a_checkpoint(tmp_path: Path) -> None:
    cfg = GuardsConfig(heldout_reward="people", kl_target=0.2)

    def build() -> tuple[RunGuards, TrainingTask, Any]:
        scorer = SimpleNamespace(thinking=RULE, always=False)
        loop = FakeLoop(scorer=scorer)
        guards = RunGuards(cfg, loop, WEIGHTS)
        restored: list[Path] = []
        task = task_of(state=lambda: {"mine": 1}, restore=restored.append)
        return guards, guards.guard(task), restored

    first, task, _ = build()
    first.after_evaluation(rows_of([1.0, 1.3, None], 0.5))
    first.after_evaluation(rows_of([0.1, 0.2, 0.4], 0.7))
    result = audited([1.0, 1.0, 0.0])
    result.metrics |= {"train/kl": 0.9, "reward/good_group_std_median": 0.3}
    first.after_step(result)
    state = json.loads(json.dumps(task.state(), allow_nan=False))
    assert state["mine"] == 1
    (tmp_path / "state.json").write_text(json.dumps({"steps_done": 1, **state}))

    second, task, restored = build()
    task.restore(tmp_path)
    assert restored == [tmp_path]
    assert second.state() == first.state()
    assert second.loop.weights == [first.kl_weight]
    assert second.audited["good"].always
    # both go on alike
    rows = rows_of([0.1, 0.1, 0.1], 0.9)
    assert second.after_evaluation(rows) == first.after_evaluation(rows)
    assert second.after_step(result) == first.after_step(result)
    assert second.alarm.bad == 2


def test_stop_ends_the_run_after_the_step() -> None:
    guards = RunGuards(GuardsConfig(), FakeLoop(), WEIGHTS)
    task = guards.guard(task_of(lambda number: StepReport({"x": 1.0}, result_of())))
    assert not task.step(0).stop
    guards.stop = True
    report = task.step(1)
    assert report.stop
    assert report.metrics == {"x": 1.0, "guard/saturation.good": 1.0}


def test_run_without_guards_is_left_alone() -> None:
    task = task_of()
    assert RunGuards(None, FakeLoop(), WEIGHTS).guard(task) is task


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["guards.heldout_reward=nobody"], "none of the rewards"),
        (["guards.heldout_reward=descore"], r"rewards\.descore\.weight=0"),
        (["guards.heldout_reward=people"], r"evaluation\.prompts"),
        (["guards.kl_target=0.1", "grpo.kl_weight=0"], r"grpo\.kl_weight"),
        (
            ["rewards.descore.options.thinking=adaptive", "grpo.ranks_per_group=2"],
            r"grpo\.ranks_per_group",
        ),
        (["rewards.descore.options.thinking=maybe"], r"descore\.options: thinking"),
    ],
)
def test_guards_with_nothing_to_work_on_are_refused(
    words: list[str], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        load(GrpoRun, "configs/shapes/grpo.yaml", words)


@pytest.mark.long
def test_resumed_run_has_the_guards_of_an_uninterrupted_run(tiny: Path) -> None:
    program = [
        sys.executable,
        str(ROOT / "launch" / "grpo.py"),
        "--config",
        str(tiny),
        "self_checks=false",
        "rewards.brightness.weight=1",
        "rewards.watched={kind: brightness, weight: 0}",
        f"evaluation.prompts={tiny.parent / 'prompts.txt'}",
        "evaluation.every=1",
        "guards.heldout_reward=watched",
        "guards.kl_target=1.0e-9",
    ]
    whole = tiny.parent / "guarded"
    parts = tiny.parent / "guarded_parts"
    for steps, folder in ((3, whole), (2, parts), (3, parts)):
        run(*program, f"steps={steps}", f"run_dir={folder}", timeout=600)
    weights = [row.get("guard/kl_weight") for row in numbers(whole)]
    # the KL is 0 at first, which is below the target, and above it afterwards
    assert weights[1] == pytest.approx(weights[0] / 1.5)
    assert weights[2] == pytest.approx(weights[0])
    assert "guard/heldout_z" in numbers(whole)[1]
    assert numbers(parts) == numbers(whole)
