"""Compare ways to train a reward model in miniature: `make reproduce-rm`.

The paper's comparison (2605.05922, Figure 1) in the embedded world: a discriminative and a
generative reward model, DeScore's first stage without and with masking, and both stages, on three
sizes of training data under three seeds. They are tested on pairs of the training domain and of
four others (`toy.make_pairs`). Results: docs/results/reproduce_rm.{json,md} and two plots.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.files import replaced
from common.log import read_metrics
from experiments import tables
from experiments.runner import (
    ROOT,
    CommandStep,
    Job,
    Recipe,
    commit,
    comparison_parser,
    config_words,
    run_step,
)
from launch.evaluation.intervals import mean_ci95
from rm.prompt import DIMENSIONS
from toy.make_pairs import write_csv

# The page and the JSON name it.
COMMAND = "python experiments/reproduce_rm.py"
# The first is of the training domain.
TESTS = ("indomain", "combinations", "renderer", "wan", "spoilt")
OUTSIDE = TESTS[1:]
GROUPS = {
    "in domain": TESTS[:1],
    "out of domain": OUTSIDE,
}
# Metrics of the training log: how often the preference was met.
CURVES = {
    "discriminative": "train/accuracy",
    "generative": "reward/preference",
    "stage1": "train/accuracy",
    "descore": "train/accuracy",
}


@dataclass(frozen=True)
class Method:
    """A way to make a reward model.

    script   Training command; None uses the model of ``after``, or the base Qwen3-VL, unchanged.
    config   Name of its yaml.
    after    Method whose model training starts from, on the same data.
    extra    Overrides of the yaml.
    scoring  Keyword arguments of `rm.scorer.DeScoreScorer.load`.
    """

    title: str
    script: str | None = None
    config: str = ""
    after: str | None = None
    extra: tuple[str, ...] = ()
    scoring: str = "{}"


# Options of the scorer.
NO_COT = "{cots: 0}"
STATED = "{value: overall}"
COLD_START = "launch/cold_start.py"
DUAL_RL = "launch/dual_rl.py"
# Overrides of the yaml files.
PASSES = (
    "cold_start.epochs=4",
    "cold_start.pairs_per_step=16",
    "cold_start.micro_batch=16",
)
# Half the demo's rates: nothing in stage 1 holds the chains of thought in place.
STAGE1 = (*PASSES, "lr.llm=2e-4", "lr.vision=3e-5", "lr.merger=3e-5")
UNMASKED = (*STAGE1, "cold_start.masking.probability=0.0")
MASKED = (*STAGE1, "cold_start.masking.probability=0.5")
RL = ("dual_rl.pairs_per_step=16", "dual_rl.pairs_per_update=16")
# Methods by name; "descore" starts from "stage1".
METHODS = {
    "base": Method("base Qwen3-VL, its stated score", scoring=STATED),
    "discriminative": Method(
        "discriminative (always masked)",
        COLD_START,
        "discriminative",
        extra=PASSES,
        scoring=NO_COT,
    ),
    "generative": Method(
        "generative (GRPO on the stated score)",
        DUAL_RL,
        "generative",
        extra=RL,
        scoring=STATED,
    ),
    "stage1_p0": Method(
        "DeScore stage 1, p = 0", COLD_START, "cold_start", extra=UNMASKED
    ),
    "stage1": Method(
        "DeScore stage 1, p = 0.5", COLD_START, "cold_start", extra=MASKED
    ),
    "stage1_at_once": Method(
        "... the same, scoring without a CoT", after="stage1", scoring=NO_COT
    ),
    "descore": Method(
        "DeScore, both stages, p = 0.5", DUAL_RL, "dual_rl", "stage1", RL
    ),
    "descore_p0": Method(
        "DeScore, both stages, p = 0", DUAL_RL, "dual_rl", "stage1_p0", RL
    ),
}


@dataclass(frozen=True)
class Cell:
    """A method under a seed on the first ``size`` training pairs. The base has size 0."""

    seed: int
    size: int
    method: str

    def folder(self, run: Path) -> Path:
        """Run folder."""
        return run / f"seed{self.seed}" / f"{self.size}_{self.method}"

    def checkpoint(self, run: Path) -> Path:
        """Folder of its weights."""
        if METHODS[self.method].script is None:
            return self.start(run)
        return self.folder(run) / "final"

    def start(self, run: Path) -> Path:
        """Folder of the weights before training."""
        before = METHODS[self.method].after
        if before is None:
            return run / "base"
        return Cell(self.seed, self.size, before).checkpoint(run)


def sequences_of(seed: int, sizes: Sequence[int]) -> list[list[Cell]]:
    """Cells in sequences, in which a cell may start from an earlier one."""
    # The base needs no training pairs.
    sequences = [[Cell(seed, 0, "base")]]
    for size in sizes:
        for names in (
            ("stage1", "descore", "stage1_at_once"),
            ("stage1_p0", "descore_p0"),
            ("generative",),
            ("discriminative",),
        ):
            sequences.append([Cell(seed, size, name) for name in names])
    return sequences


def steps_of(
    cell: Cell, run: Path, *, rl_steps: int, more: Sequence[str] = ()
) -> list[CommandStep]:
    """Commands that train a cell's model and evaluate it on all tests."""
    method = METHODS[cell.method]
    folder = cell.folder(run)
    data = run / f"seed{cell.seed}" / "data"
    steps = []

    # Train, unless the model of another method is used.
    if method.script is not None:
        words = config_words(
            method.config,
            f"run_dir={folder}",
            f"seed={cell.seed}",
            f"data.train={data / 'filmed.csv'}",
            "data.heldout=null",
            f"data.limit={cell.size}",
            "eval_every=0",
        )

        # Dual RL counts steps instead of epochs.
        if method.script == DUAL_RL:
            words.append(f"dual_rl.steps={rl_steps}")
        if method.after is not None:
            words.append(f"checkpoint={cell.start(run)}")

        # The command line of the user comes last and wins.
        words += [*method.extra, *more]
        done = folder / "final" / "descore.json"
        steps.append(CommandStep(f"train {cell}", method.script, words, done))

    # Evaluate on all tests.
    out = folder / "tests"
    words = config_words(
        "evaluate_rm",
        f"checkpoint={cell.checkpoint(run)}",
        f"pairs={data / 'tests.csv'}",
        f"out={out}",
        f"options={method.scoring}",
        "batch=32",
        "resamples=200",
    )
    words = ["rm", *words]
    done = out / "summary.json"
    steps.append(CommandStep(f"judge {cell}", "launch/evaluate.py", words, done))
    return steps


