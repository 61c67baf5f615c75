"""Compare the parts of Longcat-GRPO and related algorithms: `python experiments/reproduce_grpo.py`.

Every arm trains the tiny Wan on the exact oracle under three seeds, for the same number of DiT
forwards (a backward counts two), and is evaluated on held-out prompts. The paper (LongCat-Video
2510.22200, section 3.3) shows such curves without numbers. Results: a JSON, a page and a plot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean, median
from typing import Any

from common.config import load
from common.log import read_metrics
from experiments import tables
from experiments.runner import (
    CONFIGS,
    ROOT,
    CommandStep,
    Job,
    RecipeTimer,
    commit,
    comparison_parser,
    config_words,
    run_jobs,
    write_json,
)
from launch.evaluation.intervals import Interval
from launch.planning.forwards import samples_per_rollout, samples_per_update
from launch.schemas.training import GrpoRun

COMMAND = "python experiments/reproduce_grpo.py"
BASE = "longcat"


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

    The rollouts, and for every latent from which a stochastic step starts 3 with gradient and 1
    for the reference policy.
    """
    # Guidance doubles the forwards, KL adds the reference policy.
    sampler = cfg.generator.sampler
    guidance = 1 if sampler.guidance_scale == 1 else 2
    per_latent = 4 if cfg.grpo.kl_weight > 0 else 3

    # Both are per group.
    rollout = samples_per_rollout(sampler, cfg.grpo.group_size)
    update = samples_per_update(cfg) * guidance * per_latent
    return cfg.prompts_per_step * (rollout + update)


def updates_of(name: str, updates: int) -> int:
    """Number of updates of an arm for the cost of ``updates`` of the recipe, at least 1."""
    if ARMS[name].group == "tail":
        return updates

    # Equal cost: fewer updates where an update costs more.
    recipe_cost = cost_of_update(config_of(BASE))
    return max(1, round(updates * recipe_cost / cost_of_update(config_of(name))))


@dataclass(frozen=True)
class GrpoArmRun:
    """An arm under a seed. Arm "base" is the generator before any training."""

    seed: int
    arm: str

    def folder(self, root: Path) -> Path:
        """Run folder."""
        return root / f"seed{self.seed}" / self.arm


def steps_of(
    run: GrpoArmRun, root: Path, *, updates: int, prompts: int
) -> list[CommandStep]:
    """Commands that train an arm and evaluate it on held-out prompts."""
    folder = run.folder(root)
    steps = []

    # Held-out prompts for the oracle.
    evaluation = config_words(
        "evaluate_oracle",
        f"seed={run.seed}",
        f"out={folder / 'eval'}",
        f"limit={prompts}",
    )

    # Train all arms but the base.
    if run.arm != "base":
        count = updates_of(run.arm, updates)

        # Later config files override earlier ones.
        words = []
        for path in configs_of(run.arm):
            words += ["--config", str(path)]
        words += [
            f"run_dir={folder}",
            f"seed={run.seed}",
            f"steps={count}",
            # Four evaluations in training give the curve.
            f"evaluation.every={max(1, count // 4)}",
            f"evaluation.limit={min(48, prompts)}",
            *ARMS[run.arm].extra,
        ]
        done = folder / "final" / "pytorch_lora_weights.safetensors"
        steps.append(CommandStep(f"train {run}", "launch/grpo.py", words, done))
        evaluation.append(f"adapter={folder / 'final'}")

    # Evaluate with the oracle.
    words = ["generator", *evaluation]
    done = folder / "eval" / "summary.json"
    steps.append(CommandStep(f"judge {run}", "launch/evaluate.py", words, done))
    return steps


@dataclass(frozen=True)
class GrpoOutcome:
    """Results of a run.

    score     The oracle's value of every held-out prompt's video, in order.
    curve     Points (DiT forwards so far, MEAN oracle of the first held-out prompts).
    forwards  Of the whole run, a backward counted as two.
    rollout   Median seconds of a step's rollouts.
    """

    score: tuple[float, ...]
    curve: tuple[tuple[float, float], ...] = ()
    updates: int = 0
    videos: int = 0
    forwards: float = 0.0
    rollout: float = 0.0


