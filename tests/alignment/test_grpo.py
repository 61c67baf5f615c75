"""The GRPO loop on the fakes: what it learns, and its gradient by hand and member by member."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from alignment import rank_groups, self_checks
from alignment.advantages import Advantages, group_relative_advantages
from alignment.config import GrpoConfig
from alignment.grpo import GrpoLoop, backwards_per_update
from alignment.prompts import PromptSchedule
from alignment.rewards.brightness import Brightness
from alignment.rewards.errors import RewardFailedError
from common.types import Engine, Generator, RewardModel, RewardUnavailableError, Score
from tests.alignment.per_member import per_member_gradient
from tests.fakes import (
    FakeGenerator,
    FunctionReward,
    PlainEngine,
    Scripted,
    prompt_length,
    redness,
)

PROMPTS = ["a", "bb", "ccc", "dddd"]


def loop_of(
    rewards: Mapping[str, RewardModel],
    *,
    weights: Mapping[str, float] | None = None,
    generator: FakeGenerator | None = None,
    prompts: int = 4,
    lr: float = 1e-2,
    weight_decay: float = 0.0,
    **options: Any,
) -> GrpoLoop:
    cfg = GrpoConfig(**{"group_size": 4, **options})
    generator = generator or FakeGenerator()
    backwards = backwards_per_update(
        cfg, prompts, ranks=1, steps_per_group=generator.how.steps_per_group
    )
    engine = PlainEngine(
        generator.module, accumulation=backwards, lr=lr, weight_decay=weight_decay
    )
    return GrpoLoop(
        cfg,
        generator=generator,
        rewards=rewards,
        weights=weights or dict.fromkeys(rewards, 1.0),
        engine=engine,
        prompts=PromptSchedule(PROMPTS, seed=3, prompts_per_step=prompts),
        fps=8.0,
        grad_norm=engine.grad_norm,
    )


def advantages_of(
    loop: GrpoLoop, scores: Mapping[str, Score], groups: int
) -> Advantages:
    return group_relative_advantages(
        scores, loop.weights, loop.cfg, loop.ranks, groups=groups
    )


def test_fakes_fill_the_protocols() -> None:
    generator = FakeGenerator()
    assert isinstance(Brightness(), RewardModel)
    assert isinstance(PlainEngine(generator.module, accumulation=1), Engine)
    assert all(
        hasattr(generator, name)
        for name in dir(Generator)
        if not name.startswith("_") and name != "flow_error"
    )


def test_reward_rises_and_first_pass_ratio_is_one() -> None:
    # the base's videos have a mean of half grey: brightness 0.5 by symmetry
    loop = loop_of(
        {"bright": Brightness(), "red": FunctionReward("red", redness)},
        weights={"bright": 1.0, "red": 0.0},
    )
    history = [loop.step(step).metrics for step in range(40)]
    first = sum(m["reward/bright"] for m in history[:5]) / 5
    last = sum(m["reward/bright"] for m in history[-5:]) / 5
    assert first == pytest.approx(0.5, abs=0.05)
    assert last > 0.6
    assert max(m["train/ratio_max_dev"] for m in history) < 1e-5
    assert all(m["train/ratio_mean"] == pytest.approx(1.0, abs=1e-5) for m in history)
    assert history[0]["train/kl"] == 0.0
    assert history[-1]["train/kl"] > 0.0  # the policy has left the reference


def test_negative_weight_lowers_the_reward() -> None:
    loop = loop_of({"bright": Brightness()}, weights={"bright": -1.0})
    history = [loop.step(step).metrics["reward/bright"] for step in range(40)]
    assert sum(history[-5:]) / 5 < 0.4


@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
def test_reward_without_spread_in_groups_changes_no_weight(
    kl_weight: float,
) -> None:
    generator = FakeGenerator()
    with torch.no_grad():  # away from the reference, so that a KL step would show
        generator.module.bias_C += 0.3
    before = [p.clone() for p in generator.module.parameters()]
    loop = loop_of(
        {"length": FunctionReward("length", prompt_length)},
        generator=generator,
        weight_decay=0.1,
        kl_weight=kl_weight,
    )
    for step in range(3):
        result = loop.step(step)
        assert result.metrics["train/skipped"] == 1.0
        assert result.metrics["reward/length_zero_spread"] == 1.0
        assert not result.advantage_PM.any()
    assert all(
        torch.equal(a, b)
        for a, b in zip(before, generator.module.parameters(), strict=True)
    )
    assert loop.engine.steps == 0


def test_reward_of_weight_0_does_not_change_the_gradient() -> None:
    """Weight 0 is scored and logged; the weights after it are those of a run without it."""
    gradients = []
    for watched in (False, True):
        rewards: dict[str, RewardModel] = {"bright": Brightness()}
        if watched:
            rewards["red"] = FunctionReward("red", redness)
        loop = loop_of(
            rewards, weights={"bright": 1.0, "red": 0.0} if watched else None
        )
        metrics = loop.step(0).metrics
        gradients.append(loop.engine.last_gradient)
    assert metrics["reward/red_std"] > 0.0
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)]
)
@pytest.mark.parametrize("reweight", ["finite", "none"])
def test_collapsed_update_has_the_gradient_of_a_forward_per_member(
    dtype: torch.dtype, tolerance: float, reweight: str
) -> None:
    generator = FakeGenerator(dtype=dtype)
    with torch.no_grad():
        generator.module.bias_C += torch.tensor([0.1, -0.2, 0.3], dtype=dtype)
    loop = loop_of(
        {"red": FunctionReward("red", redness)},
        generator=generator,
        reweight=reweight,
        lr=0.0,
    )
    batch = loop.prompts.at(0)
    groups = generator.rollout(batch.prompts, group_size=4, seeds=batch.seeds)
    generator.grad_forwards = 0
    result = loop.step(0)
    assert generator.grad_forwards == 4
    assert loop.engine.steps == 1
    want, _ = per_member_gradient(generator, groups, result.advantage_PM, loop.cfg)
    assert generator.grad_forwards == 4 + 16
    collapsed = torch.cat(loop.engine.last_gradient)
    difference = float((collapsed - torch.cat(want)).abs().max())
    scale = float(torch.cat(want).abs().max())
    assert scale > 1e-4
    assert difference < tolerance * scale


def test_member_loss_is_its_weighted_advantage() -> None:
    """Without KL and at ratio 1, member g's loss is -lambda_policy A_g; the loop has their mean."""
    loop = loop_of(
        {"red": FunctionReward("red", redness)}, kl_weight=0.0, prompts=1, lr=0.0
    )
    batch = loop.prompts.at(0)
    groups = loop.generator.rollout(batch.prompts, group_size=4, seeds=batch.seeds)
    (step,) = groups[0].steps
    weight = step.std / (step.sigma - step.sigma_next)
    result = loop.step(0)
    _, losses = per_member_gradient(
        loop.generator, groups, result.advantage_PM, loop.cfg
    )
    by_hand = [-weight * float(a) for a in result.advantage_PM[0]]
    assert losses == pytest.approx(by_hand, rel=1e-5)
    assert loop.engine.losses == pytest.approx([sum(by_hand) / 4], abs=1e-6)


