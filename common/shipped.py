"""Find files that ship with this project: recipes, prompts, the tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def resolve_assets(settings: Any) -> Any:
    """Replace texts ``assets/...`` in nested settings by the files that ship with the project.

    So a recipe of the tiny models runs from any folder. In a checkout nothing changes.
    """
    if isinstance(settings, dict):
        return {key: resolve_assets(value) for key, value in settings.items()}
    if isinstance(settings, list):
        return [resolve_assets(value) for value in settings]
    if isinstance(settings, str) and settings.startswith("assets/"):
        return str(shipped(settings))
    return settings
