"""``--dry-run``: the resolved config and what the run will need, before anything is loaded.

    python launch/grpo.py --config configs/wan/grpo.yaml --dry-run 8xh100
    python launch/grpo.py --config configs/wan/grpo.yaml --dry-run 64xa100@0.4     # at 40 % of the device's peak

The modules are built on the meta device from their configs, so parameters and FLOPs are those of the code that will
run; memory is what its tensors take (see `launch.planning.meta_device`). Seconds and the reserve are predictions, for the first step
that is run to check. What the run would look for and not find is said before the plan and after it. Exit code 1 where
the plan does not fit the device's memory, or the ranks do not fit the batch.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from common.cli import exit_with_error
from common.run_record import hide_secrets, plain
from launch.planning.advice import Less, advice
from launch.planning.runs import (
    DEVICES,
    GIB,
    RESERVE,
    Part,
    Plan,
    Where,
    is_descore,
    plan_dpo,
    plan_grpo,
    plan_pairs,
    plan_reward_model,
)
from launch.schemas.pairs import DpoRun, PairsRun
from launch.schemas.training import ColdStartRun, DualRlRun, GrpoRun

_WHERE = re.compile(r"(?:(\d+)x)?([a-z0-9]+)(?:@(0?\.\d+|1(?:\.0*)?))?")


def dry_run(cfg: Any, where: str) -> NoReturn:
    """Print the config and the plan of any run, and end: 0 if it fits, 1 if it does not, 2 if it cannot be made."""
    place = parse_where(where)
    from launch.compose import quiet
    from launch.planning.models import UnknownModelError

    print(
        hide_secrets(
            yaml.safe_dump(plain(cfg), sort_keys=False, allow_unicode=True, width=120)
        )
    )
    quiet()
    try:
        plan = plan_of(cfg, place)
    except (UnknownModelError, ValueError) as error:
        exit_with_error(str(error))
    missing = missing_inputs(cfg, planned=plan is not None)
    if plan is None:
        print(
            "\n".join(
                [
                    f"nothing is planned for a {type(cfg).__name__}: the config is valid",
                    *missing,
                ]
            )
        )
        sys.exit(0)
    print(
        "\n".join(lines_of(plan, place, missing=missing, less=advice(cfg, place.ranks)))
    )
    sys.exit(1 if plan.problems or plan.peak > place.device.memory else 0)


def plan_of(cfg: Any, where: Where) -> Plan | None:
    """None for a kind of run that nothing is known of."""
    if isinstance(cfg, GrpoRun):
        return plan_grpo(cfg, where)
    if isinstance(cfg, DpoRun):
        return _plan_dpo(cfg, where)
    if isinstance(cfg, ColdStartRun | DualRlRun):
        return plan_reward_model(cfg, where)
    return (
        plan_pairs(cfg, where)
        if isinstance(cfg, PairsRun) and cfg.prompts is not None
        else None
    )


def parse_where(text: str) -> Where:
    """``8xh100@0.5``: ranks (1), device, and the share of its peak (0.5). Exit with code 2 for anything else."""
    found = _WHERE.fullmatch(text.lower())
    if found is None or found[2] not in DEVICES or found[1] == "0":
        exit_with_error(
            f"--dry-run {text}: want GPUSxDEVICE@UTILISATION, such as 8xh100 or 1xa100@0.4, of {', '.join(DEVICES)}"
        )
    return Where(DEVICES[found[2]], int(found[1] or 1), float(found[3] or 0.5))


_INPUTS = (
    "prompts",
    "evaluation.prompts",
    "refresh.prompts",
    "table.csv",
    "pairs",
    "heldout",
)
_INPUTS += ("data.train", "data.heldout", "adapter")


def missing_inputs(cfg: Any, *, planned: bool) -> list[str]:
    """A line for every file or folder that the run would read and that is not there. Of a run that is ``planned``,
    judges which are not there are told of by `Plan.assumed`.
    """
    named = {
        key: _at(cfg, key) for key in (*_INPUTS, *([] if planned else ["checkpoint"]))
    }
    for name, reward in (getattr(cfg, "rewards", None) or {}).items():
        kind = "descore" if is_descore(name, reward) else reward.kind or name
        if kind in ("videoreward", "hpsv3") or (kind == "descore" and not planned):
            named[f"rewards.{name}.checkpoint"] = reward.checkpoint
    return [
        f"{key}: {path} is not there; the run would refuse"
        for key, path in named.items()
        if isinstance(path, str) and not Path(path).exists()
    ]


def _at(cfg: Any, dotted: str) -> Any:
    """None where a section on the way is null or is none of this run's."""
    for key in dotted.split("."):
        cfg = getattr(cfg, key, None)
    return cfg


