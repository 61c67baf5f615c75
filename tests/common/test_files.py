from __future__ import annotations

import hashlib
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common.files import append_line, replace_text, replaced, sha256, sort_header


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


def test_line_that_does_not_fit_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """A limit on the size of files takes a part of the line, as a full disk does."""
    path = tmp_path / "rows.jsonl"
    append_line(path, "first")
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9))
        try:
            append_line(path, "second")
        except OSError:
            os._exit(0)
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert path.read_text() == "first\n"
