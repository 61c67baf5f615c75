"""launch/score.py on mp4 files: prompts of videos, broken files, and exit codes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.files import read_jsonl
from common.video_io import write_mp4
from launch import score
from launch.evaluation.files import (
    ScoreItem,
    check_groups,
    find_items,
    prompt_batches,
    read_clip,
    share_of_prompts,
)
from rm.model import DeScore
from tests.fakes import decoder_with_a_trap
from tests.launch.processes import ROOT, refused_early
from tests.tiny_qwen import SETTINGS, save_tiny_qwen

GREYS = {"a.mp4": 51, "b.mp4": 102, "c.mp4": 204}  # 0.2, 0.4 and 0.8 of white


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Three grey clips; b is larger, c has more frames at another rate."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for name, grey in GREYS.items():
        frames, side, fps = (
            (9, 16, 4.0) if name == "c.mp4" else (5, 32 if name == "b.mp4" else 16, 8.0)
        )
        write_mp4(
            folder / name,
            torch.full((frames, side, side, 3), grey, dtype=torch.uint8),
            fps,
            crf=0,
        )
    (tmp_path / "prompts.txt").write_text("first\nsecond\nthird\n")
    return folder


def scored(tmp_path: Path, *words: str, code: int = 0) -> list[dict]:
    with pytest.raises(SystemExit) as exit_:
        score.main(
            [
                *words,
                "--out",
                str(tmp_path / "scores.jsonl"),
                "rewards.brightness.weight=1",
            ]
        )
    assert exit_.value.code == code
    return read_jsonl(tmp_path / "scores.jsonl") if code != 2 else []


def test_brightness_of_grey_clips(clips: Path, tmp_path: Path) -> None:
    """Clips of three sizes and rates in one batch; H.264 moves a grey by a level or two."""
    rows = scored(
        tmp_path,
        "--videos",
        f"{clips}/*.mp4",
        "--prompts",
        str(tmp_path / "prompts.txt"),
    )
    assert [row["prompt"] for row in rows] == ["first", "second", "third"]
    assert [Path(row["video"]).name for row in rows] == list(GREYS)
    assert [row["rewards"]["brightness"] for row in rows] == pytest.approx(
        [0.2, 0.4, 0.8], abs=2.5 / 255
    )


def test_frames_and_rate_of_a_clip(clips: Path) -> None:
    item = ScoreItem("c.mp4", clips / "c.mp4", "a prompt")
    whole = read_clip(item, max_frames=100)
    assert (len(whole.video_TYXC), whole.fps) == (9, pytest.approx(4.0))
    # Frames 0, 2, 4, 6, 8: half the rate.
    thinned = read_clip(item, max_frames=5)
    assert (len(thinned.video_TYXC), thinned.fps) == (5, pytest.approx(2.0))


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_table_with_videos_needs_no_glob(
    clips: Path, tmp_path: Path, form: str
) -> None:
    if form == "csv":
        text = 'prompt,video\nthird,c.mp4\n"first, last",a.mp4\n'
    else:
        rows = [
            ("third", "c.mp4"),
            ("not kept", None),
            ("first, last", "a.mp4"),
        ]
        text = "".join(
            json.dumps({"prompt": p, "video": v, "rewards": {}}) + "\n" for p, v in rows
        )
    (clips / f"table.{form}").write_text(text)
    rows = scored(tmp_path, "--prompts", str(clips / f"table.{form}"))
    assert [(row["prompt"], row["video"]) for row in rows] == [
        ("third", "c.mp4"),
        ("first, last", "a.mp4"),
    ]
    assert [row["rewards"]["brightness"] for row in rows] == pytest.approx(
        [0.8, 0.2], abs=2.5 / 255
    )
    chosen = find_items(f"{clips}/a*.mp4", clips / f"table.{form}")
    assert [item.prompt for item in chosen] == ["first, last"]


def test_broken_files_lose_their_row_and_are_retried(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--videos", f"{clips}/*.mp4", "--prompts", str(tmp_path / "prompts.txt"))
    good = (clips / "b.mp4").read_bytes()
    (clips / "b.mp4").write_text("this is no video")
    rows = scored(tmp_path, *words)
    assert [row["rewards"]["brightness"] is None for row in rows] == [
        False,
        True,
        False,
    ]
    assert "b.mp4:" in rows[1]["error"]

    (clips / "b.mp4").write_bytes(good)
    capsys.readouterr()
    rows = scored(tmp_path, *words)
    assert "1 of 3 videos to score" in capsys.readouterr().out
    assert [row["rewards"]["brightness"] for row in rows] == pytest.approx(
        [0.2, 0.4, 0.8], abs=2.5 / 255
    )
    assert "error" not in rows[1]


def test_file_that_kills_the_decoder_loses_its_row(
    clips: Path, tmp_path: Path, monkeypatch
) -> None:
    """The file is a sound video to every other decoder."""
    decoder_with_a_trap(tmp_path, "trap and os.kill(os.getpid(), 11)", monkeypatch)
    (clips / "b.mp4").rename(clips / "b_trap.mp4")
    rows = scored(
        tmp_path,
        "--videos",
        f"{clips}/*.mp4",
        "--prompts",
        str(tmp_path / "prompts.txt"),
    )
    assert [row["rewards"]["brightness"] is None for row in rows] == [
        False,
        True,
        False,
    ]
    assert "b_trap.mp4" in rows[1]["error"]
    assert "-11" in rows[1]["error"]


def test_no_scored_video_exits_1(clips: Path, tmp_path: Path) -> None:
    for name in GREYS:
        (clips / name).write_bytes(b"")
    rows = scored(
        tmp_path,
        "--videos",
        f"{clips}/*.mp4",
        "--prompts",
        str(tmp_path / "prompts.txt"),
        code=1,
    )
    assert all("error" in row for row in rows)


def test_rows_of_earlier_calls_are_kept(clips: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("only\n")
    for name in ("a.mp4", "c.mp4"):
        rows = scored(
            tmp_path,
            "--videos",
            str(clips / name),
            "--prompts",
            str(tmp_path / "one.txt"),
        )
    assert [Path(row["video"]).name for row in rows] == ["c.mp4", "a.mp4"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--videos", "{clips}/[ab].mp4", "--prompts", "{root}/prompts.txt"],
            "2 videos",
        ),
        (
            ["--videos", "{clips}/*.avi", "--prompts", "{root}/prompts.txt"],
            ".avi",
        ),
        (["--prompts", "{root}/prompts.txt"], "--videos"),
        (["--prompts", "{root}/nowhere.csv"], "nowhere.csv"),
        (["--prompts", "{root}/empty.csv"], "empty.csv:"),
        (
            ["--prompts", "{root}/other.csv"],
            "other.csv:",
        ),
        (
            ["--prompts", "{root}/mute.csv"],
            "mute.csv:",
        ),
    ],
)
def test_unmatched_videos_and_prompts_exit_2(
    clips: Path,
    tmp_path: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.csv").write_text("video,prompt\n")
    (tmp_path / "other.csv").write_text("clip,prompt\na.mp4,rain\n")
    (tmp_path / "mute.csv").write_text("video,text\na.mp4,rain\n")
    scored(
        tmp_path, *(word.format(clips=clips, root=tmp_path) for word in words), code=2
    )
    assert message in capsys.readouterr().err


def test_score_config_typo_exits_2() -> None:
    words = [
        "--prompts",
        "p.txt",
        "--out",
        "o.jsonl",
        "rewards.mine.kind=brigthness",
        "bach=3",
    ]
    assert "'batch'" in refused_early(str(ROOT / "launch" / "score.py"), *words)


@pytest.mark.parametrize("kind", ["lost", "nan", "cut"])
def test_damaged_reward_model_exits_2_with_its_file(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """Never a score from random weights."""
    folder = tmp_path / "descore"
    DeScore.from_base(save_tiny_qwen(tmp_path / "base"), settings=SETTINGS).save(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.language_model.layers.1.self_attn.q_proj.weight"
    if kind == "lost":
        tensors.pop(name)
    else:
        tensors[name][0, 0] = torch.nan
    save_file(tensors, file)
    if kind == "cut":
        file.write_bytes(file.read_bytes()[:5000])
    scored(
        tmp_path,
        "--videos",
        f"{clips}/*.mp4",
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "rewards.descore.weight=1",
        f"rewards.descore.checkpoint={folder}",
        code=2,
    )
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(file) in last
    assert kind == "cut" or name in last
    assert read_jsonl(tmp_path / "scores.jsonl") == []


@pytest.fixture
def twelve(tmp_path: Path) -> Path:
    """Empty files 0.mp4 to 11.mp4, and a prompt for each that has its number."""
    (tmp_path / "out").mkdir()
    for i in range(12):
        (tmp_path / "out" / f"{i}.mp4").touch()
    text = "".join(f"prompt {i}\n" for i in range(12))
    (tmp_path / "prompts.txt").write_text(text)
    return tmp_path


def test_numbered_videos_get_their_prompts(
    twelve: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = find_items(f"{twelve}/out/*.mp4", twelve / "prompts.txt")
    for item in items:
        assert item.prompt == f"prompt {Path(item.name).stem}"
    # and the first and last pair are shown with their number
    head, first, last = capsys.readouterr().out.strip().split("\n")
    assert head.startswith("12 videos")
    assert first.endswith("0.mp4  'prompt 0'")
    assert last.endswith("11.mp4  'prompt 11'")


@pytest.mark.parametrize("change", ["prompt 12\n", None])
def test_another_number_of_prompts_is_refused(twelve: Path, change: str | None) -> None:
    lines = (twelve / "prompts.txt").read_text().split("\n")[:-1]
    lines = [*lines, "prompt 12"] if change else ["", *lines[1:]]
    (twelve / "prompts.txt").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"12 videos .* 1[13] prompts"):
        find_items(f"{twelve}/out/*.mp4", twelve / "prompts.txt")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "video,prompt\na.mp4,x\nb.mp4,a ball, slowly\n", r"t\.csv:3: has 3 "),
        ("t.csv", "video,prompt\na.mp4,x\nb.mp4\n", r"t\.csv:3: has 1 "),
        ("t.csv", "video,prompt,prompt\na.mp4,x,y\n", r"t\.csv.*'prompt'"),
        ("t.csv", "video;prompt\na.mp4;x\n", "video;prompt"),
        ("t.csv", "video,prompt\na.mp4,\n", r"t\.csv:2:"),
        ("t.jsonl", '{"video": "a.mp4", "prompt": "x"}\n' * 2 + "?", r"t\.jsonl:3:"),
        (
            "t.jsonl",
            '{"video": "a.mp4", "prompt": "x"}\n{"video": "a", "prompt": "\\ud83d"}\n',
            r"t\.jsonl:2:.*ud83d",
        ),
        (
            "t.jsonl",
            '{"video": "\\udc80.mp4", "prompt": "x"}\n',
            r"t\.jsonl:1:.*udc80",
        ),
        ("t.jsonl", '{"file": "a.mp4", "prompt": ["x"]}\n', r"t\.jsonl:1:"),
        (
            "t.jsonl",
            '{"file": "a.mp4", "prompt": "x", "prompt": "y"}\n',
            r"t\.jsonl:1:.*'prompt'",
        ),
    ],
)
def test_bad_row_of_a_table_is_refused_with_its_line(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        find_items(None, tmp_path / name)


def test_file_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    os.close(os.open(bytes(tmp_path) + b"/a\xff.mp4", os.O_CREAT))
    (tmp_path / "p.txt").write_text("a ball\n")
    with pytest.raises(ValueError, match="udcff"):
        find_items(f"{tmp_path}/*.mp4", tmp_path / "p.txt")


def test_repeated_row_and_percentiles_are_printed(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["video,prompt", "a.mp4,x", "c.mp4,x", "a.mp4,x", "gone.mp4,x"]
    (clips / "table.csv").write_text("\n".join(rows) + "\n")
    assert len(scored(tmp_path, "--prompts", str(clips / "table.csv"))) == 3
    said = capsys.readouterr().out
    assert "1 of 4 rows repeat" in said
    assert "over 2 videos" in said
    assert "1 missing" in said
    assert "check_rewards.py" in said


def test_described_values_have_percentiles() -> None:
    """0, 1, ..., 20: the percentiles fall on numbers."""
    line = score.describe_values([float(i) for i in reversed(range(21))])
    for text in ("mean 10.0", "min 0.0", "5 % 1.0", "median 10.0", "95 % 19.0"):
        assert text in line
    assert score.describe_values([3.0]) == "mean 3.0000 over 1 videos"


def test_unusual_line_separators_in_a_prompt_survive_scoring(
    clips: Path, tmp_path: Path
) -> None:
    prompt = "a\u2028b\u2029c\u0085d\x0be\x1cf"
    row = json.dumps({"video": "a.mp4", "prompt": prompt}, ensure_ascii=False)
    (clips / "t.jsonl").write_text(row + "\n", encoding="utf-8")
    for _ in range(2):
        (found,) = scored(tmp_path, "--prompts", str(clips / "t.jsonl"))
        assert found["prompt"] == prompt


def test_video_without_a_score_is_a_failure_with_its_reason(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reward scores a.mp4 only: the others fail with its reason."""
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from common.types import Score\n"
        "def score(video, prompts):\n"
        "    dark = video.float().mean((1, 2, 3, 4)) < 60\n"
        "    value = torch.where(dark, 1.0, float('nan'))\n"
        "    return Score(value, reasons=['' if d else 'too bright' for d in dark])\n"
    )
    words = [
        "--videos",
        f"{clips}/*.mp4",
        "--prompts",
        str(tmp_path / "prompts.txt"),
        f"rewards.mine.target={tmp_path / 'mine.py'}:score",
    ]
    first, second, third = scored(tmp_path, *words)
    assert "error" not in first
    for row in (second, third):
        assert row["error"] == "mine: too bright"
        assert row["rewards"]["mine"] is None
    assert "2 failures" in capsys.readouterr().out


