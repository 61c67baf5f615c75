"""The results of `make reproduce-rm`: read them, and write tables and plots."""

from __future__ import annotations

import ast
import csv
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.log import read_metrics
from experiments import tables
from experiments.heldout import order_right
from experiments.rm_methods import GROUPS, METHODS, NO_COT, OUTSIDE, TESTS, Cell
from launch.evaluation.intervals import mean_ci95
from rm.prompt import DIMENSIONS
from toy.people import PEOPLE

# The page names it.
COMMAND = "python experiments/reproduce_rm.py"
# Methods whose training is watched, in the panels of a plot.
CURVES = ("discriminative", "generative", "stage1", "descore")
WATCHED = "heldout/accuracy"
# Orders that the chains of thought of a pair state against the label, see `RmOutcome.stated`.
RIGHT = 1.0
SAME = 0.0
WRONG = -1.0
STATED_ORDERS = {
    RIGHT: "right",
    SAME: "the same",
    WRONG: "wrong",
}
# Names of the fields of `RmOutcome` in tables.
FIELD_TITLES = {
    "right": "accuracy",
    "thought": "right sub-dimension scores",
}


@dataclass(frozen=True)
class RmOutcome:
    """Results of a reward model on a test, in the order of its pairs.

    right    Per pair without a tie, 1 if the order was right, 1/2 for equal scores.
    stated   Per pair without a tie, the order of the sums of the five scores in the chains of
             thought: 1 right, 0 equal sums, -1 wrong, NaN where a score is missing.
    thought  Per pair, the share of right sub-dimension scores; empty without chains of thought.
    """

    right: tuple[float, ...]
    stated: tuple[float, ...] = ()
    thought: tuple[float, ...] = ()


Outcomes = dict[Cell, dict[str, RmOutcome]]
# Updates and the held-out accuracy after them.
Curve = list[tuple[int, float]]


def read_outcomes(run: Path, cells: Sequence[Cell]) -> Outcomes:
    """Read the results of all cells, by cell and test."""
    outcomes: Outcomes = {}
    for cell in cells:
        # A file name starts with the name of its test.
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TESTS}
        for row in tables.read_results(cell.folder(run) / "tests"):
            rows[Path(row["video_A"]).name.split("_")[0]].append(row)
        outcomes[cell] = {name: _outcome(part) for name, part in rows.items()}
    return outcomes


def _outcome(rows: Sequence[dict[str, Any]]) -> RmOutcome:
    # Ties have no right order.
    decided = [row for row in rows if row["label"] != 0]
    right = tuple(_right(row) for row in decided)
    stated = tuple(stated_order(row) for row in decided)

    # MEAN share of right sub-dimension scores over both videos.
    thought = []
    for row in rows:
        if row.get("cot_A") or row.get("cot_B"):
            quality = row.get("quality_A", 0.0) + row.get("quality_B", 0.0)
            thought.append(quality / 2)
    return RmOutcome(right, stated, tuple(thought))


def _right(row: dict[str, Any]) -> float:
    return order_right(row["reward_A"], row["reward_B"], row["label"])


