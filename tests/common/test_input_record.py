"""Which inputs of a run have other content when it goes on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common import input_record
from common.input_record import (
    changed_inputs,
    content_hash,
    record_inputs,
    write_inputs,
)


def test_changed_file_and_changed_folder_are_named(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a ball\n")
    model = tmp_path / "model"
    (model / "inner").mkdir(parents=True)
    for name in ("a.json", "b.json", "inner/c.json"):
        (model / name).write_text("{}")
    inputs = {"prompts": prompts, "rewards.x.checkpoint": str(model), "none": None}
    write_inputs(tmp_path, record_inputs(inputs))
    assert changed_inputs(tmp_path, record_inputs(inputs)) == []

    # The same number of bytes, and the time of before.
    state = prompts.stat()
    prompts.write_text("a cube\n")
    os.utime(prompts, ns=(state.st_atime_ns, state.st_mtime_ns))
    (model / "inner" / "c.json").write_text("{ }")
    (model / "a.json").unlink()
    (model / "d.json").write_text("{}")
    (model / ".lock").write_text("")
    first, second = changed_inputs(tmp_path, record_inputs(inputs))
    assert first == f"prompts ({prompts}): the file changed"
    assert second.startswith("rewards.x.checkpoint")
    for name in ("a.json is missing", "d.json is new", "inner/c.json changed"):
        assert name in second
    assert "b.json" not in second
    assert ".lock" not in second


def test_moved_input_and_new_input_are_no_change(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("a ball\n")
    write_inputs(tmp_path, record_inputs({"prompts": tmp_path / "a.txt"}))
    now = {"prompts": tmp_path / "b.txt", "evaluation.prompts": tmp_path / "a.txt"}
    assert changed_inputs(tmp_path, record_inputs(now)) == []
    # a folder of an earlier version has no record
    assert changed_inputs(tmp_path / "old", record_inputs(now)) == []


def test_hub_name_has_no_files(tmp_path: Path) -> None:
    write_inputs(tmp_path, record_inputs({"base": "owner/name"}))
    assert changed_inputs(tmp_path, record_inputs({"base": "owner/name"})) == []


@pytest.mark.parametrize("place", [0, 500, 1023])
def test_large_weights_are_known_by_their_parts(
    tmp_path: Path, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Header, both ends and blocks in between; here each is as small as the file is."""
    file = tmp_path / "a.safetensors"
    weights = torch.zeros(1024)
    save_file({"a": weights}, file)
    whole = content_hash(file)
    monkeypatch.setattr(input_record, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(input_record, "_EDGE_BYTES", 100)
    parts = content_hash(file)
    assert parts != whole
    # another value, or another name of equal length in the header
    weights[place] = 1
    save_file({"a": weights}, file)
    assert content_hash(file) != parts
    save_file({"b": torch.zeros(1024)}, file)
    assert content_hash(file) != parts
    save_file({"a": torch.zeros(1024)}, file)
    assert content_hash(file) == parts
