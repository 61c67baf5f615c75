"""Every shipped yaml loads into the schema of the program that reads it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from common.config import ConfigError, load
from generator.experts import check_sampling, check_stochastic_steps, check_training
from launch.planning import known_models
from launch.schemas.evaluation import GeneratorEvaluation, RewardEvaluation, ScoreRun
from launch.schemas.pairs import DpoRun, PairsRun
from launch.schemas.server import ServeRun
from launch.schemas.training import ColdStartRun, DualRlRun, GrpoRun, SampleRun
from launch.schemas.vbench import VbenchEvaluation, VbenchSampleRun

ROOT = Path(__file__).resolve().parent.parent / "configs"
SCHEMAS = {
    "cold_start": ColdStartRun,
    "dimensions": ColdStartRun,
    "discriminative": ColdStartRun,
    "dpo": DpoRun,
    "dual_rl": DualRlRun,
    "generative": DualRlRun,
    "grpo": GrpoRun,
    "grpo_anyflow": GrpoRun,
    "grpo_oracle": GrpoRun,
    "pairs": PairsRun,
    "sample": SampleRun,
    "score": ScoreRun,
    "serve": ServeRun,
    "evaluate": GeneratorEvaluation,
    "evaluate_oracle": GeneratorEvaluation,
    "evaluate_rm": RewardEvaluation,
    "vbench": VbenchSampleRun,
    "evaluate_vbench": VbenchEvaluation,
}
SISTERS = sorted((ROOT / "sisters").glob("*.yaml"))  # these stand on a GRPO recipe
MIXES = sorted((ROOT / "rewards").glob("*.yaml"))  # so do these
SIZES = sorted(
    (ROOT / "sizes").glob("*.yaml")
)  # and these on any recipe of a generator
GPUS = sorted(
    (ROOT / "gpus").glob("*.yaml")
)  # and each of these on the full-size recipe of its name
MODELS = sorted(
    (ROOT / "wan" / "models").glob("*.yaml")
)  # and these on a recipe for Wan 2.1 1.3B
LAYERS = {*SISTERS, *MIXES, *SIZES, *GPUS, *MODELS}
FILES = sorted(set(ROOT.rglob("*.yaml")) - LAYERS)


@pytest.mark.parametrize("layer", [*SISTERS, *MIXES], ids=lambda path: path.stem)
def test_run_of_a_layer_is_beside_the_run_of_its_recipe(layer: Path) -> None:
    """Over the tiny recipe no run is written among those of full size."""
    with_descore = layer in MIXES
    tiny = ROOT / "shapes" / ("grpo.yaml" if with_descore else "grpo_oracle.yaml")
    below = load(GrpoRun, tiny).run_dir
    assert load(GrpoRun, [tiny, layer]).run_dir == f"{below}_{layer.stem}"
    wan = load(GrpoRun, [ROOT / "wan" / "grpo.yaml", layer])
    assert wan.run_dir == f"runs/wan/grpo_{layer.stem}"
    own = load(GrpoRun, [tiny, layer], ["run_dir=mine"])
    assert own.run_dir == "mine"


@pytest.mark.parametrize(
    "path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_shipped_config_loads(path: Path) -> None:
    assert isinstance(load(SCHEMAS[path.stem], path), SCHEMAS[path.stem])


def test_shipped_config_with_a_wrong_key_raises() -> None:
    assert len(FILES) >= 10
    with pytest.raises(ConfigError, match=r"sampler\.num_steps"):
        load(GrpoRun, ROOT / "wan" / "grpo.yaml", ["generator.sampler.num_stpes=4"])


def test_shapes_generator_is_equal_in_every_config() -> None:
    """Commands with other generator settings would compare different models."""
    names = (
        "grpo",
        "sample",
        "evaluate",
        "grpo_oracle",
        "evaluate_oracle",
        "pairs",
        "dpo",
    )
    generators = [
        load(SCHEMAS[name], ROOT / "shapes" / f"{name}.yaml").generator
        for name in names
    ]
    assert all(one == generators[0] for one in generators)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", ["grpo", "dpo", "sample"])
def test_model_config_stands_on_each_recipe(path: Path, name: str) -> None:
    """Only the generator changes, and its stochastic steps are the trained transformer's."""
    recipe = ROOT / "wan" / f"{name}.yaml"
    plain, other = load(SCHEMAS[name], recipe), load(SCHEMAS[name], [recipe, path])
    assert other.generator.path != plain.generator.path
    assert dataclasses.replace(other, generator=plain.generator) == plain
    family = known_models.wan_family(other.generator.path)
    check_sampling(other.generator, family)
    if name == "grpo":
        check_training(other.generator, family, zero_stage=other.zero_stage)
        check_stochastic_steps(other.generator, family)


