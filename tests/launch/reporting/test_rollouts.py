"""Rollouts in the report: the table, parts before and after, trained against watched rewards."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from launch.reporting import data, rollouts
from launch.reporting.charts import Series, rank_correlation, scatter
from launch.reporting.films import STEPS_SHOWN, Videos, rollout_slides, same_seed_slides
from tests.launch.reporting.pages import EVIL, alignment_run, clip, lines, rendered


def samples(folder: Path, steps: list[int]) -> Path:
    """Two members a step; descore is the step, shapes falls with it, and one has no score."""
    for step in steps:
        place = folder / "samples" / f"step-{step:06d}"
        rows = []
        for member in (0, 1):
            row = {"file": f"{member}.mp4", "step": step, "prompt": EVIL, "seed": 7}
            row |= {"member": member, "advantage": 0.5, "texts": {"descore": EVIL}}
            shapes = None if step == 0 and member else -float(step)
            row["rewards"] = {"descore": step + member / 2, "shapes": shapes}
            rows.append(row)
            clip(place / f"{member}.mp4", 80)
        lines(place / "samples.jsonl", rows)
    return folder


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([1.0, 2.0, 3.0], [10.0, 100.0, 1000.0], 1.0),
        ([1.0, 2.0, 3.0], [3.0, 2.0, -50.0], -1.0),
        # ranks 1 2 3 4 and 1 2.5 2.5 4: 4.5 / sqrt(5 x 4.5)
        ([1.0, 2.0, 3.0, 4.0], [0.0, 5.0, 5.0, 9.0], 0.9486832980505138),
        ([1.0, 1.0], [0.0, 5.0], None),
        ([], [], None),
    ],
)
def test_rank_correlation_by_hand(
    x: list[float], y: list[float], expected: float | None
) -> None:
    found = rank_correlation(x, y)
    assert found == (None if expected is None else pytest.approx(expected))


def test_points_of_a_scatter_have_their_texts() -> None:
    """Equal steps are equal distances, and every point has the text of its own place."""
    series = [
        Series("a", [0.0, 1.0, 3.0], [0.0, 2.0, 6.0]),
        Series("b", [3.0], [2.0], "#ff0000"),
    ]
    chart = scatter("t", series, [["first", "second", "<third>"], ["other"]])
    points = re.findall(
        r'<use [^>]*?x="([\d.]+)" y="([\d.]+)"[^>]*><title>([^<]*)</title></use>',
        chart.svg,
    )
    assert [text for _, _, text in points] == [
        "first",
        "second",
        "&lt;third&gt;",
        "other",
    ]
    x0, x1, x2, x3 = (float(x) for x, _, _ in points)
    y0, y1, y2, y3 = (float(y) for _, y, _ in points)
    assert (x2 - x0) / (x1 - x0) == pytest.approx(3.0, rel=1e-3)
    assert (y0 - y2) / (y0 - y1) == pytest.approx(3.0, rel=1e-3)
    assert (x3, y3) == (x1, y2)


def test_trained_reward_is_drawn_against_each_watched_one(tmp_path: Path) -> None:
    """Of six rollouts five have both scores; -step falls as the trained reward rises."""
    run = samples(tmp_path, [0, 1, 2])
    weights = "descore: {weight: 1.0}, shapes: {weight: 0}"
    (run / "config.yaml").write_text(f"grpo: {{}}\nrewards: {{{weights}}}\n")
    (chart,) = rollouts.judged_charts(run, {}, data.sampled_steps(run))
    assert chart.title == "Rollouts: descore and shapes"
    # ranks 1 2 3 4 5 and 5 3.5 3.5 1.5 1.5: -9 / sqrt(10 x 9)
    assert "rank correlation -0.95 of 5 videos" in chart.note
    assert [len(series.y) for series in chart.legend] == [1, 4]
    assert "step 2, member 1\ndescore 2.5, shapes -2" in chart.svg
    # without weights nobody is a judge
    (run / "config.yaml").write_text("grpo: {}\n")
    assert rollouts.judged_charts(run, {}, data.sampled_steps(run)) == []


def test_parts_are_compared_between_first_and_last_tenth(tmp_path: Path) -> None:
    """Twenty steps: the means of two values at each end."""
    rows = [
        {"step": s, "reward/a": 1.0, "reward/a.x": float(s), "eval/a.x": 2.0 * s}
        for s in range(20)
    ]
    rows[3]["reward/a.once"] = 1.0
    lines(tmp_path / "metrics.jsonl", rows)
    table = rollouts.part_table(tmp_path)
    assert table.rewards == ["reward/a", "eval/a"]
    assert table.rows == [("x", [(0.5, 18.5), (1.0, 37.0)])]


def test_table_has_the_last_rollouts_with_their_texts_folded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain_charts: None
) -> None:
    run = samples(alignment_run(tmp_path / "run"), [40, 41])
    monkeypatch.setattr(rollouts, "ROWS_SHOWN", 3)
    table = rollouts.rollout_table(data.sampled_steps(run))
    assert table.total == 6 + 4
    assert [(row["step"], row["member"]) for row in table.rows] == [
        (40, 1),
        (41, 0),
        (41, 1),
    ]
    assert table.rewards == ["descore", "shapes"]
    text, page = rendered(run)
    assert "The last 3 of 10 rollouts" in page.text
    body = text[text.index('class="sortable rollouts"') :]
    assert body.count("<details>") == 3
    assert '<td data-value="41.5">41.5</td>' in body


def test_slider_has_both_ends_and_even_steps_between(tmp_path: Path) -> None:
    run = samples(tmp_path, list(range(0, 40, 2)))
    steps = rollouts.data.sampled_steps(run)
    shown = [slide.step for slide in rollout_slides(steps, Videos(10**9))]
    assert len(shown) == STEPS_SHOWN
    assert (shown[0], shown[-1]) == (0, 38)
    assert shown == sorted(shown)
    assert max(b - a for a, b in itertools.pairwise(shown)) <= 4


def test_last_step_is_the_first_to_get_room(tmp_path: Path) -> None:
    run = samples(tmp_path, [0, 5, 10])
    size = (run / "samples" / "step-000000" / "0.mp4").stat().st_size
    steps = rollouts.data.sampled_steps(run)
    store = Videos(int(4.5 * size))
    slides = same_seed_slides({"": steps}, store, count=4)
    assert [slide.step for slide in slides] == [0, 10]
    assert store.left_out == 2
    # without any room the steps and their numbers are shown
    assert len(same_seed_slides({"": steps}, Videos(0), count=4)) == 3
