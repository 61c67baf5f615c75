"""Faults that no test on a CPU can see, planted one by one: a rehearsal names file and line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ROOMS = ("common", "rm", "generator", "engine", "alignment", "launch", "toy")
DATA = ("configs", "assets")


@dataclass(frozen=True)
class PlantedFault:
    """A line of a file that a fault replaces, and the command that runs it.

    named  the file whose line the device refuses; by default that of the fault.
    """

    name: str
    file: str
    old: str
    new: str
    words: tuple[str, ...]
    named: str = ""


GRPO = (
    "launch/grpo.py",
    "--config=configs/shapes/grpo.yaml",
    "prompts_per_step=1",
    "grpo.group_size=2",
    "rewards.descore=null",
    "rewards.shapes=null",
    "rewards.people=null",
    "rewards.brightness.weight=1",
)
DPO = (
    "launch/dpo.py",
    "--config=configs/shapes/dpo.yaml",
    "dpo.pairs_per_step=2",
    "dpo.micro_batch=1",
)
SAMPLE = ("launch/sample.py", "--config=configs/shapes/sample.yaml", "adapter=null")
SCORE = (
    "launch/score.py",
    "--config=configs/shapes/score.yaml",
    "batch=2",
    "rewards.descore.checkpoint=DESCORE",
)
COLD_START = (
    "launch/cold_start.py",
    "--config=configs/shapes/cold_start.yaml",
    "base=assets/shapes/qwen",
    "cold_start.pairs_per_step=2",
    "cold_start.micro_batch=1",
)
DUAL_RL = (
    "launch/dual_rl.py",
    "--config=configs/shapes/dual_rl.yaml",
    "checkpoint=assets/shapes/qwen",
    "dual_rl.pairs_per_step=2",
    "dual_rl.pairs_per_update=2",
    "dual_rl.micro_batch=1",
    "dual_rl.group_size=2",
)
FAULTS = [
    PlantedFault(
        "sampler: a member's noise stays on the CPU",
        "generator/sampler.py",
        "torch.stack(xi).to(device)",
        "torch.stack(xi)",
        GRPO,
    ),
    PlantedFault(
        "GRPO: advantages stay on the CPU",
        "alignment/policy_update.py",
        "advantage_G.to(log_prob_G.device)",
        "advantage_G",
        GRPO,
        named="common/policy_gradient.py",
    ),
    PlantedFault(
        "generation: banned ids stay on the CPU",
        "rm/generate.py",
        "model.banned_ids().to(model.device)",
        "model.banned_ids()",
        SCORE,
    ),
    PlantedFault(
        "transformer: fp32 latents for bf16 weights",
        "generator/denoiser.py",
        "hidden = x_BCFHW.to(self.device, expert.dtype)",
        "hidden = x_BCFHW.to(self.device)",
        (*GRPO, "generator.dtype=bfloat16"),
    ),
    PlantedFault(
        "flow: sigmas stay on the CPU",
        "generator/flow.py",
        "sigma_B.to(clean.device, clean.dtype)",
        "sigma_B.to(clean.dtype)",
        DPO,
    ),
    PlantedFault(
        "VAE: the latents' means stay on the CPU",
        "generator/latents.py",
        "torch.tensor(self.vae.config.latents_mean, device=device)",
        "torch.tensor(self.vae.config.latents_mean)",
        SAMPLE,
    ),
    PlantedFault(
        "reward model: query ids stay on the CPU",
        "rm/model.py",
        "args[0].unsqueeze(-1) == self.query_id_K",
        "args[0].unsqueeze(-1) == torch.tensor(self.query_ids)",
        SCORE,
    ),
    PlantedFault(
        "cold start: labels stay on the CPU",
        "rm/cold_start.py",
        "torch.tensor(label_rows(pairs, self.model.dimensions), device=device)",
        "torch.tensor(label_rows(pairs, self.model.dimensions))",
        COLD_START,
        named="rm/losses.py",
    ),
    PlantedFault(
        "reward model: position ids go to the CPU",
        "rm/model.py",
        "position_ids=batch.position_3BL,",
        "position_ids=batch.position_3BL.cpu(),",
        SCORE,
    ),
    PlantedFault(
        "engine: what replaces a bad gradient stays on the CPU",
        "engine/skip_nonfinite.py",
        "torch.zeros((), dtype=gradient.dtype, device=gradient.device)",
        "torch.zeros(1, dtype=gradient.dtype)",
        COLD_START,
    ),
    PlantedFault(
        "dual RL: banned ids of the log-probs stay on the CPU",
        "rm/packed.py",
        "model.banned_ids().to(hidden_ND.device)",
        "model.banned_ids()",
        DUAL_RL,
    ),
]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the source, whose files may be changed."""
    folder = tmp_path / "source"
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / room)
    for name in DATA:
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_rehearsal_names_the_line_of_a_planted_fault(fault, copy, descore):
    file = copy / fault.file
    source = file.read_text()
    assert source.count(fault.old) == 1
    file.write_text(source.replace(fault.old, fault.new))
    words = [word.replace("DESCORE", str(descore)) for word in fault.words]
    done = subprocess.run(
        [sys.executable, *words, "--rehearse=1xh100"],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    found = re.search(r"FAULT ([\w/]+\.py):(\d+): (.*)", done.stdout)
    assert found, done.stdout[-3000:]
    assert found[1] == (fault.named or fault.file), found[0]