def lines_of(
    plan: Plan,
    where: Where,
    *,
    missing: Sequence[str] = (),
    less: Mapping[str, Less] | None = None,
) -> list[str]:
    """The plan as people read it. What is not there comes first, assumed models once more beside the total."""
    device = where.device
    assumed = [f"  NOTE {line}" for line in plan.assumed]
    lines = [
        f"plan for {where.ranks} x {device.name} at {where.utilisation:.0%} of its peak",
        *assumed,
    ]
    lines += [*(f"  NOTE {line}" for line in missing), ""]
    lines += [f"  {fact}" for fact in plan.facts]
    lines += ["", f"  memory of a rank{'':24}GiB"]
    lines += [
        f"    {part.name:36}{part.bytes / GIB:8.2f}{'  while it runs' if part.passing else ''}"
        for part in sorted(plan.parts, key=lambda part: (part.passing, -part.bytes))
        if part.bytes
    ]
    lines += [
        f"    {'reserve (a guess)':36}{RESERVE / GIB:8.2f}",
        f"    {'peak':36}{plan.peak / GIB:8.2f}",
    ]
    lines.append(f"    {'of the device':36}{device.memory / GIB:8.2f}")
    lines += ["", f"  one {plan.unit:32}TFLOP a rank   seconds"]
    lines += [
        f"    {phase.name:36}{phase.flops / 1e12:12,.0f}{phase.seconds:10,.1f}"
        for phase in plan.phases
    ]
    lines.append(
        f"    {'together':36}{sum(p.flops for p in plan.phases) / 1e12:12,.0f}{plan.seconds:10,.1f}"
    )
    if plan.count:
        lines.append(
            f"  {plan.count:,} of them: {plan.count * plan.seconds / 3600:,.1f} hours"
        )
    lines += [*assumed, f"  disk for what is kept: {plan.disk / GIB:.1f} GiB"]
    return [*lines, *_verdict(plan, where, less or {})]


def _verdict(plan: Plan, where: Where, less: Mapping[str, Less]) -> list[str]:
    """The last lines: whether it goes, and what would help if not."""
    memory, peak = where.device.memory / GIB, plan.peak / GIB
    lines = [f"  DOES NOT GO: {problem} does not divide" for problem in plan.problems]
    if peak <= memory:
        return [
            *lines,
            f"  {'' if lines else 'it goes: '}a rank needs {peak:.1f} of {memory:.1f} GiB",
        ]
    lines.append(
        f"  DOES NOT FIT: a rank needs {peak:.1f} GiB and has {memory:.1f}, {peak - memory:.1f} are missing."
    )
    helped = [part for part in _too_large(plan, where) if part.name in less][:5]
    if helped:
        lines += ["  The largest parts, and what makes them smaller:"]
        lines += [
            f"    {part.bytes / GIB:6.1f}  {part.name}: {less[part.name]}"
            for part in helped
        ]
    larger = [name for name, device in DEVICES.items() if device.memory >= plan.peak]
    fits = (
        f"it fits {where.ranks} x {', '.join(larger)}"
        if larger
        else "none of the devices known here holds it"
    )
    return [*lines, f"  As it is, {fits}."]


def _too_large(plan: Plan, where: Where) -> list[Part]:
    """Largest first: what always stays, and what passes and does not fit beside that."""
    counted = [
        part
        for part in plan.parts
        if not part.passing or plan.staying + part.bytes > where.device.memory
    ]
    return sorted(
        (part for part in counted if part.bytes), key=lambda part: -part.bytes
    )


def _plan_dpo(cfg: DpoRun, where: Where) -> Plan:
    """With as many pairs as the folder has, if it is there."""
    from alignment.pair_store import MANIFEST, PairSet

    there = (Path(cfg.pairs) / MANIFEST).is_file()
    return plan_dpo(cfg, where, pairs=len(PairSet(cfg.pairs)) if there else None)
