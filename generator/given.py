"""Entries that a cache has for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def given_entries(cache: dict[str, T], entries: Mapping[str, T]) -> Iterator[None]:
    """Inside, the cache has these entries too; one of its own takes precedence and stays."""
    new = {key: value for key, value in entries.items() if key not in cache}
    cache.update(new)
    try:
        yield
    finally:
        for key in new:
            del cache[key]