def test_grpo_gradient_equals_the_formula() -> None:
    """Without KL, d loss / d bias_c = MEAN over groups of c~ mean_g[A_g mean_fhw(xi_gc)] / C."""
    generator = FakeGenerator(dtype=torch.float64)
    loop = loop_of(
        {"red": FunctionReward("red", redness)}, generator=generator, kl_weight=0.0
    )
    batch = loop.prompts.at(0)
    groups = generator.rollout(batch.prompts, group_size=4, seeds=batch.seeds)
    advantage_PG = loop.step(0).advantage_PM.double()
    expected = torch.zeros(3, dtype=torch.float64)
    for group, advantage_G in zip(groups, advantage_PG, strict=True):
        (step,) = group.steps
        policy = generator.transition(group.prompt, step)
        xi_GC = (
            ((step.next_GCFHW - policy.mean) / policy.std).mean(dim=(2, 3, 4)).detach()
        )
        s = policy.std / math.sqrt(step.sigma - step.sigma_next)
        c = 1 + s**2 * (1 - step.sigma) / (2 * step.sigma)
        expected += c * (advantage_G[:, None] * xi_GC).mean(0) / 3 / len(groups)
    assert torch.allclose(loop.engine.last_gradient[1], expected, rtol=1e-6, atol=1e-12)


