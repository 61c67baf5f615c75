"""``--dry-run``: the resolved config and what the run will need, before anything is loaded.

    python launch/grpo.py --config configs/wan/grpo.yaml --dry-run 8xh100
    python launch/grpo.py --config configs/wan/grpo.yaml --dry-run 64xa100@0.4     # at 40 % of the device's peak

The modules are built on the meta device from their configs, so parameters and FLOPs are those of the code that will
run; memory is what its tensors take (see `launch.on_meta`). Seconds and the reserve are predictions, for the first step
that is run to check. Exit code 1 where the plan does not fit the device's memory, or the ranks do not fit the batch.
"""

from __future__ import annotations

import re
import sys
from typing import Any, NoReturn

import yaml

from common.run_record import hide_secrets, plain
from launch.pair_runs import DpoRun, PairsRun
from launch.plan_runs import DEVICES, GIB, RESERVE, Plan, Where, plan_dpo, plan_grpo, plan_judge, plan_pairs
from launch.refuse import refuse
from launch.runs import ColdStartRun, DualRlRun, GrpoRun

_WHERE = re.compile(r"(?:(\d+)x)?([a-z0-9]+)(?:@(0?\.\d+|1(?:\.0*)?))?")


def dry_run(cfg: Any, where: str) -> NoReturn:
    """Print the config and the plan of any run, and end: 0 if it fits, 1 if it does not, 2 if it cannot be made."""
    from launch.compose import quiet
    from launch.plan_models import UnknownModelError

    print(hide_secrets(yaml.safe_dump(plain(cfg), sort_keys=False, allow_unicode=True, width=120)))
    place = parse_where(where)
    quiet()
    try:
        plan = plan_of(cfg, place)
    except (UnknownModelError, ValueError) as error:
        refuse(str(error))
    if plan is None:
        print(f"nothing is planned for a {type(cfg).__name__}: the config is valid")
        sys.exit(0)
    print("\n".join(lines_of(plan, place)))
    sys.exit(1 if plan.problems or plan.peak > place.device.memory else 0)


def plan_of(cfg: Any, where: Where) -> Plan | None:
    """None for a kind of run that nothing is known of."""
    if isinstance(cfg, GrpoRun):
        return plan_grpo(cfg, where)
    if isinstance(cfg, DpoRun):
        return _plan_dpo(cfg, where)
    if isinstance(cfg, ColdStartRun | DualRlRun):
        return plan_judge(cfg, where)
    return plan_pairs(cfg, where) if isinstance(cfg, PairsRun) and cfg.prompts is not None else None


def parse_where(text: str) -> Where:
    """``8xh100@0.5``: ranks (1), device, and the share of its peak (0.5). Exit with code 2 for anything else."""
    found = _WHERE.fullmatch(text.lower())
    if found is None or found[2] not in DEVICES or found[1] == "0":
        refuse(f"--dry-run {text}: want GPUSxDEVICE@UTILISATION, such as 8xh100 or 1xa100@0.4, of {', '.join(DEVICES)}")
    return Where(DEVICES[found[2]], int(found[1] or 1), float(found[3] or 0.5))


def lines_of(plan: Plan, where: Where) -> list[str]:
    """The plan as people read it."""
    device = where.device
    lines = [f"plan for {where.ranks} x {device.name} at {where.utilisation:.0%} of its peak", ""]
    lines += [f"  {fact}" for fact in plan.facts]
    lines += ["", f"  memory of a rank{'':24}GiB"]
    lines += [
        f"    {part.name:36}{part.bytes / GIB:8.2f}{'  while it runs' if part.passing else ''}"
        for part in sorted(plan.parts, key=lambda part: (part.passing, -part.bytes))
        if part.bytes
    ]
    lines += [f"    {'reserve (a guess)':36}{RESERVE / GIB:8.2f}", f"    {'peak':36}{plan.peak / GIB:8.2f}"]
    lines.append(f"    {'of the device':36}{device.memory / GIB:8.2f}")
    lines += ["", f"  one {plan.unit:32}TFLOP a rank   seconds"]
    lines += [f"    {phase.name:36}{phase.flops / 1e12:12,.0f}{phase.seconds:10,.1f}" for phase in plan.phases]
    lines.append(f"    {'together':36}{sum(p.flops for p in plan.phases) / 1e12:12,.0f}{plan.seconds:10,.1f}")
    if plan.count:
        lines.append(f"  {plan.count:,} of them: {plan.count * plan.seconds / 3600:,.1f} hours")
    lines.append(f"  disk for what is kept: {plan.disk / GIB:.1f} GiB")
    lines += [f"  DOES NOT GO: {problem} does not divide" for problem in plan.problems]
    if plan.peak > device.memory:
        lines += ["  DOES NOT FIT. The largest parts, and what makes them smaller:"]
        lines += [f"    {part.name}: {part.less}" for part in _largest(plan)]
    return lines


def _largest(plan: Plan) -> list[Any]:
    return sorted((part for part in plan.parts if part.less and part.bytes), key=lambda part: -part.bytes)[:5]


def _plan_dpo(cfg: DpoRun, where: Where) -> Plan:
    """With as many pairs as the folder has, if it is there."""
    from pathlib import Path

    from alignment.pair_store import MANIFEST, PairSet

    there = (Path(cfg.pairs) / MANIFEST).is_file()
    return plan_dpo(cfg, where, pairs=len(PairSet(cfg.pairs)) if there else None)
