"""The page of launch/report.py: its numbers, its videos, and texts that look like markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest

from common.files import read_jsonl
from launch import report
from launch.reporting import data as report_data
from launch.reporting import find_runs as report_find
from launch.reporting import texts
from tests.launch.processes import ROOT
from tests.launch.reporting.pages import (
    BASE,
    EVIL,
    TUNED,
    Page,
    alignment_run,
    evaluation,
    lines,
    make_demo,
    rendered,
)


@pytest.fixture(autouse=True)
def _plain_charts(plain_charts: None) -> None:
    """Leave out the drawings; `whole_page` has real charts."""


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    return make_demo(tmp_path / "demo")


@pytest.fixture(scope="module")
def whole_page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Page]:
    """A demo folder and its page, with charts and a malicious title."""
    folder = make_demo(tmp_path_factory.mktemp("report") / "demo")
    return folder, *rendered(folder, "--title", EVIL)


def test_page_loads_nothing(whole_page: tuple[Path, str, Page]) -> None:
    _, text, page = whole_page
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "img", "base"), tag
        for name in ("src", "href", "poster", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:video/mp4;base64,")), (
                tag,
                value,
            )
        assert not [name for name in attributes if name.startswith("on")]
    styles = re.sub(r"data:video/mp4;base64,[\w+/=]+", "", text)
    # but for the name of a library, in a comment
    assert styles.count("://") == 1
    assert "/*! https://github.com/leeoniya/uPlot (v1.6.32) */" in page.script
    assert "@import" not in styles
    assert set(re.findall(r"url\((.)", styles)) == {"#"}  # clip paths of the charts
    assert "default-src 'none'" in text
    # the browser runs the page's own script only, by its hash
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [{}]
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text


def test_nothing_from_a_run_is_markup(whole_page: tuple[Path, str, Page]) -> None:
    _, text, page = whole_page
    assert text.count("<script") == 1
    assert "alert(1)" not in page.script
    assert "\x00" not in text
    assert (
        '<script>alert(1)</script> {{ 7 * 7 }} & "quotes" \N{REPLACEMENT CHARACTER}'
        in page.text
    )
    assert "&lt;b&gt;A&lt;/b&gt;" in text


def test_videos_are_embedded_and_play(whole_page: tuple[Path, str, Page]) -> None:
    demo, text, page = whole_page
    videos = [attributes for tag, attributes in page.tags if tag == "video"]
    assert (
        len(videos) == 2 * 2 + 2 * 3 + 2
    )  # base and tuned, rollouts of two steps, two pairs with one file each
    for attributes in videos:
        assert {"autoplay", "loop", "muted", "playsinline"} <= set(attributes)
        assert attributes["class"] == "pixels"  # 16 pixels wide
    first = base64.b64decode(videos[0]["src"].partition(",")[2])
    assert first == (demo / "eval_base" / "videos" / "0000.mp4").read_bytes()
    assert text.index("Base and tuned, same prompt, same seed") < text.index(
        "prompt number 1"
    )


def test_page_shows_numbers_of_runs(whole_page: tuple[Path, str, Page]) -> None:
    """Means 0.4 and 0.65; the differences 0.3, 0.2, 0.1, 0.4 have mean 0.25."""
    demo, _, page = whole_page
    rows = {
        row.name: row
        for row in report_data.compare(
            report_find.discover(demo), ["shapes", "descore"]
        )
    }
    assert rows["shapes"].base["mean"] == pytest.approx(0.4)
    assert rows["shapes"].tuned["mean"] == pytest.approx(0.65)
    assert rows["shapes"].difference["mean"] == pytest.approx(0.25)
    assert 0.1 <= rows["shapes"].difference["ci95"][0] <= 0.2
    assert rows["shapes"].watched
    assert not rows["descore"].watched
    assert (
        rows["descore"].difference["mean"],
        rows["descore"].difference["missing"],
    ) == (pytest.approx(2.0), 1)
    text = re.sub(r"\s+", " ", page.text)
    assert "change 0.25, 95 %" in text
    assert "1 not scored" in text
    assert "watched only" in text
    assert "1 of 3 pairs are ties" in text


def test_videos_of_other_seeds_are_not_compared(demo: Path) -> None:
    evaluation(demo / "eval_tuned", TUNED, seed=100, adapter="runs/demo/grpo/final")
    _, page = rendered(demo)
    assert "share no prompt and seed" in page.text
    assert "Base and tuned, same prompt" not in page.text
    assert (
        report_data.compare(report_find.discover(demo), ["shapes"])[0].difference
        is None
    )


def test_page_of_grpo_run_alone(tmp_path: Path) -> None:
    """A full-size run leaves metrics and samples; the page names what is missing."""
    _, page = rendered(alignment_run(tmp_path / "run"))
    assert "Reward: descore (trained, weight 1)" in page.text
    assert "Reward: shapes (watched only)" in page.text
    assert "0.15 → 3.75" in page.text  # 0, 0.1, 0.2, 0.3 and 3.6, 3.7, 3.8, 3.9
    assert "not scored" not in page.text
    assert "kind base" in page.text
    assert "Results" not in page.text
    members = re.findall(r"member \d", page.text)
    assert members == ["member 1", "member 0", "member 2"] * 2  # by advantage


def test_heldout_prompts_of_grpo_run_are_drawn(tmp_path: Path) -> None:
    folder = alignment_run(tmp_path / "run")
    rows = read_jsonl(folder / "metrics.jsonl")
    for row in rows[::20]:
        row |= {"eval/shapes": 0.25 + row["step"] / 80, "eval_stock/shapes": 0.5}
        row["eval_usual/shapes"] = 0.4
    lines(
        folder / "metrics.jsonl",
        [*rows, {"step": 40, "eval/shapes": 0.75, "eval_stock/shapes": 0.5}],
    )
    _, page = rendered(folder)
    assert "Held-out prompts: shapes" in page.text
    assert "Held-out prompts: descore" not in page.text
    assert "the stock scheduler" in page.text
    assert "the usual guidance" in page.text


def test_page_of_dpo_and_grpo(demo: Path) -> None:
    """Three videos of a prompt; 0.1, 0.1, 0.1 and 0.3 more than the base."""
    evaluation(demo / "eval_dpo", [0.3, 0.5, 0.7, 0.7], adapter="runs/demo/dpo/final")
    names = {
        "loss": 0.6,
        "accuracy": 0.7,
        "chosen_change": -0.01,
        "rejected_change": 0.02,
        "dpo_logit_abs": 0.5,
        "loss_sigma_0-0.2": 0.6,
    }
    rows = [
        {
            "step": s,
            **{f"train/{name}": value - 0.001 * s for name, value in names.items()},
        }
        for s in range(20)
    ]
    lines(demo / "dpo" / "metrics.jsonl", rows)
    (demo / "dpo" / "config.yaml").write_text("dpo: {}\n")
    text, page = rendered(demo)
    assert "Flow-DPO − base" in page.text
    found = report_data.compare(
        report_find.discover(demo), ["shapes"], tuned="dpo_tuned"
    )[0]
    assert found.difference["mean"] == pytest.approx(0.15)
    assert found.watched
    for title in (
        "Change against the reference",
        "Implicit accuracy",
        "Loss by noise level",
    ):
        assert title in page.text
    assert (
        text.count('<h4 class="Flow-DPO">') == 2
    )  # of the two prompts whose videos were kept
    assert report_find.kind_of(demo / "dpo", {}) == "dpo"


def test_page_of_reward_model_evaluation_alone(demo: Path) -> None:
    _, page = rendered(demo / "eval_rm")
    assert "wrong" not in page.text  # pair 1 is among the first
    assert "no video" in page.text  # gone.mp4
    assert "kind grpo" in page.text


def test_page_has_no_absolute_path(demo: Path) -> None:
    """Neither of the folders of the report, nor of settings, commands and remarks."""
    with (demo / "grpo" / "config.yaml").open("a") as config:
        config.write("generator: {path: /data/anna/models/wan}\n")
    command = ["/opt/anna/bin/python", "--config=/data/anna/grpo.yaml"]
    (demo / "grpo" / "environment.json").write_text(json.dumps({"command": command}))
    (demo / "eval_rm" / "summary.json").unlink()
    text, page = rendered(demo)
    assert "demo/eval_rm has no summary.json" in page.text
    assert "…/models/wan" in page.text
    assert "…/bin/python" in page.text
    for folder in (str(demo.parent), "/data/anna", "/opt/anna"):
        assert folder not in text


def test_videos_above_max_mb_are_counted(demo: Path) -> None:
    size = (demo / "eval_base" / "videos" / "0000.mp4").stat().st_size
    _, page = rendered(demo, "--max-mb", str(1.5 * size / 1e6))
    assert len([tag for tag, _ in page.tags if tag == "video"]) == 1
    assert "did not fit into" in page.text


def test_only_videos_are_read_into_the_page(demo: Path) -> None:
    (demo / "secret.txt").write_text("do not show")
    rows = report_data.results(demo / "eval_rm")
    lines(
        demo / "eval_rm" / "results.jsonl",
        [{**row, "video_A": "../secret.txt"} for row in rows],
    )
    text, _ = rendered(demo)
    assert base64.b64encode(b"do not show").decode() not in text


def test_runs_are_found_whatever_their_names(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page is the same with unknown names and a deeper folder."""
    names = {
        "eval_base": "x6",
        "eval_tuned": "g1",
        "eval_rm": "deep/er/one",
        "grpo": "flat",
        "descore": "run1",
    }
    odd = tmp_path / "odd"
    for old, new in names.items():
        (odd / new).parent.mkdir(parents=True, exist_ok=True)
        (demo / old).rename(odd / new)
    (odd / "g1" / "config.yaml").write_text("adapter: /gone/flat/final\n")
    lines(
        odd / "flat" / "checkpoints" / "metrics.jsonl", [{"step": 0}]
    )  # inside of a run
    lines(
        odd / "vbench" / "model" / "results.jsonl",
        [{"dimension": "color", "score": 1.0}],
    )
    found = report_find.discover(odd)
    kinds = {
        "x6": "base",
        "g1": "tuned",
        "deep/er/one": "rm",
        "flat": "grpo",
        "run1": "cold_start",
    }
    assert {
        str(folder.relative_to(odd)): kind for kind, folder in found.shown.items()
    } == kinds
    assert found.more == []
    _, page = rendered(odd)
    assert "change 0.25, 95 %" in re.sub(r"\s+", " ", page.text)
    said = capsys.readouterr().out
    assert all(f"{odd / folder} ({kind})" in said for folder, kind in kinds.items())