def best_possible(run: Path) -> dict[str, tuple[float, ...]]:
    """By test, `People.best_accuracy` of every pair without a tie, in the order of its pairs."""
    best: dict[str, list[float]] = {name: [] for name in TESTS}
    with open(run / "tests" / "tests.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["GSB"] == "same":
                continue
            first, _ = ast.literal_eval(row["videos"])
            difference = float(row["utility_A"]) - float(row["utility_B"])
            name = Path(first).name.split("_")[0]
            best[name].append(PEOPLE.best_accuracy(difference))
    return {name: tuple(values) for name, values in best.items()}


def stated_order(row: dict[str, Any]) -> float:
    """`RmOutcome.stated` of a row."""
    # SUM of the five stated scores of each video.
    sums = []
    for side in "AB":
        parts = row.get(f"parts_{side}") or {}
        scores = [parts.get(name) for name in DIMENSIONS]
        if None in scores:
            return math.nan
        sums.append(sum(scores))

    # Positive where the stated order is right.
    lead = (sums[0] - sums[1]) * row["label"]
    return math.copysign(1.0, lead) if lead else 0.0


def runs_of(
    outcomes: Outcomes, size: int, method: str, tests: Sequence[str], field: str
) -> dict[int, tables.Tables]:
    """Values of a method, by seed and test."""
    # The base has no training pairs.
    wanted = (0 if method == "base" else size, method)
    runs = {}
    for cell, by_test in outcomes.items():
        if (cell.size, cell.method) == wanted:
            runs[cell.seed] = [getattr(by_test[test], field) for test in tests]
    return runs


def mean_of(
    outcomes: Outcomes,
    size: int,
    method: str,
    tests: Sequence[str],
    field: str,
    *,
    minus: str | None = None,
) -> dict[str, Any] | None:
    """MEAN of a field over seeds and tests; None where there are no values.

    ``minus`` gives the mean difference to another method, pair by pair at the same seeds.
    """
    runs = runs_of(outcomes, size, method, tests, field)
    complete = all(len(values) for run in runs.values() for values in run)
    if not runs or not complete:
        return None
    others = None
    if minus is not None:
        others = runs_of(outcomes, size, minus, tests, field)
        # The base is the same for all seeds, which have the same tests.
        if minus == "base":
            (of_base,) = others.values()
            others = dict.fromkeys(runs, of_base)
    return tables.over_seeds(runs, others)


def values_of(
    outcomes: Outcomes, best: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """Values of every pair, from which every interval of the page can be made again."""
    judges = []
    for cell, by_test in outcomes.items():
        judge = asdict(cell)
        judge["tests"] = {}
        for name, outcome in by_test.items():
            judge["tests"][name] = asdict(outcome)
        judges.append(judge)
    return {"best_possible": best, "judges": judges}


def record_of(cell: Cell, by_test: Mapping[str, RmOutcome]) -> dict[str, Any]:
    def interval(values: Sequence[float]) -> dict[str, Any]:
        return mean_ci95(values, seed=0, resamples=2_000).as_dict()

    # Intervals of each test.
    results = {}
    for name, outcome in by_test.items():
        results[name] = {"accuracy": interval(outcome.right)}
        if outcome.thought:
            results[name]["sub_dimensions"] = interval(outcome.thought)
    return {**asdict(cell), "tests": results}


def page_of(
    outcomes: Outcomes,
    sizes: Sequence[int],
    record: dict[str, Any],
    curves: Mapping[str, Mapping[int, Curve]],
    claims: Sequence[str],
    workers: int,
) -> list[str]:
    """Lines of the page; ``claims`` are those of a table (`experiments.rm_claims`)."""
    # Facts of the first paragraph.
    seeds = sorted({cell.seed for cell in outcomes})
    largest = sizes[-1]
    seconds = record["seconds"]
    tests = {name: (largest, (name,)) for name in TESTS}
    tests["mean of the four"] = (largest, OUTSIDE)
    lines = [
        "# DeScore's claims in miniature",
        "",
        f"Made by `{COMMAND}` at commit {record['commit']}: {len(outcomes)} reward models, "
        f"{seconds['wall'] / 60:.0f} minutes with {workers} processes, "
        f"{seconds['cpu'] / 60:.0f} minutes of a core. Mean over the seeds "
        f"{', '.join(map(str, seeds))}, with 95 % intervals for new seeds and new pairs "
        "(`seeds_ci95`). Accuracy leaves ties out; equal scores are half right. People's labels "
        "are drawn, so no model can exceed the best possible accuracy. The page compares "
        f"{record['comparisons']} means; one interval in twenty misses by chance.",
        "",
        "## The paper's claims",
        "",
        "A claim holds where the interval of its number lies above 0, does not hold where it "
        "lies below, and cannot be told where it contains 0.",
        "",
        *claims,
        "",
        f"## Accuracy on {largest} training pairs",
        "",
        *_table(outcomes, tests, METHODS, "right"),
        _best_row(record["best_possible"]),
        "",
        f"## Training on {largest} pairs: efficiency and stability",
        "",
        *efficiency_table(curves),
        "",
        "## Accuracy against training pairs",
        "",
    ]

    # A table over sizes in the training domain, and another outside of it.
    trained = [name for name in METHODS if name != "base"]
    for group, members in GROUPS.items():
        columns = {f"{group}, {size}": (size, members) for size in sizes}
        lines += [*_table(outcomes, columns, trained, "right"), ""]

    # Methods that write a CoT.
    thinking = [name for name, method in METHODS.items() if method.scoring != NO_COT]
    return [
        *lines,
        f"## Right sub-dimension scores in the chains of thought, {largest} training pairs",
        "",
        *_table(outcomes, tests, thinking, "thought"),
        "",
        f"## What the score adds to the scores in the CoT, {largest} training pairs",
        "",
        "A CoT states five scores. The columns are the order of their sums against the label: the "
        "share of pairs, and the accuracy of the reward model's score on them. All seeds together.",
        "",
        *stated_table(outcomes, largest),
        "",
        f"## Differences on the same pairs, {largest} training pairs",
        "",
        *_differences(outcomes, largest),
        "",
        "![accuracy against training pairs](reproduce_rm_size.svg)",
        "",
        "![accuracy in training](reproduce_rm_training.svg)",
    ]


def _table(
    outcomes: Outcomes,
    columns: Mapping[str, tuple[int, Sequence[str]]],
    methods: Iterable[str],
    field: str,
) -> list[str]:
    """Table of a field by method, and by the training pairs and tests of a column."""
    rows = []
    for name in methods:
        cells = [METHODS[name].title]
        for size, tests in columns.values():
            cells.append(tables.show(mean_of(outcomes, size, name, tests, field)))
        rows.append(cells)
    return tables.markdown_table(["reward model", *columns], rows)


def stated_table(outcomes: Outcomes, size: int) -> list[str]:
    """Share of pairs and accuracy by the order that the chains of thought state."""
    rows = []
    for name in ("generative", "stage1", "descore", "stage1_p0", "descore_p0"):
        for group, tests in GROUPS.items():
            by_seed = right_by_stated_order(outcomes, size, name, tests)
            # All seeds together.
            by_order = []
            for order in STATED_ORDERS:
                by_order.append([x for found in by_seed.values() for x in found[order]])
            total = max(1, sum(map(len, by_order)))
            cells = []
            for values in by_order:
                mean = f"{sum(values) / len(values):.3f}" if values else "none"
                cells.append(f"{len(values) / total:.3f}: {mean}")
            rows.append([METHODS[name].title, group, *cells])
    cases = [f"stated {case}" for case in STATED_ORDERS.values()]
    return tables.markdown_table(["reward model", "tests", *cases], rows)


def right_by_stated_order(
    outcomes: Outcomes, size: int, method: str, tests: Sequence[str]
) -> dict[int, dict[float, list[float]]]:
    """`RmOutcome.right` of every pair, by seed and by the stated order."""
    right = runs_of(outcomes, size, method, tests, "right")
    stated = runs_of(outcomes, size, method, tests, "stated")
    by_seed = {}
    for seed, of_tests in right.items():
        by_order: dict[float, list[float]] = {order: [] for order in STATED_ORDERS}
        for values, orders in zip(of_tests, stated[seed], strict=True):
            for is_right, order in zip(values, orders, strict=True):
                # A chain of thought without a score states no order.
                if not math.isnan(order):
                    by_order[order].append(is_right)
        by_seed[seed] = by_order
    return by_seed


def _best_row(best: Mapping[str, float]) -> str:
    """Row of the best possible accuracy, below a table of tests."""
    outside = statistics.fmean(best[name] for name in OUTSIDE)
    cells = [f"{value:.3f}" for value in (*best.values(), outside)]
    return f"| best possible | {' | '.join(cells)} |"


# Differences on the same pairs: a field, a method and the other method.
_THOUGHT = (
    ("descore", "stage1"),
    ("descore_p0", "stage1_p0"),
)
_RIGHT = (
    ("descore", "base"),
    ("descore", "stage1"),
    ("descore", "generative"),
    ("descore", "discriminative"),
    ("descore_p0", "stage1_p0"),
    ("descore_p0", "generative"),
    ("descore_p0", "discriminative"),
    ("descore", "descore_p0"),
    ("stage1", "discriminative"),
)
COMPARED = (
    *(("thought", *pair) for pair in _THOUGHT),
    *(("right", *pair) for pair in _RIGHT),
)


def _differences(outcomes: Outcomes, size: int) -> list[str]:
    rows = []
    for field, method, other in COMPARED:
        row = [
            f"{FIELD_TITLES[field]}: {METHODS[method].title} - {METHODS[other].title}"
        ]
        for tests in GROUPS.values():
            # Both methods are compared on the same pairs.
            gap = mean_of(outcomes, size, method, tests, field, minus=other)
            row.append(tables.show(gap))
        rows.append(row)
    return tables.markdown_table(["difference", *GROUPS], rows)


def plot_sizes(outcomes: Outcomes, sizes: Sequence[int], path: Path) -> None:
    """Plot accuracy against the number of training pairs, in and out of domain."""
    # A panel in the domain, and another out of it.
    figure, axes = tables.new_figure(len(GROUPS))
    for axis, (group, tests) in zip(axes, GROUPS.items(), strict=True):
        for place, (name, method) in enumerate(METHODS.items()):
            if name == "base":
                continue
            values = [mean_of(outcomes, size, name, tests, "right") for size in sizes]

            # Bars reach from the lower to the upper end of the interval.
            mean = [value["mean"] for value in values]
            below = [value["mean"] - value["ci95"][0] for value in values]
            above = [value["ci95"][1] - value["mean"] for value in values]
            axis.errorbar(
                # Shifted, so that the bars of all methods are visible.
                [size * (1 + 0.012 * (place - 3)) for size in sizes],
                mean,
                yerr=[below, above],
                marker="o",
                markersize=3,
                capsize=2,
                label=method.title,
            )
        axis.set(
            title=group,
            xlabel="training pairs",
            ylabel="accuracy",
            xscale="log",
        )
        axis.set_xticks(sizes, labels=map(str, sizes), minor=False)
        axis.minorticks_off()
    tables.save_figure(figure, path, legend_of=axes[0])


def watched_curves(run: Path, cells: Sequence[Cell]) -> dict[str, dict[int, Curve]]:
    """Held-out accuracy against updates in training, by method and seed.

    The updates of the second stage come after those of the first.
    """
    curves: dict[str, dict[int, Curve]] = {name: {} for name in CURVES}
    for cell in cells:
        if cell.method not in CURVES:
            continue
        start = 0
        before = METHODS[cell.method].after
        if before is not None:
            earlier = Cell(cell.seed, cell.size, before)
            start = _log_of(earlier, run)[-1]["step"]
        curve = []
        for row in _log_of(cell, run):
            accuracy = row.get(WATCHED)
            if accuracy is not None:
                curve.append((start + row["step"], accuracy))
        curves[cell.method][cell.seed] = curve
    return {name: by_seed for name, by_seed in curves.items() if by_seed}


def _log_of(cell: Cell, run: Path) -> list[dict[str, Any]]:
    """Rows of the training log of a cell."""
    return read_metrics(cell.folder(run) / "metrics.jsonl")


def efficiency_table(curves: Mapping[str, Mapping[int, Curve]]) -> list[str]:
    """Updates to reach the generative model's best, and how steady training is."""
    goal = _mean_best(curves.get("generative", {}))
    rows = []
    for name, by_seed in curves.items():
        last = [curve[-1][1] for curve in by_seed.values()]
        spreads = [wobble(curve) for curve in by_seed.values()]
        updates = [first_update(curve, goal) for curve in by_seed.values()]
        reached = ["never" if update is None else str(update) for update in updates]
        spread = ""
        if len(last) > 1:
            spread = f"{statistics.stdev(last):.3f}"
        cells = [
            METHODS[name].title,
            ", ".join(reached),
            f"{statistics.fmean(last):.3f}",
            spread,
            f"{statistics.fmean(spreads):.3f}",
        ]
        rows.append(cells)
    head = (
        "reward model",
        f"updates to {goal:.3f}, the generative model's best, by seed",
        "accuracy at the end",
        "its std over seeds",
        "std over the last tenth of training",
    )
    return tables.markdown_table(head, rows)


def _mean_best(by_seed: Mapping[int, Curve]) -> float:
    """MEAN over seeds of the best accuracy of each; NaN without a curve."""
    best = []
    for curve in by_seed.values():
        best.append(max(accuracy for _, accuracy in curve))
    return statistics.fmean(best) if best else math.nan


def first_update(curve: Curve, goal: float) -> int | None:
    """Number of updates after which the accuracy is first at the goal; None if never."""
    for update, accuracy in curve:
        if accuracy >= goal:
            return update
    return None


def wobble(curve: Curve) -> float:
    """Standard deviation of the accuracy over the last tenth of training, two values or more."""
    count = max(2, len(curve) // 10)
    return statistics.pstdev(accuracy for _, accuracy in curve[-count:])


def plot_training(curves: Mapping[str, Mapping[int, Curve]], path: Path) -> None:
    """Plot held-out accuracy in training, a line per seed."""
    figure, axes = tables.new_figure(len(curves))
    for axis, (name, by_seed) in zip(axes, curves.items(), strict=True):
        for seed, curve in by_seed.items():
            updates = [update for update, _ in curve]
            accuracies = [accuracy for _, accuracy in curve]
            axis.plot(updates, accuracies, label=f"seed {seed}", lw=1)
        axis.set(
            title=METHODS[name].title,
            xlabel="updates",
            ylabel="accuracy",
            ylim=(0.4, 1.0),
        )
    tables.save_figure(figure, path, legend_of=axes[0])
