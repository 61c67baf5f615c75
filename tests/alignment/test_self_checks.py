"""Each self-check passes on what is sound and fails on the one thing it is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from alignment import self_checks
from common import distributed
from common.types import Score
from generator import denoiser
from generator.stock_check import stock_gap
from tests.fakes import FakeGenerator, FunctionReward, redness
from tests.tiny import build_tiny_wan, tiny_generator

PROMPTS = ["a", "bb", "ccc", "dddd"]


def videos() -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (4, 3, 8, 8, 3), generator=draw, dtype=torch.uint8)


def test_first_ratio_check_detects_another_velocity() -> None:
    fake = FakeGenerator()
    assert self_checks.first_ratio(fake, "a", dtype="float32").ok
    plain = fake.transition

    def moved(*of: object) -> object:
        with torch.no_grad():
            fake.module.bias_C.fill_(0.5)
        return plain(*of)

    fake.transition = moved
    found = self_checks.first_ratio(fake, "a", dtype="float32")
    assert not found.ok
    assert "guidance_in_update" in found.message


def test_first_ratio_check_replays_the_group_of_a_run() -> None:
    """A velocity that depends on the size of the batch is found at that size only."""
    fake = FakeGenerator()
    asked = []
    rollout = fake.rollout

    def noted(prompts: Sequence[str], **how: object) -> object:
        asked.append((prompts, how["group_size"], how["seeds"]))
        return rollout(prompts, **how)

    fake.rollout = noted
    found = self_checks.first_ratio(fake, "a", dtype="float32", group_size=5, seed=7)
    assert found.ok
    assert asked == [(["a"], 5, [7])]

    plain = fake.transition

    def sized(prompt: str, step: object) -> object:
        law = plain(prompt, step)
        if len(step.next_GCFHW) == 5:
            law = replace(law, mean=law.mean + 0.1)
        return law

    fake.transition = sized
    assert self_checks.first_ratio(fake, "a", dtype="float32").ok
    assert not self_checks.first_ratio(fake, "a", dtype="float32", group_size=5).ok


class Shifted:
    """Gives each video the score of the one before it in the batch."""

    name = "shifted"

    def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        return Score(video_BTYXC[..., 0].float().mean((1, 2, 3)).roll(1))


def test_permutation_check_detects_mixed_scores() -> None:
    assert self_checks.permutation(
        FunctionReward("red", redness), videos(), PROMPTS, fps=8.0
    ).ok
    found = self_checks.permutation(Shifted(), videos(), PROMPTS, fps=8.0)
    assert not found.ok
    assert found.fatal
    assert "wrong videos" in found.message


def test_reward_check_detects_ignored_prompts_and_noise() -> None:
    """Likes flat videos whose brightness is ten times the length of the prompt."""

    def fits(video: Tensor, prompt: str) -> float:
        x = video.float()
        return -abs(float(x.mean()) - 10 * len(prompt)) - float(x.std())

    flat = torch.stack(
        [torch.full((3, 8, 8, 3), 10 * len(p), dtype=torch.uint8) for p in PROMPTS]
    )
    assert self_checks.sense(FunctionReward("fits", fits), flat, PROMPTS, fps=8.0).ok
    found = self_checks.sense(
        FunctionReward("misfits", lambda v, p: -fits(v, p)), flat, PROMPTS, fps=8.0
    )
    assert (found.ok, found.fatal) == (False, False)
    assert "wrong prompt: fell 0 of 4, rose 4" in found.message


def test_reward_check_counts_noise_but_does_not_judge_by_it() -> None:
    """Likes videos as bright as ten times the prompt's length, and loves contrast."""

    def noisy(video: Tensor, prompt: str) -> float:
        x = video.float()
        return 11 * float(x.std()) - abs(float(x.mean()) - 10 * len(prompt))

    flat = torch.stack(
        [torch.full((3, 8, 8, 3), 10 * len(p), dtype=torch.uint8) for p in PROMPTS]
    )
    found = self_checks.sense(FunctionReward("noisy", noisy), flat, PROMPTS, fps=8.0)
    assert found.ok
    assert "noise, which reward models rarely saw: fell 0 of 4, rose 4" in found.message


