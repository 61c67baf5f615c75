"""Rows of CSV files: cells that do not match the header, broken quotes, encodings."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.csv_table import missing_columns, read_csv


def table_of(folder: Path, content: str | bytes) -> Path:
    path = folder / "table.csv"
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content)
    return path


def test_rows_have_the_line_where_they_start(tmp_path: Path) -> None:
    text = 'video,prompt\na.mp4,"one\ntwo"\n\nb.mp4,"x, ""y"""\n'
    rows = read_csv(table_of(tmp_path, text)).rows
    assert [(row.line, row.cells["prompt"]) for row in rows] == [
        (2, "one\ntwo"),
        (5, 'x, "y"'),
    ]


@pytest.mark.parametrize(
    ("row", "numbers"),
    [
        ("a.mp4,a red ball, rolling, slowly", ("4", "2")),
        ("a.mp4,", None),
        ("a.mp4", ("1", "2")),
        ("a.mp4,p,", ("3", "2")),
    ],
)
def test_row_with_another_number_of_cells_is_a_bad_row(
    tmp_path: Path, row: str, numbers: tuple[str, str] | None
) -> None:
    text = f"video,prompt\n{row}\nb.mp4,good\n"
    bad, good = read_csv(table_of(tmp_path, text)).rows
    assert good.cells == {"video": "b.mp4", "prompt": "good"}
    if numbers is None:
        assert bad.problem == ""
    else:
        assert f"has {numbers[0]} cells, the header {numbers[1]}" in bad.problem
        assert bad.line == 2


@pytest.mark.parametrize("columns", ["prompt,video,prompt", "prompt,video, prompt"])
def test_two_columns_with_a_name_are_refused(tmp_path: Path, columns: str) -> None:
    with pytest.raises(ValueError, match=r"table\.csv.*'prompt'"):
        read_csv(table_of(tmp_path, f"{columns}\na,b,c\n"))


def test_columns_without_a_name_may_be_several(tmp_path: Path) -> None:
    table = read_csv(table_of(tmp_path, ", video ,\n0,a.mp4,\n"))
    assert table.rows[0].cells["video"] == "a.mp4"


def test_quote_that_another_row_closes_loses_these_rows_only(tmp_path: Path) -> None:
    text = 'video,prompt\n"a.mp4,one\n"b.mp4",two\nc.mp4,three\n'
    bad, good = read_csv(table_of(tmp_path, text)).rows
    assert (bad.line, good.line) == (2, 4)
    assert "2 to 3" in bad.problem


def test_quote_that_is_never_closed_is_refused_with_its_line(tmp_path: Path) -> None:
    text = 'video,prompt\na.mp4,one\nb.mp4,"two\nc.mp4,three\n'
    with pytest.raises(ValueError, match=r"table\.csv:3:"):
        read_csv(table_of(tmp_path, text))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("video,prompt\na,b\n".encode("utf-16"), "UTF-16"),
        ("video,prompt\na,b\n".encode("utf-32"), "UTF-32"),
        ("video,prompt\na,b\n".encode("utf-16-le"), r"table\.csv:1:"),
        (b"video,prompt\na,b\nc,d\x00\n", r"table\.csv:3:"),
        ("video,prompt\na,caf\u00e9\n".encode("cp1252"), r"table\.csv:2:"),
    ],
)
def test_other_encoding_is_refused_with_the_file(
    tmp_path: Path, content: bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_csv(table_of(tmp_path, content))
    assert "table.csv" in str(error.value)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_and_byte_order_mark_are_no_content(tmp_path: Path, end: str) -> None:
    text = "\ufeffvideo,prompt\na.mp4,one\n".replace("\n", end)
    (row,) = read_csv(table_of(tmp_path, text)).rows
    assert row.cells == {"video": "a.mp4", "prompt": "one"}


def test_unusual_line_separators_stay_inside_their_cell(tmp_path: Path) -> None:
    cell = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\x1dh\x1ei"
    (row,) = read_csv(table_of(tmp_path, f"video,prompt\na.mp4,{cell}\n")).rows
    assert row.cells["prompt"] == cell


def test_missing_columns_of_a_semicolon_table_name_the_separator(
    tmp_path: Path,
) -> None:
    table = read_csv(table_of(tmp_path, "video;prompt\na;b\n"))
    assert "commas" in missing_columns(table, ["video"])
    assert missing_columns(table, ["video;prompt"]) == ""
