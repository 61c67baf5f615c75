from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common.files import replace_text, replaced, sha256, sort_header


def test_atomic_write_leaves_old_or_complete_file(tmp_path: Path) -> None:
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


def test_equal_weights_give_equal_files(tmp_path):
    """Whatever order the writer found for the metadata."""
    files = []
    for i in range(8):
        files.append(tmp_path / f"{i}.safetensors")
        save_file(
            {"b": torch.ones(3), "a": torch.arange(4)},
            files[-1],
            metadata={"one": "1", "two": "ä", "3": "x"},
        )
        sort_header(files[-1])
    assert len({file.read_bytes() for file in files}) == 1
    with safe_open(files[0], framework="pt") as found:
        assert found.metadata() == {"one": "1", "two": "ä", "3": "x"}
        assert found.get_tensor("a").tolist() == [0, 1, 2, 3]
        assert found.get_tensor("b").tolist() == [1.0] * 3
