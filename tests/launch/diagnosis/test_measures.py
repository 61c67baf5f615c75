"""Measurements of a generator, of rewards and of an update, on a tiny random Wan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from alignment.config import GrpoConfig
from alignment.grpo import StepResult
from alignment.prompts import PromptBatch
from alignment.rewards.errors import NamedReward
from common.types import Score
from generator.config import GeneratorConfig, LoraConfig, SamplerConfig
from generator.wan import WanGenerator
from launch.diagnosis import generator_measures, reward_measures, update_measures
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


def test_negated_scores_are_told_from_the_reward_itself() -> None:
    video = some_videos()
    right = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    score = Mean().score(video, right, fps=8.0)
    negated = Score(-score.value_B)
    for recorded, alone, turned in ((score, 0.0, 1.0), (negated, 1.0, 0.0)):
        result = result_of(recorded, video, torch.zeros(2, 2))
        found = reward_measures.answers(
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
        found = reward_measures.advantage_sign(
            {"mean": score}, {"mean": 1.0}, sign * centred
        )
        assert found == pytest.approx(sign)
    assert math.isnan(
        reward_measures.advantage_sign({"mean": score}, {"mean": 1.0}, 0 * centred)
    )


def test_shares_at_the_ends_of_the_scores() -> None:
    score = Score(torch.tensor([1.0, 1.0, 1.0, 0.5, math.nan]))
    found = reward_measures.shape_of_scores(score)
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
        found = update_measures.gain(generator, cfg, [group], advantage_PM)
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


def test_tiny_folder_has_no_measurements_of_its_own(tmp_path: Path) -> None:
    from launch.diagnosis.run_files import rows_of

    assert rows_of(tmp_path / "measurements.jsonl") == []