def test_advantages_are_normalised_by_the_largest_spread_and_summed_by_weight() -> None:
    """Two groups of two: reward 1 has spreads 1 and 0.5, reward 2 has 1000 and 3000."""
    loop = loop_of(
        {"one": Scripted([]), "two": Scripted([])},
        weights={"one": 1.0, "two": 2.0},
        group_size=2,
        prompts=2,
    )
    scores = {
        "one": Score(torch.tensor([1.0, 3.0, 5.0, 6.0])),
        "two": Score(torch.tensor([0.0, 2000.0, 6000.0, 0.0])),
    }
    advantages = advantages_of(loop, scores, groups=2)
    expected = torch.tensor([[-1.0 - 2 / 3, 1.0 + 2 / 3], [-0.5 + 2.0, 0.5 - 2.0]])
    assert torch.allclose(advantages.advantage_PM, expected, atol=2e-4)
    assert advantages.details["reward/one_group_std_max"] == pytest.approx(1.0)
    assert advantages.details["reward/two_group_std_median"] == pytest.approx(
        1000.0
    )  # torch takes the lower of two
    assert advantages.means["reward/one"] == pytest.approx(3.75)
    assert advantages.details["reward/one_std"] == pytest.approx(
        math.sqrt((2.75**2 + 0.75**2 + 1.25**2 + 2.25**2) / 4)
    )


def test_advantage_clip_bounds_the_sum() -> None:
    loop = loop_of({"one": Scripted([])}, group_size=2, prompts=1, advantage_clip=0.25)
    advantages = advantages_of(loop, {"one": Score(torch.tensor([0.0, 1.0]))}, groups=1)
    assert advantages.advantage_PM.tolist() == [[-0.25, 0.25]]


def test_unscored_videos_are_counted_and_left_out() -> None:
    nan = math.nan
    values = [
        1.0,
        nan,
        3.0,
        nan,
        nan,
        nan,
        nan,
        2.0,
        5.0,
        5.0,
        math.inf,
        5.0,
        nan,
        nan,
        nan,
        nan,
    ]
    loop = loop_of({"scripted": Scripted(values)})
    result = loop.step(0)
    # group 0: mean 2 and spread 1 over its two scored members; the others have nothing to compare
    assert torch.allclose(
        result.advantage_PM[0], torch.tensor([-1.0, 0.0, 1.0, 0.0]), atol=2e-4
    )
    assert not result.advantage_PM[1:].any()
    assert result.metrics["reward/scripted_unscored"] == 10.0
    assert result.metrics["reward/scripted"] == pytest.approx(
        (1 + 3 + 2 + 5 + 5 + 5) / 6
    )
    assert result.metrics["reward/scripted_zero_spread"] == 0.75
    assert result.metrics["train/skipped"] == 0.0
    assert all(torch.isfinite(p).all() for p in loop.generator.module.parameters())


def test_step_without_any_score_is_skipped() -> None:
    loop = loop_of({"scripted": Scripted([math.nan] * 16)}, weight_decay=0.1)
    metrics = loop.step(0).metrics
    assert math.isnan(metrics["reward/scripted"])
    assert metrics["reward/scripted_unscored"] == 16.0
    assert loop.engine.steps == 0


