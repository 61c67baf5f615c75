"""Compare the parts of Longcat-GRPO and related algorithms: `python experiments/reproduce_grpo.py`.

Every arm trains the tiny Wan on the exact oracle under three seeds, for the same number of DiT
forwards (a backward counts two), and is evaluated on held-out prompts. The paper (LongCat-Video
2510.22200, section 3.3) shows such curves without numbers. Results: a JSON, a page and a plot.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from common.config import load
from common.log import read_metrics
from experiments import tables
from experiments.oracle_scores import (
    evaluation_step,
    oracle_of,
    read_scores,
    record_of,
    run_folder,
    training_step,
)
from experiments.runner import (
    CONFIGS,
    ROOT,
    Job,
    Recipe,
    commit,
    comparison_parser,
)
from launch.planning.forwards import forwards_per_update, samples_per_rollout
from launch.schemas.training import GrpoRun

COMMAND = "python experiments/reproduce_grpo.py"
BASE = "longcat"
# A column of the tables, and its key in the JSON.
GAP = "against the recipe"


@dataclass(frozen=True)
class GrpoArm:
    """A variant of the recipe.

    group  Section of the page. An arm of "sisters" loads configs/sisters/NAME.yaml. An arm of
           "tail" makes as many updates as the recipe, the others as many as cost the same.
    extra  Overrides of the config.
    """

    title: str
    group: str = "parts"
    extra: tuple[str, ...] = ()


# Overrides of the sampler.
_SAMPLER = "generator.sampler."
LATE = f"{_SAMPLER}stochastic_first=1"
TAIL = f"{_SAMPLER}tail_steps=3"
RANGE = f"{_SAMPLER}stochastic_range"
# A related algorithm keeps the recipe's steps, group size, adapter and learning rate.
SAME = (
    f"{_SAMPLER}num_steps=8",
    "grpo.group_size=8",
    "optimizer.lr=2e-3",
    "generator.lora.rank=32",
    "generator.lora.alpha=32",
    "generator.lora.targets=[to_q,to_k,to_v]",
)
# The recipe first: every other arm is compared with it.
ARMS = {
    BASE: GrpoArm("Longcat-GRPO, the recipe"),
    # Parts of the recipe.
    "no_reweight": GrpoArm("without reweighting", extra=("grpo.reweight=none",)),
    "own_spread": GrpoArm(
        "divided by each group's spread", extra=("grpo.scale=group",)
    ),
    "no_spread": GrpoArm("divided by no spread", extra=("grpo.scale=none",)),
    # Its largest noise is at the first step.
    "late": GrpoArm("the first step never stochastic", extra=(LATE,)),
    "untruncated": GrpoArm(
        "the same, noise without a ceiling", extra=(LATE, f"{_SAMPLER}max_std=null")
    ),
    "no_kl": GrpoArm("without KL", extra=("grpo.kl_weight=0",)),
    # Group size, at equally many videos.
    "members_4": GrpoArm(
        "G = 4, twice the prompts", extra=("grpo.group_size=4", "prompts_per_step=32")
    ),
    "members_16": GrpoArm(
        "G = 16, half the prompts", extra=("grpo.group_size=16", "prompts_per_step=8")
    ),
    # Related algorithms.
    "flow_grpo": GrpoArm("Flow-GRPO", "sisters", (*SAME, f"{RANGE}=8")),
    "mixgrpo": GrpoArm(
        "MixGRPO, a window of 4",
        "sisters",
        (*SAME, f"{RANGE}=8", f"{_SAMPLER}window_every=4"),
    ),
    "flash_grpo": GrpoArm("Flash-GRPO", "sisters", (*SAME, f"{RANGE}=4")),
    "flow_cps": GrpoArm("Flow-CPS kernel", "sisters"),
    # Cheaper steps after the stochastic step.
    "tail_euler": GrpoArm("tail of 3 Euler steps", "tail", (TAIL,)),
    "tail_ab2": GrpoArm(
        "tail of 3 second-order steps", "tail", (TAIL, f"{_SAMPLER}tail_solver=ab2")
    ),
    "tail_cache": GrpoArm(
        "every other tail step from cached features",
        "tail",
        (f"{_SAMPLER}tail_cache=2",),
    ),
}


def configs_of(name: str) -> list[Path]:
    """Config files of an arm, in the order of --config."""
    files = [CONFIGS / "grpo_oracle.yaml"]
    if ARMS[name].group == "sisters":
        files.append(Path("configs/sisters", f"{name}.yaml"))
    return files


def config_of(name: str) -> GrpoRun:
    """Resolved config of an arm."""
    return load(GrpoRun, configs_of(name), ARMS[name].extra)


def cost_of_update(cfg: GrpoRun) -> float:
    """DiT samples of an update, a backward counted as two.

    The rollouts, and for every trained latent 3 with gradient and 1 for the reference policy.
    """
    # Both are per group.
    rollout = samples_per_rollout(cfg.generator.sampler, cfg.grpo.group_size)
    return cfg.prompts_per_step * (rollout + forwards_per_update(cfg))


def updates_of(name: str, updates: int) -> int:
    """Number of updates of an arm for the cost of ``updates`` of the recipe, at least 1."""
    if ARMS[name].group == "tail":
        return updates

    # Equal cost: fewer updates where an update costs more.
    recipe_cost = cost_of_update(config_of(BASE))
    return max(1, round(updates * recipe_cost / cost_of_update(config_of(name))))


def job_of(root: Path, seed: int, arm: str, *, updates: int, prompts: int) -> Job:
    """Commands that train an arm and evaluate it on held-out prompts."""
    folder = run_folder(root, seed, arm)
    evaluation = evaluation_step(folder, seed, prompts, trained=arm != "base")
    if arm == "base":
        return Job(folder, [evaluation])

    # Later config files override earlier ones.
    count = updates_of(arm, updates)
    words = []
    for path in configs_of(arm):
        words += ["--config", str(path)]
    words += [
        f"run_dir={folder}",
        f"seed={seed}",
        f"steps={count}",
        # Four evaluations in training give the curve.
        f"evaluation.every={max(1, count // 4)}",
        f"evaluation.limit={min(48, prompts)}",
        *ARMS[arm].extra,
    ]
    return Job(folder, [training_step("launch/grpo.py", words, folder), evaluation])


class GrpoTraining(NamedTuple):
    """Log of a training run.

    updates   Number of updates.
    videos    Number of sampled videos.
    forwards  DiT samples of the whole run, a backward counted as two.
    rollout   Median seconds of a step's rollouts.
    curve     Points (DiT forwards so far, MEAN oracle of the first held-out prompts).
    """

    updates: int
    videos: int
    forwards: float
    rollout: float
    curve: list[tuple[float, float]]


def read_training(folder: Path) -> GrpoTraining:
    """Read a run's training log."""
    metrics = read_metrics(folder / "metrics.jsonl")

    # DiT forwards before and after each training step.
    steps = [row for row in metrics if "forwards/grad" in row]
    spent = [0.0, *accumulate(tables.training_forwards(row) for row in steps)]

    # The oracle in training, against the forwards until then.
    curve = []
    for row in metrics:
        if "eval/oracle" in row:
            curve.append((spent[int(row["step"])], row["eval/oracle"]))
    videos = sum(row["videos_per_second"] * row["seconds/step"] for row in steps)
    rollout = median(row["seconds/rollout"] for row in steps)
    return GrpoTraining(len(steps), round(videos), spent[-1], rollout, curve)