def test_kind_of_evaluation_follows_its_adapter(
    tmp_path: Path,
) -> None:
    for name, config in (
        ("a", "dpo: {}\n"),
        ("b", "grpo: {}\n"),
        ("c", "dual_rl: {}\n"),
        ("d", "cold_start: {}\n"),
    ):
        lines(
            tmp_path / name / "metrics.jsonl",
            [{"step": 0, "train/loss": 1.0, "reward/format": 1.0}],
        )
        (tmp_path / name / "config.yaml").write_text(config)
    evaluation(
        tmp_path / "e",
        BASE,
        adapter=str(tmp_path / "a" / "checkpoints" / "step-000009"),
    )
    evaluation(tmp_path / "f", BASE, adapter="elsewhere/b/final")
    evaluation(tmp_path / "g", BASE, adapter="elsewhere/a/final")
    found = report_find.discover(tmp_path)
    assert {kind: folder.name for kind, folder in found.shown.items()} == {
        "dpo": "a", "grpo": "b", "cold_start": "d", "dpo_tuned": "e", "tuned": "f"
    }  # fmt: skip
    assert [(kind, folder.name) for kind, folder in found.more] == [
        ("dual_rl", "c"),
        ("dpo_tuned", "g"),
    ]
    assert report_find.discover(tmp_path / "c").more[0][0] == "dual_rl"
    _, page = rendered(tmp_path / "c")
    assert "Report of" in page.text


