"""Scoring beside the rollout on a rank's own GPU, and the stops for rewards that teach nothing."""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from alignment.grpo import StepResult
from alignment.rewards.brightness import Brightness
from alignment.rewards.errors import NamedReward
from alignment.scoring import (
    FlatRewardGuard,
    Scorer,
    SilentRewardGuard,
    scoring_stream,
)
from alignment.timing import PhaseTimer
from common.types import RewardUnavailableError, Score
from tests.alignment.test_grpo import loop_of
from tests.fakes import FakeGenerator

NAN = math.nan


@pytest.mark.parametrize("overlap", [False, True])
def test_rank_without_a_group_to_score_has_no_scores(*, overlap: bool) -> None:
    scorer = Scorer(
        {"bright": NamedReward("bright", Brightness())},
        fps=8.0,
        group_size=2,
        groups=0,
        videos_per_call=4,
        timer=PhaseTimer(),
        overlap=overlap,
    )
    with scorer:
        found = scorer.scores()
    assert found["bright"].value_B.shape == (0,)


class FakeCuda:
    """Records, in place of CUDA on the rank with GPU 3, what which thread asks for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, object, bool]] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        self.streams = 0
        scoring_stream.cache_clear()
        monkeypatch.setattr(torch.cuda, "Stream", self.stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self)
        for name in ("set_device", "set_stream"):
            monkeypatch.setattr(torch.cuda, name, self.recorder(name))
        monkeypatch.setattr(torch.cuda, "synchronize", self.recorder("device sync"))

    def stream(self, device: int) -> str:
        self.streams += 1
        return f"stream of {device}"

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
        groups=3,
        videos_per_call=4,
        timer=PhaseTimer(),
        overlap=True,
    )
    group = torch.full((2, 3, 4, 4, 3), 51, dtype=torch.uint8)
    with scorer:
        for _ in range(3):
            scorer.add(group, ["a", "a"])
        found = scorer.scores()
    assert found["bright"].value_B.tolist() == pytest.approx([0.2] * 6)
    # claimed before the first group, not again for the others
    thread = [call[:2] for call in cuda.calls if not call[2]]
    assert thread == [
        ("set_device", 3),
        ("set_stream", "stream of 3"),
        *[("score", None)] * 3,
    ]


def test_scorers_of_all_steps_share_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    for _ in range(3):
        scorer = Scorer(
            {"bright": NamedReward("bright", Brightness())},
            fps=8.0,
            group_size=2,
            groups=1,
            videos_per_call=4,
            timer=PhaseTimer(),
            overlap=True,
        )
        with scorer:
            scorer.add(torch.zeros((2, 3, 4, 4, 3), dtype=torch.uint8), ["a", "a"])
    assert [name for name, *_ in cuda.calls].count("set_stream") == 3
    assert cuda.streams == 1
    scoring_stream.cache_clear()


def test_timer_waits_for_its_own_stream_only(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    with PhaseTimer()("rollout"):
        pass
    assert cuda.calls == [("stream sync", None, True)]


# ------------------------------------------------------------------ frames of a step


class FrameMemory(TorchDispatchMode):
    """Counts the bytes of uint8 storages that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.uint8:
            storage = result.untyped_storage()
            key = storage.data_ptr()
            if key not in self.sizes:
                self.sizes[key] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, key, None)
            self.peak = max(self.peak, sum(self.sizes.values()))
        return result


