"""Saves states whole and in parts, run by test_state.py on real ranks; argument: a folder."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from common import distributed
from engine import state, state_files
from engine.state import load_engine, save_engine
from launch.compose import quiet
from tests.engine.engine_ranks import distance, engine_of, network, train, whole

CASES = {
    "0": (0, torch.float32),
    "1": (1, torch.float32),
    "2": (2, torch.float32),
    "3": (3, torch.float32),
    "2 bf16": (2, torch.bfloat16),
    "3 bf16": (3, torch.bfloat16),
}


def save_both(folder: Path, stage: int, dtype: torch.dtype) -> float:
    """Save two steps in both ways, and go on from the parts; the distance to never stopping."""
    module = network(dtype)
    engine = engine_of(module, stage)
    train(engine, module, range(2))
    for name, limit in (("whole", 2**31), ("parts", 0)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        state.WHOLE_FILE_BYTES = limit
        save_engine(engine, folder / name)
    distributed.barrier()
    train(engine, module, range(2, 4))

    # whatever the weights were, the checkpoint decides
    later = network(dtype)
    torch.nn.init.zeros_(later[0].weight)
    engine = engine_of(later, stage)
    load_engine(engine, folder / "parts")
    train(engine, later, range(2, 4))
    return distance(whole(module), whole(later))


def main() -> None:
    quiet()
    distributed.init_process_group()
    root = Path(sys.argv[1])
    # several parts a rank: the first weight alone has 63 numbers
    state_files.PART_BYTES = 300
    results = {}
    for name, (stage, dtype) in CASES.items():
        results[name] = save_both(root / name, stage, dtype)
    if distributed.is_main():
        sys.stdout.write("\n" + json.dumps(results) + "\n")
        sys.stdout.flush()
    distributed.barrier()
    distributed.shutdown()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
