"""Kill a run at five points, one after the other, and resume it each time."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.log import read_metrics
from tests.launch.dual_rl_runs import write_pairs_table, write_reward_model
from tests.launch.processes import ROOT, torchrun
from tests.rm.cold_start_runs import write_data

TIMES = ("seconds/", "videos_per_second", "memory/")


@dataclass(frozen=True)
class Loop:
    """A command with its words, the points where it is killed, and the file it exports."""

    words: list[str]
    kills: tuple[str, ...]
    final: str


@pytest.fixture(scope="module")
def loops(
    tmp_path_factory: pytest.TempPathFactory, tiny: Path, dpo_config: Path
) -> dict[str, Loop]:
    root = tmp_path_factory.mktemp("judges")
    write_data(root)
    write_pairs_table(root / "rl")
    write_reward_model(root / "judge")
    adapter = "final/pytorch_lora_weights.safetensors"
    common = ["lora.rank=4", "save_every=1", "eval_every=1", "zero_stage=1"]
    cold = [
        f"base={root / 'base'}",
        f"data.train={root / 'pairs.csv'}",
        f"data.heldout={root / 'pairs.csv'}",
        *common,
    ]
    cold += [
        "cold_start.pairs_per_step=4",
        "cold_start.micro_batch=1",
        "cold_start.epochs=4",
        "cold_start.theta=2",
    ]
    cold += [
        "lora.dropout=0.2",
        "dtype=float32",
        "lr.head=1e-3",
        "optimizer.warmup_steps=3",
    ]
    rl = [
        f"checkpoint={root / 'judge'}",
        f"data.train={root / 'rl/pairs.csv'}",
        "data.heldout=null",
        *common,
    ]
    rl += [
        "dual_rl.steps=4",
        "dual_rl.pairs_per_step=4",
        "dual_rl.pairs_per_update=2",
        "dual_rl.micro_batch=1",
    ]
    rl += [
        "dual_rl.group_size=3",
        "dual_rl.max_new_tokens=6",
        "rules.length=1",
        "rules.length_low=0",
    ]
    rl += ["rules.length_high=6", "optimizer.max_grad_norm=0.01"]
    return {
        "grpo": Loop(
            [
                "launch/grpo.py",
                "--config",
                str(tiny),
                "ema.decay=0.5",
                "self_checks=false",
            ],
            ("prefix:2", "tail:5", "reward:2", "backward:1", "step:1"),
            adapter,
        ),
        "dpo": Loop(
            ["launch/dpo.py", "--config", str(dpo_config), "ema.decay=0.5"],
            ("forward:1", "backward:2", "update:1", "logged:1", "step:1"),
            adapter,
        ),
        "cold_start": Loop(
            ["launch/cold_start.py", *cold],
            ("forward:2", "backward:5", "update:1", "step:1", "logged:1"),
            "final/model.safetensors",
        ),
        "dual_rl": Loop(
            ["launch/dual_rl.py", "--config", "configs/shapes/dual_rl.yaml", *rl],
            ("chains:1", "reward:2", "backward:2", "update:1", "logged:1"),
            "final/model.safetensors",
        ),
    }


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def state_of(folder: Path, final: str) -> dict[str, object]:
    """Collect weights, optimizer state, average, counts and metrics, which must be equal."""
    newest = max((folder / "checkpoints").iterdir())
    files = {
        str(p.relative_to(newest)): digest(p)
        for p in sorted(newest.rglob("*.safetensors"))
    }
    rows = [
        {k: repr(v) for k, v in row.items() if not k.startswith(TIMES)}
        for row in read_metrics(folder / "metrics.jsonl")
    ]
    return {
        "step": newest.name,
        "final": digest(folder / final),
        "state": (newest / "state.json").read_text(),
        **files,
        "rows": rows,
    }


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["grpo", "dpo", "cold_start", "dual_rl"])
def test_run_killed_five_times_equals_an_uninterrupted_run(
    name: str, ranks: int, loops: dict[str, Loop], tmp_path: Path
) -> None:
    loop = loops[name]
    script, *words = loop.words

    def start(folder: str, **options: object) -> None:
        torchrun(
            ranks, str(ROOT / script), *words, f"run_dir={tmp_path / folder}", **options
        )

    start("whole")
    for number, place in enumerate(loop.kills):
        victim = f"@{number % ranks}"
        start("killed", expect=1, FAULT=place + victim)
        assert not (tmp_path / "killed" / "final").exists(), place
    start("killed")
    assert state_of(tmp_path / "killed", loop.final) == state_of(
        tmp_path / "whole", loop.final
    )
