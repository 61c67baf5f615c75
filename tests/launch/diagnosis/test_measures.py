"""Measurements of a generator, of rewards and of an update, on a tiny random Wan."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from alignment.config import GrpoConfig
from alignment.grpo import StepResult
from alignment.grpo_losses import weights_of_steps
from alignment.policy_update import PolicyUpdate
from alignment.prompts import PromptBatch
from alignment.rewards.errors import NamedReward
from common.types import Score
from generator.config import GeneratorConfig, LoraConfig, SamplerConfig
from generator.wan import WanGenerator
from launch.diagnosis import (
    batch_measures,
    generator_measures,
    loss_measures,
    reward_measures,
    score_measures,
    update_measures,
)
from launch.diagnosis.own_route import OwnRoute, gaps
from tests.tiny import build_tiny_wan

PROMPTS = ("a red circle", "two cats")


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> WanGenerator:
    folder = tmp_path_factory.mktemp("wan")
    build_tiny_wan(folder)
    sampler = SamplerConfig(num_steps=6, stochastic_range=3, guidance_scale=3.0)
    cfg = GeneratorConfig(
        path=str(folder),
        height=16,
        width=16,
        num_frames=9,
        dtype="float32",
        gradient_checkpointing=False,
        max_sequence_length=24,
        lora=LoraConfig(rank=4, alpha=8.0),
        sampler=sampler,
    )
    made = WanGenerator.load(cfg, device="cpu")
    # an adapter that has learned something
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.module.named_parameters():
            if "lora_B" in name:
                noise = torch.randn(parameter.shape, generator=source)
                parameter.copy_(0.05 * noise)
    return made


@pytest.fixture(scope="module")
def own(generator: WanGenerator) -> OwnRoute:
    return OwnRoute(generator, PROMPTS)


def test_both_routes_agree_and_every_variant_differs(own: OwnRoute) -> None:
    found = generator_measures.replay(own, PROMPTS[0], 3, other=PROMPTS[1], step=0)
    for name in ("rollout", "update", "tail"):
        assert found[f"{name}/gap/policy"] < 1e-5
    for variant in ("reference", "unguided", "other-prompt", "half"):
        assert found[f"rollout/gap/{variant}"] > 1e-4, variant
    assert found["rollout/log_prob_gap"] < 1e-6
    assert found["text/gap"] == 0
    assert found["update/repeat"] == 0
    # two members of one step are sqrt(2) std apart
    assert found["rollout/members_apart"] == pytest.approx(1, abs=0.1)


def test_adapter_that_is_off_in_the_sampler_is_explained_by_the_reference(
    own: OwnRoute, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = WanGenerator.rollout

    def without(self: WanGenerator, *args: object, **options: object) -> object:
        with self.reference():
            return rollout(self, *args, **options)

    monkeypatch.setattr(WanGenerator, "rollout", without)
    found = generator_measures.replay(own, PROMPTS[0], 3, other=PROMPTS[1], step=0)
    assert found["rollout/gap/reference"] < 1e-5 < found["rollout/gap/policy"]
    assert found["rollout/adapter_effect"] == 0


def test_decoded_bytes_agree(own: OwnRoute, generator: WanGenerator) -> None:
    clean = generator.sample(PROMPTS[:1], [5])
    found = generator_measures.decoding(own, clean)
    assert found["decode/gap/policy"] == 0
    # a mean of 0.5 more in a latent changes pixels
    assert not torch.equal(generator.decode(clean + 0.5), own.decode(clean))


def test_prompts_over_the_limit_are_counted(own: OwnRoute) -> None:
    # a token per byte: 12 and 8 of 24 and an end each; then one with 30
    assert generator_measures.cut_prompts(own) == {"text/cut": 0.0}
    longer = OwnRoute(own.generator, [*PROMPTS, "x" * 30])
    assert generator_measures.cut_prompts(longer) == {"text/cut": 1 / 3}


def test_place_on_a_line_is_that_of_the_nearest_point() -> None:
    start = torch.tensor([1.0, 0.0])
    end = torch.tensor([3.0, 0.0])
    place, beside = generator_measures.place_on_line(
        torch.tensor([4.0, 1.0]), start, end
    )
    assert place == pytest.approx(1.5)
    # (0, 1) from the line, rms over two numbers
    assert beside == pytest.approx(math.sqrt(0.5))
    # several samples on one line
    place, _ = generator_measures.place_on_line(
        torch.tensor([[4.0, 1.0], [4.0, 1.0]]), start[None], end[None]
    )
    assert place == pytest.approx(1.5)
    assert math.isnan(generator_measures.place_on_line(end, start, start)[0])


def test_gap_is_relative_to_the_policy() -> None:
    # rms(3 - 1) / rms(1) = 2, and 0 for the variant that was used
    observed = torch.full((2, 2), 3.0)
    found = gaps(observed, {"policy": torch.ones(2, 2), "other": observed})
    assert found == {"policy": 2.0, "other": 0.0}


class Mean:
    """The mean of a video, plus 100 for prompts that hold a word."""

    name = "mean"

    def __init__(self, *, sign: float = 1.0) -> None:
        self.sign = sign

    def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        bright_B = video_BTYXC.float().mean(dim=(1, 2, 3, 4))
        bonus = [100.0 if "red" in prompt else 0.0 for prompt in prompts]
        return Score(self.sign * (bright_B + torch.tensor(bonus)))


def result_of(score: Score, video_BTYXC: Tensor, advantage_PM: Tensor) -> StepResult:
    batch = PromptBatch(PROMPTS, (1, 2))
    return StepResult({}, batch, video_BTYXC, {"mean": score}, advantage_PM)


def some_videos() -> Tensor:
    source = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (4, 3, 8, 8, 3), generator=source, dtype=torch.uint8)


def test_recorder_tells_swapped_prompts_and_the_frame_rate() -> None:
    video = some_videos()
    named = NamedReward("mean", Mean())
    (recorder,) = reward_measures.record({"mean": named}).values()
    right = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    score = named.score(video, right[::-1], fps=24.0)
    found = reward_measures.received(
        recorder, result_of(score, video, torch.zeros(2, 2)), fps=16.0
    )
    # in reverse order every video has the other prompt
    assert found["wrong_prompt"] == 1.0
    assert found["fps_ratio"] == 1.5
    reward_measures.release({"mean": named})
    assert isinstance(named.reward, Mean)


@pytest.mark.parametrize(
    ("mistake", "change"),
    [
        ("channels", lambda video: video.flip(-1)),
        ("reversed", lambda video: video.flip(1)),
        ("upside-down", lambda video: video.flip(2)),
        ("frozen", lambda video: video[:, :1].expand_as(video)),
        ("inverted", lambda video: 255 - video),
        ("unit", lambda video: video / 255),
        ("frames", lambda video: video[:, ::2]),
        ("size", lambda video: video[:, :, ::2]),
    ],
)
def test_what_became_of_a_video_on_its_way_to_the_reward_is_found(
    mistake: str, change: Callable[[Tensor], Tensor]
) -> None:
    video = some_videos()
    named = NamedReward("mean", Mean())
    (recorder,) = reward_measures.record({"mean": named}).values()
    right = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    score = named.score(change(video), right, fps=16.0)
    found = reward_measures.received(
        recorder, result_of(score, video, torch.zeros(2, 2)), fps=16.0
    )
    assert found["other_video"] == 1
    made = [key for key in found if key.startswith("other/")]
    assert made == [f"other/{mistake}"]


def test_scores_of_the_step_before_are_told() -> None:
    recorder = reward_measures.RewardRecorder(Mean())
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    first = some_videos()
    second = first.flip(0)
    old = Mean().score(first, prompts, fps=8.0)
    for video in (first, second):
        result = result_of(old, video, torch.zeros(2, 2))
        found = score_measures.answers(recorder, old, result, fps=8.0)
    assert found["late_gap"] == 0
    assert found["as_before"] == 1
    assert found["alone_gap"] > 0


def test_default_is_the_one_value_of_scores_that_differ() -> None:
    video = some_videos()
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    value_B = Mean().score(video, prompts, fps=8.0).value_B
    # the videos at even places are scored alone
    value_B[2] = 0.5
    recorder = reward_measures.RewardRecorder(Mean())
    result = result_of(Score(value_B), video, torch.zeros(2, 2))
    found = score_measures.answers(recorder, Score(value_B), result, fps=8.0)
    assert (found["differ"], found["compared"], found["default"]) == (1, 2, 0.5)


def test_negated_scores_are_told_from_the_reward_itself() -> None:
    video = some_videos()
    right = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    score = Mean().score(video, right, fps=8.0)
    negated = Score(-score.value_B)
    for recorded, alone, turned in ((score, 0.0, 1.0), (negated, 1.0, 0.0)):
        result = result_of(recorded, video, torch.zeros(2, 2))
        found = score_measures.answers(
            reward_measures.RewardRecorder(Mean()), recorded, result, fps=8.0
        )
        assert (found["alone_gap"] > 0.1) == bool(alone)
        assert (found["turned_gap"] > 0.1) == bool(turned)
        # red loses its 100, cats gain them
        assert found["wrong_prompt/fell"] == found["wrong_prompt/rose"] == 2


def test_sign_of_advantages_is_their_correlation_with_the_rewards() -> None:
    score = Score(torch.tensor([0.0, 1.0, 2.0, 5.0]))
    centred = torch.tensor([[-0.5, 0.5], [-1.5, 1.5]])
    for sign in (1, -1):
        found = score_measures.advantage_sign(
            {"mean": score}, {"mean": 1.0}, sign * centred
        )
        assert found == pytest.approx(sign)
    assert math.isnan(
        score_measures.advantage_sign({"mean": score}, {"mean": 1.0}, 0 * centred)
    )


def test_shares_at_the_ends_of_the_scores() -> None:
    score = Score(torch.tensor([1.0, 1.0, 1.0, 0.5, math.nan]))
    found = score_measures.shape_of_scores(score)
    assert (found["at_max"], found["at_min"]) == (0.75, 0.25)
    assert found["unscored"] == pytest.approx(0.2)


def test_gain_has_the_sign_of_a_step_along_the_loss(generator: WanGenerator) -> None:
    """A small step down the loss makes rewarded members more likely, a step up less."""
    from common import gaussian

    (group,) = generator.rollout(PROMPTS[:1], group_size=2, seeds=[4])
    advantage_PM = torch.tensor([[1.0, -1.0]])
    step = group.steps[0]
    weights = list(update_measures.trained(generator.module).values())
    before = [weight.detach().clone() for weight in weights]
    policy = generator.transition(group.prompt, step)
    loss = -(advantage_PM[0] * gaussian.log_prob(policy, step.next_GCFHW)).mean()
    slopes = torch.autograd.grad(loss, weights)
    cfg = GrpoConfig(group_size=2)
    for direction in (1, -1):
        with torch.no_grad():
            for weight, old, slope in zip(weights, before, slopes, strict=True):
                weight.copy_(old - direction * slope)
        found = loss_measures.gain(generator, cfg, [group], advantage_PM)
        assert found["update/gain"] * direction > 0.5
    with torch.no_grad():
        for weight, old in zip(weights, before, strict=True):
            weight.copy_(old)


def test_recorded_gradient_has_the_norm_of_autograd() -> None:
    module = torch.nn.Linear(3, 1, bias=False)
    recorder = update_measures.GradientRecorder(module)
    recorder.start()
    # two backwards of x = (1, 2, 2): the gradient is 2 x, of norm 6
    for _ in range(2):
        module(torch.tensor([[1.0, 2.0, 2.0]])).sum().backward()
    assert recorder.norm() == pytest.approx(6.0)
    recorder.close()
    module.weight.grad = None


def test_moved_weights_are_measured_in_learning_rates() -> None:
    module = torch.nn.Linear(4, 1, bias=False)
    recorder = update_measures.WeightRecorder(module)
    with torch.no_grad():
        module.weight += 0.02
    found = recorder.look({}, rate=0.01)
    assert found["weights/moved"] == pytest.approx(0.02, rel=1e-4)
    assert found["weights/moved_per_rate"] == pytest.approx(2.0, rel=1e-4)
    assert recorder.look({}, rate=0.01)["weights/moved"] == 0


def test_matrix_that_has_a_gradient_and_stays_is_counted() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    recorder = update_measures.WeightRecorder(module)
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    gradients = {name: torch.ones(2) for name in names}
    # a gradient of 0 moves nothing, rightly
    gradients["1.bias"] = torch.zeros(2)
    with torch.no_grad():
        module[0].weight += 1
        module[0].bias += 1
    found = recorder.look(gradients, rate=1.0)
    assert found["weights/still"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("policy", "kl", "share", "factor"),
    [(1, 1, 1, 1), (-1, 1, -1, -1), (1, -1, 1, -1), (1, 0, 1, 0), (0.25, 0.5, 1, 2)],
)
def test_gradient_is_taken_apart_into_the_terms_of_the_loss(
    generator: WanGenerator, policy: float, kl: float, share: float, factor: float
) -> None:
    """The factors of the loss's own two terms are found, whatever they are."""
    cfg = GrpoConfig(group_size=2, kl_weight=0.05)
    advantage_G = torch.tensor([1.0, -1.0])
    (group,) = generator.rollout(PROMPTS[:1], group_size=2, seeds=[4])
    (weights,) = weights_of_steps(group.steps, form=cfg.reweight, normalize=False)
    # the loss of the product, with other factors
    step = group.steps[0]
    update = PolicyUpdate(cfg, generator=generator, engine=None)
    with_kl = update.loss(group.prompt, step, advantage_G, weights).loss
    update.cfg = replace(cfg, kl_weight=0.0)
    without = update.loss(group.prompt, step, advantage_G, weights).loss
    loss = policy * without + kl * (with_kl - without)
    parameters = update_measures.trained(generator.module)
    slopes = torch.autograd.grad(loss, list(parameters.values()))
    found = loss_measures.loss_terms(
        generator,
        generator.module,
        cfg,
        group,
        advantage_G,
        weights,
        dict(zip(parameters, slopes, strict=True)),
    )
    assert found["loss/rest"] < 1e-3
    assert math.copysign(1, found["loss/policy"]) == share
    assert found["loss/kl_factor"] == pytest.approx(factor, abs=1e-2)


