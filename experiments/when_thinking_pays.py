"""Draw where thinking before scoring pays: `python experiments/when_thinking_pays.py`.

Worlds that differ from the shipped one in a single respect: how much people weigh what nothing
states, how often the annotator of the base model was right, and how much its chains of thought
say. In each, the base's stated score, a discriminative and a generative reward model and DeScore
learn from the same pairs. Results: docs/results/when_thinking_pays.{json,md} and a plot.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments import tables
from experiments.reproduce_rm import (
    BASE,
    make_base,
    make_tests,
    make_training_pairs,
    steps_of,
)
from experiments.rm_methods import METHODS, OUTSIDE, TESTS, Cell
from experiments.rm_results import Outcomes, best_possible, mean_of, read_outcomes
from experiments.runner import ROOT, Job, Recipe, commit, comparison_parser
from toy.annotator import RIGHT
from toy.people import QUALITY_WEIGHT
from toy.world import SUB_DIMENSIONS

COMMAND = "python experiments/when_thinking_pays.py"
COMPARED = ("base", "discriminative", "generative", "stage1_p0", "descore_p0")
# Cells that follow each other, because one starts from another.
SEQUENCES = (("stage1_p0", "descore_p0"), ("generative",), ("discriminative",))


@dataclass(frozen=True)
class World:
    """A world, by what is different in it.

    factor    Name of what is varied, and its value for the plot.
    quality   Weight of the quality in the people's utility.
    teaching  Arguments of `toy.lessons.Teaching` for its base model; empty is the shipped one.
    """

    title: str
    factor: str
    value: float
    quality: float = QUALITY_WEIGHT
    teaching: Mapping[str, Any] = field(default_factory=dict)


UNSTATED = "weight of what nothing states"
ANNOTATOR = "share of right annotations"
LINES = "lines of the description"
WORLDS = {
    "shipped": World("as shipped", UNSTATED, QUALITY_WEIGHT),
    "quality_0": World("people want only what is stated", UNSTATED, 0.0, 0.0),
    "quality_25": World("quality weighs 0.25", UNSTATED, 0.25, 0.25),
    "quality_75": World("quality weighs 0.75", UNSTATED, 0.75, 0.75),
    "annotator_60": World(
        "annotator right in 60 of 100", ANNOTATOR, 0.6, teaching={"right": 0.6}
    ),
    "annotator_100": World(
        "annotator always right", ANNOTATOR, 1.0, teaching={"right": 1.0}
    ),
    "lines_2": World(
        "chains of thought describe subject and dynamics only",
        LINES,
        2,
        teaching={"described": ("subject", "dynamics")},
    ),
    "lines_0": World(
        "chains of thought are the scores alone", LINES, 0, teaching={"described": ()}
    ),
}
# The shipped world is a point of every factor.
SHIPPED_VALUES = {
    UNSTATED: QUALITY_WEIGHT,
    ANNOTATOR: RIGHT,
    LINES: len(SUB_DIMENSIONS),
}


def base_of(world: str, root: Path, work: Path) -> Path:
    """Folder of a world's base model, which is trained if it is not there."""
    teaching = WORLDS[world].teaching
    if not teaching:
        return BASE
    folder = root / world / "qwen"
    if not (ROOT / folder / "model.safetensors").exists():
        import torch

        from toy.build_qwen import Course, save, taught
        from toy.lessons import Teaching

        torch.set_num_threads(1)
        course = Course(ROOT / BASE.parent, work)
        model = taught(course, f"qwen_{world}", Teaching(**teaching))
        save(model, ROOT / folder)
    return folder


def jobs_of(
    world: str, base: Path, root: Path, seeds: Sequence[int], size: int
) -> list[list[Job]]:
    """Make the data of a world, and list its trainings and evaluations."""
    run = root / world
    weight = str(WORLDS[world].quality)
    options = ["--base", str(base), "--quality-weight", weight]
    make_base(run, base)
    make_tests(run, 100, options=options)
    jobs = []
    for seed in seeds:
        make_training_pairs(run, seed, size, options=options)
        for names in SEQUENCES:
            sequence = []
            for name in names:
                cell = Cell(seed, size, name)
                steps = steps_of(cell, run, rl_steps=30, base=base)
                sequence.append(Job(cell.folder(run), steps))
            jobs.append(sequence)
    cell = Cell(seeds[0], 0, "base")
    jobs.append([Job(cell.folder(run), steps_of(cell, run, rl_steps=30))])
    return jobs


