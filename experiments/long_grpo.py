"""Train the demo's generator on DeScore for hundreds of updates: `python experiments/long_grpo.py`.

The demo stops while everything rises. This goes on: each seed continues with its own DeScore of
`experiments/demo_seeds.py`, and held-out prompts are measured on the way, with the reward that is
trained on and with the people's utility that nothing trains on. Where the reward goes on rising
and the utility falls, the generator exploits the reward model. Results:
docs/results/long_grpo.{json,md} and a plot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from common.log import read_metrics
from experiments import tables
from experiments.demo_seeds import demo_folder
from experiments.oracle_scores import training_step
from experiments.runner import (
    ROOT,
    Job,
    Recipe,
    commit,
    comparison_parser,
    config_words,
)
from launch.evaluation.intervals import nested_ci95
from rm.prompt import DIMENSIONS

COMMAND = "python experiments/long_grpo.py"
# Held-out measurements: the reward that trains, what people see, and the oracle.
TRAINED = "eval/descore"
UTILITY = "eval/people"
ORACLE = "eval/shapes"
PARTS = (*DIMENSIONS, "quality")
# Prompts and videos of an update.
PROMPTS = 8
VIDEOS = 8
KEYS = (
    TRAINED,
    UTILITY,
    ORACLE,
    *(f"{UTILITY}.{part}" for part in PARTS),
)

# The rows of a training log with held-out measurements, by seed.
Curves = Mapping[int, Sequence[Mapping[str, float]]]


def job_of(root: Path, seed: int, *, updates: int, every: int, limit: int) -> Job:
    """Train a seed."""
    folder = root / f"seed{seed}"
    checkpoint = demo_folder(seed) / "descore" / "final"
    words = config_words(
        "grpo",
        f"run_dir={folder}",
        f"seed={seed}",
        f"steps={updates}",
        f"rewards.descore.checkpoint={checkpoint}",
        f"prompts_per_step={PROMPTS}",
        f"grpo.group_size={VIDEOS}",
        "evaluation.prompts=assets/shapes/prompts_heldout.txt",
        f"evaluation.every={every}",
        f"evaluation.limit={limit}",
        "save_every=50",
    )
    return Job(folder, [training_step("launch/grpo.py", words, folder)])


def read_curves(root: Path, seeds: Sequence[int]) -> dict[int, list[dict[str, float]]]:
    """Read the held-out measurements of every seed."""
    curves = {}
    for seed in seeds:
        rows = read_metrics(root / f"seed{seed}" / "metrics.jsonl")
        curves[seed] = [row for row in rows if row.get(UTILITY) is not None]
    return curves


def change(curves: Curves, key: str, first: int, last: int) -> dict[str, Any]:
    """MEAN over seeds of the change of a measurement between two places of the curves."""
    values = []
    for rows in curves.values():
        values.append([[rows[last][key] - rows[first][key]]])
    if len(values) == 1:
        return {"mean": values[0][0][0], "ci95": [None, None], "n": 1}
    return nested_ci95(values).as_dict()


def peak_of(curves: Curves) -> int:
    """Place of the highest mean utility over the seeds."""
    rows = zip(*curves.values(), strict=True)
    means = [fmean(row[UTILITY] for row in of_seeds) for of_seeds in rows]
    return means.index(max(means))


def page_of(curves: Curves, record: Mapping[str, Any]) -> list[str]:
    """Lines of the page."""
    steps = [int(row["step"]) for row in next(iter(curves.values()))]
    peak = record["peak"]
    rows = []
    for key in KEYS:
        cells = [key.removeprefix("eval/")]
        for place in (0, peak, -1):
            values = [rows_of[place][key] for rows_of in curves.values()]
            cells.append(f"{fmean(values):.3f}")
        for name in ("rise", "fall"):
            cells.append(_show(record[name][key]))
        rows.append(cells)
    head = (
        "held-out mean",
        f"update {steps[0]}",
        f"update {steps[peak]}, the highest utility",
        f"update {steps[-1]}",
        "change to the highest utility",
        "change from there to the end",
    )
    return [
        "# Hundreds of updates on DeScore",
        "",
        f"Made by `{COMMAND}` at commit {record['commit']}, seeds "
        f"{', '.join(map(str, curves))}: {steps[-1]} updates of {PROMPTS} prompts and "
        f"{VIDEOS} videos each. `descore` is the reward that is trained on, `people` the utility "
        "that nothing trains on, with its parts; `shapes` the oracle. Student's 95 % intervals "
        "over the seeds.",
        "",
        *tables.markdown_table(head, rows),
        "",
        "![reward and utility against videos](long_grpo.svg)",
    ]


def _show(value: Mapping[str, Any]) -> str:
    if None in value["ci95"]:
        return f"{value['mean']:.3f}"
    return tables.show(value)


def plot(curves: Curves, videos: int, path: Path) -> None:
    """Plot the reward model, the utility and its parts against the videos seen."""
    figure, axes = tables.new_figure(3, share_y=False)
    for seed, rows in curves.items():
        seen = [videos * row["step"] for row in rows]
        for axis, key in zip(axes, (TRAINED, UTILITY), strict=False):
            axis.plot(seen, [row[key] for row in rows], label=f"seed {seed}", lw=1)

    # The parts, MEAN over the seeds.
    for part in PARTS:
        key = f"{UTILITY}.{part}"
        of_seeds = zip(*curves.values(), strict=True)
        means = [fmean(row[key] for row in rows) for rows in of_seeds]
        axes[2].plot(seen, means, label=part, lw=1)
    axes[0].set(title="DeScore, trained on", xlabel="videos", ylabel="held-out mean")
    axes[1].set(title="utility of the people", xlabel="videos")
    axes[2].set(title="parts of the utility", xlabel="videos")
    axes[2].legend(fontsize=6)
    tables.save_figure(figure, path, legend_of=axes[0])


def main() -> None:
    """Train all seeds, then write the results."""
    parser = comparison_parser(__doc__, "long_grpo")
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--every", type=int, default=20, help="updates")
    parser.add_argument("--limit", type=int, default=96, help="held-out prompts")
    args = parser.parse_args()

    recipe = Recipe(args.run_dir, args.workers)
    jobs = []
    for seed in args.seeds:
        job = job_of(
            args.run_dir,
            seed,
            updates=args.updates,
            every=args.every,
            limit=args.limit,
        )
        jobs.append([job])
    recipe.run(jobs)

    # Up to the highest utility, and from there to the end.
    curves = read_curves(ROOT / args.run_dir, args.seeds)
    peak = peak_of(curves)
    record = {
        "command": COMMAND,
        "commit": commit(),
        "seconds": recipe.seconds,
        "peak": peak,
        "rise": {key: change(curves, key, 0, peak) for key in KEYS},
        "fall": {key: change(curves, key, peak, -1) for key in KEYS},
    }
    out = ROOT / args.out
    plot(curves, PROMPTS * VIDEOS, out / "long_grpo.svg")
    tables.write_results(out, "long_grpo", record, page_of(curves, record), curves)


if __name__ == "__main__":
    main()
