"""Files of weights that are damaged, unfinished, or not what their index says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.weight_files import (
    UNFINISHED,
    load_safetensors,
    require_whole_folder,
    tensor_places,
    weight_files,
)

NAME = "model.safetensors"
INDEX = f"{NAME}.index.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 9876\n"


def with_header(text: bytes, data: bytes = b"") -> bytes:
    """A file in the safetensors layout: the length of its header, the header, the numbers."""
    return len(text).to_bytes(8, "little") + text + data


ENTRY = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\x05\x00", "2 bytes"),
        (POINTER, "git-LFS pointer"),
        (with_header(ENTRY, bytes(8))[:30], "30 bytes"),
        (with_header(ENTRY, bytes(7)), "whole"),
        (with_header(ENTRY, bytes(9)), "whole"),
        (with_header(b"{not json"), "JSON"),
        (with_header(b"[1]"), "JSON"),
        (with_header(ENTRY.replace(b"[2]", b"[3]"), bytes(8)), "whole"),
        (with_header(ENTRY.replace(b"F32", b"F99"), bytes(8)), "whole"),
        ((2**63).to_bytes(8, "little") + b"{}", "whole"),
        (b"PK\x03\x04" + bytes(60), "whole"),
    ],
)
def test_damaged_safetensors_file_is_named(
    tmp_path: Path, content: bytes, words: str
) -> None:
    file = tmp_path / NAME
    file.write_bytes(content)
    for read in (lambda: load_safetensors(file), lambda: tensor_places(tmp_path, NAME)):
        with pytest.raises(ValueError, match=words) as caught:
            read()
        assert str(file) in str(caught.value)


def test_sound_safetensors_file_is_read(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(with_header(ENTRY, bytes(4) + b"\x00\x00\x80\x3f"))
    assert load_safetensors(tmp_path / NAME)["x"].tolist() == [0.0, 1.0]
    assert tensor_places(tmp_path, NAME) == {"x": tmp_path / NAME}


def test_file_without_tensors_is_named(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(with_header(b"{}"))
    with pytest.raises(ValueError, match=r"model\.safetensors holds no tensors"):
        tensor_places(tmp_path, NAME)


def sharded(folder: Path, places: dict[str, str], **held: list[str]) -> None:
    """Write an index, and the shards a and b with the tensors that they hold."""
    for shard, names in held.items():
        tensors = {name: torch.zeros(1) for name in names}
        save_file(tensors, folder / f"{shard}.safetensors")
    weight_map = {name: f"{shard}.safetensors" for name, shard in places.items()}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_shards_of_an_index(tmp_path: Path) -> None:
    sharded(tmp_path, {"x": "a", "y": "b"}, a=["x"], b=["y"])
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    assert weight_files(tmp_path, NAME) == files
    assert tensor_places(tmp_path, NAME) == {"x": files[0], "y": files[1]}


@pytest.mark.parametrize(
    ("places", "held", "words"),
    [
        ({"x": "a", "y": "b"}, {"a": ["x"]}, r"lacks b\.safetensors"),
        ({"x": "a", "y": "b"}, {"a": ["x"], "b": ["z"]}, r"b\.safetensors lacks y"),
        (
            {"x": "a", "y": "b"},
            {"a": ["x"], "b": ["y", "z"]},
            r"b\.safetensors holds z",
        ),
        ({"x": "b", "y": "a"}, {"a": ["x"], "b": ["y"]}, r"a\.safetensors holds x"),
        ({"x": "a", "y": "b"}, {"a": ["x", "y"], "b": ["y"]}, "both hold y"),
        ({"x": "../a"}, {"a": ["x"]}, r"\.\./a"),
        ({}, {"a": ["x"]}, "weight_map"),
    ],
)
def test_index_that_disagrees_with_its_shards_is_refused(
    tmp_path: Path, places: dict[str, str], held: dict[str, list[str]], words: str
) -> None:
    sharded(tmp_path, places, **held)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        tensor_places(tmp_path, NAME)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"x": 1}}']
)
def test_index_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        tensor_places(tmp_path, NAME)


def test_single_file_next_to_an_index_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path, {"x": "a"}, a=["x"])
    save_file({"x": torch.zeros(1)}, tmp_path / NAME)
    with pytest.raises(ValueError, match="both"):
        weight_files(tmp_path, NAME)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("pytorch_model.bin", "code"),
        ("model.pth", "code"),
        ("model.fp16.safetensors", r"holds model\.fp16\.safetensors"),
        ("notes.txt", "no weights"),
    ],
)
def test_folder_without_weights_tells_what_it_holds(
    tmp_path: Path, file: str, words: str
) -> None:
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=words):
        weight_files(tmp_path, NAME)


@pytest.mark.parametrize("ending", UNFINISHED)
def test_unfinished_download_is_named(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"{NAME}{ending}").write_bytes(b"x")
    with pytest.raises(ValueError, match="not finished") as caught:
        require_whole_folder(tmp_path)
    assert f"{NAME}{ending}" in str(caught.value)


def test_whole_folder_has_no_pointer_and_readable_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "spiece.model").write_bytes(b"\x00\x01")
    (tmp_path / "part.folder").mkdir()
    require_whole_folder(tmp_path)
    (tmp_path / "spiece.model").write_bytes(POINTER)
    with pytest.raises(ValueError, match=r"spiece\.model is a git-LFS pointer"):
        require_whole_folder(tmp_path)
    (tmp_path / "spiece.model").unlink()
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        require_whole_folder(tmp_path)
