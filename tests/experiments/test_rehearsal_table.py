"""The table of rehearsals: its recipes load, and a finished cell is not run again."""

from __future__ import annotations

import importlib
import json
import sys

import pytest

import launch.command
from common.config import parse_command_line
from experiments import rehearsal_table
from experiments.rehearsal_table import VARIANTS, is_done, page_of


class ParsedError(Exception):
    """The command line was read."""


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_command_of_a_cell_parses(variant, monkeypatch):
    seen = []

    def stop_there(*args, **options):
        seen.append(parse_command_line(*args, **options))
        raise ParsedError

    words = variant.words("8xh100")
    monkeypatch.chdir(rehearsal_table.ROOT)
    monkeypatch.setattr(launch.command, "parse_command_line", stop_there)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(ParsedError):
        importlib.import_module(f"launch.{variant.script}").main()
    assert seen[0].rehearse == "8xh100"


def test_names_of_cells_differ():
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)


def test_a_cell_of_other_words_is_not_done(tmp_path):
    file = tmp_path / "cell.json"
    assert not is_done(file, ["a"])
    file.write_text(json.dumps({"words": ["a"]}))
    assert is_done(file, ["a"])
    assert not is_done(file, ["a", "b=1"])


def test_page_lists_the_cells_that_are_there():
    phases = {
        "loading": {"seconds": 9.0},
        "rollout": {"seconds": 1000.0},
        "decode": {"seconds": 0.1},
    }
    cell = {"unit": "update", "seconds": 1234.56, "peak_gib": 7.89, "phases": phases}
    rows = [line for line in page_of({"dpo": cell}, "8xh100") if "Flow-DPO" in line]
    assert rows == ["| Flow-DPO | update | 1,234.6 | 7.9 | rollout 1,000.0 |"]