def test_gradient_of_other_advantages_is_not_explained(generator: WanGenerator) -> None:
    cfg = GrpoConfig(group_size=2, kl_weight=0.0)
    ours, other = generator.rollout(PROMPTS, group_size=2, seeds=[4, 5])
    (weights,) = weights_of_steps(ours.steps, form=cfg.reweight, normalize=False)
    update = PolicyUpdate(cfg, generator=generator, engine=None)
    advantage_G = torch.tensor([1.0, -1.0])
    loss = update.loss(other.prompt, other.steps[0], advantage_G, weights).loss
    parameters = update_measures.trained(generator.module)
    slopes = torch.autograd.grad(loss, list(parameters.values()))
    found = loss_measures.loss_terms(
        generator,
        generator.module,
        cfg,
        ours,
        advantage_G,
        weights,
        dict(zip(parameters, slopes, strict=True)),
    )
    assert found["loss/rest"] > 0.3


def test_average_that_went_half_of_the_way_is_told() -> None:
    start = {"w": torch.zeros(2)}
    now = {"w": torch.tensor([3.0, 4.0])}
    found = update_measures.follows({"w": torch.tensor([1.5, 2.0])}, start, now)
    assert found["ema/came"] == pytest.approx(0.5)


def test_weights_put_back_for_a_measurement_are_those_of_now_afterwards() -> None:
    module = torch.nn.Linear(2, 2)
    recorder = update_measures.WeightRecorder(module)
    old = recorder.before
    with torch.no_grad():
        module.weight += 1
    now = module.weight.detach().clone()
    with recorder.put_back(old):
        assert torch.equal(module.weight, old["weight"])
    assert torch.equal(module.weight, now)