def test_scores_of_a_reward_file_that_changed_are_refused(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows that are there came from other code."""
    file = tmp_path / "mine.py"
    words = ["--videos", f"{clips}/*.mp4", "--prompts", str(tmp_path / "prompts.txt")]
    words.append(f"rewards.mine.target={file}:score")
    file.write_text("def score(video, prompts):\n    return [1.0] * len(prompts)\n")
    scored(tmp_path, *words)
    scored(tmp_path, *words)
    file.write_text("def score(video, prompts):\n    return [7.0] * len(prompts)\n")
    scored(tmp_path, *words, code=2)
    assert "mine.py" in capsys.readouterr().err


def test_video_that_was_replaced_is_scored_again(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file's row is that of its content; the others keep theirs."""
    films = tmp_path / "films"
    shutil.copytree(clips, films)
    names = sorted(path.name for path in films.glob("*.mp4"))
    words = ["--videos", f"{films}/*.mp4", "--prompts", str(tmp_path / "prompts.txt")]
    before = scored(tmp_path, *words)
    (films / names[0]).write_bytes((films / names[1]).read_bytes())
    capsys.readouterr()
    after = scored(tmp_path, *words)
    assert "1 of 3 videos to score" in capsys.readouterr().out
    assert after[0]["rewards"] == before[1]["rewards"] != before[0]["rewards"]
    assert after[1:] == before[1:]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "x"}, {"video": "a.mp4", "prompt": "y"}], r"t\.jsonl:1"),
        ([{"video": "a.mp4", "file": "b.mp4", "prompt": "x"}], "video and file"),
    ],
)
def test_jsonl_whose_rows_name_videos_differently_is_refused(
    tmp_path: Path, rows: list[dict], message: str
) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        find_items(None, tmp_path / "t.jsonl")


