"""Long recipes made of the ordinary entry points: each step is a command a user would type, in a process of its own.

A step that has left its file is not repeated, so a recipe that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import os
import resource
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class CommandStep:
    """One command. ``launcher`` runs it on several ranks under deepspeed; ``done`` is the file it leaves."""

    title: str
    script: str
    arguments: list[str]
    done: Path
    launcher: bool = True


def command(step: CommandStep, ranks: int) -> list[str]:
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


def run_step(
    step: CommandStep,
    ranks: int,
    memory: PeakMemory | None = None,
    log: Path | None = None,
) -> float:
    """Run to the end, with its output in ``log`` or on this terminal; the seconds it took. RuntimeError if it fails."""
    began = time.time()
    words = command(step, ranks)
    if log is None:
        print(f"$ {spelled(words)}", flush=True)
    environment = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **os.environ,
    }
    environment["PATH"] = (
        f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    )
    with nullcontext() if log is None else log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=file and subprocess.STDOUT,
        )
        if memory is not None:
            watch = (process.pid, lambda: process.poll() is not None)
            threading.Thread(target=memory.watch, args=watch, daemon=True).start()
        code = process.wait()
    if code != 0:
        where = "" if log is None else f"; its output is in {log}"
        raise RuntimeError(
            f"'{step.title}' failed with exit code {code}: {spelled(words)}{where}"
        )
    if not (ROOT / step.done).exists():
        raise RuntimeError(f"'{step.title}' ended without writing {step.done}")
    return time.time() - began


@dataclass(frozen=True)
class Job:
    """Steps that follow each other, with a folder for their logs (``kind.log``, the kind is a title's first word)."""

    folder: Path
    steps: Sequence[CommandStep]


def run_jobs(
    chains: Sequence[Sequence[Job]],
    root: Path,
    *,
    workers: int,
    program: str,
    since: float | None = None,
    unit: str = "run",
) -> dict[str, float]:
    """All jobs, those of a chain one after the other, ``workers`` chains at a time, with a progress bar.

    Seconds of every step that had to be run are kept in root/seconds.json and returned, with those of all starts of
    the recipe together: "wall", counted from ``since`` (a `time.time`, now by default), and "cpu", so that a busy
    machine can be told from a slow recipe. Exits when one fails.
    """
    from tqdm import tqdm

    timings, began = (
        ROOT / root / "seconds.json",
        time.time() if since is None else since,
    )
    timings.parent.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = (
        json.loads(timings.read_text(encoding="utf-8")) if timings.exists() else {}
    )
    before = {name: seconds.get(name, 0.0) for name in ("wall", "cpu")}
    used = (
        _cpu_seconds() if since is None else 0.0
    )  # by commands before this call: its recipe's own with ``since``
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=sum(map(len, chains)), desc=f"{unit}s", unit=unit) as bar,
    ):
        running = {pool.submit(_run_chain, chain, root): chain for chain in chains}
        for done in as_completed(running):
            try:
                seconds |= done.result()
            except RuntimeError as error:
                pool.shutdown(cancel_futures=True)
                sys.exit(f"{program}: {error}\nstarted again, it goes on here")
            seconds["wall"] = round(before["wall"] + time.time() - began, 1)
            seconds["cpu"] = round(before["cpu"] + _cpu_seconds() - used, 1)
            timings.write_text(json.dumps(seconds, indent=1) + "\n", encoding="utf-8")
            bar.update(len(running[done]))
    return seconds


def _run_chain(chain: Sequence[Job], root: Path) -> dict[str, float]:
    seconds = {}
    for job in chain:
        for step in job.steps:
            if not (ROOT / step.done).exists():
                (ROOT / job.folder).mkdir(parents=True, exist_ok=True)
                kind = step.title.split()[0]
                took = run_step(step, 1, log=ROOT / job.folder / f"{kind}.log")
                seconds[f"{kind} {job.folder.relative_to(root)}"] = round(took, 1)
    return seconds


def _cpu_seconds() -> float:
    """Of all commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def commit() -> str:
    """Of the checkout, short; empty where there is none."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(
        git, cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()


def spelled(words: list[str]) -> str:
    """The command as a user would type it."""
    short = [
        "deepspeed"
        if w.endswith("/deepspeed")
        else "python"
        if w == sys.executable
        else w
        for w in words
    ]
    return shlex.join(short)
