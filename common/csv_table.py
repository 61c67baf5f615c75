"""Rows of a CSV file with the line where each starts, and a reason for each bad row."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from common.files import read_text

# The csv module's limit is shorter than a long chain of thought.
_MAX_FIELD = 1 << 24


@dataclass(frozen=True)
class CsvRow:
    """A row: its cells by column, or the problem that makes it a bad row."""

    line: int
    cells: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class CsvTable:
    """The columns and rows of a file. Blank lines are no rows."""

    path: Path
    columns: tuple[str, ...]
    rows: tuple[CsvRow, ...]


def read_csv(path: str | Path) -> CsvTable:
    """Read a CSV file in UTF-8 whose first line names the columns.

    A row with more or fewer cells than the header, or with a broken quote, is a bad row. Raises
    ValueError, with the file, for another encoding, two columns of the same name, and a quote
    that is never closed; OSError for a file that cannot be read.
    """
    path = Path(path)
    # strict: otherwise a quote that is not closed swallows rows without an error
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    rows: list[CsvRow] = []
    with _long_fields():
        columns: tuple[str, ...] = ()
        for line, cells, problem in _records(path, reader):
            if not columns:
                columns = _header(path, line, cells, problem)
            elif problem:
                rows.append(CsvRow(line, problem=problem))
            elif len(cells) != len(columns):
                rows.append(CsvRow(line, problem=_count_problem(cells, columns)))
            else:
                rows.append(CsvRow(line, dict(zip(columns, cells, strict=True))))
    return CsvTable(path, columns, tuple(rows))


def _records(path: Path, reader: csv._reader) -> Iterator[tuple[int, list[str], str]]:
    """Yield (first line, cells, problem) of every record that is no blank line."""
    while True:
        # A cell may span several lines.
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # At the end of the file everything after the quote is lost.
            if "unexpected end of data" in str(error):
                raise ValueError(
                    f"{path}:{line}: a quote that opens in this row is never closed"
                ) from error
            # Everything up to the end of this line is lost.
            last = reader.line_num
            lines = f"lines {line} to {last} are" if last > line else "this line is"
            yield line, [], f"{lines} no row, the quotes are wrong ({error})"
            continue
        if cells:
            yield line, cells, ""


def _header(
    path: Path, line: int, cells: Sequence[str], problem: str
) -> tuple[str, ...]:
    """Return the names of the columns without blanks around them."""
    if problem:
        raise ValueError(f"{path}:{line}: {problem}")
    columns = tuple(cell.strip() for cell in cells)
    # Columns without a name, such as pandas' index, are not read.
    for name in columns:
        if name and columns.count(name) > 1:
            raise ValueError(f"{path}: has two columns with the name {name!r}")
    return columns


def _count_problem(cells: Sequence[str], columns: Sequence[str]) -> str:
    problem = f"has {len(cells)} cells, the header {len(columns)}"
    if len(cells) > len(columns):
        return f"{problem}: quote cells that hold commas"
    return problem


def missing_columns(table: CsvTable, required: Sequence[str]) -> str:
    """Describe the columns that a table lacks, "" if it has all of them."""
    missing = [name for name in required if name not in table.columns]
    if not missing:
        return ""
    problem = f"{table.path}: lacks the columns {missing}, has {list(table.columns)}"
    # Some table programs separate cells by semicolons or tabs and still call it CSV.
    if len(table.columns) == 1 and (
        ";" in table.columns[0] or "\t" in table.columns[0]
    ):
        problem += "; cells must be separated by commas"
    return problem


@contextmanager
def _long_fields() -> Iterator[None]:
    """Allow long cells; the limit is a global of the csv module, so put it back afterwards."""
    previous = csv.field_size_limit(_MAX_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(previous)
