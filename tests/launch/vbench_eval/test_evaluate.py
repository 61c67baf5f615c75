"""launch/evaluate.py vbench: result files in the form of VBench's command line become a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch import evaluate
from launch.vbench_eval.suite import DIMENSIONS


def write_results(folder: Path, scores: dict[str, Any]) -> Path:
    """A file for each dimension, as ``vbench evaluate`` writes them."""
    folder.mkdir(exist_ok=True)
    for name, score in scores.items():
        details = [{"video_path": "a-0.mp4", "video_results": score}]
        path = folder / f"{name}_eval_results.json"
        path.write_text(json.dumps({name: [score, details]}))
    return folder


def evaluated(out: Path, results: dict[str, Path], *words: str) -> dict[str, Any]:
    """The summary of these models."""
    folders = [f"results.{model}={folder}" for model, folder in results.items()]
    evaluate.main(["vbench", f"out={out}", *folders, *words])
    return json.loads((out / "summary.json").read_text())


def refused(out: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The error line of exit code 2; nothing is written."""
    with pytest.raises(SystemExit) as exit_:
        evaluated(out, {"base": folder})
    assert exit_.value.code == 2
    assert not out.exists()
    return capsys.readouterr().err


def cells(out: Path, name: str) -> list[str]:
    for line in (out / "table.md").read_text().splitlines():
        if line.startswith(f"| {name} |"):
            return line.strip("| ").split(" | ")[1:]
    raise AssertionError(name)


def test_two_models_in_a_table(tmp_path: Path) -> None:
    """Every dimension has 0.5 and 0.9; the totals by hand from VBench's limits and weights."""
    results = {}
    for model, value in (("base", 0.5), ("tuned", 0.9)):
        scores = dict.fromkeys(DIMENSIONS, value)
        results[model] = write_results(tmp_path / model, scores)
    summary = evaluated(tmp_path / "out", results)
    assert summary["notes"] == []
    assert summary["models"]["base"]["scene"] == 0.5
    assert summary["normalised"]["base"]["scene"] == 0.5 / 0.8222

    # Six dimensions of weight 1 and dynamic degree of weight 1/2; then nine of weight 1.
    quality = {
        value: (
            (value - 0.1462) / 0.8538
            + (value - 0.2615) / 0.7385
            + (value - 0.6293) / 0.3707
            + (value - 0.706) / 0.2915
            + 0.5 * value
            + 2 * value
        )
        / 6.5
        for value in (0.5, 0.9)
    }
    semantic = {
        value: (
            5 * value + value / 0.8222 + (value - 0.0009) / 0.2846 + 2 * value / 0.364
        )
        / 9
        for value in (0.5, 0.9)
    }
    for model, value in (("base", 0.5), ("tuned", 0.9)):
        scores = summary["models"][model]
        assert scores["quality"] == pytest.approx(quality[value])
        assert scores["semantic"] == pytest.approx(semantic[value])
        total = 0.8 * quality[value] + 0.2 * semantic[value]
        assert scores["total"] == pytest.approx(total)
    assert cells(tmp_path / "out", "scene") == ["0.5000", "0.9000", "+0.4000"]
    assert cells(tmp_path / "out", "quality") == [
        f"{quality[0.5]:.4f}",
        f"{quality[0.9]:.4f}",
        f"{quality[0.9] - quality[0.5]:+.4f}",
    ]
    assert (tmp_path / "out" / "config.yaml").is_file()


def test_dimension_without_file_is_not_run(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "b", {"scene": 0.5, "human_action": 0.7})
    only = "dimensions=[scene,color]"
    summary = evaluated(tmp_path / "out", {"base": folder}, only)
    assert summary["models"]["base"] == {
        "scene": 0.5,
        "color": None,
        "quality": None,
        "semantic": None,
        "total": None,
    }
    assert list(summary["normalised"]["base"]) == ["scene"]
    assert len(summary["notes"]) == 1
    assert "color" in summary["notes"][0]
    assert cells(tmp_path / "out", "color") == ["not run"]
    assert cells(tmp_path / "out", "scene") == ["0.5000"]
    assert cells(tmp_path / "out", "human action") == ["not run"]


def test_later_results_replace_the_table(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "b", {"scene": 0.5})
    evaluated(tmp_path / "out", {"base": folder})
    write_results(folder, {"scene": 0.6, "color": 0.25})
    summary = evaluated(tmp_path / "out", {"base": folder})
    assert summary["models"]["base"]["scene"] == 0.6
    assert cells(tmp_path / "out", "color") == ["0.2500"]


@pytest.mark.parametrize("score", [float("nan"), 50.0, -1.5])
def test_score_outside_its_range_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], score: float
) -> None:
    folder = write_results(tmp_path / "b", {"color": score})
    assert str(score) in refused(tmp_path / "out", folder, capsys)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"color": []}', '{"color": 0.5}', '{"color": ["x"]}']
)
def test_file_of_another_form_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    folder = write_results(tmp_path / "b", {"scene": 0.5})
    (folder / "color_eval_results.json").write_text(content)
    error = refused(tmp_path / "out", folder, capsys)
    assert "color_eval_results.json" in error


def test_unknown_dimension_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_results(tmp_path / "b", {"scenery": 0.5})
    assert "scenery" in refused(tmp_path / "out", folder, capsys)


def test_dimension_in_two_files_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_results(tmp_path / "b", {"scene": 0.5})
    (folder / "run2_eval_results.json").write_text('{"scene": [0.6, []]}')
    assert "scene" in refused(tmp_path / "out", folder, capsys)


@pytest.mark.parametrize("name", ["empty", "missing"])
def test_folder_without_results_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "empty").mkdir()
    assert name in refused(tmp_path / "out", tmp_path / name, capsys)
