"""Collective operations of two processes, started by `test_distributed.py` for each rank."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch

from common import checkpoint, distributed


def main(folder: Path) -> dict:
    distributed.init_process_group(timeout_s=30, for_deepspeed=False)
    me = distributed.rank()
    out: dict = {
        "rank": me,
        "world": distributed.world_size(),
        "is_main": distributed.is_main(),
    }
    rows = torch.arange(4.0).reshape(2, 2).t() + 10 * me  # not contiguous on purpose
    out["gathered"] = distributed.gather_rows(rows).tolist()
    uneven = {
        "loss": 1.0 + me,
        "reward": math.nan if me == 0 else 4.0,
        **({"late": 5.0} if me == 1 else {}),
    }
    out["mean"] = distributed.mean_over_ranks(uneven)
    out["max"] = distributed.max_over_ranks(-3.0 + me)
    out["max_nan_is_nan"] = math.isnan(
        distributed.max_over_ranks(math.nan if me == 1 else 0.0)
    )
    out["sum"] = distributed.sum_over_ranks(0.1 * (me + 1))
    out["any"] = [
        distributed.any_rank(torch.tensor([False, me == 1])),
        distributed.any_rank(torch.zeros(2) > 0),
    ]
    out["batches"] = distributed.rank_batches(5, 2)
    out["from_main"] = distributed.from_main(f"rank {me}")
    try:
        distributed.gather_rows(torch.zeros(me + 1, 2))
    except ValueError as error:
        out["unequal"] = str(error)

    distributed.raise_on_all(None)
    try:
        distributed.raise_on_all(KeyError("lost") if me == 1 else None)
    except KeyError as error:
        out["together"] = error.args[0]

    def write(path: Path) -> None:
        checkpoint.save_tensors(
            path / f"rank{me}.safetensors", {"w": torch.full((3,), float(me))}
        )

    checkpoint.save(folder, 5, write, keep=2, state={"step": 5})
    found = checkpoint.resolve_resume("auto", folder)
    out["found"] = found.name
    out["weights"] = checkpoint.load_tensors(found / f"rank{me}.safetensors")[
        "w"
    ].tolist()

    def fail_on_one(path: Path) -> None:
        if me == 1:
            raise OSError("no space left on device")

    try:
        checkpoint.save(folder, 6, fail_on_one, keep=2, state={})
    except (OSError, RuntimeError) as error:
        out["failure"] = f"{type(error).__name__}: {error}"
    distributed.barrier()
    out["after_failure"] = checkpoint.resolve_resume("auto", folder).name
    distributed.shutdown()
    return out


if __name__ == "__main__":
    target = Path(sys.argv[1])
    result = main(target / "checkpoints")
    (target / f"rank{result['rank']}.json").write_text(json.dumps(result))
