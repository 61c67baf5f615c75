from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from common.files import replace_text, replaced, sha256


def test_a_file_is_there_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    replace_text(path, "old ünï")

    def stopped() -> None:
        with replaced(path) as partial:
            partial.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        stopped()
    assert path.read_text(encoding="utf-8") == "old ünï"
    with replaced(path) as partial:
        partial.write_text("new")
        assert path.read_text(encoding="utf-8") == "old ünï"
    assert path.read_text() == "new"
    assert sha256(path) == hashlib.sha256(b"new").hexdigest()