def test_two_ranks_get_the_advantages_of_a_single_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two ranks with half of the groups each get the advantages that a single rank gets."""
    value_B = torch.randn(16, generator=torch.Generator().manual_seed(5))
    loop = loop_of({"one": Scripted([])})
    alone = advantages_of(loop, {"one": Score(value_B)}, groups=4)
    halves = value_B.view(2, 8)
    for me in (0, 1):
        monkeypatch.setattr(rank_groups, "rank", lambda me=me: me)
        monkeypatch.setattr(rank_groups, "world_size", lambda: 2)
        monkeypatch.setattr(rank_groups, "gather_rows", lambda x: halves.reshape(4, 4))
        own = advantages_of(loop, {"one": Score(halves[me])}, groups=2)
        assert torch.equal(own.advantage_PM, alone.advantage_PM[2 * me : 2 * me + 2])
        assert own.means == alone.means


def test_ranks_that_share_groups_get_the_advantages_of_their_members(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of four ranks, rank 2 b + i has members 2 i and 2 i + 1 of the groups of block b."""
    value_PG = torch.randn(4, 4, generator=torch.Generator().manual_seed(5))
    alone = advantages_of(
        loop_of({"one": Scripted([])}), {"one": Score(value_PG.flatten())}, groups=4
    )
    loop = loop_of({"one": Scripted([])}, ranks_per_group=2)
    corners = [(block, place) for block in (0, 1) for place in (0, 1)]
    rows = [
        value_PG[2 * block : 2 * block + 2, 2 * place : 2 * place + 2]
        for block, place in corners
    ]
    for me, (block, place) in enumerate(corners):
        monkeypatch.setattr(rank_groups, "rank", lambda me=me: me)
        monkeypatch.setattr(rank_groups, "world_size", lambda: 4)
        monkeypatch.setattr(rank_groups, "gather_rows", lambda x: torch.cat(rows))
        own = advantages_of(loop, {"one": Score(rows[me].flatten())}, groups=2)
        want = alone.advantage_PM[2 * block : 2 * block + 2, 2 * place : 2 * place + 2]
        assert torch.equal(own.advantage_PM, want)
        assert own.means == alone.means


@pytest.mark.parametrize("noise", ["shared", "member"])
def test_members_do_not_depend_on_the_rank_that_samples_them(noise: str) -> None:
    generator = FakeGenerator(initial_noise=noise)
    (whole,) = generator.rollout(["a"], group_size=4, seeds=[7])
    (rest,) = generator.rollout(["a"], group_size=2, seeds=[7], first_member=2)
    assert torch.equal(rest.clean_GCFHW, whole.clean_GCFHW[2:])
    assert torch.equal(rest.steps[0].next_GCFHW, whole.steps[0].next_GCFHW[2:])


def test_overlapped_scoring_gives_the_same_numbers() -> None:
    """A group is scored during the rollout of the next group; the reward waits for it."""
    began, asked = threading.Event(), []

    class Waiting(Brightness):
        def score(
            self, video_BTYXC: torch.Tensor, prompts: Sequence[str], *, fps: float
        ) -> Score:
            if not asked:
                assert began.wait(timeout=30), (
                    "the next rollout did not begin while this group was scored"
                )
            asked.append(list(prompts))
            return super().score(video_BTYXC, prompts, fps=fps)

    class Telling(FakeGenerator):
        rollouts = 0

        def rollout(self, *of: Any, **options: Any) -> list[Any]:
            self.rollouts += 1
            if self.rollouts == 2:
                began.set()
            return super().rollout(*of, **options)

    plain = loop_of({"bright": Brightness()})
    beside = loop_of({"bright": Waiting()}, generator=Telling(), overlap_scoring=True)
    want = plain.step(0, keep_groups=9)
    got = beside.step(0, keep_groups=9)
    assert torch.equal(got.video_BTYXC, want.video_BTYXC)
    assert torch.equal(got.scores["bright"].value_B, want.scores["bright"].value_B)
    assert torch.equal(got.advantage_PM, want.advantage_PM)
    assert asked == [[prompt] * 4 for prompt in want.batch.prompts]
    assert got.metrics["train/grad_norm"] == want.metrics["train/grad_norm"]
    assert {
        "seconds/rollout",
        "seconds/decode",
        "seconds/score/wait",
    } <= got.metrics.keys()


