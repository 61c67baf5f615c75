from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch

from common import checkpoint


def put(value: float):
    """A ``write`` that stores one tensor, in a sub-folder, as engines do."""

    def write(folder: Path) -> None:
        (folder / "engine").mkdir()
        checkpoint.save_tensors(
            folder / "engine" / "w.safetensors", {"w": torch.full((64,), value)}
        )

    return write


def save(root: Path, *steps: int, keep: int = 10) -> list[Path]:
    return [
        checkpoint.save(
            root, step, put(step), keep=keep, state={"step": step, "order": [3, 1]}
        )
        for step in steps
    ]


def value_of(path: Path) -> float:
    return checkpoint.load_tensors(path / "engine" / "w.safetensors")["w"][0].item()


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_round_trip_and_manifest(tmp_path):
    (path,) = save(tmp_path, 12)
    assert path == tmp_path / "step-000012"
    assert value_of(path) == 12.0
    assert checkpoint.load_state(path) == {"step": 12, "order": [3, 1]}
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert set(files) == {"engine/w.safetensors", "state.json"}
    for name, entry in files.items():
        content = (path / name).read_bytes()
        assert entry == {
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    assert checkpoint.latest(tmp_path) == path


def test_tensors_round_trip_bit_exactly(tmp_path):
    tied = torch.randn(4, 4)
    tensors = {
        "a": tied,
        "b": tied.t(),
        "half": torch.randn(3).bfloat16(),
        "count": torch.tensor(7),
    }
    checkpoint.save_tensors(tmp_path / "t.safetensors", tensors)
    loaded = checkpoint.load_tensors(tmp_path / "t.safetensors")
    assert set(loaded) == set(tensors)
    assert all(
        torch.equal(loaded[name], tensors[name])
        and loaded[name].dtype == tensors[name].dtype
        for name in loaded
    )


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "w.ckpt"])
def test_formats_that_can_run_code_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="safetensors"):
        checkpoint.load_tensors(tmp_path / name)
    with pytest.raises(ValueError, match="safetensors"):
        checkpoint.save_tensors(tmp_path / name, {})


def test_checkpoint_pruning_keeps_last_k(tmp_path):
    save(tmp_path, 1, 2, 3, 4, keep=2)
    assert names(tmp_path) == ["step-000003", "step-000004"]


def test_checkpoints_are_ordered_by_number_beyond_six_digits(tmp_path):
    save(tmp_path, 999_999, 1_000_000)
    assert checkpoint.latest(tmp_path).name == "step-1000000"


def test_files_are_synced_before_the_folder_is_renamed(tmp_path, monkeypatch):
    """A power cut after the rename must not find a checkpoint whose bytes were still in memory."""
    done, real_sync, real_replace = [], os.fsync, os.replace
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), real_sync(fd)),
    )
    monkeypatch.setattr(
        os, "replace", lambda a, b: (done.append("rename"), real_replace(a, b))
    )
    save(tmp_path, 3)
    rename = done.index("rename")
    synced = {
        Path(path).relative_to(tmp_path / "tmp-step-3").as_posix()
        for path in done[:rename]
    }
    manifest = json.loads((tmp_path / "step-000003" / "manifest.json").read_text())
    assert synced >= {*manifest["files"], "manifest.json", "."}
    assert done[rename - 1].endswith("tmp-step-3")  # its names, last
    assert done[rename + 1] == str(tmp_path)


def damage_truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def damage_flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "truncate": damage_truncate,
    "flip": damage_flip,
    "delete": Path.unlink,
    "empty": lambda f: os.truncate(f, 0),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name", ["engine/w.safetensors", "state.json", "manifest.json"]
)
def test_damaged_checkpoint_falls_back_to_previous(tmp_path, capsys, name, damage):
    older, newer = save(tmp_path, 1, 2)
    DAMAGES[damage](newer / name)
    problems = checkpoint.verify(newer)
    assert len(problems) == 1
    capsys.readouterr()
    assert checkpoint.latest(tmp_path) == older
    said = capsys.readouterr().out
    assert "step-000002" in said
    assert problems[0] in said
    assert value_of(older) == 1.0


