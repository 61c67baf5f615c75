"""Planted faults are named, and sound runs are not accused: five updates in the embedded world."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.diagnosis.evidence import Diagnosis
from launch.diagnosis.rules import diagnose
from launch.diagnosis.run_files import read_run
from tests.launch.diagnosis.clean import CLEAN
from tests.launch.diagnosis.faults import FAULTS
from tests.launch.processes import ROOT

# Five of the twenty are for `make test`.
QUICK = (
    "adapter-not-in-sampler",
    "few-videos",
    "lr-too-large",
    "prompts-swapped",
    "vae-scaling",
)
RECIPE = (
    "--config",
    "configs/shapes/grpo_oracle.yaml",
    "steps=5",
    "prompts_per_step=4",
    "evaluation=null",
    "self_checks=false",
    "video_every=0",
)
SCRIPT = "tests/launch/diagnosis/planted.py"
# The scripts import the tests, and the user's shell may say nothing of them.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


class Trainer:
    """Trains with planted faults; each run of one rank is a fork of a single process."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, SCRIPT, "--serve"],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def diagnosed(
        self, folder: Path, fault: str, *words: str, ranks: int = 1
    ) -> list[Diagnosis]:
        """Train in a process of its own, and diagnose the run here."""
        configs = [word for word in words if word == "--config" or word[-5:] == ".yaml"]
        settings = [word for word in words if word not in configs]
        command = [fault, *RECIPE[:2], *configs, *RECIPE[2:], *settings]
        command.append(f"run_dir={folder}")
        log = folder.with_suffix(".log")
        if ranks > 1:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            launcher += ["--nproc-per-node", str(ranks), SCRIPT]
            with log.open("w") as file:
                code = subprocess.call(
                    [*launcher, *command],
                    cwd=ROOT,
                    env=ENVIRONMENT,
                    stdout=file,
                    stderr=file,
                )
        else:
            print(json.dumps([str(log), *command]), file=self.process.stdin, flush=True)
            # libraries may print a line while they are imported
            code = int(next(x for x in self.process.stdout if x.strip().isdigit()))
        assert code == 0, log.read_text()[-2000:]
        return diagnose(read_run(folder))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="session")
def trainer() -> Iterator[Trainer]:
    made = Trainer()
    yield made
    made.close()


def marked(names: list[str]) -> list[object]:
    return [
        pytest.param(
            name, marks=pytest.mark.slow if name in QUICK else pytest.mark.long
        )
        for name in names
    ]


@pytest.mark.parametrize("name", marked(list(FAULTS)))
def test_planted_fault_is_named(name: str, tmp_path: Path, trainer: Trainer) -> None:
    fault = FAULTS[name]
    # one update is enough for these
    few = ("steps=1",) if name in QUICK else ()
    found = trainer.diagnosed(
        tmp_path / "run", name, *few, *fault.overrides, ranks=fault.ranks
    )
    accusing = [diagnosis.cause for diagnosis in found if diagnosis.accuses]
    # the right cause comes first
    assert accusing, found
    assert accusing[0] in fault.causes, found


@pytest.mark.long
@pytest.mark.parametrize("name", list(CLEAN))
def test_sound_run_is_not_accused(name: str, tmp_path: Path, trainer: Trainer) -> None:
    ranks = 2 if name == "two-ranks" else 1
    found = trainer.diagnosed(tmp_path / "run", "none", *CLEAN[name], ranks=ranks)
    assert [diagnosis for diagnosis in found if diagnosis.accuses] == []


@pytest.mark.long
def test_measured_run_has_the_metrics_of_one_that_is_not(
    tmp_path: Path, trainer: Trainer
) -> None:
    """Measurements draw no random number and change no weight; the log says what is off."""
    rows = {}
    for name, words in (
        ("with", ("optimizer.lr=0.2",)),
        ("without", ("optimizer.lr=0.2", "diagnosis=null")),
    ):
        trainer.diagnosed(tmp_path / name, "none", "steps=2", *words)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rows[name] = [json.loads(line) for line in lines]
    for one, other in zip(rows["with"], rows["without"], strict=True):
        same = [
            key for key in one if not key.startswith(("seconds", "memory", "videos"))
        ]
        assert {key: one[key] for key in same} == {key: other[key] for key in same}
    assert (tmp_path / "with" / "measurements.jsonl").is_file()
    assert not (tmp_path / "without" / "measurements.jsonl").exists()
