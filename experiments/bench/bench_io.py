"""Share the command line, the timing and the JSON file of the benches."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from common.log import say
from experiments.runner import write_json


def bench_parser(doc: str, name: str) -> argparse.ArgumentParser:
    """Make the command line of a bench, with the path of its JSON file."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    out = Path("docs/results", f"{name}.json")
    parser.add_argument("--out", type=Path, default=out)
    return parser


def median_seconds(
    functions: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, float]:
    """Time functions in alternating rounds and return the median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            duration = time.perf_counter() - start

            # The first round warms up.
            if round_number > 0:
                seconds[name].append(duration)
    return {name: statistics.median(times) for name, times in seconds.items()}


def write_record(path: Path, record: Mapping[str, object]) -> None:
    """Write the figures of a bench as JSON, after its command, and print them."""
    # The command as a user types it.
    script = f"experiments/bench/{Path(sys.argv[0]).name}"
    command = " ".join(["python", script, *sys.argv[1:]])
    complete = {"command": command, **record}
    write_json(path, complete)
    say(json.dumps(complete))
