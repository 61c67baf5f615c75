"""Check and measure this project on a GPU, in about ten minutes: `make gpu-check`.

First the tests of tests/gpu: collectives, streams, memory that runs out, compiled blocks, ratios
in bfloat16, every attention backend. Then rates of kernels and seconds of the parts of a run at
full size, on random weights: nothing is downloaded. One GPU is enough; collectives and context
parallelism need two. The JSON is what `--measured FILE` of the commands reads:

    {"device": "h100", "rates": {...}, "measured": {...}}

The parts are also rehearsed (`experiments.gpu_rehearsal`), so that measured figures stand beside
those of the roofline. `--rehearse h100` does that alone, on a machine without a GPU.

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
# Those that have seconds by a roofline.
REHEARSED = PARTS[1:]
# A part that hangs must not hold the others up.
PART_TIMEOUT_S = 600
COMMAND = "python experiments/gpu_check.py"


def main() -> None:
    """Run the tests and every part, print a table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu_check.json")
    parser.add_argument("--part", choices=PARTS, help="run this part, print its JSON")
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    parser.add_argument(
        "--rehearse",
        metavar="DEVICE",
        help="only rehearse, on h100, h200, a100 or 4090",
    )
    args = parser.parse_args()
    if args.rehearse is not None:
        rehearse(args.rehearse, args.part)
        return
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

    # 3. How fast should it be?
    if is_known(record["device"]):
        record["measured"]["rehearsed"] = rehearse_all(record["device"])

    # 4. The table, and the file that plans read.
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


def rehearse(device: str, part: str | None) -> None:
    """Rehearse a part and print its JSON, or all of them and print a table."""
    if not is_known(device):
        sys.stderr.write(f"--rehearse {device}: plans do not know this device\n")
        sys.exit(2)
    if part is None:
        for name, value in rehearse_all(device).items():
            print(f"  {name:42}{value:10.4g}")
        return
    from launch.compose import quiet

    quiet()

    import torch

    from experiments.gpu_parts import published
    from experiments.gpu_rehearsal import rehearse_part

    subject = published(torch.device("cpu"))
    print(json.dumps(rehearse_part(part, subject, device)))


def rehearse_all(device: str) -> dict[str, float]:
    """Rehearse every part in its process; one that fails says so and has no figures."""
    figures = {}
    for part in REHEARSED:
        found = last_line_of("--part", part, "--rehearse", device)
        if isinstance(found, str):
            print(f"{part:14} rehearsal FAILED: {found}", flush=True)
        else:
            figures |= found
    return figures


def is_known(device: str) -> bool:
    """Whether plans know the rates of a device."""
    from launch.planning.roofline import RATES

    return device in RATES


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
    found = last_line_of("--part", part)
    if isinstance(found, str):
        return found
    merge(record, part, found)
    return ""


def last_line_of(*words: str) -> dict[str, Any] | str:
    """Run this program in a process; return the JSON of its last line, or why there is none."""
    try:
        done = subprocess.run(
            [sys.executable, __file__, *words],
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
    return json.loads(done.stdout.splitlines()[-1])


def merge(record: dict[str, Any], part: str, found: dict[str, Any]) -> None:
    """Add the figures of a part to the record."""
    record["rates"] |= found["rates"]
    measured = record["measured"]
    measured |= found["measured"]
    measured["left_out"] |= found["left_out"]
    measured["seconds"][part] = found["seconds"]


def table(record: dict[str, Any]) -> list[str]:
    """Lines for the terminal: rates, figures beside the rehearsed ones, what is left out."""
    rehearsed = record["measured"].get("rehearsed", {})
    lines = [f"{record['measured']['device_name']}: measured, and by roofline"]
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
            expected = f"{rehearsed[name]:10.4g}" if name in rehearsed else ""
            lines.append(f"  {name:42}{value:10.4g}{expected}")
    for name, reason in record["measured"]["left_out"].items():
        lines.append(f"  {name:42}{'-':>10} {reason}")
    return lines


if __name__ == "__main__":
    main()
