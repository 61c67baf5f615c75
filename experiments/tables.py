"""Read the results of many runs, average them over seeds, and write tables and plots."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.files import read_jsonl
from experiments.runner import write_json
from launch.evaluation.intervals import mean_ci95, seeds_ci95

# Value lists of a training run, for example the scores on each of its test sets.
Tables = Sequence[Sequence[float]]
# A backward costs two forwards, so a forward with gradient counts as three.
GRAD_COST = 3


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Read the rows that launch/evaluate.py wrote into a folder, in the order of its inputs."""
    # Several ranks may have written them in another order.
    return sorted(read_jsonl(folder / "results.jsonl"), key=lambda row: row["index"])


def over_seeds(
    runs: Mapping[int, Tables], minus: Mapping[int, Tables] | None = None
) -> dict[str, Any]:
    """MEAN over seeds, tables and values with its 95 % interval, from tables by seed.

    ``minus`` gives the mean difference to other runs, value by value at the same seeds. All seeds
    are tested on the same items (`seeds_ci95`). A single seed has the bootstrap over its values,
    which knows no spread of training.
    """
    values = []
    for seed in sorted(runs):
        tables = [np.asarray(table, dtype=np.float64) for table in runs[seed]]
        if minus is not None:
            others = zip(tables, minus[seed], strict=True)
            tables = [table - np.asarray(other) for table, other in others]
        values.append(tables)
    if len(values) == 1:
        interval = mean_ci95(np.concatenate(values[0]), seed=0)
    else:
        interval = seeds_ci95([np.concatenate(tables) for tables in values])
    return interval.as_dict()


def training_forwards(row: Mapping[str, float]) -> float:
    """DiT samples of a training step, from its row of metrics.jsonl."""
    return row["forwards/no_grad"] + GRAD_COST * row["forwards/grad"]


def show(value: Mapping[str, Any] | None) -> str:
    """Format a mean with its interval, as the JSON files have it; empty for None."""
    if value is None:
        return ""
    low, high = value["ci95"]
    return f"{value['mean']:.3f} [{low:.3f}, {high:.3f}]"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a markdown table."""
    lines = []
    for row in (head, *rows):
        cells = " | ".join(row)
        lines.append(f"| {cells} |")
    lines.insert(1, "|---" * len(head) + "|")
    return lines


def write_results(
    folder: Path,
    name: str,
    record: Mapping[str, Any],
    page: Sequence[str],
    values: Mapping[Any, Any],
) -> None:
    """Write NAME.json, NAME.md and NAME.values.json.gz, what the intervals are made of."""
    write_json(folder / f"{name}.json", record)
    write_values(folder / f"{name}.values.json.gz", values)
    write_page(folder / f"{name}.md", page)


def write_values(path: Path, values: Mapping[Any, Any]) -> None:
    """Write the values behind a page as compressed JSON; equal values give equal bytes."""
    text = json.dumps(values, separators=(",", ":"))
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def read_values(path: Path) -> dict[str, Any]:
    """Read what `write_values` wrote."""
    return json.loads(gzip.decompress(path.read_bytes()))


def write_page(path: Path, lines: Sequence[str]) -> None:
    """Write a page of markdown and print it."""
    page = "\n".join(lines) + "\n"
    path.write_text(page, encoding="utf-8")
    print(page)


def new_figure(count: int, *, share_y: bool = True) -> tuple[Any, Any]:
    """Make a matplotlib figure with ``count`` panels in a row, and return it with its axes."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams |= {
        # A fixed salt gives equal runs equal bytes.
        "svg.hashsalt": "reproduce_rm",
        "font.size": 8,
        "axes.grid": True,
        "grid.alpha": 0.3,
    }
    return pyplot.subplots(
        1,
        count,
        figsize=(4.2 * count, 3.4),
        sharey=share_y,
    )


def save_figure(figure: Any, path: Path, *, legend_of: Any = None) -> None:
    """Save a figure as SVG, with the legend of a panel below all of them if given."""
    bottom = 0.0
    if legend_of is not None:
        names = legend_of.get_legend_handles_labels()
        figure.legend(*names, loc="outside lower center", ncols=4)
        # The legend takes this share of the height.
        bottom = 0.12
    figure.tight_layout(rect=(0, bottom, 1, 1))

    # Without a date, equal runs write equal files.
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
