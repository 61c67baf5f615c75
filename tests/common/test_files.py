from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common.checkpoint import save_tensors
from common.files import (
    append_line,
    check_text,
    model_folder,
    natural_order,
    read_json,
    read_jsonl,
    read_lines,
    read_text,
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


SEPARATORS = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\x1dh\x1ei"


def test_read_jsonl_keeps_unusual_line_separators(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"prompt": SEPARATORS}
    line = json.dumps(row, ensure_ascii=False)
    path.write_text(f'{line}\n{line}\n{{"to', encoding="utf-8")
    assert read_jsonl(path) == [row, row]
    path.write_text(f"{line}\n?\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.jsonl:2:"):
        read_jsonl(path)


def test_no_file_reads_json_lines_with_splitlines() -> None:
    """It would cut lines at separators that JSON leaves as they are."""
    root = Path(__file__).resolve().parents[2]
    found = []
    for folder in ("common", "rm", "generator", "engine", "alignment", "launch", "toy"):
        for file in (root / folder).rglob("*.py"):
            for line in file.read_text(encoding="utf-8").split("\n"):
                if ".splitlines()" in line and "doc" not in line:
                    found.append(f"{file.name}: {line.strip()}")
    # the first line of a decoder's message, and the lines of a written text
    assert [text.partition(":")[0] for text in sorted(found)] == [
        "build_qwen.py",
        "config_reference.py",
        "film.py",
        "relay.py",
    ]


def test_read_lines_ends_them_at_lf_and_cr_only(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(f"\ufeff{SEPARATORS}\r\nb\rc\n".encode())
    assert read_lines(path) == [SEPARATORS, "b", "c", ""]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\nb".encode("utf-16"), "UTF-16"),
        ("a\nb".encode("utf-16-be"), r"a\.txt:1:"),
        (b"a\nb\n\xe9\n", r"a\.txt:3:"),
        (b"a\nb\0\n", r"a\.txt:2:"),
    ],
)
def test_read_text_of_another_encoding_raises_with_its_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_text(tmp_path / "a.txt")
    assert "a.txt" in str(error.value)


@pytest.mark.parametrize("text", ["\ud83d", "a ball \udc80", "\ude00\ud83d"])
def test_check_text_refuses_lone_surrogates(text: str) -> None:
    with pytest.raises(ValueError, match=r"\\ud83d|\\udc80|\\ude00"):
        check_text(text)
    assert check_text("\U0001f600 \u200d\u5bb6") == "\U0001f600 \u200d\u5bb6"


def test_natural_order_counts_numbers_as_numbers() -> None:
    names = ["v10.mp4", "v2.mp4", "v1.mp4", "v02.mp4", "b/9.mp4", "b10/1.mp4", "a.mp4"]
    assert sorted(names, key=natural_order) == [
        "a.mp4",
        "b/9.mp4",
        "b10/1.mp4",
        "v1.mp4",
        "v02.mp4",
        "v2.mp4",
        "v10.mp4",
    ]
    assert sorted(["1a", "a1", "1", "\u00b2.mp4", ""], key=natural_order)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_weights_get_the_mode_that_the_umask_allows(
    tmp_path: Path, mask: int, mode: int
) -> None:
    before = os.umask(mask)
    try:
        save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)})
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == mode


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