def test_reward_check_warns_of_a_reward_without_any_score() -> None:
    mute = FunctionReward("mute", lambda v, p: float("nan"))
    found = self_checks.sense(mute, videos(), PROMPTS, fps=8.0)
    assert (found.ok, found.fatal) == (False, False)
    assert "no video could be scored" in found.message


def test_weights_that_differ_across_ranks_are_detected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = FakeGenerator().module
    assert self_checks.same_weights(module).ok
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(
        distributed, "gather_objects", lambda own: [own, own, "another"]
    )
    found = self_checks.same_weights(module)
    assert not found.ok
    assert "[2]" in found.message


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_wan(tmp_path_factory.mktemp("wan"))


def test_noiseless_rollout_equals_stock_pipeline(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wan = tiny_generator(folder)
    scheduler = wan._pipeline.scheduler
    found = self_checks.stock_trajectory(
        lambda: stock_gap(wan, "a cat"), dtype="float32"
    )
    assert found.ok, found.message
    assert wan._pipeline.scheduler is scheduler
    plain = denoiser.guide
    monkeypatch.setattr(
        denoiser,
        "guide",
        lambda cond, uncond, scale: plain(cond, uncond, scale * 1.001),
    )
    found = self_checks.stock_trajectory(
        lambda: stock_gap(wan, "a cat"), dtype="float32"
    )
    assert not found.ok
    assert "another model" in found.message


def test_rank_correlation_of_decoders_by_hand() -> None:
    """Ranks 1 2 3 4 against 1 3 2 4: 1 - 6 * 2 / (4 * 15) = 0.8; ties share their rank."""
    one = torch.tensor([0.1, 0.2, 0.3, 0.4])
    other = torch.tensor([1.0, 3.0, 2.0, 9.0])
    assert self_checks.rank_correlation(one, other) == pytest.approx(0.8)
    assert self_checks.rank_correlation(one, -one) == pytest.approx(-1.0)
    # ranks 1.5 1.5 3 against 1 2 3: 1.5 / sqrt(1.5 * 2)
    tied = self_checks.rank_correlation(one.new_tensor([0, 0, 1]), one[:3])
    assert tied == pytest.approx(1.5 / 3**0.5)
    assert self_checks.rank_correlation(one, torch.ones(4)) is None


def test_small_decoder_is_warned_about_where_it_changes_the_order() -> None:
    """Redder and redder videos, and the same with two of them exchanged."""
    whole = torch.zeros(4, 3, 8, 8, 3, dtype=torch.uint8)
    whole[..., 0] = torch.tensor([10, 20, 30, 40]).view(4, 1, 1, 1)
    reward = FunctionReward("red", redness)
    for order, ok in (([0, 1, 2, 3], True), ([2, 1, 0, 3], False)):
        small = whole[order]
        found = self_checks.decoders_agree(
            reward, small, whole, PROMPTS, fps=8.0, members=4
        )
        assert found.ok is ok
        assert not found.fatal
    # ranks 3 2 1 4: 1 - 6 * 8 / 60; levels differ by 40 / 12 in the MEAN
    assert (
        "of 4, is 0.200 on 4 videos, and pixels differ by 3.3 of 255" in found.message
    )
    # Alike frames have lost the order; videos that the VAE makes alike had none.
    alike = whole[:1].expand_as(whole)
    for pair, ok in (((alike, whole), False), ((whole, alike), True)):
        found = self_checks.decoders_agree(reward, *pair, PROMPTS, fps=8.0, members=4)
        assert found.ok is ok


def test_decoders_are_compared_within_groups() -> None:
    """Two groups of two far apart: one keeps its order, one turns: (1 - 1) / 2, of all 0.8."""
    whole = torch.zeros(4, 3, 8, 8, 3, dtype=torch.uint8)
    whole[..., 0] = torch.tensor([10, 20, 130, 140]).view(4, 1, 1, 1)
    small = whole[[0, 1, 3, 2]]
    reward = FunctionReward("red", redness)
    facts = []
    for members in (2, 4):
        found = self_checks.decoders_agree(
            reward, small, whole, PROMPTS, fps=8.0, members=members
        )
        facts.append(found.message)
    assert "within groups of 2, is 0.000 on 4 videos" in facts[0]
    assert "within groups of 4, is 0.800 on 4 videos" in facts[1]