@pytest.mark.parametrize("path", GPUS, ids=lambda path: path.stem)
def test_gpu_config_fits_its_recipe(path: Path) -> None:
    name, _, gpus = path.stem.rpartition("_")
    recipe = ROOT / "wan" / f"{name}.yaml"
    plain, other = load(SCHEMAS[name], recipe), load(SCHEMAS[name], [recipe, path])
    assert other != plain
    pairs = (
        other.cold_start.pairs_per_step
        if name == "cold_start"
        else other.dual_rl.pairs_per_step
    )
    assert pairs % int(gpus) == 0
    assert "Not run" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["grpo", "pairs", "dpo", "sample"])
def test_size_config_fits_every_recipe(name: str) -> None:
    (small,) = SIZES
    how = load(SCHEMAS[name], [ROOT / "wan" / f"{name}.yaml", small]).generator
    assert f"{how.height}x{how.width}x{how.num_frames}" == small.stem
    assert (
        how.sampler
        == load(SCHEMAS[name], ROOT / "wan" / f"{name}.yaml").generator.sampler
    )


@pytest.mark.parametrize("path", SISTERS, ids=lambda path: path.stem)
@pytest.mark.parametrize("recipe", ["wan", "shapes"])
def test_related_algorithm_config_fits_every_recipe(path: Path, recipe: str) -> None:
    own = (
        [] if recipe == "wan" else ["generator.sampler.num_steps=26"]
    )  # the tiny Wan's eight are fewer than some need
    run = load(GrpoRun, [ROOT / recipe / "grpo.yaml", path], own)
    assert run.run_dir == f"runs/{recipe}/grpo_{path.stem}"
    plain = load(GrpoRun, ROOT / recipe / "grpo.yaml")
    assert run.rewards == plain.rewards  # what the recipe says and the sister does not
    assert run.generator.sampler != plain.generator.sampler


def test_longcat_reward_config_fits_the_recipe() -> None:
    """LongCat-Video 2510.22200, section 3.3.2: four rewards of weight 1; DeScore watches."""
    run = load(GrpoRun, [ROOT / "wan" / "grpo.yaml", *MIXES])
    assert {name: reward.weight for name, reward in run.rewards.items()} == {
        "descore": 0.0, "hps_general": 1.0, "hps_percentile": 1.0, "motion": 1.0, "alignment": 1.0,
    }  # fmt: skip
    general, percentile = run.rewards["hps_general"], run.rewards["hps_percentile"]
    assert general.checkpoint == percentile.checkpoint
    prompt = "A high-quality image"
    assert general.options["prompt"] == prompt
    assert percentile.options["best"] == 0.3
    assert run.rewards["motion"].options == {
        "dimension": "MQ",
        "gray": True,
        "dtype": "bfloat16",
    }
    assert [path.stem for path in MIXES] == ["longcat"]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("rewards.mine.target=/no/such.py:score", "no file /no/such.py (command line)"),
        ("rewards.oracle=null", "rewards: has no entry, and needs one"),
    ],
)
def test_mistake_of_an_override_is_found_on_the_command_line(
    word: str, said: str
) -> None:
    path = ROOT / "shapes" / "grpo_oracle.yaml"
    with pytest.raises(ConfigError) as error:
        load(GrpoRun, path, [word])
    assert said in error.value.errors[0]
