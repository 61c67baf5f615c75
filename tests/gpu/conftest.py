"""Tests that need a GPU: `make gpu-check`.

GPU_CHECK_DEVICE=cpu rehearses them on a CPU, where it can: a test of `tests/experiments` does.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.tiny import build_tiny_wan


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything of this folder is a test of the GPU."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The first GPU, or the CPU of a rehearsal."""
    name = os.environ.get("GPU_CHECK_DEVICE", "cuda")
    if name == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device: nothing to check")
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(name)


@pytest.fixture(scope="session")
def cuda(device: torch.device) -> torch.device:
    """The first GPU; a rehearsal on a CPU leaves the test out."""
    if device.type != "cuda":
        pytest.skip("only on CUDA")
    return device


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WanPipeline folder with random weights."""
    return build_tiny_wan(tmp_path_factory.mktemp("wan"))
