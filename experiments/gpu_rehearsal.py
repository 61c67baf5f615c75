"""Rehearse `experiments/gpu_check.py` on a simulated GPU, so that its code is known to run.

It gives the same figures by roofline, which stand beside the measured ones in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from experiments import gpu_parts
from experiments.gpu_parts import GIB, Peak, Subject

if TYPE_CHECKING:
    from launch.rehearsal.device import SimulatedGpu

# Nothing is computed in a rehearsal: these figures would mean nothing.
NUMBERS = ("repeats/", "decode_error/", "ratio_", "grad_norm")
# Of both updates of the part.
UPDATES = 2
# A token that ends nothing.
WORD = 100


def rehearse_part(name: str, subject: Subject, device: str) -> dict[str, float]:
    """Rehearse a part on a device of `RATES`: its seconds and peaks by the measured names.

    Raises what the simulated device refuses (`launch.rehearsal.cuda_rules`).
    """
    from launch.planning.roofline import RATES
    from launch.rehearsal.device import SimulatedGpu
    from launch.rehearsal.patches import BACKENDS
    from launch.rehearsal.rehearse import simulated

    backends = tuple(name for name in subject.backends if name in BACKENDS)
    subject = replace(subject, backends=backends)
    gpu = SimulatedGpu(RATES[device])
    with simulated(gpu, 1), instruments_of(gpu):
        found = gpu_parts.PARTS[name](subject, gpu.device)
    figures = {}
    for key, value in found.measured.items():
        if not key.startswith(NUMBERS):
            figures[key] = float(value)

    # Phases of the loop, which times itself by the clock.
    if name == "update":
        phases = gpu.ledger.phases
        steps = phases.get("optimizer step")
        for phase in ("rollout", "decode", "update"):
            seconds = phases[phase].total_seconds(gpu.rates.host)
            if phase == "update" and steps is not None:
                seconds += steps.total_seconds(gpu.rates.host)
            figures[f"grpo_s/{phase}"] = seconds / UPDATES
    return figures


@contextmanager
def instruments_of(gpu: SimulatedGpu) -> Iterator[None]:
    """Inside, clocks and peaks of the parts are those of the simulated device."""

    def seconds_of(
        function: Callable[[], object], device: torch.device, **_: Any
    ) -> float:
        with gpu.ledger.record() as costs:
            function()
        return costs.total_seconds(gpu.rates.host)

    @contextmanager
    def peak_of(device: torch.device) -> Iterator[Peak]:
        peak = Peak()
        for costs in gpu.ledger.phases.values():
            costs.peak = gpu.ledger.live
        yield peak
        peaks = [costs.peak for costs in gpu.ledger.phases.values()]
        peak.gib = max(peaks) / GIB

    stand_ins = {
        "seconds_of": seconds_of,
        "peak_of": peak_of,
        # no CoT ends, since no chosen token is the end
        "require_cut": lambda _: None,
    }
    gpu.choose_tokens = lambda result: torch.full_like(result, WORD, device="cpu")
    with ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch.object(gpu_parts, name, stand_in))
        yield
