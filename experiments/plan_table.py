"""What every full-size recipe needs on 1, 8 and 64 GPUs: `python experiments/plan_table.py`, docs/results/plans.md and, of
each recipe as it stands, README.

The plans are those of ``--dry-run``; nothing of this was run on a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.config import load
from experiments.runner import ROOT, commit
from launch.planning.dry_run import plan_of
from launch.planning.plan import DEVICES, GIB, Plan, Where
from launch.schemas.pairs import DpoRun, PairsRun
from launch.schemas.training import ColdStartRun, DualRlRun, GrpoRun

CONFIGS = ROOT / "configs" / "wan"
SMALL = "../sizes/240x416x33.yaml"
RECIPES: dict[str, tuple[type, tuple[str, ...], tuple[str, ...]]] = {
    "DeScore, cold start (8B)": (ColdStartRun, ("cold_start.yaml",), ()),
    "the same, 64 pairs a step": (
        ColdStartRun,
        ("cold_start.yaml", "../gpus/cold_start_64.yaml"),
        (),
    ),
    "DeScore, dual RL (8B)": (DualRlRun, ("dual_rl.yaml",), ()),
    "the same, ZeRO 3": (DualRlRun, ("dual_rl.yaml",), ("zero_stage=3",)),
    "the same, an adapter": (DualRlRun, ("dual_rl.yaml", "../gpus/dual_rl_1.yaml"), ()),
    "Longcat-GRPO": (GrpoRun, ("grpo.yaml",), ()),
    "the same, 240 x 416 x 33": (GrpoRun, ("grpo.yaml", SMALL), ()),
    "pairs, one prompt": (PairsRun, ("pairs.yaml",), ()),
    "Flow-DPO": (DpoRun, ("dpo.yaml",), ()),
    "the same, 240 x 416 x 33 ": (DpoRun, ("dpo.yaml", SMALL), ()),
}
RANKS = (1, 8, 64)
README, README_MARKS = ROOT / "README.md", ("<!-- plans -->", "<!-- end of plans -->")
HEAD = (
    f"| recipe | {' | '.join(f'{ranks} GPU' + 's' * (ranks > 1) for ranks in RANKS)} |",
    "|---" * (len(RANKS) + 1) + "|",
)
OUT = ROOT / "docs" / "results" / "plans.md"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--device", choices=DEVICES, default="h100")
    args = parser.parse_args(argv)
    from launch.compose import quiet

    quiet()
    lines = []
    for title, (schema, files, words) in RECIPES.items():
        cfg = load(schema, [CONFIGS / file for file in files], words)
        lines.append(
            f"| {title.strip()} | {' | '.join(cell(cfg, args.device, ranks) for ranks in RANKS)} |"
        )
        print(lines[-1], flush=True)
    args.out.write_text(page(args.device, lines), encoding="utf-8")
    if args.out == OUT:
        README.write_text(
            with_table(README.read_text(encoding="utf-8"), lines), encoding="utf-8"
        )


def cell(cfg: Any, device: str, ranks: int) -> str:
    """Peak of a rank, seconds of a step, and whether it goes."""
    where = Where(DEVICES[device], ranks)
    plan = plan_of(cfg, where)
    if plan is None or plan.problems:
        return "the batch does not divide"
    fits = "" if plan.peak <= where.device.memory else ", does not fit"
    return f"{plan.peak / GIB:.0f} GiB, {duration(plan)}{fits}"


def duration(plan: Plan) -> str:
    seconds = plan.seconds
    article = "an" if plan.unit[0] in "aeiou" else "a"
    return (
        f"{seconds:,.0f} s {article} {plan.unit}"
        if seconds >= 10
        else f"{seconds:.1f} s {article} {plan.unit}"
    )


def page(device: str, rows: list[str]) -> str:
    name = DEVICES[device].name
    return "\n".join(
        [
            "# What the full-size recipes need",
            "",
            f"Made by `python experiments/plan_table.py` at commit {commit()}: what `--dry-run` predicts; nothing ran on "
            f"a GPU. Peak memory of a rank (4 GiB of it a reserve) and time of a step on {name} at half its peak.",
            "",
            *HEAD,
            *rows,
            "",
        ]
    )


def with_table(text: str, rows: Sequence[str]) -> str:
    """README with these rows between its marks, without variants of a recipe."""
    before, rest = text.split(README_MARKS[0] + "\n")
    after = rest.split(README_MARKS[1])[1]
    own = [row for row in rows if not row.startswith("| the same")]
    return "\n".join([before + README_MARKS[0], *HEAD, *own, README_MARKS[1]]) + after


if __name__ == "__main__":
    main()
