"""Find files that ship with this project: recipes, prompts, the tiny models."""

from __future__ import annotations

from pathlib import Path

# The checkout, or the folder that the packages were installed into.
ROOT = Path(__file__).resolve().parents[1]


def shipped(path: str | Path) -> Path:
    """Return ``path`` if it exists, else the file of that name that ships with the project.

    ``configs/wan/grpo.yaml`` and ``assets/shapes/qwen`` are so found from any folder: in a
    checkout beside the packages, in an installed package inside of launch. A path that is
    found nowhere comes back unchanged.
    """
    for place in (Path(), ROOT, ROOT / "launch"):
        if (place / path).exists():
            return place / path
    return Path(path)