def test_flipped_manifest_byte_is_detected_or_harmless(tmp_path):
    (path,) = save(tmp_path, 3)
    manifest = path / "manifest.json"
    whole = manifest.read_bytes()
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 0x04
        manifest.write_bytes(flipped)
        if not checkpoint.verify(path):
            assert chr(whole[place]).isspace(), (
                f"byte {place}: {whole[place - 10 : place + 10]!r}"
            )


def test_all_checkpoints_damaged_returns_none(tmp_path):
    for path in save(tmp_path, 1, 2):
        (path / "state.json").unlink()
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "nowhere") is None


def test_failed_write_leaves_earlier_checkpoint(tmp_path):
    save(tmp_path, 1)

    def write(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="space"):
        checkpoint.save(tmp_path, 2, write, keep=1, state={})
    assert names(tmp_path) == ["step-000001", "tmp-step-2"]
    assert checkpoint.latest(tmp_path).name == "step-000001"
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step-000002"]


def test_state_that_is_not_json_is_refused_before_writing(tmp_path):
    with pytest.raises(TypeError):
        checkpoint.save(
            tmp_path / "new", 1, put(1.0), keep=1, state={"rng": torch.zeros(2)}
        )
    assert not (tmp_path / "new").exists()


def test_full_disk_is_detected_before_saving(tmp_path, monkeypatch):
    save(tmp_path, 1)
    took = sum(
        file.stat().st_size
        for file in (tmp_path / "step-000001").rglob("*")
        if file.is_file()
    )
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage._replace(free=took - 1)
    )
    with pytest.raises(
        checkpoint.NoRoomError,
        match=f"{took - 1:,}",
    ):
        checkpoint.save(tmp_path, 2, put(2.0), keep=2, state={})
    assert names(tmp_path) == ["step-000001"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=took))
    checkpoint.save(tmp_path, 2, put(2.0), keep=2, state={})


@pytest.mark.parametrize("limit", [8, 340])
def test_disk_that_fills_up_leaves_earlier_checkpoints(tmp_path, limit):
    """Files may hold so many bytes: the tensors do not fit, or only state.json does not."""
    save(tmp_path, 1)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            checkpoint.save(tmp_path, 2, put(2.0), keep=2, state={"note": "x" * 400})
        except checkpoint.NoRoomError as error:
            os._exit(
                0
                if "File too large" in str(error) and "step-000001 took" in str(error)
                else 3
            )
        finally:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert names(tmp_path) == ["step-000001"]
    assert checkpoint.verify(tmp_path / "step-000001") == []


@pytest.mark.parametrize("arguments", [{"step": -1, "keep": 1}, {"step": 1, "keep": 0}])
def test_checkpoint_with_invalid_numbers_raises(tmp_path, arguments):
    with pytest.raises(ValueError, match="keep"):
        checkpoint.save(tmp_path, write=put(1.0), state={}, **arguments)


def test_abandoned_history_is_removed(tmp_path, capsys):
    save(tmp_path, 1, 2, 3, 4)
    # resumed from step 1: what the abandoned run reached must not win the next resume
    checkpoint.save(tmp_path, 2, put(22.0), keep=10, state={})
    assert names(tmp_path) == ["step-000001", "step-000002"]
    assert value_of(checkpoint.latest(tmp_path)) == 22.0
    assert "step-000003, step-000004" in capsys.readouterr().out


