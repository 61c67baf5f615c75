"""Scoring beside the rollout on a rank's own GPU, and the stops for rewards that teach nothing."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence

import pytest
import torch

from alignment.rewards.brightness import Brightness
from alignment.rewards.errors import NamedReward
from alignment.scoring import FlatRewardGuard, Scorer, SilentRewardGuard
from alignment.timing import PhaseTimer
from common.types import RewardUnavailableError, Score

NAN = math.nan


@pytest.mark.parametrize("overlap", [False, True])
def test_rank_without_a_group_to_score_has_no_scores(*, overlap: bool) -> None:
    scorer = Scorer(
        {"bright": NamedReward("bright", Brightness())},
        fps=8.0,
        group_size=2,
        timer=PhaseTimer(),
        overlap=overlap,
    )
    with scorer:
        found = scorer.scores(torch.empty((0, 1, 1, 1, 3), dtype=torch.uint8), [])
    assert found["bright"].value_B.shape == (0,)


class FakeCuda:
    """Records, in place of CUDA on the rank with GPU 3, what which thread asks for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, object, bool]] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"stream of {device}")
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self)
        for name in ("set_device", "set_stream"):
            monkeypatch.setattr(torch.cuda, name, self.recorder(name))
        monkeypatch.setattr(torch.cuda, "synchronize", self.recorder("device sync"))

    def recorder(self, name: str) -> object:
        def record(value: object = None) -> None:
            self.add(name, value)

        return record

    def add(self, name: str, value: object) -> None:
        is_main = threading.current_thread() is threading.main_thread()
        self.calls.append((name, value, is_main))

    def synchronize(self) -> None:
        self.add("stream sync", None)


class Watching(Brightness):
    """Records which thread scores."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def score(
        self, video_BTYXC: torch.Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        self.cuda.add("score", None)
        return super().score(video_BTYXC, prompts, fps=fps)


def test_scoring_thread_has_the_gpu_and_a_stream_of_its_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda(monkeypatch)
    scorer = Scorer(
        {"bright": NamedReward("bright", Watching(cuda))},
        fps=8.0,
        group_size=2,
        timer=PhaseTimer(),
        overlap=True,
    )
    group = torch.full((2, 3, 4, 4, 3), 51, dtype=torch.uint8)
    with scorer:
        for _ in range(3):
            scorer.start(group, ["a", "a"])
        found = scorer.scores(torch.cat([group] * 3), ["a"] * 6)
    assert found["bright"].value_B.tolist() == pytest.approx([0.2] * 6)
    # claimed before the first group, not again for the others
    thread = [call[:2] for call in cuda.calls if not call[2]]
    assert thread == [
        ("set_device", 3),
        ("set_stream", "stream of 3"),
        *[("score", None)] * 3,
    ]


def test_timer_waits_for_its_own_stream_only(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    with PhaseTimer()("rollout"):
        pass
    assert cuda.calls == [("stream sync", None, True)]


# ------------------------------------------------------------------ stops


def spreads(**spread: float) -> dict[str, float]:
    return {f"reward/{name}_group_std_max": value for name, value in spread.items()}


def means(**mean: float) -> dict[str, float]:
    return {f"reward/{name}": value for name, value in mean.items()}


def steps_until_stop(
    guard: FlatRewardGuard, history: Sequence[Mapping[str, float]]
) -> int | None:
    """How many steps a guard lets pass, None for all; every mean is 0.5."""
    for step, spread in enumerate(history):
        try:
            guard.check(means(mine=0.5, other=0.5), spreads(**spread))
        except RewardUnavailableError:
            return step
    return None


FLAT = {"mine": 0.0, "other": 0.0}
OTHER_SPREADS = {"mine": 0.0, "other": 0.25}


def test_flat_rewards_stop_the_run_after_the_patience() -> None:
    guard = FlatRewardGuard({"mine": 1.0, "other": -2.0}, patience=4)
    # three steps pass, the fourth stops
    assert steps_until_stop(guard, [FLAT] * 6) == 3


@pytest.mark.parametrize("spread_at", [0, 2, 3])
def test_reward_that_spread_once_never_stops_the_run(spread_at: int) -> None:
    guard = FlatRewardGuard({"mine": 1.0, "other": 1.0}, patience=4)
    history = [FLAT] * 12
    history[spread_at] = OTHER_SPREADS
    assert steps_until_stop(guard, history) is None


def test_spread_of_a_watched_reward_does_not_count() -> None:
    guard = FlatRewardGuard({"mine": 1.0, "other": 0.0}, patience=2)
    assert steps_until_stop(guard, [OTHER_SPREADS] * 3) == 1


def test_flat_rewards_go_on_where_that_is_wanted() -> None:
    wanted = FlatRewardGuard({"mine": 1.0, "other": 1.0}, patience=None)
    assert steps_until_stop(wanted, [FLAT] * 50) is None
    watched = FlatRewardGuard({"mine": 0.0, "other": 0.0}, patience=2)
    assert steps_until_stop(watched, [FLAT] * 50) is None


def test_silent_reward_tells_the_first_reason() -> None:
    guard = SilentRewardGuard({"mine": 1.0})
    scores = {"mine": Score(torch.tensor([NAN, NAN]), reasons=["", "it was too long"])}
    for _ in range(2):
        guard.check(means(mine=NAN), scores)
    with pytest.raises(RewardUnavailableError, match="it was too long"):
        guard.check(means(mine=NAN), scores)


def test_silent_run_of_fewer_steps_ends_at_its_last_step() -> None:
    """A run of two steps in which nothing was scored has not succeeded."""
    guard = SilentRewardGuard({"mine": 1.0})
    guard.expect(2)
    scores = {"mine": Score(torch.tensor([NAN, NAN]), reasons=[])}
    guard.check(means(mine=NAN), scores)
    with pytest.raises(RewardUnavailableError, match="first 2 steps"):
        guard.check(means(mine=NAN), scores)
