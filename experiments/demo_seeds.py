"""The demo under several seeds: `python experiments/demo_seeds.py`. Writes docs/results/demo.json and the README's table.

Each seed is a whole demo in a folder of its own (other data, another head, another adapter, other
noises); one that has finished is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from experiments.runner import ROOT, commit

README_MARKS = ("<!-- demo results -->", "<!-- end of demo results -->")
COMMAND = "python experiments/demo_seeds.py"


def row(seed: int, summary: dict) -> str:
    """One line of the table."""

    def cell(value: dict) -> str:
        return f"{value['mean']:.3f} [{value['ci95'][0]:.3f}, {value['ci95'][1]:.3f}]"

    accuracy, oracle = summary["rm"]["heldout_accuracy"], summary["oracle"]
    return (
        f"| {seed} | {cell(accuracy)} | {cell(oracle['base'])} | {cell(oracle['tuned'])} | {cell(oracle['dpo'])} "
        f"| {summary['seconds']['all'] / 60:.1f} | {summary['peak_memory_gb']:.1f} |"
    )


def table(summaries: dict[int, dict], commit: str) -> str:
    """The measured results in markdown, with the command that made them."""
    first = next(iter(summaries.values()))
    pairs, prompts = first["rm"]["heldout_accuracy"]["n"], first["oracle"]["base"]["n"]
    lines = [
        f"Measured by `{COMMAND}` at commit {commit}, on two CPU cores; mean and 95 % bootstrap interval. Accuracy: "
        f"DeScore on {pairs} held-out pairs (seed {min(summaries)}; ties left out). Oracle: total score in [0, 1] of "
        f"{prompts} held-out prompts at fixed seeds, before, and after Longcat-GRPO or Flow-DPO, with DeScore as the "
        "only judge.",
        "",
        "| seed | DeScore accuracy | oracle, base Wan | oracle, Longcat-GRPO | oracle, Flow-DPO | minutes "
        "| peak memory, GB |",
        "|---|---|---|---|---|---|---|",
        *[row(seed, summary) for seed, summary in summaries.items()],
        "",
        "Wan-2.1-1.3B and Qwen3-VL-8B at full size on GPUs: not run.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    summaries = {}
    for seed in args.seeds:
        run = Path("runs/demo" if seed == 0 else f"runs/demo-seed{seed}")
        subprocess.run(
            [
                sys.executable,
                "experiments/demo.py",
                "--seed",
                str(seed),
                "--run-dir",
                str(run),
            ],
            cwd=ROOT,
            check=True,
        )
        summaries[seed] = json.loads(
            (ROOT / run / "summary.json").read_text(encoding="utf-8")
        )
    results = ROOT / "docs" / "results"
    results.mkdir(parents=True, exist_ok=True)
    record = {"command": COMMAND, "commit": commit(), "seeds": summaries}
    (results / "demo.json").write_text(
        json.dumps(record, indent=1) + "\n", encoding="utf-8"
    )
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(README_MARKS[0])
    after = rest.partition(README_MARKS[1])[2]
    body = f"{README_MARKS[0]}\n{table(summaries, record['commit'])}\n{README_MARKS[1]}"
    readme.write_text(before + body + after, encoding="utf-8")


if __name__ == "__main__":
    main()
