"""Run the demo under several seeds: `python experiments/demo_seeds.py`.

Every seed is a whole demo in its folder, with other data, initial weights and noise. A seed that
has finished is not run again. Results: docs/results/demo.json and the table of README.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from common.files import read_json
from experiments import tables
from experiments.runner import ROOT, commit, replace_section, write_json

COMMAND = "python experiments/demo_seeds.py"
# Columns of the table.
HEAD = (
    "seed",
    "DeScore accuracy",
    "base Qwen3-VL, its stated score",
    "gain",
    "best possible",
    "utility, base Wan",
    "utility, Longcat-GRPO",
    "utility, Flow-DPO",
    "minutes",
    "peak memory, GB",
)


def demo_folder(seed: int) -> Path:
    """Run folder of the demo of a seed."""
    return Path("runs", "demo" if seed == 0 else f"demo-seed{seed}")


def row_of(seed: int, summary: dict[str, Any]) -> list[str]:
    """Cells of a seed's row."""
    # The reward model, then the arms of the generator.
    results = [*summary["rm"].values(), *summary["utility"].values()]
    cells = [str(seed), *map(tables.show, results)]
    minutes = summary["seconds"]["all"] / 60
    return [*cells, f"{minutes:.1f}", f"{summary['peak_memory_gb']:.1f}"]


def section_of(summaries: dict[int, dict[str, Any]], commit_name: str) -> list[str]:
    """Lines of README.md: how the demo was measured, and its table."""
    first_seed = min(summaries)
    summary = summaries[first_seed]
    pairs = summary["rm"]["heldout_accuracy"]["n"]
    prompts = summary["utility"]["base"]["n"]
    rows = [row_of(seed, summary) for seed, summary in summaries.items()]
    return [
        f"Measured by `{COMMAND}` at commit {commit_name}, on two CPU cores; mean and 95 % "
        f"bootstrap interval. Accuracy: DeScore on {pairs} held-out pairs (seed {first_seed}; "
        "ties left out), the score that the base model states on the same pairs, the gain pair by "
        "pair, and what no model can exceed, because people's labels are drawn. Utility: what "
        f"people see in the videos of {prompts} held-out prompts at fixed seeds, in [0, 1], "
        "before, and after Longcat-GRPO or Flow-DPO, with DeScore as the only reward.",
        "",
        *tables.markdown_table(HEAD, rows),
        "",
        "Wan-2.1-1.3B and Qwen3-VL-8B at full size on GPUs: not run.",
    ]


def main() -> None:
    """Run the demo under every seed, then write the JSON and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()

    # Run the demos.
    summaries = {}
    for seed in args.seeds:
        folder = demo_folder(seed)
        options = ["--seed", str(seed), "--run-dir", str(folder)]
        words = [sys.executable, "experiments/demo.py", *options]
        subprocess.run(words, cwd=ROOT, check=True)
        summaries[seed] = read_json(ROOT / folder / "summary.json")

    # Write the results.
    commit_name = commit()
    record = {
        "command": COMMAND,
        "commit": commit_name,
        "seeds": summaries,
    }
    write_json(ROOT / "docs/results/demo.json", record)
    section = section_of(summaries, commit_name)
    replace_section(ROOT / "README.md", "demo results", section)


if __name__ == "__main__":
    main()
