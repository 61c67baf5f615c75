"""Advice of a plan: settings that the run's schema accepts and that change its config."""

from __future__ import annotations

from typing import Any

import pytest

from common.config import load
from common.run_record import plain
from launch.planning.advice import advice, is_new
from launch.schemas.pairs import DpoRun, PairsRun
from launch.schemas.training import ColdStartRun, DualRlRun, GrpoRun
from tests.launch.processes import ROOT

RECIPES: dict[str, type] = {
    **{f"{world}/{name}": schema for world in ("wan", "shapes") for name, schema in (
        ("grpo", GrpoRun), ("dpo", DpoRun), ("pairs", PairsRun), ("cold_start", ColdStartRun),
        ("dual_rl", DualRlRun),
        ("discriminative", ColdStartRun), ("dimensions", ColdStartRun), ("generative", DualRlRun),
    )},
    "shapes/grpo_oracle": GrpoRun,
}  # fmt: skip
OVER = {
    "gpus/cold_start_64": "cold_start",
    "gpus/dual_rl_1": "dual_rl",
    "sizes/240x416x33": "grpo",
}
OVER |= {
    f"sisters/{name}": "grpo"
    for name in ("flash_grpo", "flow_cps", "flow_grpo", "mixgrpo")
}
OVER |= {"rewards/longcat": "grpo"}


def recipe(name: str, *words: str) -> Any:
    """The run of a shipped file, over its base if it has one, as the command line reads it."""
    base = f"wan/{OVER[name]}" if name in OVER else name
    files = [ROOT / "configs" / f"{one}.yaml" for one in dict.fromkeys([base, name])]
    return load(RECIPES[base], files, words)


@pytest.mark.parametrize("ranks", [1, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [*RECIPES, *OVER])
def test_advice_is_accepted_by_the_schema_and_changes_the_config(
    name: str, ranks: int
) -> None:
    cfg = recipe(name)
    found = advice(cfg, ranks)
    assert found
    settings = [words for part in found.values() for words in part if "=" in words]
    assert settings
    for words in settings:
        assert plain(recipe(name, *words.split())) != plain(cfg), words
        for word in words.split():
            assert not word.startswith("zero_stage=") or (
                ranks > 1 and int(word[-1]) > cfg.zero_stage
            ), word


def test_every_planned_recipe_is_tested_here() -> None:
    others = {
        "evaluate",
        "evaluate_oracle",
        "evaluate_rm",
        "evaluate_vbench",
        "sample",
        "score",
        "serve",
        "vbench",
    }
    found = {
        str(file.relative_to(ROOT / "configs").with_suffix(""))
        for file in (ROOT / "configs").glob("*/*.yaml")
    }
    assert {name for name in found if name.partition("/")[2] not in others} == {
        *RECIPES,
        *OVER,
    }


def test_advice_for_a_small_device() -> None:
    grpo = advice(recipe("wan/grpo"), 1)
    assert grpo["reward descore: weights"] == ("rewards.descore.url=http://HOST:8900",)
    assert grpo["rollout: activations"][0] == "generator.rollout_batch=1"
    small = ("generator.num_frames=33", "generator.height=240 generator.width=416")
    assert grpo["update: activations"] == small
    assert grpo["decoding: activations"] == small
    assert grpo["transformer: weights"] == ("more ranks",)
    assert grpo["transformer: optimizer"] == ("more ranks",)
    assert "text encoder: weights" not in grpo  # cached already
    assert advice(recipe("wan/grpo"), 8)["transformer: weights"] == ("zero_stage=3",)
    assert "text encoder: weights" not in advice(recipe("wan/pairs"), 1)
    cold_start = advice(recipe("wan/cold_start"), 1)
    assert "base=Qwen/Qwen3-VL-2B-Instruct" in cold_start["reward model: weights"]
    adapter = "lora.rank=64 lora.dropout=0"
    dual_rl = advice(recipe("wan/dual_rl"), 1)
    assert adapter in dual_rl["reward model: optimizer"]
    with_adapter = advice(recipe("gpus/dual_rl_1"), 1)
    assert adapter not in with_adapter["reward model: optimizer"]


def test_advice_for_reward_with_kind_or_options_has_no_url() -> None:
    """The schema refuses a kind next to a url, and a remote reward a DeScore's options."""
    path = ROOT / "configs" / "wan" / "grpo.yaml"
    named = load(GrpoRun, path, ["rewards.other={kind: descore, checkpoint: x}"])
    assert not any(
        "url" in words for words in advice(named, 1)["reward other: weights"]
    )
    cfg = load(GrpoRun, path, ["rewards.descore.options.batch=1"])
    found = advice(cfg, 1)
    assert not any("url" in words for words in found["reward descore: weights"])
    assert "reward descore: activations, cache" not in found
    assert not is_new(cfg, "rewards.descore.options.batch=1")
    assert not is_new(cfg, "cache_promts=false")
    batch = advice(load(GrpoRun, path), 1)["reward descore: activations, cache"]
    assert batch == ("rewards.descore.options.batch=1",)


def test_advice_leaves_out_zero_stage_that_the_schema_refuses() -> None:
    """ZeRO 3 refuses cached blocks."""
    path = ROOT / "configs" / "wan" / "grpo.yaml"
    cfg = load(GrpoRun, path, ["generator.sampler.tail_cache=2"])
    assert "zero_stage=3" not in advice(cfg, 8).get("transformer: weights", ())
    assert "zero_stage=3" in advice(load(GrpoRun, path), 8)["transformer: weights"]
