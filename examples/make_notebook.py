"""Write examples/tour.ipynb, which is the other examples cell by cell.

    python examples/make_notebook.py

A test compares the notebook with the scripts, so run this after changing one of them.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
NOTEBOOK = HERE / "tour.ipynb"
TITLE = """# A tour in one notebook

Every script of `examples/`, smaller: a table of your own, a reward model trained on it, scores, a
reward of your own, GRPO around your own generator, pairs and Flow-DPO. On a CPU it takes about a
minute. Files go to `runs/examples`."""
START = """import os
from pathlib import Path

# scripts and configs are named from the repository's root
if Path.cwd().name == "examples":
    os.chdir("..")
OUT = Path("runs/examples")"""

# Each script, and the call that its cell ends with.
PARTS = {
    "make_clips": 'table = make_clips(OUT / "clips")\nprint(table.read_text())',
    "train_descore": """small = ["cold_start.pairs_per_step=8", "cold_start.epochs=1"]
train(table, "assets/shapes/qwen", OUT / "descore", "--resume", "none", *small)""",
    "score_videos": """clips = sorted((OUT / "clips").glob("00*.mp4"))
score_videos(OUT / "descore/final", clips, "a red circle moves left")""",
    "my_reward": """film = Film(clips[0])
score(film.frames(range(film.count))[None], [""], fps=film.fps, calm=0.5)""",
    "own_generator": "generator = TintGenerator()\ngenerator.sample([''], [0]).shape",
    "grpo_loop": "means = train(steps=10)",
    "pairs_and_dpo": 'metrics = train(OUT / "pairs", prompts=4, candidates=2)',
}
# Imports that a script needs and the notebook does not, and the other way round.
SCRIPT_ONLY = (
    "from __future__ import annotations",
    "import argparse",
    "from own_generator import TintGenerator",
)
CELL_ONLY = {"my_reward": "from common.film import Film\n"}


def notebook() -> dict[str, Any]:
    """Return the notebook in Jupyter's format 4.5."""
    cells = [markdown("title", TITLE), code("start", START)]
    for name, call in PARTS.items():
        # its docstring becomes text, the rest a cell, then a cell that calls it
        source = (HERE / f"{name}.py").read_text(encoding="utf-8")
        title, _, text = (ast.get_docstring(ast.parse(source)) or "").partition("\n")
        cells.append(markdown(f"{name}-text", f"## {title}\n{text}"))
        cells.append(code(name, body_of(source) + "\n"))
        cells.append(code(f"{name}-call", CELL_ONLY.get(name, "") + call))
    return {
        "cells": cells,
        "metadata": {"language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def body_of(source: str) -> str:
    """Return a script without its docstring and its command line."""
    # the docstring is the first statement
    first = ast.parse(source).body[0]
    lines = source.splitlines()[first.end_lineno :]
    kept = []
    for line in lines:
        # the call of the cell replaces the command line
        if line.startswith("if __name__"):
            break
        if line not in SCRIPT_ONLY:
            kept.append(line)
    return "\n".join(kept).strip()


def markdown(name: str, text: str) -> dict[str, Any]:
    return {
        "cell_type": "markdown",
        "id": name,
        "metadata": {},
        "source": text.splitlines(keepends=True),
    }


def code(name: str, text: str) -> dict[str, Any]:
    return {
        "cell_type": "code",
        "execution_count": None,
        "id": name,
        "metadata": {},
        "outputs": [],
        "source": text.rstrip().splitlines(keepends=True),
    }


if __name__ == "__main__":
    text = json.dumps(notebook(), indent=1, ensure_ascii=False)
    NOTEBOOK.write_text(text + "\n", encoding="utf-8")
    print(NOTEBOOK)
