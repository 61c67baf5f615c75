"""Refresh the reward model on the policy's own videos: `python experiments/refresh.py`.

GRPO moves the policy away from the videos that its reward model learned from. Two arms make
equally many updates and start from the demo's DeScore of their seed (`experiments/demo_seeds.py`).
One keeps it. The other stops several times: people label pairs of the policy's newest videos,
DeScore goes on training on them, and GRPO goes on with it. Every step is an ordinary command, so a
user does the same with a table of labels of their own. Results: docs/results/refresh.{json,md}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments import tables
from experiments.demo_seeds import demo_folder
from experiments.oracle_scores import Scores, oracle_of, run_folder
from experiments.runner import (
    ROOT,
    CommandStep,
    Job,
    Recipe,
    commit,
    comparison_parser,
    config_words,
)

COMMAND = "python experiments/refresh.py"
FIXED = "fixed"
REFRESHED = "refreshed"
TITLES = {
    "base": "the generator before",
    FIXED: "GRPO, the same DeScore throughout",
    REFRESHED: "GRPO, DeScore refreshed on the policy's videos",
}
# The utility that nothing trains on, and the oracle.
COLUMNS = ("people", "shapes")
TRAIN_PROMPTS = ROOT / "assets/shapes/prompts_train.txt"
# Prompts and videos of an update.
PROMPTS = 8
VIDEOS = 8


def grpo_step(
    folder: Path, seed: int, checkpoint: Path, *, steps: int, every: int
) -> CommandStep:
    """Command that trains up to ``steps``; started again with more steps, it goes on."""
    words = config_words(
        "grpo",
        f"run_dir={folder}",
        f"seed={seed}",
        f"steps={steps}",
        f"rewards.descore.checkpoint={checkpoint}",
        f"prompts_per_step={PROMPTS}",
        f"grpo.group_size={VIDEOS}",
        "evaluation=null",
        "video_every=0",
        f"save_every={every}",
        # Every part's last checkpoint says that the part is done.
        "keep=1000",
    )
    done = folder / "checkpoints" / f"step-{steps:06d}" / "manifest.json"
    return CommandStep(f"train {folder} to {steps}", "launch/grpo.py", words, done)


def refresh_steps(
    place: Path, seed: int, grpo: Path, checkpoint: Path, *, pairs: int, part: int
) -> list[CommandStep]:
    """Commands that sample the policy, let people label, and train DeScore on in ``place``."""
    # Other prompts in each part.
    prompts = TRAIN_PROMPTS.read_text(encoding="utf-8").splitlines()
    start = part * pairs % len(prompts)
    chosen = (prompts[start:] + prompts[:start])[:pairs]
    (ROOT / place).mkdir(parents=True, exist_ok=True)
    file = place / "prompts.txt"
    (ROOT / file).write_text("\n".join(chosen) + "\n", encoding="utf-8")

    # Two videos of each prompt, labels, and the training.
    samples = place / "samples"
    table = place / "pairs.csv"
    earlier = demo_folder(seed) / "data" / "train.csv"
    sample = config_words(
        "sample",
        f"out={samples}",
        f"prompts={file}",
        "limit=null",
        f"seed={1000 * part + seed}",
        "seeds=2",
        f"adapter={grpo / 'final'}",
    )
    label = ["--samples", str(samples), "--model", str(checkpoint)]
    label += ["--out", str(table), "--seed", str(seed)]
    label += ["--also", str(earlier), str(pairs)]
    train = config_words(
        "cold_start",
        f"run_dir={place / 'descore'}",
        f"checkpoint={checkpoint}",
        f"seed={seed}",
        f"data.train={table}",
        "data.heldout=null",
        "eval_every=0",
        "cold_start.epochs=2",
        "optimizer.decay_steps=0",
        # Half of the rates that it began with.
        "lr={llm: 1.0e-4, vision: 5.0e-5, merger: 1.0e-4, query: 5.0e-4, head: 5.0e-3}",
    )
    return [
        CommandStep(
            f"sample {samples}", "launch/sample.py", sample, samples / "samples.jsonl"
        ),
        CommandStep(f"label {table}", "toy/label_pairs.py", label, table),
        CommandStep(
            f"descore {place}",
            "launch/cold_start.py",
            train,
            place / "descore" / "final" / "descore.json",
        ),
    ]


def evaluation_step(
    folder: Path, seed: int, adapter: Path | None, limit: int
) -> CommandStep:
    """Command that measures a policy on held-out prompts, by DeScore of the demo and by people."""
    checkpoint = demo_folder(seed) / "descore" / "final"
    words = config_words(
        "evaluate",
        f"out={folder}",
        f"seed={seed}",
        f"limit={limit}",
        f"rewards.descore.checkpoint={checkpoint}",
    )
    if adapter is not None:
        words.append(f"adapter={adapter}")
    done = folder / "summary.json"
    words = ["generator", *words]
    return CommandStep(f"evaluate {folder}", "launch/evaluate.py", words, done)


def jobs_of(
    root: Path, seed: int, *, updates: int, parts: int, pairs: int, limit: int
) -> list[list[Job]]:
    """List the commands of a seed: the base, the fixed arm, and the refreshed one."""
    first = demo_folder(seed) / "descore" / "final"
    base = run_folder(root, seed, "base")
    jobs = [[Job(base, [evaluation_step(base / "eval", seed, None, limit)])]]

    # Both arms start from the same DeScore.
    every = updates // parts
    for arm, count in ((FIXED, 1), (REFRESHED, parts)):
        folder = run_folder(root, seed, arm)
        grpo = folder / "grpo"
        checkpoint = first
        steps: list[CommandStep] = []
        for part in range(count):
            # Between two parts, DeScore follows the policy.
            if part:
                place = folder / f"part{part}"
                steps += refresh_steps(
                    place, seed, grpo, checkpoint, pairs=pairs, part=part
                )
                checkpoint = place / "descore" / "final"
            until = updates * (part + 1) // count
            steps.append(grpo_step(grpo, seed, checkpoint, steps=until, every=every))
        adapter = grpo / "final"
        steps.append(evaluation_step(folder / "eval", seed, adapter, limit))
        jobs.append([Job(folder, steps)])
    return jobs


def read_values(root: Path, seeds: Sequence[int]) -> Scores:
    """Read the utility and the oracle of every held-out prompt."""
    values: Scores = {}
    for arm in TITLES:
        values[arm] = {}
        for seed in seeds:
            rows = tables.read_results(run_folder(root, seed, arm) / "eval")
            columns = {}
            for name in COLUMNS:
                columns[name] = [row["rewards"][name] for row in rows]
            values[arm][seed] = columns
    return values


def arms_of(values: Scores) -> dict[str, Any]:
    """Means of every arm, its gain over the base, and what the refresh adds."""
    arms: dict[str, Any] = {}
    for arm in TITLES:
        results = {name: oracle_of(values, arm, name) for name in COLUMNS}
        if arm != "base":
            results["gain"] = oracle_of(values, arm, COLUMNS[0], minus="base")
        if arm == REFRESHED:
            results["over fixed"] = oracle_of(values, arm, COLUMNS[0], minus=FIXED)
        by_seed = values[arm].items()
        results["seeds"] = {seed: fmean(c[COLUMNS[0]]) for seed, c in by_seed}
        arms[arm] = results
    return arms


def page_of(record: Mapping[str, Any]) -> list[str]:
    """Lines of the page."""
    rows = []
    for arm, results in record["arms"].items():
        cells = [TITLES[arm]]
        for name in (*COLUMNS, "gain", "over fixed"):
            cells.append(tables.show(results.get(name)))
        rows.append(cells)
    # The page.
    head = (
        "policy",
        "people's utility",
        "oracle",
        "utility, gain over the generator before",
        "utility, over the fixed DeScore",
    )
    return [
        "# A reward model that follows its policy",
        "",
        f"Made by `{COMMAND}` at commit {record['commit']}: {record['updates']} updates of "
        f"{PROMPTS} prompts and {VIDEOS} videos each, in {record['parts']} parts. Between two "
        f"parts people label {record['pairs']} pairs of the policy's videos, and DeScore goes on "
        "training on them and on as many of its first pairs. Both arms make equally many updates "
        "of the policy; nothing trains on the utility. Held-out prompts, 95 % intervals for new "
        "seeds and prompts.",
        "",
        *tables.markdown_table(head, rows),
    ]


def main() -> None:
    """Train all arms, then write the results."""
    parser = comparison_parser(__doc__, "refresh")
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--parts", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=320, help="labelled between parts")
    parser.add_argument("--limit", type=int, default=240, help="held-out prompts")
    args = parser.parse_args()
    if args.updates % args.parts:
        parser.error("--parts must divide --updates")

    # Train and evaluate.
    recipe = Recipe(args.run_dir, args.workers)
    jobs = []
    for seed in args.seeds:
        jobs += jobs_of(
            args.run_dir,
            seed,
            updates=args.updates,
            parts=args.parts,
            pairs=args.pairs,
            limit=args.limit,
        )
    recipe.run(jobs)

    # Collect the results.
    values = read_values(ROOT / args.run_dir, args.seeds)
    record = {
        "command": COMMAND,
        "commit": commit(),
        "seconds": recipe.seconds,
        "updates": args.updates,
        "parts": args.parts,
        "pairs": args.pairs,
        "arms": arms_of(values),
    }
    out = ROOT / args.out
    tables.write_results(out, "refresh", record, page_of(record), values)


if __name__ == "__main__":
    main()
