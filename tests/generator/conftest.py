from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import build_tiny_wan


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WanPipeline folder with the published kind of scheduler, random weights."""
    return build_tiny_wan(tmp_path_factory.mktemp("wan"))