def make_data(run: Path, seed: int, *, train: int, tests: int) -> None:
    """Make the training pairs (filmed.csv) and all test pairs (tests.csv) of a seed."""
    data = run / f"seed{seed}" / "data"
    if (ROOT / data / "tests.csv").exists():
        return

    # Make all sets with a single command.
    counts = [f"filmed={train}", *(f"{name}={tests}" for name in TESTS)]
    words = ["--out", str(data), "--seed", str(seed), "--pairs", *counts]
    done = data / "done.json"
    run_step(CommandStep("preference data", "toy/make_pairs.py", words, done))

    # Join the tests in a single file, which is never seen half written.
    rows: list[dict[str, str]] = []
    for name in TESTS:
        with open(ROOT / data / f"{name}.csv", encoding="utf-8", newline="") as file:
            rows += csv.DictReader(file)
    with replaced(ROOT / data / "tests.csv") as partial:
        write_csv(partial, rows)


def make_base(run: Path) -> None:
    """Save the base Qwen3-VL as a reward model with an untrained head, which is not used."""
    folder = ROOT / run / "base"
    if (folder / "descore.json").exists():
        return
    from rm.config import Generation
    from rm.model import DeScore

    generation = Generation(max_new_tokens=96, repetition_penalty=1.0)
    qwen = ROOT / "assets/shapes/qwen"
    DeScore.from_base(qwen, generation=generation).save(folder)


@dataclass(frozen=True)
class RmOutcome:
    """Results of a reward model on a test, in the order of its pairs.

    right    Per pair without a tie, 1 if the order was right.
    stated   Per pair without a tie, the order of the sums of the five scores in the chains of
             thought: 1 right, 0 equal sums, -1 wrong, NaN where a score is missing.
    thought  Per pair, the share of right sub-dimension scores; empty without chains of thought.
    """

    right: tuple[float, ...]
    stated: tuple[float, ...] = ()
    thought: tuple[float, ...] = ()


Outcomes = dict[Cell, dict[str, RmOutcome]]


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
    rewards = (row["reward_A"], row["reward_B"])
    # A pair with a missing score counts as wrong.
    if None in rewards:
        return 0.0
    return float((rewards[0] - rewards[1]) * row["label"] > 0)


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


def _runs(
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
    runs = _runs(outcomes, size, method, tests, field)
    complete = all(len(values) for run in runs.values() for values in run)
    if not runs or not complete:
        return None
    others = None
    if minus is not None:
        others = _runs(outcomes, size, minus, tests, field)
    return tables.over_seeds(runs, others)


def _record_of(cell: Cell, by_test: Mapping[str, RmOutcome]) -> dict[str, Any]:
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
    outcomes: Outcomes, sizes: Sequence[int], record: dict[str, Any], workers: int
) -> list[str]:
    """Lines of the page."""
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
        f"{', '.join(map(str, seeds))}, with 95 % intervals, bootstrap over seeds and pairs. "
        "Accuracy leaves ties out; equal scores are wrong.",
        "",
        f"## Accuracy on {largest} training pairs",
        "",
        *_table(outcomes, tests, METHODS, "right"),
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
        "A CoT states five scores, and the preference is the order of their true sums. The columns "
        "are the order of the stated sums: the share of pairs, and the accuracy of the reward "
        "model's score on them. All seeds together.",
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
            by_order = _right_by_stated_order(outcomes, size, name, tests)
            total = max(1, sum(map(len, by_order.values())))
            cells = []
            for values in by_order.values():
                mean = f"{sum(values) / len(values):.3f}" if values else "none"
                cells.append(f"{len(values) / total:.3f}: {mean}")
            rows.append([METHODS[name].title, group, *cells])
    cases = [f"stated {case}" for case in ("right", "the same", "wrong")]
    return tables.markdown_table(["reward model", "tests", *cases], rows)


