"""Start programs as a user does, in their own process group, so that none outlives its test."""

from __future__ import annotations

import ast
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
# by default ZeRO 3 leaves parameters below 100,000 numbers whole
ZERO_3 = (
    "zero_stage=3",
    "deepspeed.zero_optimization.stage3_param_persistence_threshold=0",
)


def run(
    *words: str, expect: int = 0, timeout: float = 240.0, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a program from the repository's root; fail on another exit code than ``expect``."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:  # a launcher's children are in its group
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == expect, (
        f"exit code {process.returncode}\n{out[-3000:]}\n{err[-3000:]}"
    )
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def refused_early(*words: str) -> str:
    """Return stderr of a program that exits with code 2 before it imports anything heavy."""
    lines = run(
        sys.executable, "-X", "importtime", *words, expect=2
    ).stderr.splitlines()
    imported = {
        line.rpartition("|")[2].strip()
        for line in lines
        if line.startswith("import time:")
    }
    assert "common.config" in imported
    assert imported & {"torch", "transformers", "diffusers", "deepspeed"} == set()
    return "\n".join(line for line in lines if not line.startswith("import time:"))


def loaded_by_help(program: str, *packages: str) -> tuple[list[str], str]:
    """Which of these packages ``launch.PROGRAM --help`` has imported, and what it printed."""
    code = (
        f"import sys; from launch.{program} import main\n"
        "try: main(['--help'])\n"
        f"except SystemExit: print(sorted({set(packages)!r} & set(sys.modules)))"
    )
    lines = run(sys.executable, "-c", code).stdout.splitlines()
    return ast.literal_eval(lines[-1]), "\n".join(lines[:-1])


def next_step(printed: str) -> list[str]:
    """Return the words of the next step, which the last line of a command names."""
    start, _, command = printed.splitlines()[-1].partition(": ")
    assert start == "next"
    return command.split()


def deepspeed(
    ranks: int, *words: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Under the deepspeed launcher, on a port of its own."""
    launcher = [
        str(BIN / "deepspeed"),
        "--num_accelerators",
        str(ranks),
        "--master_port",
        str(free_port()),
    ]
    return run(*launcher, *words, **variables)


def torchrun(
    ranks: int, *words: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Under torchrun, on a port of its own."""
    port = str(free_port())
    return run(
        str(BIN / "torchrun"),
        "--nproc_per_node",
        str(ranks),
        "--master_port",
        port,
        *words,
        **variables,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