class Slow(Brightness):
    """Slower than the rollout, so that groups wait for it."""

    def score(
        self, video_BTYXC: torch.Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        time.sleep(0.05)
        return super().score(video_BTYXC, prompts, fps=fps)


def peak_frames(*, prompts: int, videos_per_call: int, **options: object) -> int:
    """Peak of a step's uint8 frames, in videos of the fake generator."""
    loop = loop_of(
        {"bright": Slow()},
        prompts=prompts,
        videos_per_call=videos_per_call,
        **options,
    )
    with FrameMemory() as memory:
        result = loop.step(0)
    assert len(result.scores["bright"].value_B) == prompts * 4
    assert not memory.sizes
    video_bytes = 2 * 4 * 4 * 3
    return memory.peak // video_bytes


def test_frames_of_a_step_grow_with_the_chunk_and_not_with_the_prompts() -> None:
    # a chunk of 8 videos and the group of 4 that is copied into it
    assert peak_frames(prompts=4, videos_per_call=8) == 12
    assert peak_frames(prompts=24, videos_per_call=8) == 12
    assert peak_frames(prompts=24, videos_per_call=16) == 20
    # a group is a chunk without a copy
    assert peak_frames(prompts=24, videos_per_call=1) == 4
    # no larger than what is there
    assert peak_frames(prompts=4, videos_per_call=1000) == 20


def test_frames_that_wait_for_the_thread_are_bounded() -> None:
    """Two groups wait or are scored, while the next is decoded."""
    peak = peak_frames(prompts=24, videos_per_call=8, overlap_scoring=True)
    assert peak <= 12


@pytest.mark.parametrize("overlap", [False, True])
def test_frames_of_the_first_groups_are_kept(*, overlap: bool) -> None:
    whole = loop_of({"bright": Brightness()}, overlap_scoring=overlap)
    result = whole.step(0, keep_groups=2)
    assert result.video_BTYXC.shape[0] == 8
    value_B = Brightness().score(result.video_BTYXC, ["a"] * 8, fps=8.0).value_B
    assert torch.equal(result.scores["bright"].value_B[:8], value_B)
    assert whole.step(1).video_BTYXC is None


@pytest.mark.parametrize("videos_per_call", [1, 8, 12, 64])
def test_chunks_change_no_score_and_no_gradient(videos_per_call: int) -> None:
    """Rewards see whole groups in order, group by group where they compare members."""
    counts = []

    class Counting(Brightness):
        def score(
            self, video_BTYXC: torch.Tensor, prompts: Sequence[str], *, fps: float
        ) -> Score:
            counts.append(len(prompts))
            return super().score(video_BTYXC, prompts, fps=fps)

    class Grouped(Counting):
        group_level = True

    def results(reward: Brightness, **options: int) -> StepResult:
        return loop_of({"bright": reward}, **options).step(0)

    want = results(Brightness())
    got = results(Counting(), videos_per_call=videos_per_call)
    sizes = {1: [4] * 4, 8: [8, 8], 12: [12, 4], 64: [16]}
    assert counts == sizes[videos_per_call]
    assert torch.equal(got.scores["bright"].value_B, want.scores["bright"].value_B)
    assert torch.equal(got.advantage_PM, want.advantage_PM)
    assert got.metrics["train/grad_norm"] == want.metrics["train/grad_norm"]
    counts.clear()
    grouped = results(Grouped(), videos_per_call=videos_per_call)
    assert counts == [4] * 4
    assert torch.equal(grouped.advantage_PM, want.advantage_PM)


def test_error_in_the_first_chunk_is_raised_after_the_last_group() -> None:
    """Other ranks sample all their groups too, and some generators do it together."""
    calls = []

    class Broken(Brightness):
        def score(
            self, video_BTYXC: torch.Tensor, prompts: Sequence[str], *, fps: float
        ) -> Score:
            calls.append(len(prompts))
            raise ConnectionError("the reward server is gone")

    class Decoding(FakeGenerator):
        decoded = 0

        def decode(self, clean: torch.Tensor) -> torch.Tensor:
            self.decoded += 1
            return super().decode(clean)

    generator = Decoding()
    loop = loop_of({"bright": Broken()}, generator=generator, videos_per_call=4)
    with pytest.raises(RewardUnavailableError, match=r"rewards\.bright"):
        loop.step(0)
    assert calls == [4]
    assert generator.decoded == 4


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