def groups_of(arms: Collection[str]) -> dict[str, list[str]]:
    """Arms by section of the page, after the recipe; without sections that only hold the recipe."""
    groups: dict[str, list[str]] = {}
    for name, arm in ARMS.items():
        if name in arms and name != BASE:
            groups.setdefault(arm.group, [BASE]).append(name)
    return groups


def page_of(record: dict[str, Any], seeds: Sequence[int]) -> list[str]:
    """Lines of the page."""
    base = record["arms"]["base"]["oracle"]
    lines = [
        "# What each part of Longcat-GRPO is worth, in miniature",
        "",
        f"Made by `{record['command']}` at commit {record['commit']} in "
        f"{record['minutes']:.0f} minutes. "
        f"Seeds: {', '.join(map(str, seeds))}. The tiny Wan learns from the exact oracle, which "
        f"scores (0 to 1) {base['n'] // len(seeds)} held-out prompts after training. Intervals: "
        "95 %, bootstrap over "
        "seeds and prompts; differences are taken prompt by prompt. Arms spend equally many DiT "
        "forwards, a backward counted as two; those of the tail make as many updates as the "
        "recipe. Rollout: median seconds of a step, two runs on two cores.",
        "",
        f"Before training: {tables.show(base)}.",
        "",
    ]

    # A table for each section.
    counts = ("updates", "videos", "forwards")
    head = ["arm", "updates", "videos", "DiT forwards", "rollout", "oracle", GAP]
    for title, members in groups_of(record["arms"]).items():
        rows = []
        for arm in members:
            result = record["arms"][arm]

            # The recipe has no difference to itself.
            gap = None if arm == BASE else result[GAP]
            cells = [ARMS[arm].title]
            cells += [f"{result[name]:.0f}" for name in counts]
            cells.append(f"{result['rollout']:.2f}")
            rows.append([*cells, tables.show(result["oracle"]), tables.show(gap)])
        lines += [f"## {title.capitalize()}", "", *tables.markdown_table(head, rows)]
        lines.append("")
    return [*lines, "![oracle against DiT forwards](reproduce_grpo.svg)"]


