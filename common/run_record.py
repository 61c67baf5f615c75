"""Record in the run folder how a run was made: config, versions, commit, command.

Secrets are masked.
"""

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
# A name with one of these words belongs to a secret.
_SECRET_WORDS = {
    "auth",
    "authorization",
    "bearer",
    "cookie",
    "cred",
    "creds",
    "credential",
    "credentials",
    "jwt",
    "key",
    "passphrase",
    "pat",
    "pw",
    "pwd",
    "sig",
}
# So does a name with a word that ends like this: PGPASSWORD, accesstoken.
_SECRET_ENDINGS = ("apikey", "accesskey", "passwd", "password", "secret", "token")
# User and password of an address: scheme://user:password@host.
_QUERY = re.compile(
    r"(?i)(?<=[?&])([\w-]*(?:key|token|secret|password|passwd|sig|signature|auth)=)[^&\s'\"]+"
)
_LOGIN = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
# Packages that affect a run's numbers.
_PACKAGES = (
    "torch",
    "deepspeed",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "tokenizers",
    "sentencepiece",
    "ftfy",
    "omegaconf",
    "numpy",
    "pillow",
    "av",
    "opencv-python-headless",
    "wandb",
)


def dump(cfg: Any, run_dir: str | Path) -> Path:
    """Write ``config.yaml`` (resolved, `load` reads it) and ``environment.json`` to the run folder.

    A text whose name says key, token, secret or password is written as ***, and so are the values
    of environment variables with such names. Returns the path of config.yaml. Raises TypeError
    unless cfg is a dataclass instance.
    """
    if not dataclasses.is_dataclass(cfg) or isinstance(cfg, type):
        raise TypeError(f"dump needs a dataclass instance, got {type(cfg).__name__}")
    # The settings, and the environment that they ran in.
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


# ---- settings ----


def write_settings(cfg: Any, file: Path) -> None:
    """Write a config as YAML, without its secrets."""
    replace_text(file, _as_yaml(cfg))


def changed_settings(file: Path, cfg: Any) -> list[str]:
    """Compare a config with the file of `write_settings`: ``a.b: 1 -> 2`` per difference."""
    stored = parse(file.read_text(encoding="utf-8")).value
    # through YAML, which changes some types
    return differences(stored, parse(_as_yaml(cfg)).value)


def _as_yaml(cfg: Any) -> str:
    settings = _without_secrets(plain(cfg))
    return yaml.safe_dump(
        settings,
        sort_keys=False,
        allow_unicode=True,
        width=120,
    )


def differences(
    old: Any,
    new: Any,
    where: str = "",
) -> list[str]:
    """List ``a.b: 1 -> 2`` for every leaf that differs; a missing leaf is null."""
    # Go down to the leaves.
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for name in dict.fromkeys([*old, *new]):
            path = f"{where}.{name}" if where else str(name)
            lines += differences(old.get(name), new.get(name), path)
        return lines
    if old == new:
        return []
    return [f"{where}: {json.dumps(old)[:60]} -> {json.dumps(new)[:60]}"]


def plain(value: Any, name: str = "") -> Any:
    """Turn dataclasses into dicts, tuples into lists, and texts with a secret's name into ***."""
    if dataclasses.is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    # Names decide what is secret.
    if isinstance(value, dict):
        return {str(key): plain(item, str(key)) for key, item in value.items()}
    # the items of a list of secrets are secrets
    if isinstance(value, list | tuple):
        return [plain(item, name) for item in value]
    if isinstance(value, str) and is_secret(name, value):
        return MASK
    return value


def value_at(settings: Any, dotted_key: str) -> Any:
    """Return the value at a.b.c of nested dicts, None where there is none."""
    for key in dotted_key.split("."):
        settings = settings.get(key) if isinstance(settings, dict) else None
    return settings


# ---- secrets ----


def is_secret(name: str, value: str) -> bool:
    """True for a text under a name such as ``api_key``, ``accessToken`` or ``PGPASSWORD``."""
    # a value such as <Reward> is only a token of a vocabulary
    if not value or value.startswith("<"):
        return False
    # hf_token, HF-TOKEN and hfToken have the same words
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    words = [word for word in re.split(r"[^a-z]+", spaced.lower()) if word]
    # token_env is the name of a variable
    if words[-1:] == ["env"]:
        return False
    return any(
        word in _SECRET_WORDS or word.endswith(_SECRET_ENDINGS) for word in words
    )


def hide_secrets(text: str) -> str:
    """Mask logins inside addresses, and the secrets of the environment wherever they occur."""
    for name, value in os.environ.items():
        secrets = [value] if is_secret(name, value) else []
        # the password inside DATABASE_URL and the like
        for login in _LOGIN.findall(value):
            secrets.append(login.partition(":")[2])
        for secret in secrets:
            # a short value (FOO_KEY=1) would mask innocent text and protect nothing
            if len(secret) >= 8:
                text = text.replace(secret, MASK)
    text = _QUERY.sub(rf"\1{MASK}", text)
    return _LOGIN.sub(MASK, text)


def _without_secrets(value: Any) -> Any:
    """Apply `hide_secrets` to every text in nested dicts and lists."""
    # before the text becomes YAML, where a bare *** would be an alias
    if isinstance(value, dict):
        return {
            _without_secrets(key): _without_secrets(item) for key, item in value.items()
        }
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    return hide_secrets(value) if isinstance(value, str) else value


def _mask_argument(word: str) -> str:
    """Mask the value of ``name=value`` on a command line where the name is a secret's."""
    path, equals, value = word.partition("=")
    name = path.rpartition(".")[2]
    return f"{path}={MASK}" if equals and is_secret(name, value) else word


# ---- environment ----


def versions() -> dict[str, str | None]:
    """Versions of the packages that affect a run's numbers; None where one is not installed."""
    installed: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = None
    return installed


def _git_state(folder: Path) -> dict[str, Any]:
    """Commit of the code and whether files differ from it; None without a repository or git."""
    # Without a repository there is neither commit nor status.
    status = _git(folder, "status", "--porcelain")
    return {
        "commit": _git(folder, "rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
    }


def _git(folder: Path, *words: str) -> str | None:
    """Output of a git command, None if it fails."""
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
