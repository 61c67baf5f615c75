"""Runs of Flow-DPO and of DeScore's stages are judged by metrics and settings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from alignment.config import DpoConfig
from alignment.dpo import summarise
from alignment.dpo_losses import flow_dpo_terms
from launch import diagnose as command
from launch.diagnosis.evidence import Evidence
from launch.diagnosis.rules import diagnose

ADAPTER = {"path": "none/here", "dtype": "float32", "lora": {"rank": 4}}
DPO = {
    "generator": ADAPTER,
    "dpo": {"pairs_per_step": 32, "beta": 100.0},
    "optimizer": {"lr": 1e-3, "warmup_steps": 0},
}
COLD_START = {
    "cold_start": {"pairs_per_step": 32, "masking": {"probability": 0.5}},
    "lr": {"llm": 2e-6, "query": 2e-6, "head": 2e-6},
    "optimizer": {"warmup_steps": 2},
}
DUAL_RL = {
    "dual_rl": {"pairs_per_step": 32, "pairs_per_update": 32},
    "dtype": "float32",
    "lr": {"llm": 2e-6, "query": 2e-6, "head": 2e-6},
}


def dpo_rows(chosen: float, rejected: float, count: int = 40) -> list[dict[str, float]]:
    """Metrics of a run whose errors change by so much a step, made by the project's own code."""
    rows = []
    for n in range(count):
        # errors of the policy of 32 pairs, then those of its reference, which are 1
        changes = [torch.full((32,), n * change) for change in (chosen, rejected)]
        one_N = torch.ones(32)
        terms = flow_dpo_terms(
            one_N + changes[0],
            one_N + changes[1],
            one_N,
            one_N,
            beta_N=100 * one_N,
        )
        columns = torch.stack([0.5 * one_N, *terms], dim=1)
        row = summarise(columns, DpoConfig(beta=100.0), "train")
        rows.append({"step": n, "seconds/step": 1.0, "train/grad_norm": 0.7, **row})
    return rows


def causes(settings: dict[str, Any], rows: list[dict[str, float]]) -> list[str]:
    run = Evidence(settings=settings, metrics=rows)
    return [found.cause for found in diagnose(run) if found.accuses]


def changed(rows: list[dict[str, float]], **changes: float) -> list[dict[str, float]]:
    values = {name.replace("__", "/"): value for name, value in changes.items()}
    return [{**row, **values} for row in rows]


def test_dpo_that_learns_is_not_accused() -> None:
    assert causes(DPO, dpo_rows(-1e-4, 2e-4)) == []


def test_dpo_whose_loss_has_its_sign_turned_is_named() -> None:
    # chosen errors rise and rejected errors fall: the logit is -50 n 3e-4
    rows = dpo_rows(2e-4, -1e-4)
    loss = math.log1p(math.exp(50 * 20 * 3e-4))
    assert rows[20]["train/loss"] == pytest.approx(loss, rel=1e-4)
    assert causes(DPO, rows) == ["reward-sign-in-update"]


def test_dpo_that_stays_at_its_reference_is_named() -> None:
    assert causes(DPO, dpo_rows(0.0, 0.0)) == ["adapter-frozen"]
    # an exported adapter that has moved tells which of the two is wrong
    run = Evidence(
        settings=DPO, metrics=dpo_rows(0.0, 0.0), facts={"exported_lora_b": 0.3}
    )
    assert [found.cause for found in diagnose(run)] == ["reference-is-policy"]


def test_dpo_at_rates_far_too_large_and_too_small_is_named() -> None:
    assert causes(DPO, dpo_rows(0.05, -0.05)) == ["lr-too-large"]
    # |logit| is 50 x 3e-7 x n
    assert causes(DPO, dpo_rows(-1e-7, 2e-7)) == ["lr-too-small"]


def test_dpo_whose_reference_differs_at_the_start_is_named() -> None:
    rows = dpo_rows(-1e-4, 2e-4)
    rows[0] |= {"train/dpo_logit_abs": 0.3}
    assert causes(DPO, rows) == ["reference-differs"]


def test_dpo_with_two_pairs_an_update_is_named() -> None:
    settings = {**DPO, "dpo": {"pairs_per_step": 2, "beta": 100.0}}
    assert causes(settings, dpo_rows(-1e-4, 2e-4)) == ["few-videos"]


def test_dpo_that_learns_its_pairs_by_heart_is_named() -> None:
    rows = dpo_rows(-1e-4, 2e-4)
    rows[-1] |= {"heldout/accuracy": 0.5}
    assert causes(DPO, rows) == ["overfit"]


def test_displacement_is_worth_knowing() -> None:
    (found,) = diagnose(Evidence(settings=DPO, metrics=dpo_rows(1e-4, 3e-4)))
    assert (found.cause, found.certainty) == ("displacement", "possible")


