"""Training states in one file and in parts: the same numbers, whoever wrote them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from common.checkpoint import load_tensors, save_tensors
from engine import state_files
from engine.state import load_weights
from engine.state_files import Piece, SavedState, plan_parts, write_index, write_parts
from tests.launch.processes import ROOT, run, torchrun

KINDS = ("weight", "exp_avg", "exp_avg_sq")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_parts_hold_what_the_whole_file_holds(ranks: int, tmp_path: Path) -> None:
    """ZeRO 0 to 3. Read here by a single process, whatever the number of ranks that wrote."""
    script = str(ROOT / "tests" / "engine" / "parts_ranks.py")
    words = [script, str(tmp_path)]
    done = run(sys.executable, *words) if ranks == 1 else torchrun(ranks, *words)
    line = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    resumed = json.loads(line)
    assert len(resumed) == 6
    for name, distance in resumed.items():
        assert distance == 0.0, name
        whole = SavedState(tmp_path / name / "whole")
        parts = SavedState(tmp_path / name / "parts")
        assert whole.steps == parts.steps == 2
        assert whole.shapes == parts.shapes
        assert whole.shapes["0.weight"] == (9, 7)
        for kind in KINDS:
            for parameter in whole.shapes:
                want = whole.read(kind, parameter)
                assert want.abs().max() > 0
                assert torch.equal(parts.read(kind, parameter), want), parameter
        files = sorted(path.name for path in (tmp_path / name / "parts").iterdir())
        assert "engine.json" in files
        assert "engine.safetensors" not in files
        assert {int(file.split("-")[1]) for file in files[:-1]} == set(range(ranks))
        if ranks == 1:
            # 63 weights of 12 bytes are above 300, so the next piece has a file of its own
            assert len(files) > 2


def save_by_hand(folder: Path) -> dict[str, torch.Tensor]:
    """A state of two ranks: numbers 0 to 3 of a 2 x 3 weight on one, 4 and 5 on the other."""
    tensors = {}
    for i, kind in enumerate(KINDS):
        tensors[kind] = torch.arange(6.0).view(2, 3) + 10 * i
    places = [(0, 4), (4, 2)]
    pieces = [
        plan_parts({"w": place}, rank=r, kinds=3) for r, place in enumerate(places)
    ]
    write_index(folder, 7, {"w": (2, 3)}, pieces)
    for piece, (start, length) in zip(pieces, places, strict=True):
        write_parts(
            folder,
            piece,
            KINDS,
            lambda kind, name, start=start, length=length: tensors[kind].flatten()[
                start : start + length
            ],
        )
    return tensors


def test_pieces_are_joined_in_their_order(tmp_path: Path) -> None:
    tensors = save_by_hand(tmp_path)
    saved = SavedState(tmp_path)
    assert saved.steps == 7
    for kind in KINDS:
        assert torch.equal(saved.read(kind, "w"), tensors[kind])
    assert torch.equal(load_weights(tmp_path)["w"], tensors["weight"])
    one = load_tensors(tmp_path / "engine-00001-00000.safetensors")
    assert one["exp_avg.w"].tolist() == [14.0, 15.0]


def test_part_holds_no_more_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 10, 10, 30 and 5 numbers, 12 bytes each, in files of up to 300 bytes."""
    monkeypatch.setattr(state_files, "PART_BYTES", 300)
    places = {"a": (0, 10), "b": (5, 10), "none": (0, 0), "c": (0, 30), "d": (1, 5)}
    pieces = plan_parts(places, rank=3, kinds=3)
    assert pieces == {
        "a": Piece("engine-00003-00000.safetensors", 0, 10),
        "b": Piece("engine-00003-00000.safetensors", 5, 10),
        "c": Piece("engine-00003-00001.safetensors", 0, 30),
        "d": Piece("engine-00003-00002.safetensors", 1, 5),
    }


def test_single_file_is_read_tensor_by_tensor(tmp_path: Path) -> None:
    """As every checkpoint up to 0.3.0 is."""
    tensors = {
        "optimizer_steps": torch.tensor([3]),
        "weight.a.b": torch.arange(4.0).view(2, 2),
        "exp_avg.a.b": torch.ones(2, 2),
        "exp_avg_sq.a.b": torch.zeros(2, 2),
    }
    save_tensors(tmp_path / "engine.safetensors", tensors)
    saved = SavedState(tmp_path)
    assert (saved.steps, saved.shapes) == (3, {"a.b": (2, 2)})
    assert torch.equal(saved.read("weight", "a.b"), tensors["weight.a.b"])


@pytest.mark.parametrize(
    ("start", "length", "found"), [(5, 1, "at 4"), (3, 3, "at 4"), (4, 1, "end at 5")]
)
def test_pieces_that_make_up_no_parameter_are_refused(
    tmp_path: Path, start: int, length: int, found: str
) -> None:
    save_by_hand(tmp_path)
    index = tmp_path / "engine.json"
    record = json.loads(index.read_text())
    piece = record["parameters"]["w"]["pieces"][1]
    piece |= {"start": start, "length": length}
    index.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=rf"engine\.json: .*w.*{found}"):
        SavedState(tmp_path)


def test_index_of_another_format_is_refused(tmp_path: Path) -> None:
    save_by_hand(tmp_path)
    index = tmp_path / "engine.json"
    record = json.loads(index.read_text())
    index.write_text(json.dumps({**record, "format": 2}))
    with pytest.raises(ValueError, match="format 2"):
        SavedState(tmp_path)