def test_further_runs_of_a_kind_are_shown(demo: Path) -> None:
    """The run named as in the demo has the sections, the others are listed at the end."""
    alignment_run(demo / "a_run")
    (demo / "a_run" / "config.yaml").write_text("grpo: {}\nsteps: 77\n")
    evaluation(demo / "a_base", [1.0, 1.0, 1.0, 0.5])  # mean 0.875
    found = report_find.discover(demo)
    assert found.shown["grpo"] == demo / "grpo"
    assert found.shown["base"] == demo / "eval_base"
    _, page = rendered(demo)
    text = re.sub(r"\s+", " ", page.text)
    section = text[text.rindex("Further runs") :]
    assert "grpo: demo/a_run" in section
    assert "base: demo/a_base" in section
    assert "shapes0.875 [" in section
    assert "Reward: descore" in section
    assert "steps: 77" in text


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("grpo/metrics.jsonl", 41),
        ("eval_base/results.jsonl", 5),
        ("grpo/samples/step-000000/samples.jsonl", 4),
    ],
)
@pytest.mark.parametrize("broken", ["{not json", "", "[1]"])
def test_broken_line_is_named(
    demo: Path, capsys: pytest.CaptureFixture[str], file: str, line: int, broken: str
) -> None:
    with (demo / file).open("a") as out:
        out.write(f"{broken}\n")
    with pytest.raises(SystemExit) as exit_:
        rendered(demo)
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert f"{demo / file}:{line}: " in said
    assert said.count("\n") == 1


def test_incomplete_last_line_is_skipped_and_broken_files_named(
    demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (demo / "grpo/metrics.jsonl").open("a") as out:
        out.write('{"step": 40, "tra')
    rendered(demo)  # the run is being written
    assert len(report_data.metrics(demo / "grpo")) == 40
    for file, text in (("eval_base/summary.json", "{"), ("grpo/config.yaml", "a: [")):
        kept = (demo / file).read_text()
        (demo / file).write_text(text)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            rendered(demo)
        assert exit_.value.code == 2
        assert str(demo / file) in capsys.readouterr().err
        (demo / file).write_text(kept)


@pytest.mark.parametrize(
    "words", [[], ["nowhere"], ["--grpo", "nowhere"], [str(ROOT / "common")]]
)
def test_missing_run_exits_2(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as exit_:
        report.main([*words, "--out", str(tmp_path / "r.html")])
    assert exit_.value.code == 2
    assert not (tmp_path / "r.html").exists()


def test_no_text_of_a_run_keeps_control_characters() -> None:
    """Escape, NUL, a right-to-left override and half of an emoji become the same mark."""
    text = texts.clean("a\x1b[31mb\x00c\u202ed\u2066e\ud83df\ng\th")
    mark = "\N{REPLACEMENT CHARACTER}"
    assert text == f"a{mark}[31mb{mark}c{mark}d{mark}e{mark}f\ng\th"