def _right_by_stated_order(
    outcomes: Outcomes, size: int, method: str, tests: Sequence[str]
) -> dict[float, list[float]]:
    """Accuracy of every pair of all seeds, by the stated order."""
    by_order: dict[float, list[float]] = {1.0: [], 0.0: [], -1.0: []}
    flat = []
    for field in ("right", "stated"):
        runs = _runs(outcomes, size, method, tests, field)
        flat.append(
            [value for run in runs.values() for table in run for value in table]
        )
    for is_right, order in zip(*flat, strict=True):
        if not math.isnan(order):
            by_order[order].append(is_right)
    return by_order


def _differences(outcomes: Outcomes, size: int) -> list[str]:
    compared = [
        ("descore", "stage1", "thought"),
        ("descore_p0", "stage1_p0", "thought"),
        ("descore", "stage1", "right"),
        ("descore", "generative", "right"),
        ("descore", "discriminative", "right"),
        ("descore_p0", "stage1_p0", "right"),
        ("descore_p0", "generative", "right"),
        ("descore_p0", "discriminative", "right"),
        ("descore", "descore_p0", "right"),
        ("stage1", "discriminative", "right"),
    ]
    labels = {"right": "accuracy", "thought": "right sub-dimension scores"}
    rows = []
    for method, other, field in compared:
        row = [f"{labels[field]}: {METHODS[method].title} - {METHODS[other].title}"]
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
        axis.set(title=group, xlabel="training pairs", ylabel="accuracy", xscale="log")
        axis.set_xticks(sizes, labels=map(str, sizes), minor=False)
        axis.minorticks_off()
    tables.save_figure(figure, path, legend_of=axes[0])


def plot_training(run: Path, cells: Sequence[Cell], path: Path) -> None:
    """Plot how often the preference was met in training, a line per seed."""
    # A panel for each trained method.
    figure, axes = tables.new_figure(len(CURVES))
    for axis, (name, metric) in zip(axes, CURVES.items(), strict=True):
        for cell in cells:
            if cell.method != name:
                continue
            rows = read_metrics(cell.folder(run) / "metrics.jsonl")
            steps = [row["step"] for row in rows]
            values = [row[metric] for row in rows]
            axis.plot(steps, values, label=f"seed {cell.seed}", lw=1)
        title = METHODS[name].title
        axis.set(title=title, xlabel="step", ylabel=metric, ylim=(0.3, 1.0))
    tables.save_figure(figure, path, legend_of=axes[0])


def main() -> None:
    """Make data, train and evaluate all cells, then write the results."""
    parser = comparison_parser(__doc__, "reproduce_rm")
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 1000, 2000])
    parser.add_argument("--tests", type=int, default=300, help="pairs of each test")
    parser.add_argument("--rl-steps", type=int, default=30, help="of 16 pairs each")
    parser.add_argument("more", nargs="*", help="overrides a.b=c of every training run")
    args = parser.parse_args()

    # Make the base and the data.
    run: Path = args.run_dir
    recipe = Recipe(run, args.workers)
    make_base(run)
    for seed in args.seeds:
        make_data(run, seed, train=max(args.sizes), tests=args.tests)

    # Train and evaluate. The longest run first, so that no worker is idle at the end.
    sequences = [c for seed in args.seeds for c in sequences_of(seed, args.sizes)]
    sequences.sort(key=lambda cells: -cells[0].size)
    jobs = []
    for sequence in sequences:
        sequence_jobs = []
        for cell in sequence:
            steps = steps_of(cell, run, rl_steps=args.rl_steps, more=args.more)
            sequence_jobs.append(Job(cell.folder(run), steps))
        jobs.append(sequence_jobs)
    recipe.run(jobs)

    # Collect the results of all cells.
    cells = [cell for sequence in sequences for cell in sequence]
    outcomes = read_outcomes(ROOT / run, cells)
    record = {
        "command": COMMAND,
        "commit": commit(),
        "seconds": recipe.seconds,
        "judges": [_record_of(cell, by_test) for cell, by_test in outcomes.items()],
    }

    # Two plots, the second of training on most pairs, and the page.
    out = ROOT / args.out
    sizes = sorted(set(args.sizes))
    plot_sizes(outcomes, sizes, out / "reproduce_rm_size.svg")
    largest = [cell for cell in cells if cell.size == sizes[-1]]
    plot_training(ROOT / run, largest, out / "reproduce_rm_training.svg")
    page = page_of(outcomes, sizes, record, args.workers)
    tables.write_results(out, "reproduce_rm", record, page)


if __name__ == "__main__":
    main()
