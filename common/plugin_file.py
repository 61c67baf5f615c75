"""Targets of plug-ins: path/to/file.py:name, an attribute of a user's file.

Imports no torch, because configs check their targets.
"""

from __future__ import annotations

import difflib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from common.shipped import shipped


def check_target(key: str, target: str) -> None:
    """Raise ValueError, naming the key, when a text cannot be a target. The file is not run.

    A file of the project (toy/oracle.py) is found from any folder.
    """
    file, _, attribute = target.rpartition(":")
    if not file.endswith(".py") or not attribute.isidentifier():
        raise ValueError(f"{key} must be path/to/file.py:name, got {target!r}")
    if not shipped(file).is_file():
        raise ValueError(f"{key}: there is no file {file}")


def file_of(target: str) -> str:
    """Return the file of a target, found from any folder if it ships with the project."""
    return str(shipped(target.rpartition(":")[0]))


def load_target(key: str, target: str, *, module: str) -> Any:
    """Run the file of a target as a module of this name; return the attribute that it names.

    The name must be no module's that the file could import.

    Raises ValueError, with the nearest name, when the file has no such attribute, and whatever
    the file raises.
    """
    check_target(key, target)
    file = file_of(target)
    attribute = target.rpartition(":")[2]
    loaded = _run_file(module, file)
    if not hasattr(loaded, attribute):
        # perhaps a typo
        close = difflib.get_close_matches(attribute, vars(loaded), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{key}: {file} has no {attribute!r}{hint}")
    return getattr(loaded, attribute)


def place_in(file: str, error: BaseException) -> str:
    """Return "file:line" of the last line of ``file`` that an error passed through, else ""."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    path = Path(file).resolve()
    lines = []
    for frame in traceback.extract_tb(error.__traceback__):
        if Path(frame.filename).resolve() == path:
            lines.append(frame.lineno)
    return f"{file}:{lines[-1]}" if lines else ""


def _run_file(name: str, file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
