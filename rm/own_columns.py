"""Tables whose columns have other names than those of `rm.data.read_pairs`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from common.csv_table import CsvTable

# The two paths of "videos", for tables that have a column for each.
SIDES = ("video_A", "video_B")
RENAMED = ("videos", *SIDES, "prompt", "GSB", "CoT_A", "CoT_B", "answer")


def check_columns(columns: Mapping[str, str]) -> None:
    """Raise ValueError for a name that stands for nothing, or one path of a pair alone."""
    unknown = [name for name in columns if name not in RENAMED]
    if unknown:
        raise ValueError(
            f"columns names {', '.join(unknown)}; it takes {', '.join(RENAMED)}, each with the "
            "name that the table has for it"
        )
    # Half a pair is none, and two names for it would contradict each other.
    sides = [name for name in SIDES if name in columns]
    if len(sides) == 1:
        raise ValueError(f"columns names {sides[0]}: it needs {' and '.join(SIDES)}")
    if sides and "videos" in columns:
        raise ValueError("columns takes videos, or video_A and video_B, not both")


def renamed(table: CsvTable, columns: Mapping[str, str]) -> CsvTable:
    """Give a table the names of `rm.data.read_pairs`.

    columns  Our name -> the table's. "video_A" and "video_B" become "videos".

    Columns that are not named keep their names. Raises ValueError, naming the file, for a column
    that the table lacks.
    """
    if not columns:
        return table
    lacking = [name for name in columns.values() if name not in table.columns]
    if lacking:
        raise ValueError(
            f"{table.path}: columns names {lacking}, and the table has {list(table.columns)}"
        )

    # A column of the table that has one of our names, and is not meant, gives way.
    paired = SIDES[0] in columns
    taken = {*columns, "videos"} if paired else set(columns)
    theirs = {name: name for name in table.columns if name not in taken}
    theirs |= {ours: name for ours, name in columns.items() if ours not in SIDES}
    rows = []
    for row in table.rows:
        # A bad row has no cells.
        if not row.cells:
            rows.append(row)
            continue
        cells = {ours: row.cells[name] for ours, name in theirs.items()}
        if paired:
            paths = [row.cells[columns[side]].strip() for side in SIDES]
            cells["videos"] = repr(paths)
        rows.append(replace(row, cells=cells))
    names = (*theirs, "videos") if paired else tuple(theirs)
    return replace(table, columns=names, rows=tuple(rows))
