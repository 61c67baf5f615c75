"""Compare learning from pairs with online learning: `python experiments/reproduce_dpo.py`.

DeScore is trained on preferences and scores eight videos a prompt of the tiny Wan; the best and the
worst make a pair. Plain fine-tuning, Flow-RWR and Flow-DPO (two schedules of beta) learn from these
pairs. Longcat-GRPO learns from the same DeScore, for as many DiT forwards as the pairs and Flow-DPO
took together. The oracle, which trains no model, scores held-out prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from alignment.pair_store import PairSet
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
from experiments.reproduce_grpo import cost_of_update
from experiments.runner import (
    CONFIGS,
    ROOT,
    CommandStep,
    Job,
    Recipe,
    commit,
    comparison_parser,
    config_words,
)
from launch.schemas.pairs import DpoRun, PairsRun
from launch.schemas.training import GrpoRun
from rm.prompt import DIMENSIONS

# The page and the JSON name it.
COMMAND = "python experiments/reproduce_dpo.py"
# overrides of configs/shapes/dpo.yaml
ARMS = {
    "sft": ("dpo.method=sft",),
    "rwr": ("dpo.method=rwr",),
    "dpo": (),
    "dpo_quadratic": ("dpo.beta_schedule=quadratic",),
}
TITLES = {
    "base": "the base generator",
    "sft": "fine-tuning on the chosen videos",
    "rwr": "Flow-RWR",
    "dpo": "Flow-DPO, constant beta",
    "dpo_quadratic": "Flow-DPO, beta (1 - t)^2",
    "grpo": "Longcat-GRPO",
}
# Columns of the last table, of which an arm may lack some.
METRICS = (
    "loss",
    "accuracy",
    "chosen_change",
    "rejected_change",
    "push",
    "grad_norm",
)


@dataclass(frozen=True)
class Size:
    """Size of the comparison.

    train_pairs  Preference pairs that train DeScore.
    prompts      Prompts of the pairs, eight videos each.
    epochs       Epochs on the pairs, in multiples of configs/shapes/dpo.yaml.
    heldout      Prompts that the oracle scores.
    """

    train_pairs: int
    prompts: int
    epochs: float
    heldout: int


def forwards_of_pairs(size: Size) -> float:
    """DiT samples of sampling all candidates."""
    pairs = load(PairsRun, CONFIGS / "pairs.yaml")

    # Guidance takes a second forward per step.
    sampler = pairs.generator.sampler
    guidance = 1 if sampler.guidance_scale == 1 else 2
    return size.prompts * pairs.pairs.candidates * sampler.num_steps * guidance


def epochs_of(size: Size) -> float:
    """Epochs of training on the pairs."""
    return load(DpoRun, CONFIGS / "dpo.yaml").dpo.epochs * size.epochs


def updates_of_grpo(size: Size) -> int:
    """GRPO updates that cost as much as the pairs and Flow-DPO on them, at least 1.

    Counts every prompt as a pair: chosen and rejected, 3 with gradient and 1 for the reference.
    """
    # Forwards with gradient cost 3, those of the reference policy 1.
    everything = forwards_of_pairs(size) + size.prompts * epochs_of(size) * 2 * (3 + 1)
    update = cost_of_update(load(GrpoRun, CONFIGS / "grpo.yaml"))
    return max(1, round(everything / update))


def prepare(seed: int, root: Path, size: Size) -> Job:
    """Train DeScore and make the pairs."""
    folder = root / f"seed{seed}"
    data = folder / "data"
    descore = folder / "descore"
    pairs = folder / "pairs"

    # Preference pairs; the held-out ones are not used.
    make = ["--out", str(data), "--seed", str(seed), "--workers", "1"]
    make += ["--pairs", f"train={size.train_pairs}", "heldout=8"]

    # DeScore, without evaluation in training.
    train = config_words(
        "cold_start",
        f"run_dir={descore}",
        f"seed={seed}",
        "eval_every=0",
        f"data.train={data / 'train.csv'}",
        "data.heldout=null",
    )

    # The best and the worst of eight videos by DeScore.
    sample = config_words(
        "pairs",
        f"out={pairs}",
        f"seed={seed}",
        f"limit={size.prompts}",
        f"rewards.descore.checkpoint={descore / 'final'}",
    )

    # Each step is done when its last file exists.
    trained = descore / "final" / "descore.json"
    steps = [
        CommandStep("data", "toy/make_pairs.py", make, data / "done.json"),
        CommandStep("descore", "launch/cold_start.py", train, trained),
        CommandStep("pairs", "launch/pairs.py", sample, pairs / "manifest.json"),
    ]
    return Job(folder, steps)


def learn(seed: int, arm: str, root: Path, size: Size) -> Job:
    """Train an arm under a seed, then evaluate it with the oracle."""
    folder = run_folder(root, seed, arm)
    prepared = folder.parent
    common = (f"run_dir={folder}", f"seed={seed}")
    evaluation = evaluation_step(folder, seed, size.heldout, trained=arm != "base")
    steps = [evaluation]

    # Learn from the pairs, or online; the base learns nothing.
    if arm in ARMS:
        epochs = f"dpo.epochs={epochs_of(size):g}"
        pairs = f"pairs={prepared / 'pairs'}"
        words = config_words("dpo", *common, epochs, pairs, *ARMS[arm])
        steps.insert(0, training_step("launch/dpo.py", words, folder))
    elif arm == "grpo":
        words = config_words(
            "grpo",
            *common,
            # Videos of training are not needed.
            "video_every=0",
            f"rewards.descore.checkpoint={prepared / 'descore' / 'final'}",
            f"steps={updates_of_grpo(size)}",
        )
        steps.insert(0, training_step("launch/grpo.py", words, folder))
    return Job(folder, steps)


def _forwards(root: Path, seeds: Sequence[int], arm: str, size: Size) -> int:
    """MEAN over seeds of an arm's DiT samples, with those of its pairs."""
    spent = []
    for seed in seeds:
        rows = read_metrics(run_folder(root, seed, arm) / "metrics.jsonl")
        steps = [row for row in rows if "forwards/grad" in row]

        # A row without forwards is an evaluation.
        spent.append(sum(tables.training_forwards(row) for row in steps))

    # Arms on pairs also pay for sampling them.
    return round(fmean(spent) + (forwards_of_pairs(size) if arm in ARMS else 0.0))


