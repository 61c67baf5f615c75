"""A reward model of the embedded world."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rm.model import DeScore

QWEN = Path(__file__).parents[3] / "assets" / "shapes" / "qwen"


@pytest.fixture(scope="session")
def descore(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained DeScore on the tiny Qwen3-VL; its chains of thought have at most 24 tokens."""
    from rm.config import Generation

    folder = tmp_path_factory.mktemp("descore")
    how = Generation(max_new_tokens=24, repetition_penalty=1.05)
    DeScore.from_base(QWEN, generation=how, dtype=torch.float32).save(folder)
    return folder
