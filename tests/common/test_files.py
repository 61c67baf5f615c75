from __future__ import annotations

import hashlib
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common.files import (
    model_folder,
    read_json,
    replace_text,
    replaced,
    sha256,
    sort_header,
)


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


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with a model owner/name that has a config and no more."""
    model = tmp_path / "models--owner--name"
    snapshot = model / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return snapshot


def test_model_folder_is_a_folder_or_a_cached_name(hub_cache: Path) -> None:
    patterns = ["*.json"]
    assert model_folder(hub_cache, "config.json", patterns=patterns) == hub_cache
    found = model_folder("owner/name", "config.json", patterns=patterns)
    assert found == hub_cache
    for path in ("owner/other", "nowhere", "./owner/name", str(hub_cache / "x")):
        with pytest.raises(FileNotFoundError, match=path):
            model_folder(path, "config.json", patterns=patterns)
    with pytest.raises(FileNotFoundError, match=r"other\.json"):
        model_folder(hub_cache, "other.json", patterns=patterns)


@pytest.mark.parametrize("text", ["", "{", "\xff", "[" * 100_000])
def test_read_json_names_the_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.json"):
        read_json(file)
