"""The files of a training state: fp32 weights and Adam moments by parameter.

A small state is one file, ``engine.safetensors``, with whole tensors. A large one is written by
every rank in parts: a rank holds a piece of each parameter, numbers start to start + length of
the flattened tensor, and nobody holds a whole one.

    engine.json                      steps, shapes, and by parameter the pieces and their files
    engine-00003-00001.safetensors   part 1 of rank 3

Tensors are called ``weight.<name>``, ``exp_avg.<name>`` and ``exp_avg_sq.<name>`` in both.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.checkpoint import save_tensors
from common.files import read_json

if TYPE_CHECKING:
    from torch import Tensor

WHOLE_FILE = "engine.safetensors"
INDEX_FILE = "engine.json"
STEPS_KEY = "optimizer_steps"
# A part of so many bytes is in host memory before it is written.
PART_BYTES = 2**30
FORMAT = 1


@dataclass(frozen=True)
class Piece:
    """Numbers ``start`` to ``start + length`` of a flattened parameter lie in ``file``."""

    file: str
    start: int
    length: int


def plan_parts(
    places: Mapping[str, tuple[int, int]], *, rank: int, kinds: int
) -> dict[str, Piece]:
    """Distribute a rank's pieces over files of about `PART_BYTES`, in their order.

    places  Start and length by parameter. A piece without numbers gets no place.
    kinds   Tensors of fp32 that are saved of each parameter.
    """
    pieces = {}
    part = 0
    part_bytes = 0
    for name, (start, length) in places.items():
        if length == 0:
            continue
        # A new file, unless this one is empty.
        piece_bytes = 4 * kinds * length
        if part_bytes and part_bytes + piece_bytes > PART_BYTES:
            part += 1
            part_bytes = 0
        part_bytes += piece_bytes
        file = f"engine-{rank:05d}-{part:05d}.safetensors"
        pieces[name] = Piece(file, start, length)
    return pieces


def write_parts(
    folder: Path,
    pieces: Mapping[str, Piece],
    kinds: Sequence[str],
    values: Callable[[str, str], Tensor],
) -> None:
    """Write a rank's pieces, one file in memory at a time.

    ``values(kind, name)`` gives the numbers of a piece.
    """
    by_file: dict[str, list[str]] = {}
    for name, piece in pieces.items():
        by_file.setdefault(piece.file, []).append(name)
    for file, names in by_file.items():
        tensors = {}
        for name in names:
            for kind in kinds:
                value = values(kind, name).detach()
                tensors[f"{kind}.{name}"] = value.float().cpu()
        save_tensors(folder / file, tensors)
        # The rank that seals the checkpoint may be on another machine.
        _flush(folder / file)


def write_index(
    folder: Path,
    steps: int,
    shapes: Mapping[str, Sequence[int]],
    pieces_of_ranks: Iterable[Mapping[str, Piece]],
) -> None:
    """Write engine.json, which names the pieces of every parameter."""
    parameters: dict[str, dict[str, Any]] = {}
    for name, shape in shapes.items():
        parameters[name] = {"shape": list(shape), "pieces": []}
    for pieces in pieces_of_ranks:
        for name, piece in pieces.items():
            parameters[name]["pieces"].append(asdict(piece))
    record = {
        "format": FORMAT,
        STEPS_KEY: steps,
        "parameters": parameters,
    }
    text = json.dumps(record, indent=1) + "\n"
    (folder / INDEX_FILE).write_text(text, encoding="utf-8")


class SavedState:
    """Reads a training state, tensor by tensor.

    Raises ValueError, naming the file, for another format or pieces that do not make up a
    parameter.

    steps   Optimizer steps.
    shapes  The shape of every parameter.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.files: dict[str, Any] = {}
        self.pieces: dict[str, list[Piece]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        if (self.folder / INDEX_FILE).is_file():
            self.steps = self._read_index()
        else:
            self.steps = self._read_whole_file()

    def read(self, kind: str, name: str) -> Tensor:
        """Return a whole weight or moment in fp32, on the CPU."""
        parts = []
        for piece in self.pieces[name]:
            tensor = self._open(piece.file).get_tensor(f"{kind}.{name}")
            parts.append(tensor.flatten())
        return torch.cat(parts).view(self.shapes[name])

    def _open(self, file: str) -> Any:
        """A file's reader; files are mapped to memory and read where they are used."""
        from safetensors import safe_open

        if file not in self.files:
            path = self.folder / file
            self.files[file] = safe_open(path, framework="pt")
        return self.files[file]

    def _read_whole_file(self) -> int:
        """Take every tensor of engine.safetensors as a single piece."""
        reader = self._open(WHOLE_FILE)
        names = reader.keys()
        for key in names:
            kind, _, name = key.partition(".")
            if kind == "weight":
                shape = tuple(reader.get_slice(key).get_shape())
                self.shapes[name] = shape
                length = math.prod(shape)
                self.pieces[name] = [Piece(WHOLE_FILE, 0, length)]
        return int(reader.get_tensor(STEPS_KEY))

    def _read_index(self) -> int:
        """Take the pieces that engine.json names."""
        path = self.folder / INDEX_FILE
        record = read_json(path)
        found = record.get("format")
        if found != FORMAT:
            raise ValueError(f"{path}: format {found!r}, this version reads {FORMAT}")
        for name, entry in record["parameters"].items():
            self.shapes[name] = tuple(entry["shape"])
            pieces = [Piece(**piece) for piece in entry["pieces"]]
            self.pieces[name] = sorted(pieces, key=lambda piece: piece.start)

            # The pieces follow each other from the first number to the last.
            end = 0
            for piece in self.pieces[name]:
                if piece.start != end:
                    raise ValueError(f"{path}: {name} has a gap or overlap at {end}")
                end += piece.length
            if end != math.prod(self.shapes[name]):
                raise ValueError(f"{path}: the pieces of {name} end at {end}")
        return int(record[STEPS_KEY])


def _flush(path: Path) -> None:
    """Wait until a file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
