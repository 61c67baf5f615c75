"""Pages without drawings: most of the time of a page is that of matplotlib."""

from __future__ import annotations

from typing import TextIO

import pytest
from matplotlib.figure import Figure


@pytest.fixture
def plain_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    def write_nothing(figure: Figure, file: TextIO, **options: object) -> None:
        file.write("<svg></svg>")

    monkeypatch.setattr(Figure, "savefig", write_nothing)