def items_of(prompts: str) -> list[ScoreItem]:
    return [ScoreItem(f"{i}.mp4", Path(f"{i}.mp4"), p) for i, p in enumerate(prompts)]


def test_batches_of_prompts_are_whole() -> None:
    """A batch of 4 takes prompts of 2 and 2; one of 5 videos is a batch of its own."""
    items = items_of("abacbccccd")
    found = list(prompt_batches(items, 4, "score"))
    assert ["".join(item.prompt for item in batch) for batch in found] == [
        "aabb",
        "ccccc",
        "d",
    ]


def test_prompt_with_a_missing_video_is_scored_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    items = items_of("aabbcc")
    missing = [("1.mp4", "a"), ("5.mp4", "c")]
    found = share_of_prompts(items, missing)
    assert [item.name for item in found] == ["0.mp4", "1.mp4", "4.mp4", "5.mp4"]
    # two ranks share prompts, not videos
    monkeypatch.setattr("common.distributed.world_size", lambda: 2)
    monkeypatch.setattr("common.distributed.rank", lambda: 1)
    assert [item.name for item in share_of_prompts(items, missing)] == [
        "4.mp4",
        "5.mp4",
    ]


def test_reward_that_cannot_compare_so_many_videos_is_refused_with_its_name() -> None:
    class PairsOnly:
        def check_group_size(self, size: int) -> None:
            if size > 2:
                raise ValueError(f"not {size}")

    check_groups({"mine": PairsOnly(), "other": object()}, items_of("aab"))
    with pytest.raises(ValueError, match=r"rewards\.mine: not 3"):
        check_groups({"mine": PairsOnly()}, items_of("aaba"))
