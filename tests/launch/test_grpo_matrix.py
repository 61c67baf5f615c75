"""First ratio and losses for every precision, ZeRO stage and number of ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launch.grpo_ranks import CASES, SHARED
from tests.launch.processes import ROOT, deepspeed, run

SCRIPT = str(ROOT / "tests" / "launch" / "grpo_ranks.py")
Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def found(tiny: Path) -> dict[int, Found]:
    """By number of ranks."""
    done = {
        1: run(sys.executable, SCRIPT, str(tiny)),
        2: deepspeed(2, SCRIPT, str(tiny)),
    }
    return {ranks: _last_json(process.stdout) for ranks, process in done.items()}


def _last_json(text: str) -> Found:
    return next(
        json.loads(line[line.index("{") :])
        for line in reversed(text.splitlines())
        if '{"float32 1"' in line
    )


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_first_ratio_is_1(found: dict[int, Found], case: str, ranks: int) -> None:
    limit = 1e-5 if "float32" in case else 1e-3
    assert max(found[ranks][case]["ratio"]) < limit
    assert found[ranks][case]["moved"] > 1e-4  # and something was learned


@pytest.mark.long
@pytest.mark.parametrize("kind", ["", " full"])
def test_losses_do_not_depend_on_stage_and_ranks(
    found: dict[int, Found], kind: str
) -> None:
    """In fp32; the policy has left its reference, so KL makes up most of the loss."""
    cases = {
        f"{name}, {ranks} ranks": one
        for ranks, results in found.items()
        for name, one in results.items()
        if name.startswith("float32") and name.endswith(" full") == bool(kind)
    }
    assert len(cases) == (14 if not kind else 4)
    want = found[1][f"float32 1{kind}"]
    assert min(want["kl"]) > 1e-4
    assert min(want["grad_norm"]) > 1e-3
    for name, got in cases.items():
        for step in range(2):
            assert got["loss"][step] == pytest.approx(
                want["loss"][step], abs=1e-5, rel=1e-4
            ), name
            assert got["kl"][step] == pytest.approx(want["kl"][step], rel=1e-4), name
            if "32 0" not in name:  # without ZeRO, DeepSpeed tells no norm
                assert got["grad_norm"][step] == pytest.approx(
                    want["grad_norm"][step], rel=1e-3
                ), name
            assert got["reward"][step] == pytest.approx(
                want["reward"][step], abs=1e-5
            ), name


@pytest.mark.long
def test_frozen_weights_stay_bit_equal(found: dict[int, Found]) -> None:
    for results in found.values():
        assert all(one["frozen"] for one in results.values())


@pytest.mark.long
def test_ranks_that_share_groups_match_one_rank(found: dict[int, Found]) -> None:
    """Members 0 and 1 of every group on one rank, 2 and 3 on the other, against all four on one."""
    want = found[1]["float32 1"]
    for name in SHARED:
        for key in ("loss", "kl", "grad_norm", "reward"):
            assert found[2][name][key] == pytest.approx(want[key], rel=1e-3), (
                name,
                key,
            )


@pytest.mark.long
def test_ema_matches_its_formula_and_swaps_back(found: dict[int, Found]) -> None:
    for results in found.values():
        for name, one in results.items():
            assert one["average"] < 1e-6, name
            assert one["swapped"], name
            assert one["restored"], name
