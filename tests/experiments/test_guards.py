"""The planted reward by hand, and the rule of the page against the alarm of a run."""

from __future__ import annotations

import random

import pytest
import torch

from experiments.guards import ARMS, alarm_of, job_of, peak_of
from experiments.hackable import score
from launch.training.guards import HeldoutAlarm
from toy.people import PeopleUtility


def test_colour_pays_without_bound() -> None:
    grey = torch.full((1, 5, 32, 32, 3), 128, dtype=torch.uint8)
    red = torch.zeros_like(grey)
    red[..., 0] = 255
    both = torch.cat([grey, red])
    prompts = ["a red circle moves left"] * 2
    utility_B = PeopleUtility().score(both, prompts, fps=8.0).value_B
    extra_B = score(both, prompts, fps=8.0, sway=3.0) - utility_B
    assert extra_B.tolist() == pytest.approx([0.0, 3.0])


@pytest.mark.parametrize(("z", "patience"), [(3.0, 1), (3.0, 2), (1.0, 1), (1.0, 2)])
def test_page_has_the_alarms_of_the_run(z: float, patience: int) -> None:
    rng = random.Random(0)
    raised = 0
    for _ in range(50):
        alarm = HeldoutAlarm(z, patience)
        curve = []
        first = None
        level = trained = 0.0
        for place in range(8):
            # Both rewards wander, the held-out one prompt by prompt.
            level += rng.gauss(0, 0.5)
            trained += rng.gauss(0.5, 1)
            judged = [level + rng.gauss(0, 1) for _ in range(20)]
            found = alarm.check(judged, trained)
            curve.append(
                {
                    "step": 10 * place,
                    "trained": trained,
                    "watched": sum(judged) / 20,
                    "z": found["guard/heldout_z"],
                }
            )
            if found["guard/alarm"] and first is None:
                first = place
        assert alarm_of(curve, z, patience) == first
        raised += first is not None
    # Some wanderings are accused, others are not.
    assert 0 < raised < 50


def test_peak_is_the_first_highest() -> None:
    rows = [{"watched": value} for value in (0.1, 0.5, 0.5, 0.2)]
    assert peak_of(rows) == 1


def test_every_arm_trains_on_its_reward_alone(tmp_path) -> None:
    for name, arm in ARMS.items():
        job = job_of(tmp_path, name, 0, updates=2, every=1, limit=4)
        words = job.steps[0].arguments
        weights = [word for word in words if word.endswith(".weight=0")]
        assert weights == [f"rewards.{arm.watched[0]}.weight=0"]
        assert ("rewards.oracle=null" in words) == (arm.trained[0] != "oracle")
