"""Run the models at their true size on a CPU with 24 GiB: `make fullsize`.

Wan 2.1 1.3B and Qwen3-VL 2B have their published configs and random weights, in fp32 because most
CPUs emulate bfloat16. The ordinary recipes and loops make a GRPO update, a DPO step, scores of
DeScore and a cold-start step. Each part (`experiments.fullsize_parts`) runs in its process, whose
peak memory is compared with the prediction of ``--dry-run``. The text encoder (22.7 GB in fp32) is
left out: embeddings of the prompt are random. Results: docs/results/fullsize.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.runner import ROOT, commit, write_json

# The JSON names it.
COMMAND = "python experiments/fullsize.py"
# Functions of `experiments.fullsize_parts`.
PARTS = ("grpo", "dpo", "cold_start")
# The C library returns freed memory to the system, as the allocator of a GPU counts it.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "PYTHONPATH": str(ROOT),
}


def main() -> None:
    """Run every part in its process and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument(
        "--part", choices=PARTS, help="run this part and print its JSON"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    if args.part is not None:
        # A part runs here, and its parent reads the last line.
        print(json.dumps(measure_part(args.part, args.threads)))
        return

    # Run the parts after each other.
    began = time.time()
    threads = str(args.threads)
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": threads}
    parts = {}
    for part in PARTS:
        process = subprocess.run(
            [sys.executable, __file__, "--part", part, "--threads", threads],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=environment,
        )
        last_line = process.stdout.splitlines()[-1]
        parts[part] = json.loads(last_line)
        print(f"{part:10} {last_line}", flush=True)

    record = {
        "command": COMMAND,
        "commit": commit(),
        "threads": args.threads,
        "parts": parts,
        "minutes": round((time.time() - began) / 60, 1),
    }
    path = args.out / "fullsize.json"
    write_json(path, record)
    print(f"{record['minutes']} minutes; {path}")


def measure_part(name: str, threads: int) -> dict[str, Any]:
    """Run a part; return its figures, its seconds, and its peak memory with the prediction."""
    from launch.compose import quiet

    quiet()

    # Libraries are imported before memory is counted, and after `quiet`.
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import torch

    from common import distributed
    from common.memory import peak_memory
    from experiments import fullsize_parts
    from launch.planning.plan import BUCKET, GIB, RESERVE

    torch.set_num_threads(threads)
    distributed.init_process_group()

    # Memory of the libraries does not count.
    libraries = _resident_bytes()
    began = time.time()
    part = getattr(fullsize_parts, name)
    with tempfile.TemporaryDirectory() as folder:
        plan, module, facts = part(Path(folder))
    process = peak_memory()["memory/peak_gb"] * GIB
    peak = process - libraries
    # A CPU gives no memory to the reduce bucket, of which a part is written at most.
    buckets = [part.bytes for part in plan.parts if part.name.endswith(BUCKET)]
    predicted = plan.peak - RESERVE - sum(buckets)
    distributed.shutdown()
    return {
        "parameters": sum(p.numel() for p in module.parameters()),
        "seconds": round(time.time() - began, 1),
        "peak_gib": round(peak / GIB, 2),
        "predicted_gib": round(predicted / GIB, 2),
        "off": round(predicted / peak - 1, 3),
        "process_gib": round(process / GIB, 2),
        **facts,
    }


def _resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * resource.getpagesize()


if __name__ == "__main__":
    main()