Outcomes = dict[GrpoArmRun, GrpoOutcome]


def read_outcome(root: Path, run: GrpoArmRun) -> GrpoOutcome:
    """Read a run's evaluation and its training log."""
    folder = run.folder(root)

    # Scores after training.
    rows = tables.read_results(folder / "eval")
    score = tuple(row["rewards"]["shapes"] for row in rows)
    if run.arm == "base":
        return GrpoOutcome(score)
    metrics = read_metrics(folder / "metrics.jsonl")

    # DiT forwards before and after each training step.
    steps = [row for row in metrics if "forwards/grad" in row]
    spent = [0.0, *accumulate(tables.training_forwards(row) for row in steps)]

    # The oracle in training, against the forwards until then.
    curve = []
    for row in metrics:
        if "eval/oracle" in row:
            forwards = spent[int(row["step"])]
            curve.append((forwards, row["eval/oracle"]))

    # Totals of the training.
    videos = sum(row["videos_per_second"] * row["seconds/step"] for row in steps)
    rollout = median(row["seconds/rollout"] for row in steps)
    return GrpoOutcome(
        score,
        tuple(curve),
        updates=len(steps),
        videos=round(videos),
        forwards=spent[-1],
        rollout=rollout,
    )


def oracle_of(outcomes: Outcomes, arm: str, *, minus: str | None = None) -> Interval:
    """MEAN oracle of an arm over seeds and prompts, or its difference to another arm."""

    def runs(name: str) -> dict[int, tables.Tables]:
        scores = {}
        for run, outcome in outcomes.items():
            if run.arm == name:
                scores[run.seed] = [outcome.score]
        return scores

    return tables.over_seeds(runs(arm), None if minus is None else runs(minus))


def _record_of(outcomes: Outcomes, arm: str) -> dict[str, Any]:
    # Mean of every seed.
    by_seed = {run.seed: outcome for run, outcome in outcomes.items() if run.arm == arm}
    seeds = {}
    for seed, outcome in by_seed.items():
        seeds[seed] = round(fmean(outcome.score), 4)
    record: dict[str, Any] = {
        "oracle": oracle_of(outcomes, arm).as_dict(),
        "seeds": seeds,
    }

    # Gains, and what the training took, MEAN over seeds.
    if arm != "base":
        record["gain"] = oracle_of(outcomes, arm, minus="base").as_dict()
        against = oracle_of(outcomes, arm, minus=BASE).as_dict()
        record["against the recipe"] = against
        for name in ("updates", "videos", "forwards", "rollout"):
            values = [getattr(outcome, name) for outcome in by_seed.values()]
            record[name] = round(fmean(values), 3)
    return record


def groups_of(arms: Sequence[str]) -> dict[str, list[str]]:
    """Arms by section of the page, after the recipe; without sections that only hold the recipe."""
    groups: dict[str, list[str]] = {}
    for name, arm in ARMS.items():
        if name in arms and name != BASE:
            groups.setdefault(arm.group, [BASE]).append(name)
    return groups


