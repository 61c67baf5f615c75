"""Check and measure this project on a GPU, in about ten minutes: `make gpu-check`.

First the tests of tests/gpu: collectives, streams, memory that runs out, compiled blocks, ratios
in bfloat16, every attention backend. Then rates of kernels and seconds of the parts of a run at
full size, on random weights: nothing is downloaded. One GPU is enough; collectives and context
parallelism need two. The JSON is what `--measured FILE` of the commands reads:

    {"device": "h100", "rates": {...}, "measured": {...}}

Exit codes: 0 all is well, 1 a test or a part failed, 2 there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from experiments.runner import ROOT, commit, write_json

# Names of parts, so that asking for help loads nothing.
PARTS = ("rates", "dit", "decode", "reward_model", "update")
# A part that hangs must not hold the others up.
PART_TIMEOUT_S = 600
COMMAND = "python experiments/gpu_check.py"


def main() -> None:
    """Run the tests and every part, print a table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu_check.json")
    parser.add_argument("--part", choices=PARTS, help="run this part, print its JSON")
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    args = parser.parse_args()
    require_gpu()
    if args.part is not None:
        # A part runs here, and its parent reads the last line.
        print(json.dumps(run_part(args.part)))
        return

    # 1. Does it work?
    began = time.time()
    tests = 0 if args.no_tests else run_tests()

    # 2. How fast is it?
    record = empty_record()
    failed = []
    for part in PARTS:
        problem = add_part(record, part)
        if problem:
            failed.append(part)
            print(f"{part:14} FAILED: {problem}", flush=True)
        else:
            print(f"{part:14} done", flush=True)

    # 3. The table, and the file that plans read.
    record["measured"]["minutes"] = round((time.time() - began) / 60, 1)
    print("\n".join(table(record)))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, record)
    print(f"{args.out}: plan with these rates by --measured {args.out}")
    if tests:
        print("tests failed, see above")
    if tests or failed:
        sys.exit(1)


def require_gpu() -> None:
    """Exit with code 2 where there is no CUDA device."""
    import torch

    if not torch.cuda.is_available():
        sys.stderr.write("no CUDA device: nothing to check\n")
        sys.exit(2)


def run_tests() -> int:
    """Run the tests that need a GPU; return pytest's exit code."""
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"]
    return subprocess.run(words, cwd=ROOT, check=False).returncode


def run_part(name: str) -> dict[str, Any]:
    """Measure a part of the published models on the current GPU."""
    from launch.compose import quiet

    quiet()

    import torch

    from common import distributed
    from experiments import gpu_parts

    distributed.init_process_group()
    device = torch.device("cuda", torch.cuda.current_device())
    found = gpu_parts.measure(name, gpu_parts.published(device), device)
    distributed.shutdown()
    return found


def empty_record() -> dict[str, Any]:
    """A record without figures, with the versions that any figure depends on."""
    import diffusers
    import torch

    full_name = torch.cuda.get_device_name()
    return {
        "device": short_name(full_name),
        "rates": {},
        "measured": {
            "device_name": full_name,
            "command": COMMAND,
            "commit": commit(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "diffusers": diffusers.__version__,
            "left_out": {},
            "seconds": {},
        },
    }


def short_name(device: str) -> str:
    """Name a device as plans do ("h100"), or by its full name if plans do not know it."""
    from launch.planning.plan import DEVICES

    for name in DEVICES:
        if name in device.lower():
            return name
    return device


def add_part(record: dict[str, Any], part: str) -> str:
    """Run a part in its process and add its figures; return why that failed, or ""."""
    words = [sys.executable, __file__, "--part", part]
    try:
        done = subprocess.run(
            words,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            timeout=PART_TIMEOUT_S,
            cwd=ROOT,
        )
    except subprocess.TimeoutExpired:
        return f"more than {PART_TIMEOUT_S} s"
    if done.returncode:
        return f"exit code {done.returncode}, see its traceback above"
    merge(record, part, json.loads(done.stdout.splitlines()[-1]))
    return ""


def merge(record: dict[str, Any], part: str, found: dict[str, Any]) -> None:
    """Add the figures of a part to the record."""
    record["rates"] |= found["rates"]
    measured = record["measured"]
    measured |= found["measured"]
    measured["left_out"] |= found["left_out"]
    measured["seconds"][part] = found["seconds"]


def table(record: dict[str, Any]) -> list[str]:
    """Lines for the terminal: rates, seconds, and what could not be measured."""
    lines = [f"{record['measured']['device_name']}"]
    for name, value in sorted(record["rates"].items()):
        # rates of work, or seconds of a kernel
        if value > 1:
            shown = f"{value / 1e12:10.2f} T/s"
        else:
            shown = f"{1e6 * value:10.2f} us"
        lines.append(f"  {name:42}{shown}")
    for name, value in record["measured"].items():
        if isinstance(value, bool):
            lines.append(f"  {name:42}{'yes' if value else 'NO':>10}")
        elif isinstance(value, int | float):
            lines.append(f"  {name:42}{value:10.4g}")
    for name, reason in record["measured"]["left_out"].items():
        lines.append(f"  {name:42}{'-':>10} {reason}")
    return lines


if __name__ == "__main__":
    main()