def plot(trainings: dict[str, list[GrpoTraining]], path: Path) -> None:
    """Plot the oracle on held-out prompts against DiT forwards, MEAN over seeds."""
    # A panel for each section.
    groups = groups_of(trainings)
    figure, axes = tables.new_figure(max(2, len(groups)))
    for axis, (title, members) in zip(axes, groups.items(), strict=False):
        for arm in members:
            # MEAN over seeds at each evaluation.
            spent = []
            oracle = []
            curves = [training.curve for training in trainings[arm]]
            for points in zip(*curves, strict=True):
                spent.append(fmean(x for x, _ in points))
                oracle.append(fmean(y for _, y in points))
            label = ARMS[arm].title
            axis.plot(spent, oracle, marker="o", markersize=2, lw=1, label=label)
        axis.set(title=title, xlabel="DiT forwards", ylabel="oracle, held-out prompts")
        axis.legend(fontsize=5)
    tables.save_figure(figure, path)


def main() -> None:
    """Run all arms under all seeds, then write the results."""
    parser = comparison_parser(__doc__, "reproduce_grpo")
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM"
    )
    parser.add_argument("--updates", type=int, default=40, help="of the recipe")
    parser.add_argument("--prompts", type=int, default=240, help="held-out prompts")
    args = parser.parse_args()

    # Train and evaluate all arms.
    recipe = Recipe(args.run_dir, args.workers)
    names = list(dict.fromkeys(["base", BASE, *args.arms]))
    jobs = []
    for seed in args.seeds:
        for arm in names:
            job = job_of(
                args.run_dir,
                seed,
                arm,
                updates=args.updates,
                prompts=args.prompts,
            )
            jobs.append([job])
    recipe.run(jobs)

    # Compare the arms.
    root = ROOT / args.run_dir
    scores = read_scores(root, args.seeds, names)
    arms = {name: record_of(scores, name) for name in names}
    trainings = {}
    for arm in names[1:]:
        arms[arm]["gain"] = oracle_of(scores, arm, minus="base")
        arms[arm][GAP] = oracle_of(scores, arm, minus=BASE)
        folders = [run_folder(root, seed, arm) for seed in args.seeds]
        trainings[arm] = [read_training(folder) for folder in folders]

        # What the training took, MEAN over seeds.
        for field in ("updates", "videos", "forwards", "rollout"):
            values = [getattr(training, field) for training in trainings[arm]]
            arms[arm][field] = round(fmean(values), 3)

    # The command names the arms if some are left out.
    chosen = "" if set(names) == {"base", *ARMS} else f" --arms {' '.join(args.arms)}"
    record = {
        "command": COMMAND + chosen,
        "commit": commit(),
        "minutes": round(recipe.seconds["wall"] / 60, 1),
        "arms": arms,
    }
    out = ROOT / args.out
    plot(trainings, out / "reproduce_grpo.svg")
    page = page_of(record, args.seeds)
    tables.write_results(out, "reproduce_grpo", record, page, scores)


if __name__ == "__main__":
    main()
