"""How long a step will take by the plan, for the progress bar of a run that has measured none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launch.planning.plan import DEVICES, Where
from launch.planning.runs import plan_of

if TYPE_CHECKING:
    from engine.config import TrainingRun


def expect_step(run: TrainingRun) -> None:
    """Tell the progress bar the plan's seconds of a step, on rank 0 of a run on known GPUs."""
    import torch

    from common import progress
    from common.distributed import is_main, world_size
    from common.log import say

    if not is_main() or not torch.cuda.is_available():
        return
    name = torch.cuda.get_device_name()
    seconds = planned_seconds(run, name, world_size())
    if seconds is not None:
        progress.expect(seconds)
        say(f"a step takes {seconds:,.0f} s or more by the plan for {name}")


def planned_seconds(run: TrainingRun, gpu: str, ranks: int) -> float | None:
    """Return the plan's seconds of a step on GPUs of this name; None if nothing is known."""
    import torch

    # "NVIDIA A100-SXM4-80GB" is the a100 of the plan.
    known = [device for key, device in DEVICES.items() if key.upper() in gpu.upper()]
    if not known:
        return None
    try:
        # Modules of the plan must not take random numbers from the run.
        with torch.random.fork_rng(devices=[]):
            return plan_of(run, Where(known[0], ranks)).seconds
    except (ValueError, OSError):
        # A run does not need its plan.
        return None
