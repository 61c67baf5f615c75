"""Run the whole way on a CPU, from preference data to a tuned generator: `make demo`.

Every step is the command a user would type, and is printed. A step that has finished is not
repeated when the demo is started again. Results: ``report.html`` and ``summary.json`` in the run
folder. At most 12 minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.files import read_json
from common.progress import clock
from experiments import heldout, tables
from experiments.runner import (
    ROOT,
    CommandStep,
    PeakMemory,
    config_words,
    run_step,
    write_json,
)

# Flow-DPO sees a third of the prompts of configs/shapes, twice as often.
PAIR_PROMPTS = 224
PAIR_EPOCHS = 8
# The seconds of its steps where they were measured last.
MEASURED = ROOT / "docs/results/demo.json"
# The last file of a training run.
ADAPTER = Path("final", "pytorch_lora_weights.safetensors")


def plan(run: Path, seed: int) -> list[CommandStep]:
    """List the steps of the demo, in order."""
    return [
        *_reward_model_steps(run, seed),
        *_generator_steps(run, seed),
        *_evaluation_steps(run, seed),
    ]


def _descore(run: Path) -> str:
    return f"rewards.descore.checkpoint={run / 'descore' / 'final'}"


def _reward_model_steps(run: Path, seed: int) -> list[CommandStep]:
    """Make preference data, then train and test DeScore."""
    # Command lines.
    data = run / "data"
    final = run / "descore" / "final"
    train = config_words(
        "cold_start",
        f"run_dir={run / 'descore'}",
        f"seed={seed}",
        f"data.train={data / 'train.csv'}",
        f"data.heldout={data / 'heldout.csv'}",
    )
    test = config_words(
        "evaluate_rm",
        f"checkpoint={final}",
        f"pairs={data / 'heldout.csv'}",
        f"out={run / 'eval_rm'}",
    )
    return [
        CommandStep(
            "preference data: two videos a prompt, a preference and chains of thought",
            "toy/make_pairs.py",
            ["--out", str(data), "--seed", str(seed)],
            data / "done.json",
        ),
        CommandStep(
            "DeScore, stage 1: cold start",
            "launch/cold_start.py",
            train,
            final / "descore.json",
        ),
        CommandStep(
            "DeScore on held-out pairs",
            "launch/evaluate.py",
            ["rm", *test],
            run / "eval_rm" / "summary.json",
        ),
        CommandStep(
            "DeScore on good videos that are spoilt, or shown with a wrong prompt",
            "launch/check_rewards.py",
            _check_words(run),
            run / "checks.json",
            alone=True,
        ),
    ]


def _check_words(run: Path) -> list[str]:
    """Command line that checks DeScore on the held-out videos that people like best."""
    words = config_words("score", _descore(run))
    prompts = str(run / "data" / "heldout_best.csv")
    out = str(run / "checks.json")
    # What a reward model got wrong is a result, and does not end the demo.
    options = ["--limit", "64", "--out", out, "--no-fail"]
    return [*words, "--prompts", prompts, *options]


def _generator_steps(run: Path, seed: int) -> list[CommandStep]:
    """Tune the generator by GRPO and, from scored pairs, by DPO."""
    # GRPO learns online, DPO from stored pairs.
    pairs = run / "pairs"
    grpo = config_words(
        "grpo",
        f"run_dir={run / 'grpo'}",
        f"seed={seed}",
        _descore(run),
    )

    # The videos that become pairs.
    sample = config_words(
        "pairs",
        f"out={pairs}",
        f"seed={seed}",
        f"limit={PAIR_PROMPTS}",
        _descore(run),
    )
    dpo = config_words(
        "dpo",
        f"run_dir={run / 'dpo'}",
        f"seed={seed}",
        f"pairs={pairs}",
        f"dpo.epochs={PAIR_EPOCHS}",
    )
    return [
        CommandStep(
            "Longcat-GRPO: Wan learns from DeScore alone; the oracle has weight 0",
            "launch/grpo.py",
            grpo,
            run / "grpo" / ADAPTER,
        ),
        CommandStep(
            "pairs: the best and the worst of eight videos a prompt, by DeScore",
            "launch/pairs.py",
            sample,
            pairs / "manifest.json",
        ),
        CommandStep(
            "Flow-DPO: Wan learns from these pairs alone",
            "launch/dpo.py",
            dpo,
            run / "dpo" / ADAPTER,
        ),
    ]


def _evaluation_steps(run: Path, seed: int) -> list[CommandStep]:
    """Evaluate the generator on held-out prompts, without and with each adapter."""
    # Title, folder, and the run whose adapter is evaluated.
    arms = [
        ("the base generator on held-out prompts", "eval_base", None),
        ("tuned by GRPO, the same prompts and seeds", "eval_tuned", "grpo"),
        ("tuned by Flow-DPO, the same prompts and seeds", "eval_dpo", "dpo"),
    ]
    steps = []
    for title, name, trained in arms:
        folder = run / name
        words = config_words("evaluate", f"seed={seed}", _descore(run))
        if trained is not None:
            words.append(f"adapter={run / trained / 'final'}")
        words = ["generator", *words, f"out={folder}"]
        done = folder / "summary.json"
        steps.append(CommandStep(title, "launch/evaluate.py", words, done))
    return steps


def summarise(run: Path, seconds: dict[str, float], peak_bytes: int) -> dict[str, Any]:
    """Collect the results of the demo from the files of its steps."""
    # Summaries of the evaluations of the generator.
    arms = {}
    for arm in ("base", "tuned", "dpo"):
        arms[arm] = read_json(run / f"eval_{arm}" / "summary.json")

    def of_arms(key: str) -> dict[str, Any]:
        return {arm: results[key] for arm, results in arms.items()}

    # Parts of the utility: five sub-dimensions and the quality.
    sub_dimensions = {}
    for key in sorted(arms["base"]):
        if key.startswith("people."):
            sub_dimensions[key.removeprefix("people.")] = of_arms(key)

    # Seconds of the steps and of all together.
    rounded = {name: round(value, 1) for name, value in seconds.items()}
    return {
        "rm": heldout.summarise(run),
        "checks": read_json(run / "checks.json")["descore"],
        "utility": of_arms("people"),
        "oracle": of_arms("shapes"),
        "descore": of_arms("descore"),
        "sub_dimensions": sub_dimensions,
        "seconds": {**rounded, "all": round(sum(seconds.values()), 1)},
        "peak_memory_gb": round(peak_bytes / 2**30, 2),
    }


def run_steps(
    steps: list[CommandStep],
    timings: Path,
    ranks: int,
) -> tuple[dict[str, float], int]:
    """Run the steps that are not done; return the seconds of all and the peak memory in bytes.

    ``timings`` holds both over restarts.
    """
    # Continue the counts of earlier starts.
    seconds: dict[str, float] = read_json(timings) if timings.exists() else {}
    memory = PeakMemory()
    memory.peak = int(seconds.pop("peak_bytes", 0))
    usual = next(iter(read_json(MEASURED)["seeds"].values()))["seconds"]
    names = []
    for number, step in enumerate(steps, start=1):
        names.append(f"{number} {Path(step.script).name}")

    # Run what is not done.
    for number, (name, step) in enumerate(zip(names, steps, strict=True), start=1):
        print(f"\n== {number}/{len(steps)}  {step.title}", flush=True)
        if step.is_done:
            print(f"   done before ({step.done})", flush=True)
            continue

        # Run the step; a failure ends the demo with advice.
        try:
            duration = run_step(step, ranks, memory=memory)
        except RuntimeError as error:
            sys.exit(f"demo: {error}\nfix it and start the demo again to continue here")

        # Record it, so that a restart counts it too.
        seconds[name] = duration
        write_json(timings, {**seconds, "peak_bytes": memory.peak})
        line = f"   {duration:.0f} s; {clock(sum(seconds.values()))} so far"
        rest = seconds_left(seconds, usual, names)
        if rest:
            line += f", about {clock(rest)} left"
        print(line, flush=True)
    return seconds, memory.peak


def seconds_left(
    seconds: Mapping[str, float], usual: Mapping[str, float], names: Sequence[str]
) -> float | None:
    """Seconds of the steps that are not done, at the pace of those that are; None if unknown.

    ``usual`` are the seconds of every step on another machine.
    """
    known = [name for name in seconds if name in usual]
    rest = [name for name in names if name not in seconds]
    if not known or any(name not in usual for name in rest):
        return None
    done = sum(seconds[name] for name in known)
    pace = done / sum(usual[name] for name in known)
    return pace * sum(usual[name] for name in rest)


def print_summary(summary: dict[str, Any]) -> None:
    """Print the accuracy of DeScore, its checks, and utility and oracle of every arm."""
    # Rows of mean and interval.
    rows = dict(summary["rm"])
    for group in ("utility", "oracle"):
        for arm, value in summary[group].items():
            rows[f"{group}.{arm}"] = value
    for name, value in rows.items():
        print(f"{name:>22}  {tables.show(value)}, n = {value['n']}")
    for case, counts in summary["checks"].items():
        total = counts["fell"] + counts["same"] + counts["rose"]
        print(f"{case:>22}  lowers the reward of {counts['fell']} of {total} videos")

    # Cost of the demo.
    minutes = summary["seconds"]["all"] / 60
    memory = summary["peak_memory_gb"]
    print(f"{'all steps':>22}  {minutes:.1f} minutes, peak memory {memory} GB")


def main() -> None:
    """Run all steps, then write the summary and the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0)
    ranks = min(2, os.cpu_count() or 1)
    parser.add_argument("--ranks", type=int, default=ranks, help="training processes")
    args = parser.parse_args()

    # Run the steps.
    folder = ROOT / args.run_dir
    steps = plan(args.run_dir, args.seed)
    seconds, peak_bytes = run_steps(steps, folder / "seconds.json", args.ranks)
    summary = summarise(folder, seconds, peak_bytes)
    write_json(folder / "summary.json", summary)

    page = str(args.run_dir / "report.html")
    words = ["launch/report.py", str(args.run_dir), "--out", page]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
    print_summary(summary)
    print(f"look at {page}")


if __name__ == "__main__":
    main()
