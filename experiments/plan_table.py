"""Write a table of what every full-size recipe needs: `python experiments/plan_table.py`.

The plans are those of ``--dry-run`` on 1, 8 and 64 GPUs; no recipe was run on a GPU. Results:
docs/results/plans.md, and a table without the variants of a recipe in README.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.config import load
from experiments import tables
from experiments.runner import ROOT, commit, replace_section
from launch.planning.plan import DEVICES, GIB, Device, Plan, Where
from launch.planning.runs import plan_of
from launch.schemas.pairs import DpoRun, PairsRun
from launch.schemas.training import ColdStartRun, DualRlRun, GrpoRun


class PlannedRecipe(NamedTuple):
    """A row of the table: config files of configs/wan, and overrides."""

    title: str
    schema: type
    files: tuple[str, ...]
    overrides: tuple[str, ...] = ()


# A smaller video.
SMALL = "../sizes/240x416x33.yaml"
SISTERS = "../sisters/"
# 14B need two ranks to a sample, and two experts a server for the reward.
SHARED = "generator.context_parallel=2"
SERVED = (SHARED, "rewards.descore.url=http://HOST:8000")
VLLM = ("dual_rl.engine=vllm", "vllm.python=ENVIRONMENT/bin/python")
# "the same" marks a variant of the recipe above it.
RECIPES = (
    PlannedRecipe("DeScore, cold start (8B)", ColdStartRun, ("cold_start.yaml",)),
    PlannedRecipe(
        "the same, 64 pairs a step",
        ColdStartRun,
        ("cold_start.yaml", "../gpus/cold_start_64.yaml"),
    ),
    PlannedRecipe("DeScore, dual RL (8B)", DualRlRun, ("dual_rl.yaml",)),
    PlannedRecipe("the same, ZeRO 3", DualRlRun, ("dual_rl.yaml",), ("zero_stage=3",)),
    PlannedRecipe("the same, vLLM", DualRlRun, ("dual_rl.yaml",), VLLM),
    PlannedRecipe(
        "the same, an adapter", DualRlRun, ("dual_rl.yaml", "../gpus/dual_rl_1.yaml")
    ),
    PlannedRecipe("Longcat-GRPO", GrpoRun, ("grpo.yaml",)),
    PlannedRecipe("the same, 240 x 416 x 33", GrpoRun, ("grpo.yaml", SMALL)),
    PlannedRecipe(
        "the same, Flow-GRPO", GrpoRun, ("grpo.yaml", SISTERS + "flow_grpo.yaml")
    ),
    PlannedRecipe(
        "the same, Flash-GRPO", GrpoRun, ("grpo.yaml", SISTERS + "flash_grpo.yaml")
    ),
    PlannedRecipe(
        "the same, MixGRPO", GrpoRun, ("grpo.yaml", SISTERS + "mixgrpo.yaml")
    ),
    PlannedRecipe(
        "the same, DiffusionNFT", GrpoRun, ("grpo.yaml", SISTERS + "diffusion_nft.yaml")
    ),
    PlannedRecipe("the same, AWM", GrpoRun, ("grpo.yaml", SISTERS + "awm.yaml")),
    PlannedRecipe("the same, AnyFlow", GrpoRun, ("grpo.yaml", "models/anyflow.yaml")),
    PlannedRecipe(
        "the same, Wan 2.2 TI2V-5B", GrpoRun, ("grpo.yaml", "models/ti2v_5b.yaml")
    ),
    PlannedRecipe(
        "the same, Wan 2.1 T2V-14B",
        GrpoRun,
        ("grpo.yaml", "models/t2v_14b.yaml"),
        (SHARED,),
    ),
    PlannedRecipe(
        "the same, Wan 2.1 I2V-14B", GrpoRun, ("grpo.yaml", "models/i2v_14b.yaml")
    ),
    PlannedRecipe(
        "the same, Wan 2.2 T2V-A14B",
        GrpoRun,
        ("grpo.yaml", "models/t2v_a14b.yaml"),
        SERVED,
    ),
    PlannedRecipe(
        "the same, Wan 2.2 I2V-A14B",
        GrpoRun,
        ("grpo.yaml", "models/i2v_a14b.yaml"),
        SERVED,
    ),
    PlannedRecipe("pairs, one prompt", PairsRun, ("pairs.yaml",)),
    PlannedRecipe("Flow-DPO", DpoRun, ("dpo.yaml",)),
    PlannedRecipe("the same, 240 x 416 x 33", DpoRun, ("dpo.yaml", SMALL)),
)
# Where the recipes are, and the machines they are planned for.
CONFIGS = ROOT / "configs" / "wan"
RANKS = (1, 8, 64)
HEAD = ("recipe", "1 GPU", "8 GPUs", "64 GPUs")
OUT = ROOT / "docs" / "results" / "plans.md"


def main() -> None:
    """Plan all recipes, then write the page and the table of README.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--device", choices=DEVICES, default="h100")
    args = parser.parse_args()
    from launch.compose import quiet

    quiet()

    # A row for each recipe, a cell for each number of ranks.
    device = DEVICES[args.device]
    rows = []
    for recipe in RECIPES:
        files = [CONFIGS / name for name in recipe.files]
        cfg = load(recipe.schema, files, recipe.overrides)
        cells = [recipe.title]
        cells += [cell_of(cfg, Where(device, ranks)) for ranks in RANKS]
        rows.append(cells)
    lines = tables.markdown_table(HEAD, rows)
    tables.write_page(args.out, page_of(device, lines))

    # README.md follows the page of docs/results only.
    if args.out == OUT:
        replace_section(ROOT / "README.md", "plans", without_variants(lines))


def cell_of(cfg: Any, where: Where) -> str:
    """Peak memory of a rank, seconds of a step, and whether the memory suffices."""
    plan = plan_of(cfg, where)
    if plan is None or plan.problems:
        return "the batch does not divide"

    # The peak includes the reserve.
    fits = "" if plan.peak <= where.device.memory else ", does not fit"
    return f"{plan.peak / GIB:.0f} GiB, {_duration(plan)}{fits}"


def _duration(plan: Plan) -> str:
    # Whole seconds from 10 on.
    article = "an" if plan.unit[0] in "aeiou" else "a"
    digits = 0 if plan.seconds >= 10 else 1
    return f"{plan.seconds:,.{digits}f} s {article} {plan.unit}"


def page_of(device: Device, table: Sequence[str]) -> list[str]:
    """Lines of the page."""
    return [
        "# What the full-size recipes need",
        "",
        f"Made by `python experiments/plan_table.py` at commit {commit()}: what `--dry-run` "
        "predicts; nothing ran on a GPU. Peak memory of a rank (4 GiB of it a reserve) and time "
        f"of a step on {device.name}, by the roofline of its kernels and without communication.",
        "",
        *table,
    ]


def without_variants(lines: Sequence[str]) -> list[str]:
    """Drop the rows of variants."""
    return [line for line in lines if not line.startswith("| the same")]


if __name__ == "__main__":
    main()
