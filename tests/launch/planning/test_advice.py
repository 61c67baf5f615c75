"""What a plan advises can be typed as it stands: keys of that run, other values than are set, on so many ranks."""

from __future__ import annotations

from typing import Any

import pytest

from common.config import load
from common.run_record import plain
from launch.planning.advice import Less, advice, is_new
from launch.schemas.pairs import DpoRun, PairsRun
from launch.schemas.training import ColdStartRun, DualRlRun, GrpoRun
from tests.launch.processes import ROOT

RECIPES: dict[str, type] = {
    **{f"{world}/{name}": schema for world in ("wan", "shapes") for name, schema in (
        ("grpo", GrpoRun), ("dpo", DpoRun), ("pairs", PairsRun), ("cold_start", ColdStartRun), ("dual_rl", DualRlRun),
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
def test_advice_is_taken_by_the_runs_schema_and_changes_it(
    name: str, ranks: int
) -> None:
    cfg = recipe(name)
    found = advice(cfg, ranks)
    assert found
    for words in (words for less in found.values() for words in less.settings):
        assert plain(recipe(name, *words.split())) != plain(cfg), words
        for word in words.split():
            assert not word.startswith("zero_stage=") or (
                ranks > 1 and int(word[-1]) > cfg.zero_stage
            ), word


def test_every_shipped_recipe_that_is_planned_is_asked_for_advice() -> None:
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


def test_what_is_advised_for_a_small_device() -> None:
    grpo = advice(recipe("wan/grpo"), 1)
    assert grpo["reward descore: weights"].settings == (
        "rewards.descore.url=http://HOST:8900",
    )
    assert grpo["rollout: activations"].settings == ("generator.rollout_batch=1",)
    small = ("generator.num_frames=33", "generator.height=240 generator.width=416")
    assert (
        grpo["decoding: activations"].settings
        == grpo["update: activations"].settings
        == small
    )  # one at once already
    assert grpo["transformer: weights"] == Less((), "more ranks, with zero_stage=3")
    assert grpo["transformer: optimizer"] == Less((), "more ranks")
    assert "text encoder: weights" not in grpo  # cached already
    assert advice(recipe("wan/grpo"), 8)["transformer: weights"].settings == (
        "zero_stage=3",
    )
    assert "text encoder: weights" not in advice(recipe("wan/pairs"), 1)
    assert advice(recipe("wan/cold_start"), 1)["judge: weights"].settings == (
        "base=Qwen/Qwen3-VL-2B-Instruct",
    )
    assert advice(recipe("wan/dual_rl"), 1)["judge: optimizer"].settings == (
        "lora.rank=64 lora.dropout=0",
    )
    assert advice(recipe("gpus/dual_rl_1"), 1)["judge: optimizer"].settings == ()


def test_a_reward_by_another_name_and_one_with_options() -> None:
    """A kind beside a url is refused, and a remote reward would refuse a DeScore's options."""
    path = ROOT / "configs" / "wan" / "grpo.yaml"
    cfg = load(GrpoRun, path, ["rewards.judge={kind: descore, checkpoint: x}"])
    words = advice(cfg, 1)["reward judge: weights"].settings[0]
    assert words == "rewards.judge.url=http://HOST:8900 rewards.judge.kind=remote"
    cfg = load(GrpoRun, path, ["rewards.descore.options.batch=1"])
    found = advice(cfg, 1)
    assert found["reward descore: weights"].settings == ()
    assert "reward descore: activations, cache" not in found
    assert not is_new(cfg, "rewards.descore.options.batch=1")
    assert not is_new(cfg, "cache_promts=false")
    batch = advice(load(GrpoRun, path), 1)["reward descore: activations, cache"]
    assert batch == Less(
        ("rewards.descore.options.batch=1",), "not beside a url"
    )  # which takes no batch


def test_a_stage_that_the_run_refuses_is_not_hinted_at() -> None:
    """ZeRO 3 goes with no cached blocks, in settings and in words."""
    path = ROOT / "configs" / "wan" / "grpo.yaml"
    cfg = load(GrpoRun, path, ["generator.sampler.tail_cache=2"])
    for ranks in (1, 8):
        assert "zero_stage" not in str(
            advice(cfg, ranks).get("transformer: weights", "")
        )
        assert "zero_stage" in str(
            advice(load(GrpoRun, path), ranks)["transformer: weights"]
        )
