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
OUT = ROOT / "docs" / "results" / "rehearsal.json"
WORK = ROOT / "runs" / "rehearsal"


@dataclass(frozen=True)
class RecipeVariant:
    """A row of the table.

    name       Of the cell's file.
    title      "the same, ..." is a variant of the recipe above it.
    script     The command, in launch/.
    config     Its recipe, in configs/wan.
    overrides  Changes of the recipe.
    """

    name: str
    title: str
    script: str
    config: str
    overrides: tuple[str, ...] = ()

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


# Changes of the generator, each of which may be tried alone.
ADAPTER = ("generator.lora.compute_dtype=bfloat16",)
MERGED = ("generator.sampler.merge_adapter=true",)
ATTENTION = ("generator.attention=_native_cudnn",)
COMPILED = ("generator.compile=true",)
VAE = ("generator.vae_dtype=bfloat16", "generator.vae_channels_last=true")
INT8 = ("generator.sampler.tail_attention=sage",)
AB2 = ("generator.sampler.tail_steps=6", "generator.sampler.tail_solver=ab2")
EXACT = (*ADAPTER, *MERGED, *ATTENTION, *COMPILED, *VAE)
NO_ADAPTER = (*ATTENTION, *COMPILED, *VAE)


def _grpo(name: str, change: str, overrides: tuple[str, ...]) -> RecipeVariant:
    return RecipeVariant(
        f"grpo-{name}", f"the same, {change}", "grpo", "grpo", overrides
    )


VARIANTS = (
    RecipeVariant("grpo", "Longcat-GRPO", "grpo", "grpo"),
    _grpo("adapter", "adapter products in bf16", ADAPTER),
    _grpo("merged", "merged adapter in prefix and tail", MERGED),
    _grpo("attention", "cuDNN's attention", ATTENTION),
    _grpo("compiled", "compiled blocks", COMPILED),
    _grpo("vae", "VAE in bf16", VAE),
    _grpo("int8", "int8 attention in the tail", INT8),
    _grpo("ab2", "6 `ab2` steps of the tail", AB2),
    _grpo("exact", "all of these that keep the sampler", EXACT),
    _grpo("exact-int8", "these, and int8 attention in the tail", (*EXACT, *INT8)),
    _grpo("all", "these, and 6 `ab2` steps", (*EXACT, *INT8, *AB2)),
    RecipeVariant("dpo", "Flow-DPO", "dpo", "dpo"),
    RecipeVariant(
        "dpo-all",
        "the same, bf16 adapter, cuDNN's attention, compiled blocks",
        "dpo",
        "dpo",
        (*ADAPTER, *ATTENTION, *COMPILED),
    ),
    RecipeVariant("pairs", "pairs, one prompt", "pairs", "pairs"),
    RecipeVariant(
        "pairs-all",
        "the same, cuDNN's attention, compiled blocks, VAE in bf16",
        "pairs",
        "pairs",
        NO_ADAPTER,
    ),
    RecipeVariant("cold-start", "DeScore, cold start (8B)", "cold_start", "cold_start"),
    RecipeVariant("dual-rl", "DeScore, dual RL (8B)", "dual_rl", "dual_rl"),
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
    write_json(args.out, {"commit": commit(), "where": args.where, "cells": cells})
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
    record = {"words": words, "commit": commit()}
    write_json(file, {**record, **read_json(partial)})
    partial.unlink()


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
    yield from (
        "# The full-size recipes on a simulated GPU",
        "",
        f"Made by `python experiments/rehearsal_table.py` at commit {commit()}: rank 0 of "
        f"{where}, rooflines of the operations that the commands run, and the peak of their "
        "tensors. Nothing ran on a GPU; collectives take no time. How it is counted and what it "
        "does not see: [rehearsal.md](../rehearsal.md).",
        "",
        *tables.markdown_table(HEAD, rows),
    )


if __name__ == "__main__":
    main()
