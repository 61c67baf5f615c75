"""Long recipes made of the ordinary entry points: each step is a command a user would type, in a process of its own.

A step that has left its file is not repeated, so a recipe that was stopped goes on where it was.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Step:
    """One command. ``launcher`` runs it on several ranks under deepspeed; ``done`` is the file it leaves."""

    title: str
    script: str
    arguments: list[str]
    done: Path
    launcher: bool = True


def command(step: Step, ranks: int) -> list[str]:
    """What is run."""
    script = f"launch/{step.script}"
    if step.launcher and ranks > 1:
        launcher = str(Path(sys.executable).with_name("deepspeed"))
        return [launcher, "--num_accelerators", str(ranks), script, *step.arguments]
    return [sys.executable, script, *step.arguments]


class PeakMemory:
    """Highest SUM of resident bytes over a process and its descendants, sampled twice a second."""

    def __init__(self) -> None:
        self.peak = 0

    def watch(self, pid: int, finished: Callable[[], bool]) -> None:
        import psutil

        while not finished():
            total = 0
            try:
                root = psutil.Process(pid)
                family = [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for process in family:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue  # it ended between the two calls
            self.peak = max(self.peak, total)
            time.sleep(0.5)


def run_step(step: Step, ranks: int, memory: PeakMemory | None = None, log: Path | None = None) -> float:
    """Run to the end, with its output in ``log`` or on this terminal; the seconds it took. RuntimeError if it fails."""
    began = time.time()
    words = command(step, ranks)
    if log is None:
        print(f"$ {spelled(words)}", flush=True)
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    with nullcontext() if log is None else log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=file, stderr=file and subprocess.STDOUT)
        if memory is not None:
            watch = (process.pid, lambda: process.poll() is not None)
            threading.Thread(target=memory.watch, args=watch, daemon=True).start()
        code = process.wait()
    if code != 0:
        where = "" if log is None else f"; its output is in {log}"
        raise RuntimeError(f"'{step.title}' failed with exit code {code}: {spelled(words)}{where}")
    if not (ROOT / step.done).exists():
        raise RuntimeError(f"'{step.title}' ended without writing {step.done}")
    return time.time() - began


def spelled(words: list[str]) -> str:
    """The command as a user would type it."""
    short = ["deepspeed" if w.endswith("/deepspeed") else "python" if w == sys.executable else w for w in words]
    return shlex.join(short)
