"""What `experiments/reproduce_rm.py` measured, as JSON, as a page of tables, and as two plots."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.log import read_metrics
from experiments.rm_arms import COMMAND, METHODS, TESTS, Cell
from launch.evaluation.intervals import (
    Interval,
    difference_ci95,
    mean_ci95,
    runs_ci95,
)
from rm.prompt import DIMENSIONS

OUTSIDE = TESTS[1:]
GROUPS = {"in domain": TESTS[:1], "out of domain": OUTSIDE}
CURVES = {  # metric of the training log that says how often the preference was met
    "discriminative": "train/accuracy",
    "generative": "reward/preference",
    "stage1": "train/accuracy",
    "descore": "train/accuracy",
}


@dataclass(frozen=True)
class RmOutcome:
    """A judge on one test, in the order of the table, so that outcomes of the same seed compare pair by pair.

    right    per decided pair, 1 if the order was right
    stated   per decided pair, what the five scores that both chains state add up to: 1 the right order, 0 the same sum,
             -1 the wrong order, NaN where a chain states none
    thought  per pair, the share of right sub-dimensions; without chains of thought empty
    """

    right: tuple[float, ...]
    stated: tuple[float, ...] = ()
    thought: tuple[float, ...] = ()


Outcomes = dict[Cell, dict[str, RmOutcome]]


def read_outcomes(run: Path, cells: Sequence[Cell]) -> Outcomes:
    """By cell and test."""
    found: Outcomes = {}
    for cell in cells:
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TESTS}
        for line in (
            (cell.folder(run) / "tests" / "results.jsonl")
            .read_text(encoding="utf-8")
            .splitlines()
        ):
            row = json.loads(line)
            rows[Path(row["video_A"]).name.split("_")[0]].append(row)
        found[cell] = {
            name: _outcome(sorted(part, key=lambda row: row["index"]))
            for name, part in rows.items()
        }
    return found


def _outcome(rows: Sequence[dict[str, Any]]) -> RmOutcome:
    def right(row: dict[str, Any]) -> float:
        a, b = row["reward_A"], row["reward_B"]
        return float(
            a is not None and b is not None and (a - b) * row["label"] > 0
        )  # unjudged is wrong

    scored = [row for row in rows if row.get("cot_A") or row.get("cot_B")]
    return RmOutcome(
        tuple(right(row) for row in rows if row["label"] != 0),
        tuple(_stated(row) for row in rows if row["label"] != 0),
        tuple(
            (row.get("quality_A", 0.0) + row.get("quality_B", 0.0)) / 2
            for row in scored
        ),
    )


def _stated(row: dict[str, Any]) -> float:
    sums = []
    for side in "AB":
        scores = [(row.get(f"parts_{side}") or {}).get(name) for name in DIMENSIONS]
        sums.append(math.nan if None in scores else sum(scores))
    lead = (sums[0] - sums[1]) * row["label"]
    return math.nan if math.isnan(lead) else float((lead > 0) - (lead < 0))


def over_seeds(
    outcomes: Outcomes, size: int, method: str, tests: Sequence[str], field: str
) -> Interval | None:
    """Over the seeds of a method; None where it states nothing."""
    cells = sorted(
        (c for c in outcomes if (c.size, c.method) == (size, method)),
        key=lambda c: c.seed,
    )
    runs = [[getattr(outcomes[cell][test], field) for test in tests] for cell in cells]
    return (
        runs_ci95(runs, seed=0)
        if runs and all(table for run in runs for table in run)
        else None
    )


def difference(
    outcomes: Outcomes,
    size: int,
    one: str,
    other: str,
    tests: Sequence[str],
    field: str,
) -> Interval:
    """``one`` minus ``other``, pair by pair of the same seed."""
    seeds = sorted({cell.seed for cell in outcomes})
    both = [
        [
            [getattr(outcomes[Cell(seed, size, method)][test], field) for test in tests]
            for seed in seeds
        ]
        for method in (one, other)
    ]
    return difference_ci95(*both, seed=0)


def write_results(
    run: Path, out: Path, cells: Sequence[Cell], *, commit: str, workers: int
) -> str:
    """Write reproduce_rm.json, .md and two .svg into ``out``; the page."""
    outcomes = read_outcomes(run, cells)
    seconds = json.loads((run / "seconds.json").read_text(encoding="utf-8"))
    sizes = sorted({cell.size for cell in cells if cell.size})
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "command": COMMAND,
        "commit": commit,
        "seconds": seconds,
        "judges": [
            {
                "seed": cell.seed,
                "size": cell.size,
                "method": cell.method,
                "tests": {
                    name: {
                        "accuracy": mean_ci95(found.right, seed=0, resamples=2_000).as_dict(),
                        **({"sub_dimensions": mean_ci95(found.thought, seed=0, resamples=2_000).as_dict()}
                           if found.thought else {}),
                    }
                    for name, found in tests.items()
                },
            }
            for cell, tests in outcomes.items()
        ],
    }  # fmt: skip
    (out / "reproduce_rm.json").write_text(
        json.dumps(record, indent=1) + "\n", encoding="utf-8"
    )
    plot_sizes(outcomes, sizes, out / "reproduce_rm_size.svg")
    plot_training(
        run,
        [cell for cell in cells if cell.size == sizes[-1]],
        out / "reproduce_rm_training.svg",
    )
    page = _page(outcomes, sizes, commit=commit, seconds=seconds, workers=workers)
    (out / "reproduce_rm.md").write_text(page, encoding="utf-8")
    return page


def _page(
    outcomes: Outcomes,
    sizes: Sequence[int],
    *,
    commit: str,
    seconds: dict[str, float],
    workers: int,
) -> str:
    seeds = sorted({cell.seed for cell in outcomes})
    largest = sizes[-1]
    tests = {name: (name,) for name in TESTS} | {"mean of the four": OUTSIDE}
    lines = [
        "# DeScore's claims in miniature",
        "",
        f"Made by `{COMMAND}` at commit {commit}: {len(outcomes)} judges, {seconds['wall'] / 60:.0f} minutes with "
        f"{workers} processes, {seconds['cpu'] / 60:.0f} minutes of one core. "
        f"Mean over the seeds {', '.join(map(str, seeds))} and 95 % interval of a bootstrap that "
        "draws seeds, then pairs. Accuracy is over pairs that are no ties; equal scores are wrong.",
        "",
        f"## Accuracy on {largest} training pairs",
        "",
        *_table(
            "judge",
            tests,
            METHODS,
            lambda m, t: over_seeds(outcomes, _size(m, largest), m, t, "right"),
        ),
        "",
        "## Accuracy against training pairs",
        "",
    ]
    for group, members in GROUPS.items():
        columns = {f"{group}, {size}": size for size in sizes}
        trained = {name: method for name, method in METHODS.items() if name != "base"}
        lines += [
            *_table(
                "judge",
                columns,
                trained,
                lambda m, s, t=members: over_seeds(outcomes, s, m, t, "right"),
            ),
            "",
        ]
    thinking = {
        name: method
        for name, method in METHODS.items()
        if "chains: 0" not in method.judging
    }
    lines += [
        f"## Right sub-dimension scores in the chains of thought, {largest} training pairs",
        "",
        *_table(
            "judge",
            tests,
            thinking,
            lambda m, t: over_seeds(outcomes, _size(m, largest), m, t, "thought"),
        ),
        "",
        f"## What the score adds to what the chains state, {largest} training pairs",
        "",
        "The preference is the order of two sums of five scores, and a chain states five scores. Where their sums are "
        "in the right order, the same, or in the wrong order: the share of pairs, and how often the judge's own score "
        "is right there. All seeds together.",
        "",
        *_against_statement(outcomes, largest),
        "",
        f"## Differences on the same pairs, {largest} training pairs",
        "",
        *_differences(outcomes, largest),
        "",
        "![accuracy against training pairs](reproduce_rm_size.svg)",
        "",
        "![accuracy in training](reproduce_rm_training.svg)",
    ]
    return "\n".join(lines) + "\n"


def _size(method: str, size: int) -> int:
    return 0 if method == "base" else size


def _table(
    head: str,
    columns: dict[str, Any],
    rows: dict[str, Any],
    cell: Callable[..., Interval | None],
) -> list[str]:
    lines = [f"| {head} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, method in rows.items():
        lines.append(
            f"| {method.title} | {' | '.join(shown(cell(name, column)) for column in columns.values())} |"
        )
    return lines


def shown(value: Interval | None) -> str:
    return (
        "" if value is None else f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"
    )


def _against_statement(outcomes: Outcomes, size: int) -> list[str]:
    cases = {"right": 1.0, "the same": 0.0, "wrong": -1.0}
    lines = [
        f"| judge | tests | {' | '.join(f'stated {case}' for case in cases)} |",
        "|---|---|---|---|---|",
    ]
    for name in ("generative", "stage1", "descore", "stage1_p0", "descore_p0"):
        for group, tests in GROUPS.items():
            found = [
                pair
                for cell, by_test in outcomes.items()
                if (cell.size, cell.method) == (size, name)
                for test in tests
                for pair in zip(by_test[test].right, by_test[test].stated, strict=True)
                if not math.isnan(pair[1])
            ]
            shown = []
            for wanted in cases.values():
                right = [r for r, stated in found if stated == wanted]
                mean = f"{sum(right) / len(right):.3f}" if right else "none"
                shown.append(f"{len(right) / max(1, len(found)):.3f}: {mean}")
            lines.append(f"| {METHODS[name].title} | {group} | {' | '.join(shown)} |")
    return lines


def _differences(outcomes: Outcomes, size: int) -> list[str]:
    compared = [("descore", "stage1", "thought")]
    compared += [("descore_p0", "stage1_p0", "thought")]
    compared += [
        ("descore", other, "right")
        for other in ("stage1", "generative", "discriminative")
    ]
    compared += [
        ("descore_p0", other, "right")
        for other in ("stage1_p0", "generative", "discriminative")
    ]
    compared += [
        ("descore", "descore_p0", "right"),
        ("stage1", "discriminative", "right"),
    ]
    what = {"right": "accuracy", "thought": "right sub-dimension scores"}
    lines = [f"| difference | {' | '.join(GROUPS)} |", "|---|---|---|"]
    for one, other, field in compared:
        found = [
            difference(outcomes, size, one, other, tests, field)
            for tests in GROUPS.values()
        ]
        title = f"{what[field]}: {METHODS[one].title} - {METHODS[other].title}"
        lines.append(f"| {title} | {' | '.join(map(shown, found))} |")
    return lines


def plot_sizes(outcomes: Outcomes, sizes: Sequence[int], path: Path) -> None:
    """Accuracy of every method against the number of training pairs, in and out of domain, with intervals."""
    figure, axes = figure_of(len(GROUPS))
    for axis, (group, tests) in zip(axes, GROUPS.items(), strict=True):
        for place, (name, method) in enumerate(METHODS.items()):
            if name == "base":
                continue
            found = [over_seeds(outcomes, size, name, tests, "right") for size in sizes]
            mean = [value.mean for value in found]
            error = [[v.mean - v.low for v in found], [v.high - v.mean for v in found]]
            shift = [
                size * (1 + 0.012 * (place - 3)) for size in sizes
            ]  # so that the bars stand side by side
            axis.errorbar(
                shift,
                mean,
                yerr=error,
                marker="o",
                markersize=3,
                capsize=2,
                label=method.title,
            )
        axis.set(title=group, xlabel="training pairs", ylabel="accuracy", xscale="log")
        axis.set_xticks(sizes, labels=map(str, sizes), minor=False)
        axis.minorticks_off()
    _save(figure, axes[0], path)


def plot_training(run: Path, cells: Sequence[Cell], path: Path) -> None:
    """How often the preference was met in training, every seed a line."""
    figure, axes = figure_of(len(CURVES))
    for axis, (name, metric) in zip(axes, CURVES.items(), strict=True):
        for cell in (c for c in cells if c.method == name):
            rows = read_metrics(cell.folder(run) / "metrics.jsonl")
            axis.plot(
                [row["step"] for row in rows],
                [row[metric] for row in rows],
                label=f"seed {cell.seed}",
                lw=1,
            )
        axis.set(
            title=METHODS[name].title, xlabel="step", ylabel=metric, ylim=(0.3, 1.0)
        )
    _save(figure, axes[0], path)


def figure_of(count: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams |= {
        "svg.hashsalt": "reproduce_rm",
        "font.size": 8,
        "axes.grid": True,
        "grid.alpha": 0.3,
    }
    return pyplot.subplots(1, count, figsize=(4.2 * count, 3.4), sharey=True)


def _save(figure: Any, first: Any, path: Path) -> None:
    names = first.get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=4)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path, metadata={"Date": None})
