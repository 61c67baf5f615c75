"""Collectives over the ranks' devices, run by test_collectives.py; rank 0 prints a JSON line.

python tests/gpu/collective_ranks.py DEVICE WAN_FOLDER
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from common import distributed
from launch.compose import quiet
from tests.generator.context_ranks import loss_of, trained
from tests.tiny import tiny_generator


def collectives(device: torch.device) -> dict[str, object]:
    """What common.distributed gives for tensors of the device."""
    me = distributed.rank()
    rows = torch.arange(4.0, device=device).view(2, 2) + 10 * me
    summed = torch.full((3,), float(me + 1), device=device)
    dist.all_reduce(summed)
    seen = torch.full((1 << 20,), float(me), device=device)
    dist.broadcast(seen, src=1)
    error = ValueError("on purpose") if me == 1 else None
    try:
        distributed.raise_on_all(error)
        together = ""
    except ValueError as raised:
        together = str(raised)
    return {
        "device of rank 1": distributed.gather_objects(str(device))[1],
        "gathered": distributed.gather_rows(rows).tolist(),
        "any": distributed.any_rank(torch.tensor([me == 1], device=device)),
        "none": distributed.any_rank(torch.tensor([False], device=device)),
        "sum": summed.tolist(),
        "broadcast": float(seen.mean()),
        "differing": distributed.differing_ranks({"w": rows}),
        "same": distributed.differing_ranks({"w": seen}),
        "mean": distributed.mean_over_ranks({"x": 1.0 + me, "nan": math.nan}),
        "together": together,
    }


def context(folder: Path, device: torch.device) -> dict[str, float]:
    """Forward and gradient on shared tokens against one rank's."""
    whole = tiny_generator(folder, device=device)
    shared = tiny_generator(folder, device=device, context_parallel=2)
    with torch.no_grad():
        ours, wanted = loss_of(shared)[0], loss_of(whole)[0]
    gradients = torch.autograd.grad(loss_of(shared)[1], trained(shared))
    return {
        "forward": float((ours - wanted).norm() / wanted.norm()),
        "gap": shared.context_gap(),
        "parts": len(gradients),
    }


def main() -> None:
    quiet()
    distributed.init_process_group(timeout_s=120)
    device = torch.device(sys.argv[1])
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    results = {
        "collectives": collectives(device),
        "context": context(Path(sys.argv[2]), device),
    }
    if distributed.is_main():
        sys.stdout.write("\n" + json.dumps(results) + "\n")
        sys.stdout.flush()
    distributed.barrier()
    distributed.shutdown()


if __name__ == "__main__":
    main()
