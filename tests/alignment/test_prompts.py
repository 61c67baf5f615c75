"""Prompts: files with mistakes, and the schedule's promises."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from alignment.prompts import (
    PromptBatch,
    PromptSchedule,
    describe_shared_prompts,
    read_image_prompts,
    read_prompts,
)
from common.types import ImagePrompt, text_of

NINE = [f"prompt {i}" for i in range(9)]


def test_text_and_json_lines_hold_the_same_prompts(tmp_path: Path) -> None:
    text, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_bytes("\ufeffa red ball\r\n\r\n  ein blauer Würfel \n".encode())
    rows = [{"prompt": "a red ball"}, {"prompt": "ein blauer Würfel", "id": 3}]
    lines.write_text("\n".join(json.dumps(row) for row in rows))
    assert (
        read_prompts(text) == read_prompts(lines) == ["a red ball", "ein blauer Würfel"]
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": "b"\n', r"p\.jsonl:3:"),
        (
            "p.jsonl",
            b'{"prompt": "a"}\n{"promt": "b"}\n',
            r"p\.jsonl:2:",
        ),
        ("p.jsonl", b'{"prompt": " "}\n', r"p\.jsonl:1:"),
        ("p.jsonl", b'["a"]\n', r"p\.jsonl:1:"),
        ("p.txt", b"a\nb\n\xff\n", r"p\.txt:3:"),
        ("p.txt", b"\n \n", r"p\.txt:"),
        ("p.csv", b"a\n", r"p\.csv:"),
    ],
)
def test_bad_prompt_file_reports_its_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_missing_file_raises_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no\.txt"):
        read_prompts(tmp_path / "no.txt")


def test_epoch_has_each_prompt_once_in_new_order() -> None:
    schedule = PromptSchedule(NINE, seed=1, prompts_per_step=4)
    drawn = [
        prompt for step in range(9) for prompt in schedule.at(step).prompts
    ]  # 36 = 4 epochs
    epochs = [drawn[i : i + 9] for i in range(0, 36, 9)]
    assert all(Counter(epoch) == Counter(NINE) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len({seed for step in range(9) for seed in schedule.at(step).seeds}) == 36


def test_prompt_step_does_not_depend_on_earlier_steps() -> None:
    walked = PromptSchedule(NINE, seed=1, prompts_per_step=4)
    batches = [walked.at(step) for step in range(7)]
    for step in (6, 0, 3):
        assert (
            PromptSchedule(NINE, seed=1, prompts_per_step=4).at(step) == batches[step]
        )
    assert PromptSchedule(NINE, seed=2, prompts_per_step=4).at(0) != batches[0]


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_rank_shares_join_to_the_batch(world: int) -> None:
    batch = PromptSchedule(NINE, seed=0, prompts_per_step=6).at(2)
    shares = [batch.share(rank, world) for rank in range(world)]
    assert tuple(p for share in shares for p in share.prompts) == batch.prompts
    assert tuple(s for share in shares for s in share.seeds) == batch.seeds


def test_uneven_rank_shares_raise() -> None:
    with pytest.raises(ValueError, match=r"\b6\b"):
        PromptBatch(tuple("abcdef"), tuple(range(6))).share(0, 4)


def test_schedule_without_prompts_raises() -> None:
    with pytest.raises(ValueError, match=r"\b0\b"):
        PromptSchedule([], seed=0, prompts_per_step=4)


SEPARATORS = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\x1dh\x1ei"


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_unusual_line_separators_stay_inside_a_prompt(
    tmp_path: Path, name: str
) -> None:
    line = SEPARATORS
    if name == "p.jsonl":
        line = json.dumps({"prompt": SEPARATORS}, ensure_ascii=False)
    (tmp_path / name).write_text(f"{line}\n{line}\n", encoding="utf-8")
    assert read_prompts(tmp_path / name) == [SEPARATORS, SEPARATORS]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "b \\ud83d"}\n', r"p\.jsonl:2:"),
        ("p.jsonl", b'{"prompt": "\\ude00 b"}\n', r"p\.jsonl:1:"),
        ("p.txt", "a\nb\n".encode("utf-16"), r"p\.txt: is UTF-16"),
        ("p.txt", b"a\nb\0\n", r"p\.txt:2:"),
        ("p.jsonl", b"a\n" + b"[" * 100_000, r"p\.jsonl:1:"),
        ("p.jsonl", b"[" * 100_000, r"p\.jsonl:1:"),
        ("p.jsonl", b'{"prompt": "a", "prompt": "b"}\n', r"p\.jsonl:1:.*'prompt'"),
        ("p.jsonl", b"1" * 10_000, r"p\.jsonl:1:"),
    ],
)
def test_prompt_that_is_no_text_is_refused_with_its_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_whole_emoji_is_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a \\ud83d\\ude00"}\n')
    assert read_prompts(tmp_path / "p.jsonl") == ["a \U0001f600"]


def test_held_out_prompts_that_are_trained_on_are_counted() -> None:
    text = describe_shared_prompts(["a", "b"], ["b", "c", "b"])
    assert text.startswith("2 of 3 ")
    assert describe_shared_prompts(["a"], ["b"]) == ""


def test_images_lie_beside_their_file(tmp_path: Path) -> None:
    """An absolute path stays; commands that know no images refuse them instead of ignoring them."""
    file = tmp_path / "p.jsonl"
    file.write_text(
        '{"prompt": "rain", "image": "a.png"}\n{"prompt": "sun"}\n'
        '{"prompt": "wind", "image": "/images/b.png"}\n'
    )
    assert read_image_prompts(file) == [
        ImagePrompt("rain", str(tmp_path / "a.png")),
        "sun",
        ImagePrompt("wind", "/images/b.png"),
    ]
    with pytest.raises(ValueError, match=r"texts alone.*'rain'"):
        read_prompts(file)
    file.write_text('{"prompt": "rain", "image": 3}\n')
    with pytest.raises(ValueError, match=r"p\.jsonl:1: .*\"image\""):
        read_image_prompts(file)


def test_prompts_with_two_images_are_two_prompts() -> None:
    """The schedule's seeds and held-out comparison take text and image together."""
    first, second = ImagePrompt("rain", "a.png"), ImagePrompt("rain", "b.png")
    schedule = PromptSchedule([first, second], seed=0, prompts_per_step=2)
    assert set(schedule.at(0).prompts) == {first, second}
    assert describe_shared_prompts([first], [second]) == ""
    assert text_of(first) == text_of("rain") == "rain"
    shared = describe_shared_prompts([first], [first, second])
    assert shared.startswith("1 of 2")