def test_fine_tuning_has_no_reference_to_be_compared_with() -> None:
    rows = changed(dpo_rows(0.0, 0.0), train__loss=2.0)
    settings = {**DPO, "dpo": {"method": "sft"}}
    assert causes(settings, rows) == []


def cold_rows(accuracy: float, count: int = 80) -> list[dict[str, float]]:
    loss = -math.log(max(accuracy, 0.05))
    return [
        {
            "step": n,
            "seconds/step": 1.0,
            "train/loss": loss,
            "train/accuracy": accuracy,
            "train/grad_norm": 1.0,
        }
        for n in range(count)
    ]


def test_cold_start_by_chance_or_the_wrong_way_is_named() -> None:
    assert causes(COLD_START, cold_rows(0.8)) == []
    # 19 steps of 32 pairs: 2.5 standard deviations of a coin are 0.05
    assert causes(COLD_START, cold_rows(0.54)) == ["nothing-learnt"]
    assert causes(COLD_START, cold_rows(0.56)) == []
    assert causes(COLD_START, cold_rows(0.2)) == ["reward-sign-in-update"]
    # too early to tell
    assert causes(COLD_START, cold_rows(0.5, 30)) == []


@pytest.mark.parametrize(
    ("accuracy", "heldout", "cause"),
    [(0.8, 0.2, "labels-turned"), (0.99, 0.5, "overfit")],
)
def test_heldout_pairs_in_another_order_are_named(
    accuracy: float, heldout: float, cause: str
) -> None:
    rows = cold_rows(accuracy)
    rows[-1] |= {"heldout/accuracy": heldout}
    assert causes(COLD_START, rows) == [cause]


def test_cold_start_whose_loss_explodes_is_named() -> None:
    rows = cold_rows(0.8)
    for row in rows[40:]:
        row["train/loss"] *= 4
    assert causes(COLD_START, rows) == ["lr-too-large"]


def test_frozen_head_and_unread_chains_of_thought_are_told() -> None:
    settings = {**COLD_START, "lr": {"llm": 2e-6, "query": 2e-6, "head": 0.0}}
    assert causes(settings, cold_rows(0.8)) == ["part-frozen"]
    settings = {
        **COLD_START,
        "cold_start": {"pairs_per_step": 32, "masking": {"probability": 1.0}},
    }
    (found,) = diagnose(Evidence(settings=settings, metrics=cold_rows(0.8)))
    assert (found.cause, found.certainty) == ("without-cots", "possible")


def dual_rows(**changes: float) -> list[dict[str, float]]:
    row = {
        "seconds/step": 1.0,
        "reward/zero_spread": 0.3,
        "cot/finished": 1.0,
        "train/loss": 0.1,
        "train/kl": 1e-3,
        "train/ratio_mean": 1.0,
        "train/clip_frac": 0.0,
        "train/grad_norm/llm": 0.1,
        "train/grad_norm/query": 0.1,
        "train/grad_norm/head": 0.1,
    }
    return changed([{"step": n, **row} for n in range(6)], **changes)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, []),
        ({"cot__finished": 0.3}, ["cots-cut"]),
        ({"reward__zero_spread": 1.0}, ["reward-saturated"]),
        ({"train__ratio_mean": 0.9}, ["log-prob-dtype"]),
        ({"train__clip_frac": 0.7}, ["clip-too-narrow"]),
        ({"train__kl": -0.1}, ["kl-sign"]),
        ({"train__grad_norm/llm": 0.0}, ["no-gradient"]),
        ({"train__loss": math.nan}, ["gradient-not-finite"]),
    ],
)
def test_second_stage_is_judged(changes: dict[str, float], found: list[str]) -> None:
    assert causes(DUAL_RL, dual_rows(**changes)) == found


def test_ratio_of_later_updates_of_a_step_may_differ() -> None:
    settings = {**DUAL_RL, "dual_rl": {"pairs_per_step": 128, "pairs_per_update": 4}}
    assert causes(settings, dual_rows(train__ratio_mean=0.9)) == []


def test_command_says_what_it_read_of_another_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "dpo"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(DPO))
    lines = [json.dumps(row) for row in dpo_rows(0.0, 0.0)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(SystemExit) as end:
        command.main([str(run)])
    assert end.value.code == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "no measurements: launch/dpo.py makes none" in said
    assert "CERTAIN [adapter-frozen]" in said


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "name one of those inside: run"),
        ("prompts: x\n", "holds no training run"),
    ],
)
def test_folder_that_is_no_run_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    config: str | None,
    message: str,
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(DPO))
    if config is not None:
        (tmp_path / "config.yaml").write_text(config)
    with pytest.raises(SystemExit) as end:
        command.main([str(tmp_path)])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
