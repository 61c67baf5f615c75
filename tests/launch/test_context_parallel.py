"""GRPO and DPO on ranks that share the tokens of each sample equal one rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.pair_store import LatentPair, write_pairs
from common.config import ConfigError, load
from common.distributed import seeded_generator
from launch.schemas.pairs import DpoRun, PairsRun
from launch.schemas.training import GrpoRun, SampleRun
from tests.launch.processes import ROOT, run, torchrun

SCRIPT = str(ROOT / "tests/launch/context_ranks.py")
# 3 latent frames of 2 x 2 tokens, and members enough to share
SIZE = ["generator.height=32", "generator.width=32", "grpo.group_size=4"]
GRPO = str(ROOT / "launch/grpo.py")


def steps_of(config: Path, ranks: int, *words: str) -> dict[str, Any]:
    done = torchrun(ranks, SCRIPT, str(config), *words)
    return json.loads(done.stdout.splitlines()[-1])


def assert_same(ours: dict[str, Any], wanted: dict[str, Any]) -> None:
    first, second = ours["steps"]
    # Sampled with the same weights. AdamW then divides the rounding of small gradients by their
    # size.
    assert first == pytest.approx(wanted["steps"][0], rel=1e-6, abs=1e-9)
    assert second == pytest.approx(wanted["steps"][1], rel=1e-4, abs=1e-9)
    assert ours["heldout"] == pytest.approx(wanted["heldout"], rel=1e-5)


@pytest.fixture(scope="module")
def one_rank(tiny: Path) -> dict[str, Any]:
    return steps_of(tiny, 1, *SIZE, "zero_stage=1")


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 2])
def test_two_ranks_sharing_tokens_equal_one_rank(
    tiny: Path, one_rank: dict[str, Any], stage: int
) -> None:
    words = [f"zero_stage={stage}", "generator.context_parallel=2"]
    ours = steps_of(tiny, 2, *SIZE, *words, "generator.gradient_checkpointing=true")
    assert_same(ours, one_rank)
    # each group is decoded and scored on one of the ranks
    for step in range(2):
        first, second = (rank[step] for rank in ours["scored"])
        (everything,) = one_rank["scored"]
        assert sorted(first + second) == sorted(everything[step])
        assert len(first) == 2


@pytest.mark.long
@pytest.mark.parametrize("shared", ["1", "2"])
def test_four_ranks_of_two_samples_equal_one_rank(
    tiny: Path, one_rank: dict[str, Any], shared: str
) -> None:
    words = [*SIZE, "zero_stage=1", "generator.context_parallel=2"]
    words += [f"grpo.ranks_per_group={shared}", "grpo.overlap_scoring=true"]
    assert_same(steps_of(tiny, 4, *words), one_rank)


@pytest.mark.long
def test_grpo_command_trains_with_shared_tokens_after_checking_the_gradient(
    tiny: Path, tmp_path: Path
) -> None:
    words = ["--config", str(tiny), *SIZE, "generator.context_parallel=2", "steps=1"]
    done = torchrun(2, GRPO, *words, f"run_dir={tmp_path / 'run'}", "zero_stage=1")
    assert "self-check ok: context parallelism" in done.stdout
    assert "2 ranks to a sample" in done.stdout
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    # 4 groups of 4, one of 6 steps is stochastic: a forward that both ranks make counts once
    assert row["forwards/grad"] == 2 * 4
    assert (tmp_path / "run/final/pytorch_lora_weights.safetensors").is_file()


@pytest.fixture(scope="module")
def larger_pairs(dpo_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four random pairs whose videos have 3 x 2 x 2 tokens."""
    pairs = []
    for i in range(4):
        chosen, rejected = torch.randn((2, 16, 3, 4, 4), generator=seeded_generator(i))
        text = torch.randn((5, 32), generator=seeded_generator(i, "text"))
        pairs.append(LatentPair("rain", chosen, rejected, text, 1.0, 0.0))
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder, iter(pairs), per_shard=4, dtype=torch.float32, about={})
    return folder


@pytest.mark.long
def test_dpo_on_two_ranks_sharing_tokens_equals_one_rank(
    dpo_config: Path, larger_pairs: Path, tmp_path: Path
) -> None:
    size = [f"pairs={larger_pairs}", f"heldout={larger_pairs}", *SIZE[:2]]
    rows = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        words = [str(ROOT / "launch/dpo.py"), "--config", str(dpo_config)]
        words += [f"run_dir={folder}", f"generator.context_parallel={ranks}"]
        torchrun(ranks, *words, *size, "zero_stage=1", "dpo.epochs=2")
        rows[ranks] = [
            json.loads(line)
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
    assert len(rows[1]) == len(rows[2]) > 1
    for name, value in rows[1][0].items():
        if name.startswith(("train/", "forwards/")):
            assert rows[2][0][name] == pytest.approx(value, rel=1e-5), name
    assert rows[2][-1]["heldout/loss"] == pytest.approx(
        rows[1][-1]["heldout/loss"], rel=1e-4
    )


def test_grpo_on_ranks_that_no_sample_divides_exits_with_2(tiny: Path) -> None:
    words = [sys.executable, GRPO, "--config", str(tiny), *SIZE]
    done = run(*words, "generator.context_parallel=2", expect=2)
    assert "context_parallel=2 must divide the 1 ranks" in done.stderr


def test_zero_3_and_context_parallelism_exclude_each_other(tiny: Path) -> None:
    words = ["generator.context_parallel=2", "zero_stage=3"]
    with pytest.raises(ConfigError, match="context_parallel=2 needs zero_stage"):
        load(GrpoRun, tiny, words)
    with pytest.raises(ConfigError, match="context_parallel=2 needs zero_stage"):
        load(DpoRun, None, ["pairs=x", "generator.path=x", "run_dir=x", *words])


def test_sampling_commands_refuse_context_parallelism() -> None:
    words = ["out=x", "prompts=x", "generator.path=x", "generator.context_parallel=2"]
    with pytest.raises(ConfigError, match="context_parallel=2 is for training"):
        load(SampleRun, None, words)
    with pytest.raises(ConfigError, match="context_parallel=2 is for training"):
        load(PairsRun, None, [*words, "rewards.brightness.weight=1"])


def test_a_degree_that_is_no_power_of_two_is_refused(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="context_parallel"):
        load(GrpoRun, tiny, ["generator.context_parallel=3"])
