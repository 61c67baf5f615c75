"""Compare ways to train a reward model in miniature: `make reproduce-rm`.

The paper's comparison (2605.05922, Figure 1) in the embedded world: a discriminative and a
generative reward model, DeScore's first stage without and with masking, and both stages, on three
sizes of training data, five seeds on the largest and three on the others. All are tested on the
same pairs, of the training domain and of four others (`toy.make_pairs`). Results:
docs/results/reproduce_rm.{json,md}, the values of every pair, and two plots.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from common.files import replaced
from experiments import tables
from experiments.rm_claims import claims_table, findings_of
from experiments.rm_methods import DUAL_RL, METHODS, TESTS, Cell
from experiments.rm_results import (
    COMMAND,
    best_possible,
    page_of,
    plot_sizes,
    plot_training,
    read_outcomes,
    record_of,
    values_of,
    watched_curves,
)
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
from toy.make_pairs import write_csv

BASE = Path("assets/shapes/qwen")
MAKE_PAIRS = "toy/make_pairs.py"
# Seed of the test pairs.
TEST_SEED = 1000


def sequences_of(
    seed: int, sizes: Sequence[int], *, has_base: bool = True
) -> list[list[Cell]]:
    """Cells in sequences, in which a cell may start from an earlier one."""
    # The base needs no training pairs, and all seeds have the same tests: one seed has it.
    sequences = [[Cell(seed, 0, "base")]] if has_base else []
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
    cell: Cell,
    run: Path,
    *,
    rl_steps: int,
    watched: bool = False,
    base: Path = BASE,
    more: Sequence[str] = (),
) -> list[CommandStep]:
    """Commands that train a cell's model and evaluate it on all tests.

    A ``watched`` training measures its accuracy on pairs of the training domain as it goes.
    """
    method = METHODS[cell.method]
    folder = cell.folder(run)
    data = run / f"seed{cell.seed}" / "data"
    steps = []

    # Train, unless the model of another method is used.
    watch = ["data.heldout=null", "eval_every=0"]
    if watched:
        every = 5 if method.script == DUAL_RL else 50
        heldout = run / "tests" / "indomain.csv"
        watch = [f"data.heldout={heldout}", f"eval_every={every}", "heldout_pairs=150"]
    if method.script is not None:
        words = config_words(
            method.config,
            f"run_dir={folder}",
            f"seed={cell.seed}",
            f"data.train={data / 'filmed.csv'}",
            f"data.limit={cell.size}",
            *watch,
        )

        # Dual RL counts steps instead of epochs.
        if method.script == DUAL_RL:
            words.append(f"dual_rl.steps={rl_steps}")
        if method.after is not None:
            words.append(f"checkpoint={cell.start(run)}")
        else:
            key = "checkpoint" if method.script == DUAL_RL else "base"
            words.append(f"{key}={base}")

        # The command line of the user comes last and wins.
        words += [*method.extra, *more]
        done = folder / "final" / "descore.json"
        steps.append(CommandStep(f"train {cell}", method.script, words, done))

    # Evaluate on all tests.
    out = folder / "tests"
    words = config_words(
        "evaluate_rm",
        f"checkpoint={cell.checkpoint(run)}",
        f"pairs={run / 'tests' / 'tests.csv'}",
        f"out={out}",
        f"options={method.scoring}",
        "batch=32",
        "resamples=200",
    )
    words = ["rm", *words]
    done = out / "summary.json"
    steps.append(CommandStep(f"judge {cell}", "launch/evaluate.py", words, done))
    return steps


def make_training_pairs(
    run: Path, seed: int, count: int, *, options: Sequence[str] = ()
) -> None:
    """Make the training pairs of a seed, filmed.csv."""
    data = run / f"seed{seed}" / "data"
    words = ["--out", str(data), "--seed", str(seed), *options]
    words += ["--pairs", f"filmed={count}"]
    step = CommandStep("training pairs", MAKE_PAIRS, words, data / "done.json")
    if not step.is_done:
        run_step(step)


def make_tests(run: Path, count: int, *, options: Sequence[str] = ()) -> None:
    """Make the test pairs of all seeds, tests.csv; no training has their seed."""
    data = run / "tests"
    if (ROOT / data / "tests.csv").exists():
        return

    # Make all sets with a single command.
    counts = [f"{name}={count}" for name in TESTS]
    words = ["--out", str(data), "--seed", str(TEST_SEED), *options]
    words += ["--pairs", *counts]
    done = data / "done.json"
    run_step(CommandStep("test pairs", MAKE_PAIRS, words, done))

    # Join the tests in a single file, which is never seen half written.
    rows: list[dict[str, str]] = []
    for name in TESTS:
        with open(ROOT / data / f"{name}.csv", encoding="utf-8", newline="") as file:
            rows += csv.DictReader(file)
    with replaced(ROOT / data / "tests.csv") as partial:
        write_csv(partial, rows)


def make_base(run: Path, qwen: Path = BASE) -> None:
    """Save a base Qwen3-VL as a reward model with an untrained head, which is not used."""
    folder = ROOT / run / "base"
    if (folder / "descore.json").exists():
        return
    from rm.config import Generation
    from rm.model import DeScore

    generation = Generation(max_new_tokens=96, repetition_penalty=1.0)
    DeScore.from_base(ROOT / qwen, generation=generation).save(folder)


def main() -> None:
    """Make data, train and evaluate all cells, then write the results."""
    parser = comparison_parser(__doc__, "reproduce_rm")
    parser.set_defaults(seeds=[0, 1, 2, 3, 4])
    parser.add_argument("--sizes", type=int, nargs="+", default=[300, 600, 1200])
    parser.add_argument("--tests", type=int, default=300, help="pairs of each test")
    parser.add_argument(
        "--seeds-of-small-sizes",
        type=int,
        default=3,
        help="seeds of the sizes below the largest",
    )
    parser.add_argument("--rl-steps", type=int, default=30, help="of 16 pairs each")
    parser.add_argument("more", nargs="*", help="overrides a.b=c of every training run")
    args = parser.parse_args()

    # Make the base and the data. The sizes below the largest have fewer seeds.
    run: Path = args.run_dir
    recipe = Recipe(run, args.workers)
    make_base(run)
    make_tests(run, args.tests)
    sizes = sorted(set(args.sizes))
    sequences = []
    for seed in args.seeds:
        make_training_pairs(run, seed, sizes[-1])
        few = seed in args.seeds[: args.seeds_of_small_sizes]
        sequences += sequences_of(
            seed, sizes if few else sizes[-1:], has_base=seed == args.seeds[0]
        )

    # Train and evaluate. The longest run first, so that no worker is idle at the end.
    sequences.sort(key=lambda cells: -cells[0].size)
    jobs = []
    for sequence in sequences:
        sequence_jobs = []
        for cell in sequence:
            steps = steps_of(
                cell,
                run,
                rl_steps=args.rl_steps,
                watched=cell.size == sizes[-1],
                more=args.more,
            )
            sequence_jobs.append(Job(cell.folder(run), steps))
        jobs.append(sequence_jobs)
    recipe.run(jobs)

    # Collect the results of all cells.
    cells = [cell for sequence in sequences for cell in sequence]
    outcomes = read_outcomes(ROOT / run, cells)
    best = best_possible(ROOT / run)
    record = {
        "command": COMMAND,
        "commit": commit(),
        "seconds": recipe.seconds,
        "comparisons": len(METHODS) * (len(TESTS) + 1),
        "best_possible": {name: statistics.fmean(best[name]) for name in TESTS},
        "judges": [record_of(cell, by_test) for cell, by_test in outcomes.items()],
    }

    # Plots, the values of every pair, and the page.
    out = ROOT / args.out
    plot_sizes(outcomes, sizes, out / "reproduce_rm_size.svg")
    largest = [cell for cell in cells if cell.size == sizes[-1]]
    curves = watched_curves(ROOT / run, largest)
    plot_training(curves, out / "reproduce_rm_training.svg")
    findings = findings_of(outcomes, sizes[-1], curves)
    record["claims"] = [asdict(finding) for finding in findings]
    claims = claims_table(findings)
    page = page_of(outcomes, sizes, record, curves, claims, args.workers)
    values = values_of(outcomes, best)
    tables.write_results(out, "reproduce_rm", record, page, values)


if __name__ == "__main__":
    main()