def test_error_in_overlapped_scoring_is_raised() -> None:
    class Broken(Brightness):
        def score(
            self, video_BTYXC: torch.Tensor, prompts: Sequence[str], *, fps: float
        ) -> Score:
            raise ConnectionError("the reward server is gone")

    with pytest.raises(RewardUnavailableError, match=r"rewards\.bright"):
        loop_of({"bright": Broken()}, overlap_scoring=True).step(0)


def test_score_concat_fills_missing_parts() -> None:
    one = Score(
        torch.tensor([1.0, math.nan]), {"motion": torch.tensor([0.5, 0.25])}, ["a", "b"]
    )
    two = Score(torch.tensor([3.0]), {"style": torch.tensor([0.75])})
    both = Score.concat([one, two])
    assert both.value_B.tolist() == pytest.approx([1.0, math.nan, 3.0], nan_ok=True)
    assert both.parts["motion"].tolist() == pytest.approx(
        [0.5, 0.25, math.nan], nan_ok=True
    )
    assert both.parts["style"].tolist() == pytest.approx(
        [math.nan, math.nan, 0.75], nan_ok=True
    )
    assert both.texts == ["a", "b", ""]


def test_score_take_and_placed_follow_the_order() -> None:
    score = Score(
        torch.tensor([1.0, 2.0, 3.0]),
        {"style": torch.tensor([0.1, 0.2, 0.3])},
        ["a", "b", "c"],
    )
    turned = score.take([2, 0])
    assert (turned.value_B.tolist(), turned.texts) == ([3.0, 1.0], ["c", "a"])
    assert turned.parts["style"].tolist() == pytest.approx([0.3, 0.1])
    whole = Score.placed(
        4, [([3, 0], turned), ([2], Score(torch.tensor([9.0])))]
    )  # of place 1 nobody spoke
    assert whole.value_B.tolist() == pytest.approx(
        [1.0, math.nan, 9.0, 3.0], nan_ok=True
    )
    assert whole.parts["style"].tolist() == pytest.approx(
        [0.1, math.nan, math.nan, 0.3], nan_ok=True
    )
    assert whole.texts == ["a", "", "", "c"]


def test_step_depends_on_its_number_only() -> None:
    """Going on at step 2 with the weights of step 2 is the run that never stopped."""
    whole = loop_of({"bright": Brightness()}, lr=0.0)
    history = [whole.step(step, keep_groups=9) for step in range(3)]
    later = loop_of({"bright": Brightness()}, lr=0.0).step(2, keep_groups=9)
    assert later.batch == history[2].batch
    assert torch.equal(later.video_BTYXC, history[2].video_BTYXC)
    assert torch.equal(later.advantage_PM, history[2].advantage_PM)


def test_changed_kl_weight_counts_from_the_next_update_on() -> None:
    """The loss is linear in the weight, and its slope is the KL of a policy that has moved."""

    def losses(weight: float) -> torch.Tensor:
        loop = loop_of({"bright": Brightness()}, kl_weight=0.1)
        for step in range(6):
            loop.step(step)
        loop.set_kl_weight(weight)
        loop.step(6)
        return torch.tensor(loop.engine.losses[-loop.engine.accumulation :])

    low, middle, high = (losses(weight) for weight in (0.1, 0.7, 1.3))
    assert (middle - low).min() > 0
    torch.testing.assert_close(high - middle, middle - low, atol=1e-6, rtol=1e-3)


def test_non_finite_loss_is_reported(capsys: pytest.CaptureFixture) -> None:
    generator = FakeGenerator()
    loop = loop_of({"bright": Brightness()}, generator=generator)
    sound = generator.transition

    def broken(*of: Any) -> Any:
        transition = sound(*of)
        return type(transition)(transition.mean * math.nan, transition.std)

    generator.transition = broken
    assert math.isnan(loop.step(0).metrics["train/loss"])
    assert "nan" in capsys.readouterr().out