def test_samples_that_occur_twice_are_counted(generator: WanGenerator) -> None:
    one, other = generator.rollout(PROMPTS, group_size=2, seeds=[4, 5])
    found, seen = batch_measures.samples([one, other], set())
    assert (found["samples/twins"], found["samples/as_before"]) == (0, 0)
    # three of four samples are another's copy
    copy = replace(one, clean_GCFHW=one.clean_GCFHW[:1].expand(2, -1, -1, -1, -1))
    found, _ = batch_measures.samples([copy, copy], seen)
    assert (found["samples/twins"], found["samples/as_before"]) == (0.75, 0.25)
    assert found["samples/apart"] == 0


def test_prompts_and_seeds_that_repeat_are_counted() -> None:
    batch = PromptBatch(("a", "a", "b", "c"), (1, 2, 3, 3))
    found = batch_measures.repeats(batch, batch, ["a", "b", "c", "d", "e"])
    assert found["batch/repeated"] == 0.25
    assert found["batch/prompts"] == 0.75
    assert (found["batch/as_before"], found["batch/prompts_as_before"]) == (1, 1)


def test_tiny_folder_has_no_measurements_of_its_own(tmp_path: Path) -> None:
    from launch.diagnosis.run_files import rows_of

    assert rows_of(tmp_path / "measurements.jsonl") == []
