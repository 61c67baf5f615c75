"""Reward models of several dimensions: K query tokens, K rows of the head, K labels."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import logsigmoid, softplus

from rm.calibration import Calibration
from rm.cold_start import ColdStart
from rm.config import ColdStartConfig, Generation, Masking, RewardDimension
from rm.data import Pair, PairSchedule, read_pairs
from rm.generate import generate, rewards_from_cache
from rm.losses import counted, preference_loss
from rm.model import DESCORE_FILE, DeScore
from rm.packed import PackedCot, pack, packed_forward
from rm.prompt import Encoded
from rm.scorer import DeScoreScorer
from rm.video import prepare
from tests.rm import test_dual_rl
from tests.rm.test_cold_start import RATES, PlainEngine
from tests.tiny_qwen import (
    SETTINGS,
    TEMPLATE,
    random_frames,
    speak_plainly,
    tiny_qwen,
    tiny_tokenizer,
)

THREE = {
    "VQ": RewardDimension(weight=1.0),
    "MQ": RewardDimension(weight=-0.5),
    "TA": RewardDimension(weight=2.0),
}


def judge_of(dimensions=None, generation=None) -> DeScore:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = DeScore(
            tiny_qwen(layers=2),
            tiny_tokenizer(),
            TEMPLATE,
            SETTINGS,
            264,
            generation,
            dimensions,
        )
        torch.manual_seed(2)
        model.query.data += 0.3 * torch.randn(
            model.query.shape
        )  # as after training: no two alike
    speak_plainly(model.backbone)
    return model.eval()


@pytest.fixture(scope="module")
def pairs(cold_start_pairs) -> list[Pair]:
    return cold_start_pairs


@pytest.fixture(scope="module")
def three() -> DeScore:
    return judge_of(THREE)


@pytest.fixture(scope="module")
def videos():
    return [
        prepare(random_frames(i, frames=4 + i), SETTINGS, fps=4.0) for i in range(3)
    ]


@torch.no_grad()
def test_scoring_training_and_packing_give_the_same_rewards(three, videos) -> None:
    encoded = [
        three.encode(prompt, video)
        for prompt, video in zip(("a", "two cats", "x" * 30), videos, strict=True)
    ]
    how = Generation(max_new_tokens=9, temperature=2.0, repetition_penalty=1.0)
    chains = generate(
        three, three.batch(encoded, videos, query=False), how, seeds=range(3)
    )
    lengths = chains.length_B.tolist()
    assert len(set(lengths)) > 1
    sequences = [
        Encoded(item.prompt_ids, tuple(chains.ids(row)))
        for row, item in enumerate(encoded)
    ]
    whole_BK = three(three.batch(sequences, videos))
    assert whole_BK.shape == (3, 3)
    assert whole_BK.std(1).min() > 1e-4
    packed = pack(
        three,
        encoded,
        videos,
        [[PackedCot(tuple(chains.ids(row)), finished=False)] * 2 for row in range(3)],
    )
    packed_BGK = packed_forward(three, packed, temperature=1.0).reward_BGK
    for g in range(2):
        torch.testing.assert_close(packed_BGK[:, g], whole_BK, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        rewards_from_cache(three, chains), whole_BK, atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_query_does_not_change_earlier_rewards(three, videos) -> None:
    """Attention is causal: the first of three queries equals a single query."""
    one = judge_of({"VQ": RewardDimension()})
    one.query.data, one.head.weight.data = (
        three.query.data[:1],
        three.head.weight.data[:1],
    )
    encoded = [one.encode("a", video, "abc") for video in videos]
    first = three(three.batch(encoded, videos))[:, :1]
    torch.testing.assert_close(
        one(one.batch(encoded, videos)), first, atol=1e-6, rtol=0
    )


@torch.no_grad()
def test_each_query_has_a_separate_embedding(three) -> None:
    rows = three.backbone.get_input_embeddings()
    got = rows(torch.tensor([[265, 7, 264, 266, 267]]))[0]
    assert torch.equal(got[[2, 0, 3]], three.query)
    assert torch.equal(got[[1, 4]], rows.weight[[7, 267]])
    assert three.banned_ids()[264:267].all()


def test_the_loss_by_hand() -> None:
    reward_N2K = torch.tensor(
        [[[1.0, 0.0], [0.0, 3.0]], [[2.0, 1.0], [5.0, 1.5]], [[0.0, 4.0], [0.5, 1.0]]]
    )
    label_NK = torch.tensor([[1.0, math.nan], [-1.0, 0.0], [0.0, 1.0]])
    # first: A by 1, B by 3, a tie; second: unknown, a tie, A by 3
    first, second = (
        (softplus(torch.tensor(-1.0)) + softplus(torch.tensor(-3.0))) / 2,
        softplus(torch.tensor(-3.0)),
    )
    loss = preference_loss(reward_N2K, label_NK, weight_K=(2.0, 0.25), count_K=(2, 1))
    assert loss.item() == pytest.approx((2.0 * first + 0.25 * second).item(), abs=1e-6)
    assert counted(label_NK, theta=None).tolist() == [2, 1]
    assert counted(label_NK, theta=5.0).tolist() == [3, 2]
    parts = [
        preference_loss(
            reward_N2K[i : i + 1],
            label_NK[i : i + 1],
            weight_K=(2.0, 0.25),
            count_K=(2, 1),
        )
        for i in range(3)
    ]
    assert sum(parts).item() == pytest.approx(loss.item(), abs=1e-6)


def test_batch_without_labels_has_zero_loss() -> None:
    reward = torch.randn(2, 2, 1, requires_grad=True)
    loss = preference_loss(
        reward, torch.full((2, 1), math.nan), weight_K=(1.0,), count_K=(1,)
    )
    loss.backward()
    assert loss.item() == 0.0
    assert reward.grad.abs().max() == 0.0


def loop_of(pairs, dimensions, **changes) -> ColdStart:
    cfg = ColdStartConfig(
        pairs_per_step=len(pairs),
        micro_batch=len(pairs),
        masking=Masking(1.0),
        **changes,
    )
    model = judge_of(dimensions)
    engine = PlainEngine(
        model.param_groups(RATES, lora=None, weight_decay=0.0),
        1,
    )
    schedule = PairSchedule(len(pairs), pairs_per_step=cfg.pairs_per_step, seed=0)
    return ColdStart(
        cfg, model=model, engine=engine, pairs=pairs, schedule=schedule, seed=0
    )


def test_dimensions_learn_opposite_orders_from_opposite_labels(pairs) -> None:
    """One body, two heads: what pleases the eye and what follows the text need not agree."""
    told = [
        replace(pair, labels={"VQ": pair.label, "TA": -pair.label}) for pair in pairs
    ]
    loop = loop_of(
        told, {"VQ": RewardDimension(weight=1.0), "TA": RewardDimension(weight=0.0)}
    )
    for step in range(12):
        last = loop.step(step)
    found = loop.evaluate(told)
    assert (found["heldout/accuracy/VQ"], found["heldout/accuracy/TA"]) == (1.0, 1.0)
    assert (
        found["heldout/accuracy"] == 1.0
    )  # the weights say VQ, which is how these people decided overall
    assert last["train/loss"] < 0.6  # of 2 ln 2 at the start
    loop.model.dimensions = {
        "VQ": RewardDimension(weight=0.0),
        "TA": RewardDimension(weight=1.0),
    }
    assert loop.evaluate(told)["heldout/accuracy"] == 0.0


def test_unlabelled_dimension_does_not_change_its_head(pairs) -> None:
    told = [replace(pair, labels={"TA": pair.label}) for pair in pairs]
    loop = loop_of(told, {"VQ": RewardDimension(), "TA": RewardDimension()})
    before = loop.model.head.weight.detach().clone()
    loop.step(0)
    change = (loop.model.head.weight - before).abs().amax(1)
    assert change[0] == 0.0
    assert change[1] > 1e-4


def test_loss_weight_scales_the_term(pairs) -> None:
    told = [
        replace(pair, labels={"VQ": pair.label, "TA": pair.label}) for pair in pairs
    ]
    both = loop_of(told, {"VQ": RewardDimension(), "TA": RewardDimension()}).step(0)[
        "train/loss"
    ]
    alone = loop_of(
        told, {"VQ": RewardDimension(), "TA": RewardDimension(loss_weight=0.0)}
    ).step(0)["train/loss"]
    half = loop_of(
        told, {"VQ": RewardDimension(), "TA": RewardDimension(loss_weight=0.5)}
    ).step(0)["train/loss"]
    assert half == pytest.approx((both + alone) / 2, abs=1e-6)


def test_single_dimension_uses_its_label(pairs) -> None:
    told = [replace(pair, labels={"TA": -pair.label}) for pair in pairs]
    loop = loop_of(told, {"TA": RewardDimension()})
    for step in range(8):
        last = loop.step(step)
    assert last["train/accuracy"] == loop.evaluate(told)["heldout/accuracy"] == 1.0


def test_stage_2_trains_all_dimensions(pairs) -> None:
    truth = {"subject": 2, "dynamics": 0}
    told = [
        replace(
            pair,
            scores_A=truth,
            scores_B={"subject": 0, "dynamics": 2},
            labels={"VQ": pair.label},
        )
        for pair in pairs
    ]
    loop = test_dual_rl.build(told, bt_weight=1.0, kl_weight=0.0)
    wide = judge_of(
        {"VQ": RewardDimension(), "subject": RewardDimension(loss_weight=3.0)}
    )
    loop.model = wide
    loop.engine = PlainEngine(wide.param_groups(RATES, lora=None, weight_decay=0.0), 1)
    rollouts = test_dual_rl.collect(loop, [0, 1, 2, 3], step=0)
    with torch.no_grad():
        reward_BGK = packed_forward(wide, rollouts.packed, temperature=1.0).reward_BGK
    margin_N_GK = reward_BGK[0::2] - reward_BGK[1::2]  # (pair, rollout, dimension)
    label_N = torch.tensor([pair.label for pair in told])
    vq = -logsigmoid(margin_N_GK[..., 0] * label_N.view(-1, 1)).mean()
    subject = -logsigmoid(
        margin_N_GK[..., 1]
    ).mean()  # A's subject is right in every pair
    assert loop.update([rollouts])["train/bt"] == pytest.approx(
        (vq + 3.0 * subject).item(), abs=1e-5
    )


def test_a_folder_keeps_its_dimensions(three, videos, tmp_path) -> None:
    three.save(tmp_path)
    again = DeScore.load(tmp_path)
    assert again.dimensions == THREE
    assert DeScore.dimensions_in(tmp_path) == ["VQ", "MQ", "TA"]
    assert again.query.shape == (3, 32)
    encoded = [three.encode("a", video, "abc") for video in videos]
    with torch.no_grad():
        assert torch.equal(
            again(again.batch(encoded, videos)),
            judge_of(THREE)(three.batch(encoded, videos)),
        )


def test_folder_without_dimensions_has_overall_reward(
    tmp_path,
) -> None:
    judge_of().save(tmp_path)
    record = json.loads((tmp_path / DESCORE_FILE).read_text())
    assert record.pop("dimensions") == {"overall": {"weight": 1.0, "loss_weight": 1.0}}
    (tmp_path / DESCORE_FILE).write_text(json.dumps(record))
    assert (
        list(DeScore.load(tmp_path).dimensions)
        == DeScore.dimensions_in(tmp_path)
        == ["overall"]
    )


def test_unreadable_calibration_raises(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"descore\.json"):
        DeScore.dimensions_in(tmp_path)


def test_the_score_is_the_weighted_sum_and_calibration_comes_first() -> None:
    how = Generation(max_new_tokens=80, temperature=2.0, repetition_penalty=1.0)
    model = judge_of(THREE, how)
    frames, prompts = (
        torch.stack([random_frames(i) for i in range(4)]),
        ["a", "b", "c", "d"],
    )
    raw = DeScoreScorer(model).score(frames, prompts, fps=4.0)
    parts = torch.stack([raw.parts[f"reward.{name}"] for name in THREE], 1)
    assert raw.value_B.isfinite().all()
    torch.testing.assert_close(
        raw.value_B,
        parts[:, 0] - 0.5 * parts[:, 1] + 2.0 * parts[:, 2],
        atol=1e-6,
        rtol=0,
    )

    found = Calibration.of(
        {name: parts[:, k].tolist() for k, name in enumerate(THREE)}, cots=1
    )
    ready = DeScoreScorer(model, calibration=found).score(frames, prompts, fps=4.0)
    z = torch.stack([ready.parts[f"reward.{name}"] for name in THREE], 1)
    torch.testing.assert_close(z.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        ready.value_B, z[:, 0] - 0.5 * z[:, 1] + 2.0 * z[:, 2], atol=1e-5, rtol=0
    )
    with pytest.raises(ValueError, match="cots=0"):
        DeScoreScorer(model, cots=0, calibration=found)
    with pytest.raises(ValueError, match="VQ"):
        DeScoreScorer(judge_of(), calibration=found)


def test_calibration_by_hand(tmp_path) -> None:
    found = Calibration.of({"overall": [1.0, None, 3.0, math.nan, 8.0]}, cots=1)
    assert (found.mean["overall"], found.videos) == (4.0, 3)
    assert found.std["overall"] == pytest.approx(math.sqrt((9 + 1 + 16) / 3))
    found.save(tmp_path)
    assert Calibration.load(tmp_path) == found
    with pytest.raises(ValueError, match="overall"):
        Calibration.of({"overall": [None]}, cots=1)
    with pytest.raises(ValueError, match="std"):
        Calibration.of({"overall": [2.0, 2.0]}, cots=1)
    with pytest.raises(FileNotFoundError, match=r"calibrate\.py"):
        Calibration.load(tmp_path / "nothing")


def test_labels_come_from_columns_answers_and_the_preference(tmp_path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.mp4").write_bytes(b"")
    scores = (
        '"video_1_scores": {"subject": 2, "style": "N/A"}, '
        '"video_2_scores": {"subject": "1", "style": 2}'
    )
    with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["videos", "prompt", "GSB", "answer", "VQ"])
        writer.writerow(
            ["['a.mp4', 'b.mp4']", "p", "B", f"<answer>{{{scores}}}</answer>", "same"]
        )
        writer.writerow(["['a.mp4', 'b.mp4']", "p", "A", "", "invalid"])
    names = ["overall", "subject", "style", "VQ"]
    first, second = read_pairs(
        tmp_path / "t.csv", require_cot=False, dimensions=names
    ).pairs
    assert [first.label_in(name) for name in names[:2]] == [-1.0, 1.0]
    assert math.isnan(first.label_in("style"))
    assert first.label_in("VQ") == 0.0
    assert second.label_in("overall") == 1.0
    assert [math.isnan(second.label_in(name)) for name in names] == [
        False,
        True,
        True,
        True,
    ]
    with pytest.raises(ValueError, match="MQ"):
        read_pairs(tmp_path / "t.csv", require_cot=False, dimensions=["MQ"])
    assert isinstance(first, Pair)
