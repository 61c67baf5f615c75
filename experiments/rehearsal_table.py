"""Rehearse the full-size recipes on a simulated GPU: `python experiments/rehearsal_table.py`.

Every cell is a ``--rehearse`` of a recipe of README.md, as it stands or with changes, in its
process; minutes of a core each. A cell that is finished is not run again, so a table that was
stopped goes on (``--fresh`` begins again). Nothing runs on a GPU. Results:
docs/results/rehearsal.json and rehearsal.md.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import read_json, write_json
from experiments import tables
from experiments.runner import ROOT, commit

HEAD = ("recipe", "unit", "seconds", "peak GiB", "seconds by phase")
HEAD_OF_PLANS = ("recipe", "seconds", "planned", "", "peak GiB", "planned", "")
KEPT_OF_PHASES = ("seconds", "peak_gib", "seconds_by_kernel")
OUT = ROOT / "docs" / "results" / "rehearsal.json"
WORK = ROOT / "runs" / "rehearsal"


@dataclass(frozen=True)
class RecipeVariant:
    """A row of the table.

    name         Of the cell's file.
    title        "the same, ..." is a variant of the recipe above it.
    script       The command, in launch/.
    config       Its recipe, in configs/wan.
    overrides    Changes of the recipe.
    planned      Whether its plan stands beside it.
    """

    name: str
    title: str
    script: str
    config: str
    overrides: tuple[str, ...] = ()
    planned: bool = False

    def words(self, where: str) -> list[str]:
        """The command line, without the file of the result."""
        return [
            f"launch/{self.script}.py",
            "--config",
            f"configs/wan/{self.config}.yaml",
            "--rehearse",
            where,
            *self.overrides,
        ]


# The paper's 16 steps with the exact module: the recipe of 0.3.0.
PLAIN = (
    "generator.lora.compute_dtype=float32",
    "generator.sampler.merge_adapter=false",
    "generator.sampler.tail_solver=euler",
    "generator.sampler.tail_steps=null",
)
MERGED = ("generator.sampler.merge_adapter=true",)
HALF = ("generator.lora.compute_dtype=bfloat16",)
TF32 = ("generator.tf32=true",)
CUDNN = ("generator.attention=_native_cudnn",)
COMPILED = ("generator.compile=true",)
VAE = ("generator.vae_dtype=bfloat16", "generator.vae_channels_last=true")
SAGE = ("generator.sampler.tail_attention=sage",)
AB2 = ("generator.sampler.tail_solver=ab2", "generator.sampler.tail_steps=6")
# Changes that keep the 16 steps and exact kernels, and what is faster still.
EXACT = (*MERGED, *HALF, *CUDNN, *COMPILED, *VAE)
# Chains of thought of several micro-batches together.
TOGETHER = ("dual_rl.cot_batch=8",)


def grpo(name: str, title: str, *changes: str) -> RecipeVariant:
    """A variant of Longcat-GRPO: the plain recipe with changes."""
    return RecipeVariant(
        f"grpo-{name}", f"the same, {title}", "grpo", "grpo", (*PLAIN, *changes)
    )


VARIANTS = (
    RecipeVariant(
        "grpo-plain", "Longcat-GRPO of 0.3.0", "grpo", "grpo", PLAIN, planned=True
    ),
    grpo("merged", "adapter merged in prefix and tail", *MERGED),
    grpo("half", "adapter products in bf16", *HALF),
    grpo("tf32", "TF32", *TF32),
    grpo("cudnn", "cuDNN's attention", *CUDNN),
    grpo("compiled", "compiled blocks", *COMPILED),
    grpo("vae", "VAE in bf16, channels last", *VAE),
    grpo("sage", "int8 attention in the tail", *SAGE),
    grpo("ab2", "6 `ab2` steps of the tail", *AB2),
    grpo("exact", "16 steps: merged, bf16 products, cuDNN, compiled, VAE", *EXACT),
    grpo("exact-sage", "and int8 attention in the tail", *EXACT, *SAGE),
    grpo("all", "and 6 `ab2` steps", *EXACT, *SAGE, *AB2),
    RecipeVariant("grpo", "Longcat-GRPO, the recipe", "grpo", "grpo", planned=True),
    RecipeVariant("dpo", "Flow-DPO", "dpo", "dpo", planned=True),
    RecipeVariant(
        "dpo-all",
        "the same, bf16 products, cuDNN, compiled",
        "dpo",
        "dpo",
        (*HALF, *CUDNN, *COMPILED),
    ),
    RecipeVariant("pairs", "pairs, one prompt", "pairs", "pairs", planned=True),
    RecipeVariant(
        "pairs-all",
        "the same, merged, cuDNN, compiled, VAE",
        "pairs",
        "pairs",
        (*MERGED, *CUDNN, *COMPILED, *VAE),
    ),
    RecipeVariant(
        "cold-start",
        "DeScore, cold start (8B)",
        "cold_start",
        "cold_start",
        planned=True,
    ),
    RecipeVariant(
        "dual-rl", "DeScore, dual RL (8B)", "dual_rl", "dual_rl", planned=True
    ),
    RecipeVariant(
        "dual-rl-together",
        "the same, chains of thought of 8 videos together",
        "dual_rl",
        "dual_rl",
        TOGETHER,
    ),
)


def main() -> None:
    """Rehearse what is missing, then write the JSON and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--where", default="8xh100", metavar="GPUSxDEVICE")
    parser.add_argument("--only", nargs="*", help="names of cells, default all")
    parser.add_argument("--fresh", action="store_true", help="run finished cells too")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the cells")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()

    # One cell after the other: each takes a core.
    cells = {}
    for variant in VARIANTS:
        file = args.work / f"{variant.name}.json"
        wanted = not args.only or variant.name in args.only
        if wanted and (args.fresh or not is_done(file, variant.words(args.where))):
            run(variant, args.where, file)
        if file.is_file():
            cells[variant.name] = read_json(file)
            if variant.planned and "plan" not in cells[variant.name]:
                cells[variant.name]["plan"] = plan(variant, args.where)
                write_json(file, cells[variant.name])
    kept = {name: summary_of(cell) for name, cell in cells.items()}
    write_json(args.out, {"commit": commit(), "where": args.where, "cells": kept})
    tables.write_page(args.out.with_suffix(".md"), list(page_of(cells, args.where)))
    print(f"{args.out} and {args.out.with_suffix('.md')}")