def page_of(
    record: dict[str, Any],
    last: dict[str, list[dict[str, float]]],
    seeds: Sequence[int],
) -> list[str]:
    """Lines of the page; ``last`` holds each arm's last row of metrics.jsonl by seed."""
    # Facts of the first paragraph.
    arms = record["arms"]
    count = arms["base"]["oracle"]["n"] // len(seeds)
    pairs = ", ".join(str(counts["pairs"]) for counts in record["pairs"])
    lines = [
        "# Learning from pairs against learning online, in miniature",
        "",
        f"Made by `{COMMAND}` at commit {record['commit']} in {record['minutes']:.0f} minutes. "
        f"Seeds: {', '.join(map(str, seeds))}. Pairs of each seed: {pairs} of "
        f"{record['pairs'][0]['prompts']} prompts; "
        "DeScore scored eight videos a prompt, and the best and the worst made a pair unless they "
        f"were too close. The oracle scores {count} held-out prompts. Intervals: 95 %, bootstrap "
        "over seeds and prompts; gains are taken prompt by prompt. DiT forwards include the making "
        "of the pairs; a backward counts as two.",
        "",
    ]

    # The oracle's total.
    rows = []
    for arm, title in TITLES.items():
        result = arms[arm]
        gain = None if arm == "base" else result["gain"]
        forwards = str(result.get("forwards", ""))
        rows.append([title, forwards, tables.show(result["oracle"]), tables.show(gain)])
    head = ["trained by", "DiT forwards", "oracle, 0 to 1", "gain on the base"]
    lines += tables.markdown_table(head, rows)

    # Sub-dimensions.
    rows = []
    for arm, title in TITLES.items():
        cells = map(tables.show, arms[arm]["sub_dimensions"].values())
        rows.append([title, *cells])
    lines += ["", "## By sub-dimension, 0 to 2", ""]
    lines += tables.markdown_table(["trained by", *DIMENSIONS], rows)

    # Training metrics; fine-tuning has only some of them.
    rows = []
    for arm, steps in last.items():
        cells = [TITLES[arm]]
        for name in METRICS:
            key = f"train/{name}"
            known = key in steps[0]
            cells.append(f"{fmean(row[key] for row in steps):.4f}" if known else "")
        rows.append(cells)
    lines += ["", "## The last training step, mean over seeds", ""]
    return lines + tables.markdown_table(["trained by", *METRICS], rows)


def write_comparison(
    root: Path, out: Path, seeds: Sequence[int], size: Size, *, minutes: float
) -> None:
    """Write the JSON and the page."""
    scores = read_scores(root, seeds, TITLES)
    pair_sets = [PairSet(root / f"seed{seed}" / "pairs") for seed in seeds]
    arms = {}
    for arm in TITLES:
        arms[arm] = record_of(scores, arm)
        arms[arm]["gain"] = oracle_of(scores, arm, minus="base")
        arms[arm]["sub_dimensions"] = {
            name: oracle_of(scores, arm, name) for name in DIMENSIONS
        }
        # The base costs nothing.
        if arm != "base":
            arms[arm]["forwards"] = _forwards(root, seeds, arm, size)
    record = {
        "command": COMMAND,
        "commit": commit(),
        "minutes": round(minutes, 1),
        "pairs": [pairs.about["counts"] for pairs in pair_sets],
        "arms": arms,
    }

    # The last training step of the arms on pairs.
    last = {}
    for arm in ARMS:
        logs = [run_folder(root, seed, arm) / "metrics.jsonl" for seed in seeds]
        last[arm] = [read_metrics(log)[-1] for log in logs]
    page = page_of(record, last, seeds)
    tables.write_results(out, "reproduce_dpo", record, page, scores)


def main() -> None:
    """Prepare DeScore and pairs, run all arms under all seeds, then write the results."""
    parser = comparison_parser(__doc__, "reproduce_dpo")
    parser.add_argument("--train-pairs", type=int, default=2000)
    parser.add_argument("--prompts", type=int, default=691, help="of the pairs")
    parser.add_argument("--epochs", type=float, default=1.0, help="times dpo.yaml's")
    parser.add_argument("--heldout", type=int, default=240, help="held-out prompts")
    args = parser.parse_args()
    root = args.run_dir
    recipe = Recipe(root, args.workers)
    size = Size(args.train_pairs, args.prompts, args.epochs, args.heldout)

    # Every seed has its DeScore and its pairs.
    recipe.run([[prepare(seed, root, size)] for seed in args.seeds])

    # The longest first, so that no worker is idle at the end.
    arms = ["grpo", *ARMS, "base"]
    recipe.run([[learn(seed, arm, root, size)] for arm in arms for seed in args.seeds])

    # Compare the arms.
    minutes = recipe.seconds["wall"] / 60
    write_comparison(ROOT / root, ROOT / args.out, args.seeds, size, minutes=minutes)


if __name__ == "__main__":
    main()
