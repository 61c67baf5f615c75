"""Run recipes that are made of the ordinary commands, each in its process.

A step is done when its output file exists, and a done step is not run again. So a recipe that was
stopped continues where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from common.files import read_json

# All commands start in the repository.
ROOT = Path(__file__).resolve().parent.parent
# Configs of the embedded world.
CONFIGS = Path("configs/shapes")


@dataclass(frozen=True)
class CommandStep:
    """A command with the file that it writes last.

    title      Text for the terminal; its first word names the step's log and its time.
    script     Program, relative to the repository.
    arguments  Its command line.
    done       File that exists once the step has finished, relative to the repository.
    alone      The command works in a single process, whatever the number of ranks.
    """

    title: str
    script: str
    arguments: list[str]
    done: Path
    alone: bool = False

    @property
    def is_done(self) -> bool:
        """Whether the step has left its file."""
        return (ROOT / self.done).exists()

    @property
    def kind(self) -> str:
        """First word of the title."""
        return self.title.split()[0]


@dataclass(frozen=True)
class Job:
    """Steps that follow each other, with a folder for their logs (``KIND.log``)."""

    folder: Path
    steps: Sequence[CommandStep]


class PeakMemory:
    """Highest SUM of resident bytes over a process and its descendants."""

    def __init__(self) -> None:
        self.peak = 0

    def watch(self, process: subprocess.Popen[bytes]) -> None:
        """Sample twice a second until the process has ended."""
        import psutil

        while process.poll() is None:
            # A process may end between two calls; the next sample is complete again.
            with suppress(psutil.NoSuchProcess):
                root = psutil.Process(process.pid)
                # Launchers have children that have children.
                family = [root, *root.children(recursive=True)]
                total = sum(member.memory_info().rss for member in family)
                self.peak = max(self.peak, total)
            time.sleep(0.5)


def comparison_parser(doc: str, name: str) -> argparse.ArgumentParser:
    """Make the command line that the comparisons share."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])

    # Folders, seeds and processes.
    parser.add_argument("--run-dir", type=Path, default=Path("runs", name))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    return parser


def config_words(name: str, *overrides: str) -> list[str]:
    """Make the command line of a command with a config of the embedded world."""
    return ["--config", str(CONFIGS / f"{name}.yaml"), *overrides]


def run_step(
    step: CommandStep,
    ranks: int = 1,
    *,
    memory: PeakMemory | None = None,
    log: Path | None = None,
) -> float:
    """Run a step to its end and return the seconds it took.

    Commands of launch/ run on ``ranks`` ranks. Its output goes to ``log``, or to this terminal
    without one. Raises RuntimeError if it fails.
    """
    began = time.time()
    program = "python"
    path = sys.executable
    options = [step.script, *step.arguments]
    if step.script.startswith("launch/") and ranks > 1 and not step.alone:
        program = "deepspeed"
        path = str(Path(sys.executable).with_name("deepspeed"))
        # Quiet: the launcher says eight lines about itself.
        options = ["-q", "--num_accelerators", str(ranks), *options]

    # Print the command as a user would type it.
    command = shlex.join([program, *options])
    if log is None:
        print(f"$ {command}", flush=True)

    # Start the process and wait for it.
    with nullcontext() if log is None else log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [path, *options],
            cwd=ROOT,
            env=_environment(),
            stdout=file,
            stderr=file and subprocess.STDOUT,
        )
        if memory is not None:
            memory.watch(process)
        code = process.wait()

    # Check the exit code and the output file.
    if code != 0:
        where = "" if log is None else f"; its output is in {log}"
        raise RuntimeError(
            f"'{step.title}' failed with exit code {code}: {command}{where}"
        )
    if not step.is_done:
        raise RuntimeError(f"'{step.title}' ended without writing {step.done}")
    return time.time() - began


class Recipe:
    """Runs the jobs of a comparison and keeps the seconds of its steps, also over restarts.

    "wall" and "cpu" in ``seconds`` are those of all starts of the recipe together. The two tell a
    busy machine from a slow recipe.
    """

    def __init__(self, root: Path, workers: int) -> None:
        self.root = root
        self.workers = workers
        self.path = ROOT / root / "seconds.json"
        self.seconds: dict[str, float] = {}
        if self.path.exists():
            self.seconds = read_json(self.path)

        # Offsets, to which this start adds.
        self.wall_before = self.seconds.get("wall", 0.0) - time.time()
        self.cpu_before = self.seconds.get("cpu", 0.0) - _cpu_seconds()

    def run(self, sequences: Sequence[Sequence[Job]]) -> None:
        """Run all jobs, ``workers`` sequences at a time, with a progress bar.

        Jobs of a sequence run in order. Exits with a message when a step fails.
        """
        from tqdm import tqdm

        # Start all sequences; the pool limits how many run together.
        total = sum(len(jobs) for jobs in sequences)
        with ThreadPoolExecutor(self.workers) as pool:
            running = {}
            for jobs in sequences:
                running[pool.submit(self._run_sequence, jobs)] = len(jobs)

            # Record each sequence when it ends.
            with tqdm(total=total, desc="runs", unit="run") as bar:
                for future in as_completed(running):
                    try:
                        self._record(future.result())
                    except RuntimeError as error:
                        pool.shutdown(cancel_futures=True)
                        program = Path(sys.argv[0]).stem
                        sys.exit(f"{program}: {error}\nstart it again to continue here")
                    bar.update(running[future])

    def _run_sequence(self, jobs: Sequence[Job]) -> dict[str, float]:
        """Run the steps that are not done, and return the seconds of each."""
        seconds = {}
        for job in jobs:
            folder = ROOT / job.folder
            for step in job.steps:
                if step.is_done:
                    continue
                folder.mkdir(parents=True, exist_ok=True)
                duration = run_step(step, log=folder / f"{step.kind}.log")
                name = f"{step.kind} {job.folder.relative_to(self.root)}"
                seconds[name] = round(duration, 1)
        return seconds

    def _record(self, steps: dict[str, float]) -> None:
        self.seconds |= steps
        self.seconds["wall"] = round(self.wall_before + time.time(), 1)
        self.seconds["cpu"] = round(self.cpu_before + _cpu_seconds(), 1)
        write_json(self.path, self.seconds)


def _environment() -> dict[str, str]:
    # deepspeed finds its programs beside this Python.
    programs = Path(sys.executable).parent
    path = os.environ.get("PATH", "")
    return {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **os.environ,
        # The ranks stay children of the launcher: their memory and time are measured.
        "NO_RELAY": "1",
        "PATH": f"{programs}{os.pathsep}{path}",
    }


def _cpu_seconds() -> float:
    """Processor time of all commands that have ended."""
    used = os.times()
    return used.children_user + used.children_system


def commit() -> str:
    """Short commit of the checkout; empty where there is none."""
    process = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return process.stdout.strip()


def write_json(path: Path, record: object) -> None:
    """Write a record as indented JSON, with the folders that it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def replace_section(path: Path, section: str, lines: Sequence[str]) -> None:
    """Replace the lines of a page between `<!-- SECTION -->` and `<!-- end of SECTION -->`."""
    text = path.read_text(encoding="utf-8")
    path.write_text(with_section(text, section, lines), encoding="utf-8")


def with_section(text: str, section: str, lines: Sequence[str]) -> str:
    """Return a text with new lines between the marks of a section."""
    # Text outside of the marks stays as it is.
    first = f"<!-- {section} -->"
    last = f"<!-- end of {section} -->"
    before, _, rest = text.partition(first)
    after = rest.partition(last)[2]
    return before + "\n".join([first, *lines, last]) + after