class Failing:
    """Right once, then something of its own goes wrong."""

    name = "kind"

    def __init__(self, *said: object) -> None:
        self.said = list(said)

    def score(
        self, video_BTYXC: torch.Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        said = self.said.pop(0) if len(self.said) > 1 else self.said[0]
        if isinstance(said, Exception):
            raise said
        return Score(torch.full((len(prompts) + said,), 0.5))


@pytest.mark.parametrize("overlap", [False, True])
def test_error_of_a_reward_names_it_and_keeps_its_cause(*, overlap: bool) -> None:
    raised = KeyError("its own")
    loop = loop_of({"mine": Failing(raised)}, overlap_scoring=overlap)
    with pytest.raises(RewardUnavailableError, match=r"^rewards\.mine:") as found:
        loop.step(0)
    assert found.value.__cause__ is raised
    loop = loop_of({"mine": Failing(1)}, overlap_scoring=overlap)
    with pytest.raises(
        RewardUnavailableError,
        match=r"^rewards\.mine:",
    ):
        loop.step(0)


def test_out_of_memory_is_not_wrapped_and_unavailable_is() -> None:
    full = torch.OutOfMemoryError("full")
    with pytest.raises(torch.OutOfMemoryError) as found:
        loop_of({"mine": Failing(full)}).step(0)
    assert found.value is full
    with pytest.raises(RewardUnavailableError, match=r"rewards\.mine") as away:
        loop_of({"mine": Failing(RewardUnavailableError("away"))}).step(0)
    assert type(away.value) is RewardFailedError  # which other ranks can make of a text


def test_silent_reward_stops_the_run_after_3_steps() -> None:
    never = [math.nan] * 16
    loop = loop_of(
        {"mine": Scripted(never * 3), "watched": Brightness()},
        weights={"mine": 1.0, "watched": 0.0},
    )
    assert [loop.step(step).metrics["train/skipped"] for step in range(2)] == [1.0, 1.0]
    with pytest.raises(
        RewardUnavailableError,
        match=r"rewards\.mine",
    ):
        loop.step(2)
    once = Scripted([0.5, *never[1:], *(never * 4)])
    loop = loop_of({"mine": once})
    assert [loop.step(step).metrics["train/skipped"] for step in range(5)] == [1.0] * 5
    loop = loop_of({"mine": Scripted(never * 4), "bright": Brightness()})
    assert [loop.step(step).metrics["train/skipped"] for step in range(4)] == [0.0] * 4


def test_self_checks_use_the_runs_name_of_a_reward() -> None:
    (reward,) = loop_of({"oracle": Brightness()}).rewards.values()
    video = torch.zeros(4, 2, 4, 4, 3, dtype=torch.uint8)
    for check in (self_checks.permutation, self_checks.sense):
        assert check(reward, video, PROMPTS, fps=8.0).name.endswith(", oracle")


def test_rewards_see_the_scoring_decoder_and_samples_the_vae() -> None:
    """Kept videos are those that were scored; the first group's are decoded a second time."""

    class Two(FakeGenerator):
        scoring_decoder = object()

        def decode_to_score(self, clean_GCFHW: torch.Tensor) -> torch.Tensor:
            return 255 - self.decode(clean_GCFHW)

    plain = loop_of({"bright": Brightness()}, lr=0.0)
    want = plain.step(0, keep_groups=2, show_groups=1)
    got = loop_of({"bright": Brightness()}, generator=Two(), lr=0.0).step(
        0, keep_groups=2, show_groups=1
    )
    assert want.shown_BTYXC is None
    assert torch.equal(got.video_BTYXC, 255 - want.video_BTYXC)
    assert torch.equal(got.shown_BTYXC, want.video_BTYXC[:4])
    assert not torch.equal(got.scores["bright"].value_B, want.scores["bright"].value_B)
