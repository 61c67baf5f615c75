"""What a run folder says about how it was made: the resolved config, versions, commit, command. Secrets are masked."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from common.files import replace_text
from common.safe_yaml import parse

MASK = "***"
SETTINGS = "config.yaml"
_SECRET_WORDS = {
    "key",
    "apikey",
    "token",
    "secret",
    "password",
    "passwd",
    "credential",
    "credentials",
}
_PACKAGES = (
    *(
        "torch",
        "deepspeed",
        "diffusers",
        "transformers",
        "peft",
        "accelerate",
        "safetensors",
    ),
    *("tokenizers", "omegaconf", "numpy", "decord2", "wandb"),
)


def dump(cfg: Any, run_dir: str | Path) -> Path:
    """Write ``config.yaml`` (resolved, `load` reads it back) and ``environment.json`` into the run folder.

    Returns the path of config.yaml. A text whose name says key, token, secret or password, and the values of
    environment variables named so, are written as ***. Raises TypeError unless cfg is a dataclass instance.
    """
    if not dataclasses.is_dataclass(cfg) or isinstance(cfg, type):
        raise TypeError(f"dump needs a dataclass instance, got {type(cfg).__name__}")
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_settings(cfg, folder / SETTINGS)
    record = {
        "command": [hide_secrets(_mask_argument(word)) for word in sys.argv],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions(),
        "git": _git_state(Path(__file__).resolve().parent),
    }
    replace_text(folder / "environment.json", json.dumps(record, indent=2) + "\n")
    return folder / SETTINGS


def write_settings(cfg: Any, file: Path) -> None:
    """A config as YAML, without its secrets."""
    replace_text(
        file,
        yaml.safe_dump(
            _without_secrets(plain(cfg)), sort_keys=False, allow_unicode=True, width=120
        ),
    )


def changed_settings(file: Path, cfg: Any) -> list[str]:
    """``a.b: 1 -> 2`` for what `write_settings` wrote and what is otherwise now."""
    now = yaml.safe_dump(_without_secrets(plain(cfg)), allow_unicode=True)
    return differences(parse(file.read_text(encoding="utf-8")).value, parse(now).value)


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """``a.b: 1 -> 2`` for every leaf that differs; what is missing is null."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for name in dict.fromkeys([*old, *new])
            for line in differences(
                old.get(name), new.get(name), f"{where}.{name}" if where else str(name)
            )
        ]
    return (
        []
        if old == new
        else [f"{where}: {json.dumps(old)[:60]} -> {json.dumps(new)[:60]}"]
    )


def plain(value: Any, name: str = "") -> Any:
    """Dataclasses as dicts, tuples as lists, texts with a secret's name as ***."""
    if dataclasses.is_dataclass(value):
        return {
            f.name: plain(getattr(value, f.name), f.name)
            for f in dataclasses.fields(value)
        }
    if isinstance(value, dict):
        return {str(key): plain(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, name) for item in value]
    return MASK if isinstance(value, str) and is_secret(name, value) else value


def versions() -> dict[str, str | None]:
    """Of the packages that decide a run's numbers."""
    return {name: _version(name) for name in _PACKAGES}


def is_secret(name: str, value: str) -> bool:
    """True for a text under a name such as ``api_key`` or ``hf_token``; ``<Reward>`` is only a vocabulary token."""
    words = re.split(r"[^a-z]+", name.lower())
    return (
        bool(value)
        and not value.startswith("<")
        and not _SECRET_WORDS.isdisjoint(words)
    )


def hide_secrets(text: str) -> str:
    """Replace the values of environment variables with a secret's name wherever they occur in a text."""
    for name, value in os.environ.items():
        # short values (FOO_KEY=1) would eat innocent text and protect nothing
        if len(value) >= 8 and is_secret(name, value):
            text = text.replace(value, MASK)
    return text


def _without_secrets(value: Any) -> Any:
    """`hide_secrets` in every text. Before it becomes YAML: there a bare *** would be an alias."""
    if isinstance(value, dict):
        return {
            _without_secrets(key): _without_secrets(item) for key, item in value.items()
        }
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    return hide_secrets(value) if isinstance(value, str) else value


def _mask_argument(word: str) -> str:
    name, equals, value = word.partition("=")
    return f"{name}={MASK}" if equals and is_secret(name, value) else word


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state(folder: Path) -> dict[str, Any]:
    """Commit of the code and whether files differ from it; both None outside a repository or without git."""

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *words],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    status = ask("status", "--porcelain")
    return {
        "commit": ask("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
    }
