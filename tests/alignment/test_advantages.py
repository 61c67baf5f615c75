"""Rewards of a step over two real ranks whose scores have different parts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.launch.processes import ROOT, torchrun


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two gloo processes computed."""
    folder = tmp_path_factory.mktemp("advantages")
    script = str(ROOT / "tests" / "alignment" / "advantage_ranks.py")
    torchrun(2, script, str(folder))
    return [json.loads((folder / f"rank{i}.json").read_text()) for i in range(2)]


@pytest.mark.slow
def test_parts_in_another_order_keep_their_columns(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        details = rank["other order"]["details"]
        assert details["reward/mine.red"] == (1 + 2 + 3 + 6) / 4
        assert details["reward/mine.blue"] == (30 + 50 + 30 + 50) / 4
        for name in "abcd":
            assert details[f"reward/mine.{name}"] == ord(name)


@pytest.mark.slow
def test_part_of_a_single_rank_is_its_mean_there(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        details = rank["some parts"]["details"]
        assert details["reward/mine.red"] == 1.5
        assert details["reward/mine.blue"] == 40.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "mean", "red", "scored"),
    [("failed", 1.0, 1.5, 0), ("failed last", 4.0, 4.5, 1)],
)
def test_rank_without_scores_and_parts_changes_nothing_else(
    ranks: list[dict[str, Any]], case: str, mean: float, red: float, scored: int
) -> None:
    for rank in ranks:
        found = rank[case]
        assert found["means"]["reward/mine"] == mean
        assert found["means"]["reward/plain"] == (0 + 2 + 4 + 4) / 4
        assert found["details"]["reward/mine.red"] == red
        assert found["details"]["reward/mine.blue"] == 40.0
        assert found["details"]["reward/mine_unscored"] == 2.0
    # the scaled sum of both rewards: only a scored group of unequal values moves
    doubled = [[-2.0, 2.0]]
    first = doubled if scored == 0 else [[-1.0, 1.0]]
    assert ranks[0][case]["advantages"] == first
    assert ranks[1][case]["advantages"] == [[0.0, 0.0]]


@pytest.mark.slow
def test_ranks_agree_on_all_metrics(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    for case, found in first.items():
        for kind in ("means", "details"):
            assert list(found[kind]) == list(second[case][kind])
            assert found[kind] == pytest.approx(second[case][kind], nan_ok=True)
