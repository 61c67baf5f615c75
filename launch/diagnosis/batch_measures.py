"""Measure the samples of a step: prompts, seeds and latents that occur twice, and noise levels."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from common.distributed import gather_objects

if TYPE_CHECKING:
    from torch import Tensor

    from alignment.prompts import PromptBatch
    from common.types import Group


def repeats(
    batch: PromptBatch,
    before: PromptBatch | None,
    known: Sequence[str],
) -> dict[str, float]:
    """Seeds and prompts of a step that occur twice, or that the step before had.

    known  all prompts of the run
    """
    # Over all ranks; the same seed twice is the same noise twice.
    seeds = []
    prompts = []
    for seeds_of_rank, prompts_of_rank in gather_objects((batch.seeds, batch.prompts)):
        seeds += seeds_of_rank
        prompts += prompts_of_rank
    count = len(prompts)
    possible = len(set(known))
    found = {
        "batch/repeated": 1 - len(set(seeds)) / count,
        "batch/prompts": len(set(prompts)) / min(count, possible),
        "batch/prompts_known": float(possible),
        "batch/groups": float(count),
    }
    if before is not None:
        found["batch/as_before"] = _share(batch.seeds, before.seeds)
        found["batch/prompts_as_before"] = _share(batch.prompts, before.prompts)
    return found


def heldout(prompts: Sequence[str], known: Sequence[str]) -> dict[str, float]:
    """The share of the evaluated prompts that are trained on; {} without any."""
    return {"evaluation/trained": _share(prompts, known)} if prompts else {}


def _share(items: Sequence[object], others: Sequence[object]) -> float:
    known = set(others)
    return sum(item in known for item in items) / len(items)


def samples(
    groups: Sequence[Group],
    before: set[str],
) -> tuple[dict[str, float], set[str]]:
    """Compare the samples of a step with each other, and with those of the step before.

    Returns the numbers, and the samples' fingerprints for the next step.
    """
    seen: set[str] = set()
    twins = 0
    count = 0
    apart = []
    levels = []
    for group in groups:
        for clean_CFHW in group.clean_GCFHW:
            name = _fingerprint(clean_CFHW)
            twins += name in seen
            seen.add(name)
            count += 1
        # Members of a group start from one latent and end apart.
        first = group.clean_GCFHW[0].float()
        last = group.clean_GCFHW[-1].float()
        size = max(float(first.norm()), 1e-12)
        apart.append(float((first - last).norm()) / size)
        levels.append(group.steps[0].sigma)
    found = {
        "samples/groups": float(len(groups)),
        "samples/twins": twins / count,
        "samples/apart": statistics.median(apart),
        "samples/as_before": len(seen & before) / count,
        # Noise levels at which the step learns.
        "samples/level_min": min(levels),
        "samples/level_max": max(levels),
    }
    return found, seen


def _fingerprint(x: Tensor) -> str:
    numbers = x.detach().float().cpu().contiguous()
    data = numbers.numpy().tobytes()
    return hashlib.sha256(data).hexdigest()
