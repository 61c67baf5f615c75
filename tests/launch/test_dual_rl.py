"""launch/dual_rl.py on a tiny reward model: one rank and two, ZeRO 1, 2 and 3, resumed or not."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from common.checkpoint import load_tensors
from common.log import read_metrics
from rm.model import DeScore
from rm.scorer import DeScoreScorer
from tests.launch.dual_rl_runs import (
    write_bf16_reward_model,
    write_pairs_table,
    write_reward_model,
)
from tests.launch.processes import ZERO_3, deepspeed, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a reward model of stage 1."""
    folder = tmp_path_factory.mktemp("dual_rl")
    write_pairs_table(folder)
    write_reward_model(folder / "judge")
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A run of two steps on one rank."""
    run(sys.executable, *words(folder, "whole", 2))
    return folder / "whole"


@pytest.fixture(scope="module")
def three(folder: Path) -> Path:
    """The same run on two ranks under ZeRO 3."""
    deepspeed(2, *words(folder, "three", 2, *ZERO_3))
    return folder / "three"


def words(folder: Path, name: str, steps: int, *more: str) -> list[str]:
    """The command line of a run of stage 2."""
    return [
        "launch/dual_rl.py",
        "--config",
        "configs/shapes/dual_rl.yaml",
        f"run_dir={folder / name}",
        f"checkpoint={folder / 'judge'}",
        f"data.train={folder / 'pairs.csv'}",
        f"data.heldout={folder / 'pairs.csv'}",
        f"dual_rl.steps={steps}",
        "dual_rl.pairs_per_step=4",
        "dual_rl.pairs_per_update=2",
        "dual_rl.micro_batch=1",
        "dual_rl.group_size=3",
        "dual_rl.max_new_tokens=6",
        "rules.length=1",
        "rules.length_low=0",
        "rules.length_high=6",
        "save_every=1",
        "eval_every=1",
        "lora.rank=4",
        "heldout_pairs=3",
        "optimizer.max_grad_norm=0.01",
        *more,
    ]


def metrics(run_dir: Path) -> list[dict[str, float]]:
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [
        {k: v for k, v in row.items() if not k.startswith(("seconds", "memory"))}
        for row in rows
    ]


@pytest.mark.long
def test_resumed_dual_rl_run_equals_an_uninterrupted_run(
    folder: Path, whole: Path
) -> None:
    run(sys.executable, *words(folder, "stopped", 1))
    resumed = run(sys.executable, *words(folder, "stopped", 2))
    assert "after 1 " in resumed.stdout
    stopped = folder / "stopped"
    assert [row["step"] for row in metrics(whole)] == [0, 1]
    assert metrics(whole) == metrics(stopped)
    file = "checkpoints/step-000002/engine.safetensors"
    one, other = (load_tensors(path / file) for path in (whole, stopped))
    assert one.keys() == other.keys()
    assert one["exp_avg.head.weight"].abs().max() > 0
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.long
def test_two_ranks_under_zero_2_match_one_rank(folder: Path, whole: Path) -> None:
    deepspeed(2, *words(folder, "two", 2, "zero_stage=2"))
    for one, two in zip(metrics(whole), metrics(folder / "two"), strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert two[name] == pytest.approx(value, abs=1e-4, rel=1e-4), name
    assert {f"train/grad_norm/{part}" for part in ("llm", "query", "head")} <= metrics(
        folder / "two"
    )[0].keys()


@pytest.mark.long
def test_two_ranks_under_zero_3_match_one_rank(whole: Path, three: Path) -> None:
    """CoTs have other lengths on each rank; three held-out pairs make unequal shares."""
    rows = metrics(whole)
    assert 0.1 < rows[0]["cot/finished"] < 1.0
    for one, two in zip(rows, metrics(three), strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert two[name] == pytest.approx(value, abs=1e-4, rel=1e-4), name
    for part in ("llm", "query"):
        assert (
            rows[0][f"train/grad_norm/{part}"] > 0.01
        )  # so they were clipped, each by its own norm


@pytest.mark.long
def test_zero_3_and_zero_1_resume_from_each_other(
    folder: Path, whole: Path, three: Path
) -> None:
    """Checkpoints hold the same weights and moments, and the exports are equal."""
    back = folder / "back"
    name = Path("checkpoints", "step-000001")
    shutil.copytree(three / name, back / name)
    run(sys.executable, *words(folder, "back", 2))
    file = "checkpoints/step-000002/engine.safetensors"
    one = load_tensors(whole / file)
    for path in (three, back):
        other = load_tensors(path / file)
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(
                other[key],
                tensor,
                atol=1e-6,
                rtol=1e-3,
                msg=lambda m, key=key: f"{key}: {m}",
            )
    assert metrics(back)[0]["step"] == 1
    before, after = (
        DeScore.load(path / "final").state_dict() for path in (whole, three)
    )
    assert before.keys() == after.keys()
    assert max(float((before[key] - after[key]).abs().max()) for key in before) < 1e-5


@pytest.mark.slow
def test_stage_2_exports_a_loadable_reward_model(folder: Path, whole: Path) -> None:
    before = DeScore.load(folder / "judge")
    after = DeScore.load(whole / "final")
    assert not torch.equal(before.head.weight, after.head.weight)
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(
        before.backbone.state_dict()[name], after.backbone.state_dict()[name]
    )  # LoRA is merged
    assert (before.cot_in_training, after.cot_in_training) == (None, "always")
    assert (after.template, after.settings, after.generation) == (
        before.template,
        before.settings,
        before.generation,
    )
    value_B = (
        DeScoreScorer.load(whole / "final", cots=0)
        .score([folder / "0A.mp4"], ["p0"])
        .value_B
    )
    assert value_B.isfinite().all()


@pytest.mark.long
def test_updates_below_bfloat16_resolution_are_exported(folder: Path) -> None:
    run(sys.executable, *words(folder, "half", 1, "dtype=bfloat16", "lr.head=1e-6"))
    before, after = (
        DeScore.load(folder / name).head.weight for name in ("judge", "half/final")
    )
    start = before.bfloat16().float()  # the module is cast once, when the run begins
    change = (after - start).abs()
    assert 1e-7 < change.max() < 3e-6  # two updates at a rate of 1e-6
    assert torch.equal(
        after.bfloat16().float(), start
    )  # in bfloat16 they would all have rounded to nothing


@pytest.mark.long
@pytest.mark.parametrize("zero", [("zero_stage=2",), ZERO_3])
def test_stage_2_in_bf16_starts_from_stage_1_with_its_adapter(
    tmp_path: Path, zero: Sequence[str]
) -> None:
    """Full training on two ranks, next to a frozen copy that has the adapter too."""
    write_pairs_table(tmp_path)
    write_bf16_reward_model(tmp_path / "judge")
    words = [
        "launch/dual_rl.py",
        "--config",
        "configs/shapes/dual_rl.yaml",
        f"run_dir={tmp_path / 'run'}",
        f"checkpoint={tmp_path / 'judge'}",
        f"data.train={tmp_path / 'pairs.csv'}",
        f"data.heldout={tmp_path / 'pairs.csv'}",
        "dual_rl.steps=2",
        "dual_rl.pairs_per_step=4",
        "dual_rl.pairs_per_update=4",
        "dual_rl.micro_batch=1",
        "dual_rl.group_size=3",
        "dual_rl.max_new_tokens=6",
        "dual_rl.kl_weight=0.1",
        "rules.length=1",
        "rules.length_low=0",
        "rules.length_high=6",
        "dtype=bfloat16",
        "lora=null",
        "lr.llm=1e-3",
        *zero,
    ]
    deepspeed(2, *words)
    rows = metrics(tmp_path / "run")
    # before the first update the policy is the reference to the bit
    assert rows[0]["train/kl"] == 0.0
    assert rows[1]["train/kl"] > 0.0
    stored = {
        name: load_tensors(tmp_path / name / "adapter_model.safetensors")
        for name in ("judge", "run/final")
    }
    assert stored["judge"].keys() == stored["run/final"].keys()
    for name, tensor in stored["judge"].items():
        assert torch.equal(stored["run/final"][name], tensor), name
    before, after = (
        DeScore.load(tmp_path / name, dtype=torch.bfloat16).backbone
        for name in ("judge", "run/final")
    )
    name = "model.language_model.layers.0.self_attn.q_proj"
    assert not torch.equal(
        before.get_submodule(name).weight, after.get_submodule(name).weight
    )


@pytest.mark.slow
def test_table_without_answers_exits_2(folder: Path) -> None:
    bare = folder / "bare.csv"
    text = (
        (folder / "pairs.csv")
        .read_text(encoding="utf-8")
        .replace("video_1_scores", "scores")
    )
    bare.write_text(text, encoding="utf-8")
    found = run(
        sys.executable,
        "launch/dual_rl.py",
        "--config",
        "configs/shapes/dual_rl.yaml",
        f"run_dir={folder / 'x'}",
        f"checkpoint={folder / 'judge'}",
        f"data.train={bare}",
        expect=2,
    )
    assert "bare.csv:2:" in found.stderr
