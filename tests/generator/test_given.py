"""Entries that a cache has inside a block only."""

from __future__ import annotations

import pytest

from generator.given import given_entries


def test_entry_of_the_cache_takes_precedence_and_stays() -> None:
    cache = {"rain": 1}
    with given_entries(cache, {"rain": 2, "sun": 3}):
        assert cache == {"rain": 1, "sun": 3}
    assert cache == {"rain": 1}


def test_entries_go_when_the_block_fails() -> None:
    cache: dict[str, int] = {}
    with pytest.raises(RuntimeError), given_entries(cache, {"sun": 3}):
        raise RuntimeError("inside")
    assert cache == {}
