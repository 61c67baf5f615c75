"""One thread per process, no network, a fixed seed: the same numbers on every machine."""

from __future__ import annotations

import os

# before torch is imported anywhere, and inherited by the processes that tests start
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that no worker is left alone with one at the end."""
    slow, long = (
        {one.path for one in items if one.get_closest_marker(mark)}
        for mark in ("slow", "long")
    )
    items.sort(key=lambda item: (item.path not in long, item.path not in slow))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
