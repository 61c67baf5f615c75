"""What a folder says of the settings it was made with, and what is otherwise now."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from common.config import load
from common.run_record import changed_settings, differences, write_settings


@dataclass(frozen=True)
class Inner:
    rate: float = 1e-5
    words: tuple[str, ...] = ("a", "b")


@dataclass(frozen=True)
class Outer:
    steps: int = 3
    inner: Inner = field(default_factory=Inner)
    extra: dict[str, float] = field(default_factory=dict)
    api_token: str = "one secret"


def test_changed_settings_are_listed_by_key(tmp_path: Path) -> None:
    cfg = Outer(extra={"gone": 1.5})
    write_settings(cfg, tmp_path / "config.yaml")
    assert changed_settings(tmp_path / "config.yaml", cfg) == []
    now = replace(
        cfg,
        steps=4,
        inner=Inner(rate=2e-5, words=("a",)),
        extra={"new": 0.25},
        api_token="another secret",
    )
    assert changed_settings(tmp_path / "config.yaml", now) == [
        "steps: 3 -> 4",
        "inner.rate: 1e-05 -> 2e-05",
        'inner.words: ["a", "b"] -> ["a"]',
        "extra.gone: 1.5 -> null",
        "extra.new: null -> 0.25",
    ]  # and of secrets nothing, they are nowhere
    assert "secret" not in (tmp_path / "config.yaml").read_text()


def test_environment_secret_is_no_changed_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "abcdefgh123")
    cfg = Outer(
        inner=Inner(words=("abcdefgh123", "at abcdefgh123")), extra={"abcdefgh123": 1.0}
    )
    write_settings(cfg, tmp_path / "config.yaml")
    assert "abcdefgh123" not in (tmp_path / "config.yaml").read_text()
    assert changed_settings(tmp_path / "config.yaml", cfg) == []
    assert load(Outer, tmp_path / "config.yaml").inner.words == (
        "***",
        "at ***",
    )  # and it is YAML still


def test_differences_of_nested_and_equal_values() -> None:
    assert differences({"a": {"b": 1}}, {"a": 2}) == ['a: {"b": 1} -> 2']
    assert differences({"a": 1}, {"a": 1.0}) == []
