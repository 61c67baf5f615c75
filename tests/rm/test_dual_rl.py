"""Stage 2 on a random Qwen3-VL: numbers by hand, and tests of the official defects."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import logsigmoid

import rm.cot_rollout
import rm.dual_rl
from common.lora import adapters_off
from rm.config import BackboneLora, DualRlConfig, Generation, LearningRates
from rm.data import Pair, PairSchedule
from rm.dual_rl import DualRl
from rm.metrics import heldout_metrics
from rm.model import DeScore
from rm.packed import packed_forward
from rm.prompt import Encoded
from rm.scorer import DeScoreScorer
from rm.text_rewards import RuleReward, RuleRewardConfig
from rm.video import prepare
from tests.rm.test_cold_start import PlainEngine
from tests.tiny_qwen import (
    SETTINGS,
    TEMPLATE,
    speak_plainly,
    tiny_qwen,
    tiny_tokenizer,
)

RATES = LearningRates(llm=3e-3, vision=0.0, merger=0.0, query=1e-3, head=1e-2)
LENGTH_ONLY = RuleRewardConfig(
    length_low=0, length_high=12
)  # a random model writes no answers, but chains of a length
SCORES = {"subject": 2, "dynamics": 0}
G = 4


@pytest.fixture(scope="module")
def pairs(dual_rl_pairs) -> list[Pair]:
    return dual_rl_pairs


def build(pairs, *, lora=True, rates=RATES, **changes) -> DualRl:
    options = {
        "pairs_per_step": 4,
        "pairs_per_update": 4,
        "micro_batch": 4,
        "group_size": G,
        "max_new_tokens": 12,
        "kl_weight": 0.1,
        "bt_weight": 0.5,
        "weight_decay": 0.0,
    }
    cfg = DualRlConfig(**{**options, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = DeScore(tiny_qwen(), tiny_tokenizer(), TEMPLATE, SETTINGS, query_id=264)
        speak_plainly(model.backbone)
        adapters = BackboneLora(rank=4, alpha=8.0, dropout=0.0) if lora else None
        groups = model.param_groups(rates, lora=adapters, weight_decay=0.0)
    engine = PlainEngine(groups, cfg.pairs_per_update // cfg.micro_batch)
    schedule = PairSchedule(len(pairs), pairs_per_step=cfg.pairs_per_step, seed=0)
    return DualRl(
        cfg,
        rules=LENGTH_ONLY,
        model=model,
        engine=engine,
        pairs=pairs,
        schedule=schedule,
        seed=0,
    )


def collect(loop: DualRl, rows, step: int) -> rm.cot_rollout.Rollouts:
    """Sample and reward some pairs without any other pair."""
    return loop.rollouts(loop.sample(rows, step))


def chains_of(rollouts: rm.cot_rollout.Rollouts) -> list[list[list[list[int]]]]:
    """[pair][side][rollout] -> tokens, end included, as the packed sequences hold them."""
    packed = rollouts.packed
    flat = [
        [target[mask].tolist() for target, mask in zip(row, masks, strict=True)]
        for row, masks in zip(packed.target_BGT, packed.token_BGT, strict=True)
    ]
    return [[flat[2 * n], flat[2 * n + 1]] for n in range(len(flat) // 2)]


def test_defect_1_every_sequence_gets_its_own_reward(pairs, monkeypatch) -> None:
    """Rewards come from the text; each sequence is multiplied with its advantage."""

    def letters(text: str, truth, *, tokens: int, how) -> RuleReward:
        value = float(sum((ord(c) * (i + 1)) % 17 for i, c in enumerate(text)))
        return RuleReward(value, 0.0, 0.0, 0.0)

    monkeypatch.setattr(rm.cot_rollout, "rule_reward", letters)
    loop = build(pairs)
    rollouts = collect(loop, [2, 0, 3], step=5)
    decode = loop.model.tokenizer.decode
    for n, pair in enumerate(chains_of(rollouts)):
        for side, group in enumerate(pair):
            texts = [
                decode([t for t in chain if t != loop.model.end_id]) for chain in group
            ]
            reward_G = torch.tensor(
                [letters(text, {}, tokens=0, how=None).total for text in texts]
            )
            expected = (reward_G - reward_G.mean()) / (
                reward_G.std(correction=0) + 1e-6
            )
            torch.testing.assert_close(
                rollouts.advantage_VG[2 * n + side], expected, rtol=0, atol=1e-5
            )
            assert expected.abs().max() > 0.1  # otherwise nothing was compared


def test_advantages_of_8_cots_are_divided_by_the_chosen_std(pairs, monkeypatch) -> None:
    """One CoT of eight gets 8, the others 0.

    The mean is 1, the squares are 7 * 1 + 49 = 56: std sqrt(56 / 8) of the population,
    sqrt(56 / 7) of the sample. The release takes the latter: 1.069 times less.
    """
    rewards = iter([8.0, 0, 0, 0, 0, 0, 0, 0] * 4)

    def listed(text: str, truth, *, tokens: int, how) -> RuleReward:
        return RuleReward(next(rewards), 0.0, 0.0, 0.0)

    monkeypatch.setattr(rm.cot_rollout, "rule_reward", listed)
    found = {}
    for std in ("population", "sample"):
        loop = build(pairs, group_size=8, advantage_std=std)
        found[std] = collect(loop, [0], step=0).advantage_VG[0].tolist()
    assert found["population"] == pytest.approx([7 / 7**0.5, *[-1 / 7**0.5] * 7])
    assert found["sample"] == pytest.approx([7 / 8**0.5, *[-1 / 8**0.5] * 7])
    assert found["population"][0] / found["sample"][0] == pytest.approx(1.069, abs=1e-4)


def test_group_has_cots_of_a_single_video_with_its_scores(pairs, monkeypatch) -> None:
    seen = []

    def note(text: str, truth, *, tokens: int, how) -> RuleReward:
        seen.append(truth["subject"])
        return RuleReward(0.0, 0.0, 0.0, 0.0)

    monkeypatch.setattr(rm.cot_rollout, "rule_reward", note)
    told = [
        replace(p, scores_A={"subject": 2 * i}, scores_B={"subject": 2 * i + 1})
        for i, p in enumerate(pairs)
    ]
    collect(build(told), [1, 3], step=0)
    assert seen == [2] * G + [3] * G + [6] * G + [7] * G


def test_the_generative_baseline_is_rewarded_by_the_preference_alone(
    pairs, monkeypatch
) -> None:
    def said(text: str, truth, *, tokens: int, how) -> RuleReward:
        return RuleReward(0.0, 0.0, 0.0, 0.0, overall=float(len(text)))

    monkeypatch.setattr(rm.cot_rollout, "rule_reward", said)
    loop = build(pairs, bt_weight=0.0)
    loop.rules = RuleRewardConfig(quality=0.0, format=0.0, length=0.0, preference=2.0)
    rollouts = collect(loop, [0, 1], step=0)
    for n, label in enumerate((1, -1)):
        groups = rollouts.rules[2 * n : 2 * n + 2]
        of_A, of_B = ([rule.overall for rule in group] for group in groups)
        better, worse = (of_A, of_B) if label == 1 else (of_B, of_A)
        want = [2.0 * sum(x > y for y in worse) / G for x in better]
        assert [rule.total for rule in groups[0 if label == 1 else 1]] == want


def test_the_losses_by_hand(pairs) -> None:
    loop = build(pairs)
    rollouts = collect(loop, [0, 1, 2, 3], step=0)
    found = loop.update([rollouts])
    # a ratio of one: the policy loss is minus the token mean of the advantages
    lengths_VG = rollouts.packed.token_BGT.sum(-1)
    expected = -(rollouts.advantage_VG * lengths_VG).sum() / lengths_VG.sum()
    assert found["train/policy"] == pytest.approx(expected.item(), abs=1e-5)
    assert found["train/ratio_mean"] == 1.0
    assert found["train/kl"] == pytest.approx(0.0, abs=1e-9)  # new adapters are silent
    # Bradley-Terry over all rollouts i, each chain scored alone by a model of the same weights
    fresh, rewards = build(pairs).model, []
    for n, pair in enumerate(chains_of(rollouts)):
        for side, group in enumerate(pair):
            path = (pairs[n].video_A, pairs[n].video_B)[side]
            video = prepare(path, SETTINGS)
            prompt = fresh.encode(pairs[n].prompt, video).prompt_ids
            for chain in group:
                ids = tuple(t for t in chain if t != fresh.end_id)
                rewards.append(
                    fresh(fresh.batch([Encoded(prompt, ids)], [video])).item()
                )
    reward_N2G = torch.tensor(rewards).view(-1, 2, G)
    margin_NG = (reward_N2G[:, 0] - reward_N2G[:, 1]) * torch.tensor(
        [1, -1, 1, -1]
    ).view(-1, 1)
    assert found["train/bt"] == pytest.approx(
        -logsigmoid(margin_NG).mean().item(), abs=1e-5
    )
    assert found["train/accuracy"] == pytest.approx(
        (margin_NG > 0).float().mean().item()
    )
    total = found["train/policy"] + 0.1 * found["train/kl"] + 0.5 * found["train/bt"]
    assert found["train/loss"] == pytest.approx(total, abs=1e-5)


def test_defect_6_error_in_preference_loss_is_raised(pairs, monkeypatch) -> None:
    def broken(*args, **options):
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(rm.dual_rl, "preference_loss", broken)
    with pytest.raises(ZeroDivisionError, match="purpose"):
        build(pairs).step(0)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_defect_7_the_weights_of_the_objectives_do_not_depend_on_micro_batches(
    pairs, micro_batch
) -> None:
    whole, parts = build(pairs), build(pairs, micro_batch=micro_batch)
    one, other = whole.step(0), parts.step(0)
    for name in ("loss", "policy", "kl", "bt", "accuracy"):
        assert one[f"train/{name}"] == pytest.approx(other[f"train/{name}"], abs=1e-5)
    assert parts.engine.calls == 4 // micro_batch
    for a, b in zip(whole.engine.gradients[0], parts.engine.gradients[0], strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)


def test_smaller_packs_give_equal_updates(pairs) -> None:
    whole, parts = build(pairs), build(pairs, cots_per_row=2)
    one, other = whole.step(0), parts.step(0)
    assert {k: v for k, v in one.items() if "seconds" not in k} == pytest.approx(
        {k: v for k, v in other.items() if "seconds" not in k}, abs=1e-5
    )
    for a, b in zip(whole.engine.gradients[0], parts.engine.gradients[0], strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)
    with pytest.raises(ValueError, match="cots_per_row=3"):
        build(pairs, cots_per_row=3)


def test_ties_reward_chains_and_do_not_dilute_the_preference(pairs) -> None:
    tied = [*pairs[:3], replace(pairs[3], label=0)]
    loop = build(tied, micro_batch=1)
    found = [collect(loop, [row], step=0) for row in range(4)]
    mixed = loop.update(found)
    fresh = build(tied, micro_batch=3, pairs_per_update=3, pairs_per_step=3)
    plain = fresh.update([collect(fresh, [0, 1, 2], step=0)])
    assert mixed["train/bt"] == pytest.approx(plain["train/bt"], abs=1e-5)
    assert found[3].advantage_VG.abs().sum() > 0


def test_defect_11_every_chain_ends_in_its_query_finished_or_not(pairs) -> None:
    loop = build(pairs, max_new_tokens=3)
    rollouts = collect(loop, [0, 1, 2, 3], step=0)
    ids_BL, query_BG = rollouts.packed.batch.ids_BL, rollouts.packed.query_BG
    assert not rollouts.finished_VG.all()
    assert (ids_BL.gather(1, query_BG) == loop.model.query_id).all()
    assert ((ids_BL == loop.model.query_id).sum(1) == G).all()
    ended = (rollouts.packed.target_BGT == loop.model.end_id).sum(-1).bool()
    assert torch.equal(ended & rollouts.packed.token_BGT.any(-1), rollouts.finished_VG)


def test_the_reference_is_the_frozen_first_stage(pairs) -> None:
    loop = build(pairs)
    rollouts = collect(loop, [0, 1], step=0)
    before = loop.log_probs(loop.model, rollouts.packed).detach()
    for step in range(3):
        loop.step(step)
    after = loop.log_probs(loop.model, rollouts.packed).detach()
    torch.testing.assert_close(
        loop.reference_log_probs(rollouts.packed).detach(), before, rtol=0, atol=1e-5
    )
    assert (after - before).abs().max() > 1e-2
    assert loop.step(3)["train/kl"] > 0


def test_reference_without_adapters_raises(pairs) -> None:
    with (
        pytest.raises(ValueError, match="adapter"),
        adapters_off(build(pairs, lora=False).model),
    ):
        pass
    with pytest.raises(ValueError, match="adapter"):
        build(pairs, lora=False).step(0)
    assert build(pairs, lora=False, kl_weight=0.0).step(0)["train/kl"] == 0.0


def test_several_updates_use_sampling_log_probs(
    pairs,
) -> None:
    loop = build(
        pairs, pairs_per_update=2, micro_batch=2, rates=replace(RATES, llm=3e-2)
    )
    updates = [
        [collect(loop, rows, 0) for rows in parts] for parts in loop.micro_batches(0)
    ]
    sampled = [part.old_BGT.clone() for parts in updates for part in parts]
    first, second = (loop.update(parts) for parts in updates)
    assert first["train/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    with torch.no_grad():
        part = updates[1][0]
        assert torch.equal(part.old_BGT, sampled[1])
        assert (
            packed_forward(loop.model, part.packed, temperature=1.0).log_prob_BGT
            - part.old_BGT
        ).abs().max() > 1e-3
    assert second["train/ratio_mean"] != pytest.approx(1.0, abs=1e-4)


def test_the_vision_tower_is_frozen_and_the_rest_learns(pairs) -> None:
    loop = build(pairs)
    before = {n: p.detach().clone() for n, p in loop.model.named_parameters()}
    for step in range(2):
        loop.step(step)
    moved = {
        n for n, p in loop.model.named_parameters() if not torch.equal(p, before[n])
    }
    assert moved
    assert all("lora_" in name or name in ("query", "head.weight") for name in moved)
    assert {"query", "head.weight"} <= moved


@pytest.mark.slow
def test_dual_rl_lengthens_cots_and_learns_preferences(pairs) -> None:
    loop = build(pairs, kl_weight=0.0)
    metrics = [loop.step(step) for step in range(16)]
    early = sum(m["reward/length"] for m in metrics[:4]) / 4
    late = sum(m["reward/length"] for m in metrics[-4:]) / 4
    assert late > early + 0.1
    assert metrics[-1]["train/bt"] < 0.5 * metrics[0]["train/bt"]


def test_dual_rl_step_depends_on_its_number_only(pairs) -> None:
    one, other = build(pairs), build(pairs)
    torch.manual_seed(99)
    first = one.step(3)
    torch.manual_seed(7)
    second = other.step(3)
    drop = {name for name in first if name.startswith("seconds")}
    assert {k: v for k, v in first.items() if k not in drop} == {
        k: v for k, v in second.items() if k not in drop
    }
    assert (
        collect(one, [0], 0).packed.target_BGT.tolist()
        != collect(one, [0], 1).packed.target_BGT.tolist()
    )


def test_heldout_pairs_are_scored_with_sampled_cots(pairs) -> None:
    loop = build(pairs, micro_batch=1)
    loop.model.generation = Generation(max_new_tokens=12, repetition_penalty=1.0)
    found = loop.evaluate(pairs[:3])
    assert found["heldout/quality"] == 0.0  # it writes no answers
    assert found["heldout/accuracy"] in (0.0, 1 / 3, 2 / 3, 1.0)
    assert found == loop.evaluate(pairs[:3])


def test_heldout_pair_with_an_unfinished_cot_has_no_margin(pairs, monkeypatch) -> None:
    """A limit that some CoTs reach: their pairs are wrong, as for `DeScoreScorer`."""
    loop = build(pairs, micro_batch=1)
    margins = []

    def noted(model, margin_NK, rows, **options):
        margins.append(margin_NK[:, 0])
        return heldout_metrics(model, margin_NK, rows, **options)

    monkeypatch.setattr(rm.dual_rl, "heldout_metrics", noted)
    decided = [replace(pair, label=1) for pair in pairs]
    how = Generation(max_new_tokens=8, repetition_penalty=1.2)
    loop.model.generation = how
    found = loop.evaluate(decided)
    missing = margins[0].isnan()
    assert 0 < found["heldout/unfinished"] == int(missing.sum()) < len(decided)
    assert found["heldout/accuracy"] == int((margins[0] > 0).sum()) / len(decided)

    # the scorer's second try ends at twice its limit
    loop.model.generation = replace(how, max_new_tokens=4)
    files = [file for pair in decided for file in (pair.video_A, pair.video_B)]
    prompts = [pair.prompt for pair in decided for _ in range(2)]
    value_N2 = DeScoreScorer(loop.model).score(files, prompts).value_B.view(-1, 2)
    assert torch.equal(value_N2.isnan().any(1), missing)
    margin_N = value_N2[:, 0] - value_N2[:, 1]
    torch.testing.assert_close(margin_N, margins[0], equal_nan=True, atol=1e-5, rtol=0)


def test_non_finite_dual_rl_loss_is_reported(pairs, capsys) -> None:
    loop = build(pairs)
    with torch.no_grad():
        loop.model.head.weight.fill_(math.nan)
    assert math.isnan(loop.step(0)["train/bt"])
    assert "bt nan" in capsys.readouterr().out


def test_updates_must_divide_a_step() -> None:
    with pytest.raises(ValueError, match="multiple"):
        DualRlConfig(pairs_per_step=6, pairs_per_update=4)
