"""Lazy exports: names of a package whose modules are imported at first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def exports(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return ``__getattr__``, ``__dir__`` and ``__all__`` of a package.

    ``modules`` maps each exported name to the module that defines it. ``__version__`` is
    the version of the installed distribution. Another name raises AttributeError.
    """
    names = [*sorted(modules), "__version__"]

    def get(name: str) -> Any:
        if name == "__version__":
            return _version()
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(modules[name]), name)

    def directory() -> list[str]:
        return names

    return get, directory, names


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("video-alignment")
    except PackageNotFoundError:  # a checkout that was never installed
        return "0+unknown"