def page_of(
    outcomes: Outcomes, arms: Sequence[str], record: dict[str, Any], minutes: float
) -> list[str]:
    """Lines of the page."""
    # Facts of the first paragraph.
    seeds = sorted({run.seed for run in outcomes})
    count = len(next(iter(outcomes.values())).score)
    lines = [
        "# What each part of Longcat-GRPO is worth, in miniature",
        "",
        f"Made by `{record['command']}` at commit {record['commit']} in {minutes:.0f} minutes. "
        f"Seeds: {', '.join(map(str, seeds))}. The tiny Wan learns from the exact oracle, which "
        f"scores (0 to 1) {count} held-out prompts after training. Intervals: 95 %, bootstrap over "
        "seeds and prompts; differences are taken prompt by prompt. Arms spend equally many DiT "
        "forwards, a backward counted as two; those of the tail make as many updates as the "
        "recipe. Rollout: median seconds of a step, two runs on two cores.",
        "",
        f"Before training: {tables.show(oracle_of(outcomes, 'base'))}.",
        "",
    ]

    # A table for each section.
    head = [
        "arm",
        "updates",
        "videos",
        "DiT forwards",
        "rollout",
        "oracle",
    ]
    head.append("against the recipe")
    for title, members in groups_of(arms).items():
        rows = []
        for arm in members:
            row = record["arms"][arm]

            # The recipe has no difference to itself.
            gap = None if arm == BASE else oracle_of(outcomes, arm, minus=BASE)
            cells = [ARMS[arm].title]
            cells += [f"{row[name]:.0f}" for name in ("updates", "videos", "forwards")]
            cells.append(f"{row['rollout']:.2f}")
            cells += [tables.show(oracle_of(outcomes, arm)), tables.show(gap)]
            rows.append(cells)
        lines += [f"## {title.capitalize()}", "", *tables.markdown_table(head, rows)]
        lines.append("")
    return [*lines, "![oracle against DiT forwards](reproduce_grpo.svg)"]


def plot(outcomes: Outcomes, arms: Sequence[str], path: Path) -> None:
    """Plot the oracle on held-out prompts against DiT forwards, MEAN over seeds."""
    groups = groups_of(arms)

    # A panel for each section.
    figure, axes = tables.new_figure(max(2, len(groups)))
    for axis, (title, members) in zip(axes, groups.items(), strict=False):
        for arm in members:
            curves = [o.curve for run, o in outcomes.items() if run.arm == arm]

            # MEAN over seeds at each evaluation.
            spent = []
            oracle = []
            for points in zip(*curves, strict=True):
                spent.append(fmean(x for x, _ in points))
                oracle.append(fmean(y for _, y in points))
            label = ARMS[arm].title
            axis.plot(spent, oracle, marker="o", markersize=2, lw=1, label=label)
        axis.set(title=title, xlabel="DiT forwards", ylabel="oracle, held-out prompts")
        axis.legend(fontsize=5)
    tables.save_figure(figure, path)


def write_results(
    root: Path, out: Path, runs: Sequence[GrpoArmRun], *, command: str, minutes: float
) -> None:
    """Write the JSON, the plot and the page."""
    # Collect the results of all runs.
    outcomes = {run: read_outcome(root, run) for run in runs}
    names = list(dict.fromkeys(run.arm for run in runs))
    record = {
        "command": command,
        "commit": commit(),
        "minutes": round(minutes, 1),
        "arms": {name: _record_of(outcomes, name) for name in names},
    }
    write_json(out / "reproduce_grpo.json", record)

    # The plot and the page.
    plot(outcomes, names, out / "reproduce_grpo.svg")
    page = page_of(outcomes, names, record, minutes)
    tables.write_page(out / "reproduce_grpo.md", page)


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
    timer = RecipeTimer(ROOT / args.run_dir / "seconds.json")
    arms = dict.fromkeys(["base", BASE, *args.arms])
    runs = [GrpoArmRun(seed, arm) for seed in args.seeds for arm in arms]
    jobs = []
    for run in runs:
        steps = steps_of(
            run,
            args.run_dir,
            updates=args.updates,
            prompts=args.prompts,
        )
        jobs.append([Job(run.folder(args.run_dir), steps)])
    run_jobs(jobs, args.run_dir, timer, workers=args.workers)

    # The command names the arms if some are left out.
    chosen = "" if set(arms) == {"base", *ARMS} else f" --arms {' '.join(args.arms)}"

    # Compare the arms.
    out = ROOT / args.out
    root = ROOT / args.run_dir
    command = COMMAND + chosen
    write_results(
        root,
        out,
        runs,
        command=command,
        minutes=timer.minutes,
    )


if __name__ == "__main__":
    main()
