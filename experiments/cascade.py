"""Measure what thinking when unsure costs and saves: `python experiments/cascade.py`.

The DeScores of three demos (`experiments/demo.py` with seeds 0 to 2) score held-out pairs without
and behind chains of thought: pairs of the demo's own held-out combinations and sizes, which no
training has seen, and new pairs of the training's domain. Half of the pairs of a test, drawn by
chance, choose the threshold, the other half measure it, many times over. Results:
docs/results/cascade.{json,md}.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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
from launch.evaluation.thinking import Guarantee, HeldoutPairs
from rm.cascade import (
    area_under_risk_coverage,
    confidence_of,
    discordant_pairs,
    harm,
    risk_coverage,
)

COMMAND = "python experiments/cascade.py"
# Seed of the pairs of the training's domain, which no demo has.
TEST_SEED = 1000
TESTS = {"indomain": "in domain", "heldout": "out of domain"}
MODES = {"never": ["options.cots=0"], "always": []}
ALPHA = 0.02
DELTA = 0.05
SPLITS = 200
SHARES = tuple(i / 10 for i in range(11))


@dataclass(frozen=True)
class ScoredPairs:
    """Decided pairs of a test, scored both ways: a value of each list belongs to a pair.

    confidence   Absolute fast margin, on the scale of the slow rewards.
    fast, slow   1 where the order of the rewards is the label.
    harm         1 where the order is right behind the chain of thought only.
    differs      1 where the two orders differ.
    """

    confidence: list[float]
    fast: list[float]
    slow: list[float]
    harm: list[float]
    differs: list[float]

    @classmethod
    def of(cls, pairs: HeldoutPairs) -> ScoredPairs:
        """Take the pairs that people decided."""
        fit = pairs.fit()
        scaled_N2 = fit.offset + fit.slope * pairs.fast_N2
        columns: list[list[float]] = [[], [], [], [], []]
        for i in pairs.items("harm"):
            fast = float(scaled_N2[i, 0] - scaled_N2[i, 1])
            slow = float(pairs.slow_N2[i, 0] - pairs.slow_N2[i, 1])
            label = pairs.label_N[i]
            row = (
                confidence_of(scaled_N2[i], sigma=fit.sigma),
                float(fast * label > 0),
                float(slow * label > 0),
                harm(fast, slow, label),
                float(discordant_pairs(scaled_N2[i], pairs.slow_N2[i])),
            )
            for column, value in zip(columns, row, strict=True):
                column.append(value)
        return cls(*columns)

    def thought(self, threshold: float | None) -> list[float]:
        """1 for each pair that is not decided fast."""
        if threshold is None:
            return [1.0] * len(self.confidence)
        return [float(not value >= threshold) for value in self.confidence]

    def right(self, thought: Sequence[float]) -> list[float]:
        """1 for each pair whose order is right if the model thinks about these."""
        answers = zip(thought, self.fast, self.slow, strict=True)
        return [slow if thinks else fast for thinks, fast, slow in answers]

    def by_share(self, share: float) -> list[float]:
        """Think about this share of the pairs, the least confident ones."""
        order = sorted(range(len(self.fast)), key=lambda i: self.confidence[i])
        thought = [0.0] * len(order)
        for i in order[: round(share * len(order))]:
            thought[i] = 1.0
        return thought


# ------------------------------------------------------------------ the evaluations


def demo_folder(root: Path, seed: int) -> Path:
    """Folder of the demo of a seed."""
    return root if seed == 0 else root.with_name(f"{root.name}-seed{seed}")


def evaluation(run: Path, seed: int, test: str, mode: str) -> Path:
    """Folder of an evaluation."""
    return run / f"seed{seed}" / test / mode


def jobs_of(run: Path, root: Path, seeds: Sequence[int], limit: int) -> list[Job]:
    """List the evaluations, each a step that is done when its summary exists."""
    jobs = []
    for seed in seeds:
        demo = demo_folder(root, seed)
        pairs = {
            "indomain": run / "pairs" / "train.csv",
            "heldout": demo / "data" / "heldout.csv",
        }
        for test, table in pairs.items():
            for mode, options in MODES.items():
                out = evaluation(run, seed, test, mode)
                words = config_words(
                    "evaluate_rm",
                    f"checkpoint={demo / 'descore' / 'final'}",
                    f"pairs={table}",
                    f"out={out}",
                    f"limit={limit}",
                    *options,
                )
                title = f"evaluate-{mode} seed {seed} {test}"
                done = out / "summary.json"
                step = CommandStep(title, "launch/evaluate.py", ["rm", *words], done)
                jobs.append(Job(out, [step]))
    return jobs


# ------------------------------------------------------------------ the measurements


def split_results(pairs: ScoredPairs, promise: Guarantee, seed: int) -> dict[str, Any]:
    """Choose the threshold on a half and measure it on the other, for many random halves.

    violations  Share of the splits in which the other half's rate of losses exceeds alpha. That
                rate is itself drawn, so it may exceed alpha where the true risk does not.
    """
    # The same halves for every kind of threshold.
    rng = random.Random(seed)
    count = len(pairs.fast)
    losses = pairs.harm if promise.risk == "harm" else pairs.differs
    columns: dict[str, list[float]] = {"thought": [], "loss": [], "gain": []}
    for _ in range(SPLITS):
        # A half that chooses and a half that measures.
        order = list(range(count))
        rng.shuffle(order)
        chosen = order[: count // 2]
        measured = order[count // 2 :]
        threshold = promise.threshold(
            [pairs.confidence[i] for i in chosen],
            [losses[i] for i in chosen],
        ).confidence
        # What the threshold does to the other half.
        thought = pairs.thought(threshold)
        right = pairs.right(thought)
        gains = [right[i] - pairs.slow[i] for i in measured]
        skipped = [losses[i] * (1 - thought[i]) for i in measured]
        columns["thought"].append(statistics.fmean(thought[i] for i in measured))
        columns["loss"].append(statistics.fmean(skipped))
        columns["gain"].append(statistics.fmean(gains))
    # The spread over splits is not an interval: they share their pairs.
    result: dict[str, Any] = {}
    for name, values in columns.items():
        ordered = sorted(values)
        result[name] = {
            "mean": statistics.fmean(values),
            "p5": ordered[round(0.05 * (SPLITS - 1))],
            "p95": ordered[round(0.95 * (SPLITS - 1))],
        }
    over = [value > promise.alpha for value in columns["loss"]]
    result["violations"] = statistics.fmean(over)
    return result


def transfer(
    chosen: ScoredPairs, measured: ScoredPairs, promise: Guarantee
) -> tuple[list[float], list[float], list[float]]:
    """Choose the threshold on all pairs of a test; thought, gain and harm on those of another."""
    threshold = promise.threshold(chosen.confidence, chosen.harm).confidence
    thought = measured.thought(threshold)
    right = measured.right(thought)
    gains = [a - b for a, b in zip(right, measured.slow, strict=True)]
    lost = [h * (1 - t) for h, t in zip(measured.harm, thought, strict=True)]
    return thought, gains, lost


def pooled(by_seed: Sequence[Sequence[float]], *, shared: bool) -> dict[str, Any]:
    """MEAN over the models of all seeds, with a 95 % interval for new pairs.

    shared  All models are tested on the same pairs: a pair has the mean of its values.
    """
    if shared:
        values = [statistics.fmean(column) for column in zip(*by_seed, strict=True)]
    else:
        values = [value for column in by_seed for value in column]
    return mean_ci95(values, seed=0).as_dict()


def results_of(tests: dict[str, dict[int, ScoredPairs]]) -> dict[str, Any]:
    """Everything that the page says, by test."""
    promise = Guarantee("clopper_pearson", "harm", ALPHA, DELTA)
    result: dict[str, Any] = {}
    for test, by_seed in tests.items():
        scored = list(by_seed.values())
        # Every demo has held-out pairs of its own; those of the domain are the same for all.
        over_models = partial(pooled, shared=test == "indomain")
        other = next(name for name in tests if name != test)
        # Accuracy of always and never thinking, and of every share of thinking between.
        curve = []
        for share in SHARES:
            gains = []
            for pairs in scored:
                right = pairs.right(pairs.by_share(share))
                gains.append([a - b for a, b in zip(right, pairs.slow, strict=True)])
            curve.append({"thought": share, "gain": over_models(gains)})
        # Thresholds of this test's halves, and of the other test.
        splits = {}
        for method in ("clopper_pearson", "crc"):
            for risk in ("harm", "disagreement"):
                kind = Guarantee(method, risk, ALPHA, DELTA)
                splits[f"{method}, {risk}"] = {
                    seed: split_results(pairs, kind, seed)
                    for seed, pairs in by_seed.items()
                }
        moved = [
            transfer(tests[other][seed], pairs, promise)
            for seed, pairs in by_seed.items()
        ]
        # How well the margin tells right from wrong.
        ranking = {}
        for name in ("fast", "slow"):
            ranking[name] = []
            for pairs in scored:
                wrong = [1 - value for value in getattr(pairs, name)]
                area = area_under_risk_coverage(pairs.confidence, wrong)
                ranking[name].append(area)
        wrong = [1 - value for value in scored[0].fast]
        risks = risk_coverage(scored[0].confidence, wrong)
        result[test] = {
            "pairs": [len(pairs.fast) for pairs in scored],
            "always": over_models([pairs.slow for pairs in scored]),
            "never": over_models([pairs.fast for pairs in scored]),
            "curve": curve,
            "splits": splits,
            "from_other": {
                "thought": over_models([columns[0] for columns in moved]),
                "gain": over_models([columns[1] for columns in moved]),
                "harm": over_models([columns[2] for columns in moved]),
            },
            "aurc": ranking,
            "risk_coverage": risks[:: max(1, len(risks) // 50)],
        }
    return result


# ------------------------------------------------------------------ the page


def page_of(record: dict[str, Any]) -> list[str]:
    """Lines of the page."""
    seeds = ", ".join(map(str, record["seeds"]))
    lines = [
        "# Think when unsure",
        "",
        f"Made by `{COMMAND}` at commit {record['commit']}: the reward models of the demos of the "
        f"seeds {seeds}, on pairs that people decided. A pair is scored fast, without a chain of "
        "thought, if its margin reaches a threshold; else the model thinks about both videos. "
        "Gains are accuracies minus that of always thinking, pair by pair; 95 % intervals for new "
        f"pairs, not for new seeds. Half of the pairs of a test choose a threshold with alpha "
        f"{record['alpha']} and delta {record['delta']}, the other half measure it: means over "
        f"{record['halves']} random halves.",
    ]
    for test, result in record["tests"].items():
        counts = ", ".join(map(str, result["pairs"]))
        lines += ["", f"## {TESTS[test].capitalize()}", ""]
        lines += [
            f"{counts} pairs. Always thinking is right in {tables.show(result['always'])}, never "
            f"thinking in {tables.show(result['never'])}.",
            "",
        ]
        head = [
            "threshold",
            "thinks about",
            "gain",
            "loss",
            "halves with a loss above 2 %",
        ]
        rows = []
        for name, by_seed in result["splits"].items():
            columns = []
            for column in ("thought", "gain", "loss"):
                means = [split[column]["mean"] for split in by_seed.values()]
                columns.append(f"{statistics.fmean(means):.4f}")
            over = statistics.fmean(split["violations"] for split in by_seed.values())
            rows.append([name, *columns, f"{over:.3f}"])
        moved = result["from_other"]
        shown = [tables.show(moved[name]) for name in ("thought", "gain", "harm")]
        rows.append(["clopper_pearson, harm, chosen on the other test", *shown, ""])
        lines += tables.markdown_table(head, rows)
        rows = []
        for point in result["curve"]:
            rows.append([f"{point['thought']:.1f}", tables.show(point["gain"])])
        lines += ["", *tables.markdown_table(["share of thinking", "gain"], rows)]
        areas = [
            f"{name} {statistics.fmean(values):.4f}"
            for name, values in result["aurc"].items()
        ]
        lines += ["", f"Area under the risk-coverage curve: {', '.join(areas)}."]
    return lines


def main() -> None:
    """Make the pairs and the evaluations that are missing, then write the results."""
    parser = comparison_parser(__doc__, "cascade")
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"))
    parser.add_argument("--pairs", type=int, default=1000, help="pairs of a test")
    args = parser.parse_args()
    run = args.run_dir
    words = ["--out", str(run / "pairs"), "--seed", str(TEST_SEED)]
    words += ["--pairs", f"train={args.pairs}"]
    # Pairs of the training domain that no demo has seen.
    making = CommandStep(
        "pairs", "toy/make_pairs.py", words, run / "pairs" / "done.json"
    )
    if not making.is_done:
        run_step(making)
    recipe = Recipe(run, args.workers)
    recipe.run([[job] for job in jobs_of(run, args.demo, args.seeds, args.pairs)])

    # Read every test of every seed.
    scored: dict[str, dict[int, ScoredPairs]] = {}
    for test in TESTS:
        scored[test] = {}
        for seed in args.seeds:
            folders = [ROOT / evaluation(run, seed, test, mode) for mode in MODES]
            scored[test][seed] = ScoredPairs.of(HeldoutPairs.read(*folders))
    # Write the results.
    record = {
        "command": COMMAND,
        "commit": commit(),
        "seeds": args.seeds,
        "alpha": ALPHA,
        "delta": DELTA,
        "halves": SPLITS,
        "tests": results_of(scored),
    }
    out = ROOT / args.out
    tables.write_json(out / "cascade.json", record)
    tables.write_page(out / "cascade.md", page_of(record))


if __name__ == "__main__":
    main()