def results_of(world: str, root: Path, seeds: Sequence[int], size: int) -> Any:
    """Accuracies of a world in and out of the domain, with the gains over the others."""
    cells = [Cell(seed, size, name) for seed in seeds for name in COMPARED[1:]]
    cells.append(Cell(seeds[0], 0, "base"))
    outcomes = read_outcomes(ROOT / root / world, cells)
    best = best_possible(ROOT / root / world)
    result: dict[str, Any] = {}
    for group, tests in (("in domain", TESTS[:1]), ("out of domain", OUTSIDE)):
        result[group] = {
            "best_possible": statistics.fmean(
                value for test in tests for value in best[test]
            ),
            "accuracy": _accuracies(outcomes, size, tests),
            "gains": _gains(outcomes, size, tests),
        }
    return result


def _accuracies(outcomes: Outcomes, size: int, tests: Sequence[str]) -> dict[str, Any]:
    found = {}
    for name in COMPARED:
        found[name] = mean_of(outcomes, size, name, tests, "right")
    return found


def _gains(outcomes: Outcomes, size: int, tests: Sequence[str]) -> dict[str, Any]:
    """DeScore minus each of the others, pair by pair."""
    found = {}
    for name in ("base", "discriminative", "generative"):
        gap = mean_of(outcomes, size, "descore_p0", tests, "right", minus=name)
        found[name] = gap
    return found


def page_of(record: Mapping[str, Any], size: int, seeds: Sequence[int]) -> list[str]:
    """Lines of the page."""
    lines = [
        "# When thinking before scoring pays",
        "",
        f"Made by `{COMMAND}` at commit {record['commit']}: {size} training pairs, seeds "
        f"{', '.join(map(str, seeds))}. Each world differs from the shipped one in one respect. "
        "Mean accuracy with 95 % intervals for new seeds and pairs; the gains are DeScore (both "
        "stages, p = 0) minus another model, pair by pair.",
    ]
    for group in ("in domain", "out of domain"):
        rows = []
        for name, world in WORLDS.items():
            if name not in record["worlds"]:
                continue
            result = record["worlds"][name][group]
            cells = [world.title, f"{result['best_possible']:.3f}"]
            cells += [tables.show(result["accuracy"][method]) for method in COMPARED]
            cells += [tables.show(gain) for gain in result["gains"].values()]
            rows.append(cells)
        head = [
            "world",
            "best possible",
            *(METHODS[name].title for name in COMPARED),
            "gain over the base",
            "gain over discriminative",
            "gain over generative",
        ]
        lines += ["", f"## {group.capitalize()}", ""]
        lines += tables.markdown_table(head, rows)
    return [*lines, "", "![accuracy by world](when_thinking_pays.svg)"]


def plot(worlds: Mapping[str, Any], path: Path) -> None:
    """Plot the accuracy in the domain against each factor."""
    figure, axes = tables.new_figure(len(SHIPPED_VALUES))
    for axis, (factor, shipped) in zip(axes, SHIPPED_VALUES.items(), strict=True):
        points = {shipped: "shipped"}
        for name, world in WORLDS.items():
            if world.factor == factor and name in worlds:
                points[world.value] = name
        values = sorted(points)
        for method in COMPARED:
            means = []
            for value in values:
                accuracy = worlds[points[value]]["in domain"]["accuracy"]
                means.append(accuracy[method]["mean"])
            axis.plot(values, means, marker="o", label=METHODS[method].title, lw=1)
        axis.set(xlabel=factor, ylabel="accuracy in the domain")
    tables.save_figure(figure, path, legend_of=axes[0])


def main() -> None:
    """Make all worlds, train and evaluate in each, then write the results."""
    parser = comparison_parser(__doc__, "when_thinking_pays")
    parser.add_argument("--size", type=int, default=1000, help="training pairs")
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS))
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/build_shapes"),
        help="folder of toy/build.py, whose finished stages are used again",
    )
    args = parser.parse_args()
    if "shipped" not in args.worlds:
        parser.error(
            "--worlds needs the shipped one, which the others are compared with"
        )

    recipe = Recipe(args.run_dir, args.workers)
    jobs = []
    for world in args.worlds:
        base = base_of(world, args.run_dir, args.work)
        jobs += jobs_of(world, base, args.run_dir, args.seeds, args.size)
    recipe.run(jobs)

    worlds = {}
    for world in args.worlds:
        worlds[world] = results_of(world, args.run_dir, args.seeds, args.size)
    record = {
        "command": COMMAND,
        "commit": commit(),
        "seconds": recipe.seconds,
        "worlds": worlds,
    }
    out = ROOT / args.out
    plot(worlds, out / "when_thinking_pays.svg")
    page = page_of(record, args.size, args.seeds)
    tables.write_json(out / "when_thinking_pays.json", record)
    tables.write_page(out / "when_thinking_pays.md", page)


if __name__ == "__main__":
    main()
