"""The last line of a command names the recipe of the size that was run."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.next_recipe import next_recipe


@pytest.mark.parametrize("words", ["--config {}", "--local_rank=1 --config={} a.b=c"])
def test_recipe_beside_the_given_one_comes_next(words: str) -> None:
    tiny = words.format("configs/shapes/grpo.yaml").split()
    assert next_recipe("sample", tiny) == "configs/shapes/sample.yaml"
    # a layer has no recipe beside it
    tiny += ["--config", "configs/sisters/awm.yaml"]
    assert next_recipe("sample", tiny) == "configs/shapes/sample.yaml"


def test_without_a_recipe_beside_it_is_that_of_full_size(tmp_path: Path) -> None:
    own = ["--config", f"{tmp_path}/grpo.yaml"]
    assert next_recipe("sample", own) == "configs/wan/sample.yaml"
    assert next_recipe("sample", ["--config"]) == "configs/wan/sample.yaml"
    (tmp_path / "sample.yaml").write_text("out: x\n")
    assert next_recipe("sample", own) == f"{tmp_path}/sample.yaml"