def is_done(file: Path, words: Sequence[str]) -> bool:
    """Whether a cell's file holds the result of this command line."""
    return file.is_file() and read_json(file)["words"] == list(words)


def run(variant: RecipeVariant, where: str, file: Path) -> None:
    """Rehearse a variant; the program ends if that finds a fault."""
    words = variant.words(where)
    print(f"{variant.name}: {' '.join(words)}", flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    with file.with_suffix(".log").open("w", encoding="utf-8") as log:
        done = subprocess.run(
            [sys.executable, *words, "--rehearse-out", str(partial)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        sys.exit(f"{variant.name} ended with {done.returncode}, see {log.name}")
    record = {"words": words, "commit": commit(), **read_json(partial)}
    write_json(file, record)
    partial.unlink()


def plan(variant: RecipeVariant, where: str) -> dict[str, float]:
    """Plan a variant; the reserve is not part of the peak here."""
    from common.config import load
    from launch.compose import quiet
    from launch.planning.dry_run import parse_where
    from launch.planning.plan import GIB, RESERVE
    from launch.planning.runs import plan_of
    from launch.schemas.pairs import DpoRun, PairsRun
    from launch.schemas.training import ColdStartRun, DualRlRun, GrpoRun

    quiet()
    schemas = {
        "grpo": GrpoRun,
        "dpo": DpoRun,
        "pairs": PairsRun,
        "cold_start": ColdStartRun,
        "dual_rl": DualRlRun,
    }
    file = ROOT / "configs" / "wan" / f"{variant.config}.yaml"
    cfg = load(schemas[variant.script], file, variant.overrides)
    planned = plan_of(cfg, parse_where(where))
    return {
        "seconds": round(planned.seconds, 2),
        "peak_gib": round((planned.peak - RESERVE) / GIB, 2),
    }


def summary_of(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Return a cell without its counts by line, which its file in ``--work`` keeps."""
    phases = {}
    for name, phase in cell["phases"].items():
        phases[name] = {key: phase[key] for key in KEPT_OF_PHASES}
    others = {key: value for key, value in cell.items() if key != "blind_spots"}
    return {**others, "phases": phases}


def comparison_of(cells: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of rehearsals beside their plans."""
    rows = []
    for variant in VARIANTS:
        cell = cells.get(variant.name, {})
        if "plan" not in cell:
            continue
        row = [variant.title]
        for key, digits in (("seconds", 1), ("peak_gib", 1)):
            found = cell[key]
            planned = cell["plan"][key]
            row += [f"{found:,.{digits}f}", f"{planned:,.{digits}f}"]
            row.append(f"{planned / found - 1:+.1%}")
        rows.append(tuple(row))
    return rows


def page_of(cells: Mapping[str, Any], where: str) -> Iterator[str]:
    """Lines of the page."""
    rows = []
    for variant in VARIANTS:
        cell = cells.get(variant.name)
        if cell is None:
            continue
        phases = []
        for name, phase in cell["phases"].items():
            if name != "loading" and phase["seconds"] >= 0.5:
                phases.append(f"{name} {phase['seconds']:,.1f}")
        rows.append(
            (
                variant.title,
                cell["unit"],
                f"{cell['seconds']:,.1f}",
                f"{cell['peak_gib']:.1f}",
                ", ".join(phases),
            )
        )
    # A cell may be older than the page.
    commits = sorted({cell.get("commit", commit()) for cell in cells.values()})
    yield from (
        "# The full-size recipes on a simulated GPU",
        "",
        f"Made by `python experiments/rehearsal_table.py` at commit {', '.join(commits)}: "
        f"rank 0 of {where}, rooflines of the operations that the commands run, and the peak "
        "of their tensors. Nothing ran on a GPU; collectives take no time. How it is counted "
        "and what it does not see: [rehearsal.md](../rehearsal.md).",
        "",
        *tables.markdown_table(HEAD, rows),
    )
    compared = comparison_of(cells)
    if compared:
        yield from (
            "",
            "Rehearsals beside the plans of `--dry-run`, without the reserve. A rehearsal draws "
            "the places of its stochastic steps, a plan takes the MEAN over all of them.",
            "",
            *tables.markdown_table(HEAD_OF_PLANS, compared),
        )


if __name__ == "__main__":
    main()
