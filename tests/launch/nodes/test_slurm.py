"""launch/nodes/train.sbatch under a real Slurm of one node, on the loopback."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.log import read_metrics
from tests.engine.test_stop import REWARD
from tests.launch.processes import BIN, ROOT, free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "sinfo")
MISSING = [name for name in PROGRAMS if shutil.which(name) is None]
WHY = (
    f"{', '.join(MISSING)} missing or not root: apt-get install slurm-wlm munge, then "
    "pytest -m slurm as root"
)
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.long,
    pytest.mark.skipif(bool(MISSING) or os.geteuid() != 0, reason=WHY),
]

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdSpoolDir={folder}/spool
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
KillWait=5
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Start munged, slurmctld and slurmd; return the environment of Slurm's commands."""
    folder = tmp_path / "slurm"
    for name in ("spool", "state"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    host = socket.gethostname().partition(".")[0]
    text = CONFIG.format(
        host=host,
        folder=folder,
        controller=free_port(),
        daemon=free_port(),
        cpus=os.cpu_count(),
    )
    (folder / "slurm.conf").write_text(text)
    environment = {
        **os.environ,
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PYTHONPATH": str(ROOT),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    munged = ["munged", "--foreground", "--force", f"--key-file={key}"]
    for name in ("socket", "pid-file", "log-file", "seed-file"):
        munged.append(f"--{name}={folder}/munge.{name.partition('-')[0]}")
    daemons = []
    for words in (munged, ["slurmctld", "-D"], ["slurmd", "-D", "-N", host]):
        log = (folder / f"{words[0]}.out").open("wb")
        daemons.append(subprocess.Popen(words, env=environment, stdout=log, stderr=log))
        time.sleep(2)
    try:
        wait_for_node(environment)
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in daemons:
            daemon.wait(timeout=30)


def slurm_says(environment: dict[str, str], *words: str) -> str:
    done = subprocess.run(
        words, env=environment, cwd=ROOT, check=True, capture_output=True, text=True
    )
    return done.stdout


def wait_for_node(environment: dict[str, str]) -> None:
    deadline = time.monotonic() + 60
    while "idle" not in slurm_says(environment, "sinfo", "--noheader", "--format=%T"):
        assert time.monotonic() < deadline
        time.sleep(1)


def test_real_slurm_stops_before_the_end_and_resumes(
    slurm: dict[str, str], tiny: Path, tmp_path: Path
) -> None:
    """Jobs of two minutes with steps of 15 s; Slurm's own warning would come too late."""
    reward = tmp_path / "sleeping.py"
    reward.write_text(REWARD.format(seconds=15))
    run = tmp_path / "run"
    words = ["launch/grpo.py", "--config", str(tiny), f"run_dir={run}", "steps=400"]
    words += ["save_every=900", "self_checks=false", "rewards.brightness=null"]
    words += [f"rewards.slow.target={reward}:Sleeping"]
    options = ["--nodes=1", "--time=2", "--signal=USR1@5", "--parsable"]

    def job() -> str:
        log = tmp_path / "job.txt"
        submitted = slurm_says(
            slurm,
            "sbatch",
            *options,
            f"--output={log}",
            "launch/nodes/train.sbatch",
            *words,
        )
        number = submitted.strip().partition(";")[0]
        deadline = time.monotonic() + 240
        while re.search(
            r"JobState=(PENDING|CONFIGURING|RUNNING|COMPLETING)",
            slurm_says(slurm, "scontrol", "show", "job", number),
        ):
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)
        state = slurm_says(slurm, "scontrol", "show", "job", number)
        assert "TIMEOUT" not in state
        return log.read_text()

    first = job()
    assert "the job ends in" in first
    done = len(read_metrics(run / "metrics.jsonl"))
    assert f"stopped after {done} steps" in first
    second = job()
    assert f"going on after {done} steps" in second
    assert len(read_metrics(run / "metrics.jsonl")) > done