def save_and_die(root: Path, step: int, survive: int) -> int:
    """Return the exit code of a save that is killed at file operation ``survive + 1``."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    calls = 0

    def counted(real):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > survive:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for function in ("replace", "fsync", "rmdir", "unlink"):
        setattr(os, function, counted(getattr(os, function)))
    checkpoint.save_tensors, Path.write_text = (
        counted(checkpoint.save_tensors),
        counted(Path.write_text),
    )
    try:
        checkpoint.save(root, step, put(9.0), keep=2, state={})
        os._exit(0)
    finally:
        os._exit(1)


# A new step: the kill leaves step 2, then step 3. The same step again: the old step 2,
# for a moment only step 1, then the new step 2.
@pytest.mark.parametrize(("step", "stages"), [(3, [2.0, 9.0]), (2, [2.0, 1.0, 9.0])])
@pytest.mark.slow
def test_kill_at_any_file_operation_leaves_a_complete_checkpoint(
    tmp_path, step, stages
):
    found = []
    for survive in range(60):
        root = tmp_path / str(survive)
        save(root, 1, 2, keep=2)
        code = save_and_die(root, step, survive)
        assert all(checkpoint.verify(path) == [] for path in root.glob("step-*"))
        found.append(value_of(checkpoint.latest(root)))
        save(root, 4, keep=2)  # the next save works and clears every leftover
        assert names(root)[-1] == "step-000004"
        assert not list(root.glob("tmp-*"))
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert code == 0
    assert len(found) > 10
    assert [
        value for i, value in enumerate(found) if i == 0 or value != found[i - 1]
    ] == stages


def test_resume_selects_the_requested_checkpoint(tmp_path):
    older, newer = save(tmp_path, 1, 2)
    assert checkpoint.resolve_resume("none", tmp_path) is None
    assert checkpoint.resolve_resume("auto", tmp_path) == newer
    assert checkpoint.resolve_resume("auto", tmp_path / "fresh") is None
    assert checkpoint.resolve_resume(str(older), tmp_path / "other") == older
    assert checkpoint.resolve_resume(str(tmp_path), tmp_path / "other") == newer


def test_requested_damaged_checkpoint_raises(tmp_path):
    _, newer = save(tmp_path, 1, 2)
    damage_flip(newer / "state.json")
    with pytest.raises(ValueError, match=r"state\.json"):
        checkpoint.resolve_resume(str(newer), tmp_path)
    with pytest.raises(ValueError, match="step-000009"):
        checkpoint.resolve_resume(str(tmp_path / "step-000009"), tmp_path)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        checkpoint.resolve_resume(str(tmp_path / ".."), tmp_path)


def test_new_history_sets_old_checkpoints_aside_until_it_is_saved(tmp_path, capsys):
    save(tmp_path, 1, 2, 3)
    checkpoint.set_aside(tmp_path, None)
    aside = ["aside-step-000001", "aside-step-000002", "aside-step-000003"]
    assert names(tmp_path) == aside
    assert checkpoint.resolve_resume("auto", tmp_path) is None
    # a second start that never saves
    checkpoint.set_aside(tmp_path, None)
    assert names(tmp_path) == aside
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-000002"]
    assert "step-000003" in capsys.readouterr().out


def test_resume_from_an_earlier_step_sets_later_ones_aside(tmp_path):
    old, *_ = save(tmp_path, 1, 2, 3)
    checkpoint.set_aside(tmp_path, old)
    assert checkpoint.latest(tmp_path) == old
    assert names(tmp_path) == ["aside-step-000002", "aside-step-000003", "step-000001"]


def test_resume_from_the_newest_step_sets_nothing_aside(tmp_path):
    *_, newest = save(tmp_path, 1, 2)
    checkpoint.set_aside(tmp_path, newest)
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_resume_from_another_folder_sets_all_aside(tmp_path):
    (other,) = save(tmp_path / "other", 5)
    save(tmp_path / "own", 2)
    checkpoint.set_aside(tmp_path / "own", other)
    assert names(tmp_path / "own") == ["aside-step-000002"]


def test_files_with_the_names_of_folders_do_not_stop_a_save(tmp_path, capsys):
    tmp_path.joinpath("tmp-step-4").write_text("")
    tmp_path.joinpath("step-000004").write_text("mine")
    (path,) = save(tmp_path, 4)
    assert checkpoint.verify(path) == []
    assert (tmp_path / "file-step-000004").read_text() == "mine"
    assert "file-step-000004" in capsys.readouterr().out


def test_file_instead_of_the_folder_of_checkpoints_is_found_at_the_start(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    for resume in ("auto", "none"):
        with pytest.raises(ValueError, match="checkpoints is a file"):
            checkpoint.resolve_resume(resume, tmp_path / "checkpoints")


@pytest.mark.parametrize("size", ["Infinity", "-Infinity", "NaN", "1e999", '"x"', "[]"])
def test_manifest_with_an_impossible_size_is_damaged(tmp_path, size):
    save(tmp_path, 1, 2)
    manifest = tmp_path / "step-000002" / "manifest.json"
    text = re.sub(r'"size": \d+', f'"size": {size}', manifest.read_text())
    manifest.write_text(text)
    assert checkpoint.verify(tmp_path / "step-000002") == ["manifest.json: damaged"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000001"
