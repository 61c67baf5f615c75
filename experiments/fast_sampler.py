"""Train with the fast sampler and without: `python experiments/fast_sampler.py`.

The recipe trains the tiny Wan on the exact oracle under three seeds, with its own sampler and with
fast ones: the adapter merged, half as many tail steps with the second-order solver, the VAE in
bf16, and in one of them the transformer in bf16 too, as at full size. A further pair of arms walks
the grid of the full-size recipe. All arms make equally many updates and are evaluated by the same
sampler. The seconds of a step come from `experiments/bench/grpo_fast.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from common.files import read_json
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
    ROOT,
    CommandStep,
    Job,
    Recipe,
    commit,
    comparison_parser,
    config_words,
)

COMMAND = "python experiments/fast_sampler.py"
# A column of the tables, and its key in the JSON.
GAP = "against the plain sampler"


@dataclass(frozen=True)
class SamplerArm:
    """A sampler of the recipe, as overrides of its config."""

    title: str
    overrides: tuple[str, ...] = ()


_SAMPLER = "generator.sampler."
FULL_GRID = (f"{_SAMPLER}num_steps=16", f"{_SAMPLER}stochastic_range=6")
# The adapter merged, a second-order tail, a faster VAE.
FAST = (
    f"{_SAMPLER}merge_adapter=true",
    f"{_SAMPLER}tail_solver=ab2",
    "generator.vae_dtype=bfloat16",
    "generator.vae_channels_last=true",
)
# The merged weights and the adapter's products are rounded to bf16 too.
BF16 = ("generator.dtype=bfloat16", "generator.lora.compute_dtype=bfloat16")
SHORT = f"{_SAMPLER}tail_steps=3"
ARMS = {
    "plain": SamplerArm("8 steps, fp32"),
    "fast_fp32": SamplerArm("8 steps, fp32, merged, ab2 tail of 3", (*FAST, SHORT)),
    "fast": SamplerArm("8 steps, bf16, merged, ab2 tail of 3", (*FAST, *BF16, SHORT)),
    "plain_16": SamplerArm("16 steps, fp32", FULL_GRID),
    "fast_16": SamplerArm(
        "16 steps, bf16, merged, ab2 tail of 6",
        (*FULL_GRID, *FAST, *BF16, f"{_SAMPLER}tail_steps=6"),
    ),
}
# (without, with the fast sampler), on the same grid.
PAIRS = (("plain", "fast_fp32"), ("plain", "fast"), ("plain_16", "fast_16"))


def job_of(
    root: Path,
    seed: int,
    arm: str,
    *,
    updates: int,
    prompts: int,
) -> Job:
    """Commands that train an arm and evaluate it on held-out prompts."""
    folder = run_folder(root, seed, arm)
    evaluation = evaluation_step(folder, seed, prompts, trained=arm != "base")
    if arm == "base":
        return Job(folder, [evaluation])
    words = config_words(
        "grpo_oracle",
        f"run_dir={folder}",
        f"seed={seed}",
        f"steps={updates}",
        "evaluation=null",
        *ARMS[arm].overrides,
    )
    return Job(folder, [training_step("launch/grpo.py", words, folder), evaluation])


def timing_job(root: Path, arms: list[str], rounds: int) -> Job:
    """Command that times a step of these arms."""
    out = root / "timing.json"
    words = ["--rounds", str(rounds), "--out", str(out), "--arms", *arms]
    step = CommandStep("time steps", "experiments/bench/grpo_fast.py", words, out)
    return Job(root, [step])


def forwards_of(folder: Path) -> float:
    """DiT samples of a training run, a backward counted as two."""
    rows = read_metrics(folder / "metrics.jsonl")
    return sum(tables.training_forwards(row) for row in rows if "forwards/grad" in row)


def page_of(record: dict[str, Any], seeds: list[int]) -> list[str]:
    """Lines of the page."""
    base = record["arms"]["base"]["oracle"]
    lines = [
        "# The fast sampler against the plain one, in miniature",
        "",
        f"Made by `{record['command']}` at commit {record['commit']}. Seeds: "
        f"{', '.join(map(str, seeds))}. The tiny Wan learns from the exact oracle, which scores "
        f"(0 to 1) {base['n'] // len(seeds)} held-out prompts after {record['updates']} updates. "
        "Intervals: 95 %, bootstrap over seeds and prompts; differences are taken prompt by "
        "prompt. All arms are evaluated by the sampler of `configs/shapes/evaluate_oracle.yaml`, "
        "in fp32 and without merging. The VAE of the fast arms is in bf16, with channels last.",
        "",
        f"Before training: {tables.show(base)}.",
        "",
    ]
    # What training reached.
    head = ["sampler", "DiT forwards", "oracle", GAP]
    rows = []
    for arm, result in record["arms"].items():
        if arm != "base":
            cells = [ARMS[arm].title, f"{result['forwards']:.0f}"]
            cells += [tables.show(result["oracle"]), tables.show(result.get(GAP))]
            rows.append(cells)
    lines += tables.markdown_table(head, rows)

    # What a step takes.
    timing = record["timing"]
    lines += [
        "",
        f"Seconds of a step at the size of the demo (32 prompts, 8 videos each), medians of "
        f"{timing['rounds']} rounds in which the arms take turns, on {timing['threads']} thread "
        "of a machine that others used. The ratio is taken round by round.",
        "",
    ]
    head = ["sampler", "rollout", "decode", "update", "step", "processor", "ratio"]
    rows = []
    for arm, row in timing["arms"].items():
        cells = [ARMS[arm].title]
        fields = ("rollout", "decode", "update", "wall", "cpu")
        cells += [f"{row[field]:.2f}" for field in fields]
        ratio = row.get("ratio")
        cells.append(f"{ratio['wall']:.2f}, {ratio['cpu']:.2f}" if ratio else "")
        rows.append(cells)
    lines += tables.markdown_table(head, rows)
    lines += ["", "Ratios: on the clock, of the processor."]
    return lines


def main() -> None:
    """Run all arms under all seeds, then write the results."""
    parser = comparison_parser(__doc__, "fast_sampler")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=240, help="held-out prompts")
    parser.add_argument("--rounds", type=int, default=4, help="timed steps")
    args = parser.parse_args()

    # Train and evaluate all arms, then time their steps.
    recipe = Recipe(args.run_dir, args.workers)
    names = ["base", *args.arms]
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
    recipe.run([[timing_job(args.run_dir, args.arms, args.rounds)]])

    # Compare the arms.
    root = ROOT / args.run_dir
    scores = read_scores(root, args.seeds, names)
    arms = {name: record_of(scores, name) for name in names}
    for arm in args.arms:
        folders = [run_folder(root, seed, arm) for seed in args.seeds]
        arms[arm]["forwards"] = fmean(forwards_of(folder) for folder in folders)
        arms[arm]["gain"] = oracle_of(scores, arm, minus="base")
    for plain, fast in PAIRS:
        if plain in names and fast in names:
            arms[fast][GAP] = oracle_of(scores, fast, minus=plain)
    chosen = "" if args.arms == list(ARMS) else f" --arms {' '.join(args.arms)}"
    record = {
        "command": COMMAND + chosen,
        "commit": commit(),
        "updates": args.updates,
        "arms": arms,
        "timing": read_json(root / "timing.json"),
    }
    page = page_of(record, args.seeds)
    tables.write_results(ROOT / args.out, "fast_sampler", record, page, scores)


if __name__ == "__main__":
    main()
