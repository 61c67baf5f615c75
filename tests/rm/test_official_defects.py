"""Numbered defects of the official release that have no test elsewhere.

Each test fails when its defect is put back. Other defects: 1, 6, 7, 11 in test_dual_rl.py;
2, 3, 9, 14 in tests/launch/test_dual_rl.py; 15 in test_text_rewards.py.
"""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
import torch

import rm.dual_rl
from rm.config import Generation
from rm.data import Pair, read_pairs
from rm.generate import generate, rewards_from_cache
from rm.packed import PackedCot, pack, packed_forward
from rm.scorer import DeScoreScorer
from rm.video import prepare
from tests.rm import test_cold_start, test_dual_rl
from tests.rm.test_dual_rl import G, collect
from tests.tiny_qwen import SETTINGS, speak_plainly


@pytest.fixture(scope="module")
def pairs(dual_rl_pairs) -> list[Pair]:
    return dual_rl_pairs


def test_defect_4_both_stages_and_inference_read_one_sequence(pairs) -> None:
    """A video, prompt and CoT have the same ids and reward in both stages and when scoring."""
    loop = test_cold_start.build([replace(pairs[0], cot_A="abc", cot_B="abcd")])
    model = loop.model.eval()
    speak_plainly(model.backbone)
    video = prepare(pairs[0].video_A, SETTINGS)
    encoded = model.encode(pairs[0].prompt, video)
    written = generate(
        model,
        model.batch([encoded], [video], query=False),
        Generation(max_new_tokens=40, repetition_penalty=1.0),
    )
    text = model.tokenizer.decode(written.ids(0))
    when_scoring = rewards_from_cache(model, written).item()

    asked, plain = [], model.batch
    model.batch = lambda encoded, videos: (
        asked.append(plain(encoded[:1], videos[:1])) or plain(encoded, videos)
    )
    with torch.no_grad():
        loop.rewards([pairs[0]], [(text, "")])
    model.batch = plain
    (first,) = asked
    packed = pack(
        model, [encoded], [video], [[PackedCot(tuple(written.ids(0)), finished=True)]]
    )
    assert first.ids_BL.tolist() == packed.batch.ids_BL.tolist()
    assert first.position_3BL.tolist() == packed.batch.position_3BL.tolist()
    with torch.no_grad():
        assert model(first).item() == pytest.approx(when_scoring, abs=1e-5)
        assert packed_forward(
            model, packed, temperature=1.0
        ).reward_BGK.item() == pytest.approx(when_scoring, abs=1e-5)


def test_defect_5_inference_goes_from_a_pair_table_to_a_margin_per_pair(pairs) -> None:
    loop = test_dual_rl.build(pairs)
    loop.model.generation = Generation(
        max_new_tokens=200, temperature=1.0, repetition_penalty=1.0
    )
    files = [path for pair in pairs for path in (pair.video_A, pair.video_B)]
    value_N2 = (
        DeScoreScorer(loop.model, batch=3)
        .score(files, [p.prompt for p in pairs for _ in "AB"])
        .value_B.view(-1, 2)
    )
    assert value_N2.isfinite().all()
    assert (value_N2[:, 0] != value_N2[:, 1]).all()


def test_defect_8_no_sequence_is_dropped_whatever_its_length(
    pairs, monkeypatch
) -> None:
    loop = test_dual_rl.build(pairs, micro_batch=2)
    parts = [collect(loop, rows, step=0) for rows in ([0, 1], [2, 3])]
    lengths = [part.packed.token_BGT.sum(-1).flatten() for part in parts]
    assert len(torch.cat(lengths).unique()) > 2
    seen: list[int] = []

    def counting(model, packed, **options):
        found = packed_forward(model, packed, **options)
        found.log_prob_BGT.register_hook(
            lambda g: seen.append(int((g != 0).any(-1).sum()))
        )
        return found

    monkeypatch.setattr(rm.dual_rl, "packed_forward", counting)
    advantages = [part.advantage_VG for part in parts]
    loop.update(parts)
    assert seen == [int((a != 0).sum()) for a in advantages]
    assert all(a.numel() == 2 * 2 * G for a in advantages)


def test_defect_10_no_vocabulary_row_is_trained_for_the_query(pairs) -> None:
    loop = test_dual_rl.build(pairs, lora=False, kl_weight=0.0)
    rows, query = loop.model.backbone.get_input_embeddings().weight, loop.model.query
    before, query_before = rows.detach().clone(), query.detach().clone()
    loop.step(0)
    assert torch.equal(rows, before)
    assert not torch.equal(query, query_before)
    assert query.shape == (
        1,
        rows.shape[1],
    )  # Adam's state is one row, not a vocabulary


def test_defect_12_evaluation_masks_nothing_and_ties_are_no_errors(
    pairs, monkeypatch
) -> None:
    told = [
        replace(p, cot_A=f"first {i}", cot_B=f"the second {i}")
        for i, p in enumerate(pairs)
    ]
    always, never = (
        test_cold_start.build(told, mask_probability=p) for p in (1.0, 0.0)
    )
    asked = []
    plain = always.rewards
    monkeypatch.setattr(
        always,
        "rewards",
        lambda rows, chains: asked.extend(chains) or plain(rows, chains),
    )
    assert always.evaluate(told) == never.evaluate(told)
    assert asked == [(pair.cot_A, pair.cot_B) for pair in told]
    decided = always.evaluate(told)["heldout/accuracy"]
    tied = [*told, *(replace(pair, label=0) for pair in told)]
    assert always.evaluate(tied)["heldout/accuracy"] == decided


@pytest.mark.parametrize("cell", ["", "nan", "None"])
def test_defect_13_a_missing_chain_is_no_text(pairs, tmp_path, cell) -> None:
    with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["videos", "prompt", "GSB", "CoT_A", "CoT_B"])
        for pair in pairs:
            writer.writerow(
                [
                    repr([str(pair.video_A), str(pair.video_B)]),
                    pair.prompt,
                    "A",
                    cell,
                    "a chain",
                ]
            )
    table = read_pairs(tmp_path / "t.csv", require_cot=False)
    loop = test_cold_start.build(list(table.pairs))
    assert {pair.cot_A for pair in table.pairs} == {""}
    asked, plain = [], loop.model.batch
    loop.model.batch = lambda encoded, videos: (
        asked.extend(encoded) or plain(encoded, videos)
    )
    with torch.no_grad():  # rows with and without a chain share a batch
        assert (
            loop.rewards(
                table.pairs, [(pair.cot_A, pair.cot_B) for pair in table.pairs]
            )
            .isfinite()
            .all()
        )
    assert [len(item.cot_ids) > 0 for item in asked] == [False, True] * 4
