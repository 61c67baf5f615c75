"""``--dry-run``: print what the run needs and its resolved config, before anything is loaded.

    python launch/grpo.py --config configs/wan/grpo.yaml --dry-run 8xh100
    python launch/grpo.py --config configs/wan/grpo.yaml --dry-run 64xa100@0.8  # 80 % of it

The modules are built without weights from their configs, and each call of a step is made once on
the simulated GPU of ``--rehearse``: kernels and tensors are those of the code that will run, and
seconds are those of their roofline (`launch.planning.roofline`), or of the rates of ``--measured``.
The reserve and the host's memory are estimates. Missing input files are listed. Exit code 1 where
the plan does not fit the device's memory, or the ranks do not divide the batch.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import yaml

from common.cli import exit_with_error, user_errors
from common.run_record import hide_secrets, plain, value_at
from generator.config import check_wan
from generator.wan_folder import require_supported
from launch.planning.plan import DEVICES, GIB, RESERVE, Plan, Where
from launch.planning.runs import (
    is_descore,
    plan_of,
)

REDUCES_MEMORY = (
    "  Less memory: more ranks with a higher zero_stage, gradient_checkpointing=true, a smaller "
    "rollout_batch, decode_batch or micro_batch, smaller videos, a LoRA, a reward server."
)

# RANKSxDEVICE@UTILISATION
_WHERE = re.compile(r"(?:(\d+)x)?([a-z0-9]+)(?:@(0?\.\d+|1(?:\.0*)?))?")
# Keys that name files or folders which a run reads.
_INPUTS = (
    "prompts",
    "evaluation.prompts",
    "refresh.prompts",
    "table.csv",
    "pairs",
    "heldout",
    "data.train",
    "data.heldout",
    "adapter",
)


def dry_run(cfg: Any, text: str, measured: Path | None = None) -> NoReturn:
    """Print the plan and the config of a run, then exit.

    The exit code is 0 if it fits, 1 if it does not, and 2 if it cannot be planned.
    """
    where = replace(parse_where(text), measured=measured)
    # A generator of another class has no plan.
    generator = getattr(cfg, "generator", None)
    if generator is not None and generator.target is not None:
        _print_with_config(lines_without_plan(cfg), cfg)
        sys.exit(0)
    # The plan itself goes to the standard output.
    print(
        "planning: one call of each kind on the simulated GPU, about a minute of a core",
        file=sys.stderr,
        flush=True,
    )
    from launch.compose import quiet

    # The plan, or the reason why there is none.
    quiet()
    with user_errors():
        check_generator(cfg)
        plan = plan_of(cfg, where)
    missing = missing_inputs(cfg, planned=plan is not None)
    if plan is None:
        name = type(cfg).__name__
        lines = [f"nothing is planned for a {name}: the config is valid", *missing]
    else:
        lines = lines_of(plan, missing=missing)
    _print_with_config(lines, cfg)
    fits = plan is None or fits_device(plan)
    sys.exit(0 if fits else 1)


def lines_without_plan(cfg: Any) -> list[str]:
    """Tell what is known of a run with a generator of another class."""
    lines = [
        f"generator.target={cfg.generator.target}: a plan knows Wan only; a run with steps=1 "
        "measures seconds and memory. The config is valid",
    ]
    if hasattr(cfg, "grpo"):
        members = cfg.grpo.group_size
        videos = cfg.prompts_per_step * members
        lines.append(
            f"one update = {cfg.prompts_per_step} prompts x {members} members = {videos} videos"
        )
    return [*lines, *missing_inputs(cfg, planned=False)]


def _print_with_config(lines: Sequence[str], cfg: Any) -> None:
    """Print these lines, and then the config, which is longer."""
    print("\n".join(lines))
    settings = yaml.safe_dump(
        plain(cfg),
        sort_keys=False,
        allow_unicode=True,
        width=120,
    )
    print(f"\n{hide_secrets(settings)}")


def fits_device(plan: Plan) -> bool:
    """Whether the ranks divide the batch and a rank's memory suffices."""
    return not plan.problems and plan.peak <= plan.where.device.memory


def check_generator(cfg: Any) -> None:
    """Raise ValueError or FileNotFoundError if the generator is of another kind than Wan.

    A name on the hub is checked when it is loaded.
    """
    generator = getattr(cfg, "generator", None)
    if generator is not None:
        check_wan(generator, "a plan")
    folder = value_at(plain(cfg), "generator.path")
    if folder is not None and Path(folder).is_dir():
        require_supported(Path(folder))


def parse_where(text: str, *, option: str = "--dry-run") -> Where:
    """Parse ``8xh100@0.8``: ranks (default 1), device, share of its roofline (default 1).

    Exits with code 2 for anything else.
    """
    match = _WHERE.fullmatch(text.lower())
    if match is None or match[2] not in DEVICES or match[1] == "0":
        exit_with_error(
            f"{option} {text}: want GPUSxDEVICE@UTILISATION, such as 8xh100 or 1xa100@0.8, "
            f"with a device of {', '.join(DEVICES)}"
        )
    return Where(DEVICES[match[2]], int(match[1] or 1), float(match[3] or 1.0))


def missing_inputs(cfg: Any, *, planned: bool) -> list[str]:
    """List the input files and folders that do not exist, a line each.

    `Plan.assumed` lists the reward models that a ``planned`` run does not find.
    """
    settings = plain(cfg)
    paths = {key: value_at(settings, key) for key in _INPUTS}
    # Reward models are inputs too.
    if not planned:
        paths["checkpoint"] = settings.get("checkpoint")
    for name, reward in (getattr(cfg, "rewards", None) or {}).items():
        read = (reward.kind or name) in ("videoreward", "hpsv3")
        if read or (is_descore(name, reward) and not planned):
            paths[f"rewards.{name}.checkpoint"] = reward.checkpoint
    return [
        f"{key}: {path} does not exist, and the run would stop"
        for key, path in paths.items()
        if isinstance(path, str) and not Path(path).exists()
    ]


def lines_of(
    plan: Plan,
    *,
    missing: Sequence[str] = (),
) -> list[str]:
    """Format a plan for the console; assumed models are named at the top and after the total."""
    # What is planned, and which files are missing.
    where = plan.where
    assumed = [f"  NOTE {line}" for line in plan.assumed]
    lines = [
        f"plan for {where.ranks} x {where.device.name}, {_rates(where)}",
        *assumed,
        *(f"  NOTE {line}" for line in missing),
        "",
        *(f"  {fact}" for fact in plan.facts),
    ]

    # Memory: permanent parts first, the largest first.
    lines += ["", f"  memory of a rank{'':24}GiB"]
    for part in sorted(plan.parts, key=lambda part: (part.temporary, -part.bytes)):
        if part.bytes:
            note = "  while it runs" if part.temporary else ""
            lines.append(f"{_memory(part.name, part.bytes)}{note}")
    lines += [
        _memory("reserve (an estimate)", RESERVE),
        _memory("peak", plan.peak),
        _memory("of the device", where.device.memory),
    ]
    if plan.host:
        lines += ["", f"  memory of the host, for a rank{'':10}GiB"]
        lines += [_memory(part.name, part.bytes) for part in plan.host]

    # Time.
    lines += ["", f"  one {plan.unit:32}TFLOP a rank   seconds"]
    for phase in plan.phases:
        lines.append(_time(phase.name, phase.flops, phase.seconds))
    flops = sum(phase.flops for phase in plan.phases)
    lines.append(_time("together", flops, plan.seconds))
    if plan.count:
        hours = plan.count * plan.seconds / 3600
        lines.append(
            f"  the whole run, {plan.count:,} of them: {hours:,.1f} hours, "
            f"{hours * where.ranks:,.0f} GPU hours"
        )
    lines += [*assumed, f"  disk for what is saved: {plan.disk / GIB:.1f} GiB"]
    return [*lines, *_verdict(plan)]


def _rates(where: Where) -> str:
    """Say by which rates the seconds are."""
    rates = "at the roofline of its kernels"
    if where.utilisation < 1:
        rates = f"at {where.utilisation:.0%} of the roofline of its kernels"
    return rates if where.measured is None else f"{rates}, by {where.measured}"


def _memory(name: str, size: float) -> str:
    return f"    {name:36}{size / GIB:8.2f}"


def _time(
    name: str,
    flops: float,
    seconds: float,
) -> str:
    return f"    {name:36}{flops / 1e12:12,.0f}{seconds:10,.1f}"


def _verdict(plan: Plan) -> list[str]:
    """Say whether the run fits; if not, list the largest parts and what reduces memory."""
    memory = plan.where.device.memory / GIB
    peak = plan.peak / GIB
    lines = [f"  does not fit: {problem}" for problem in plan.problems]
    if peak <= memory:
        start = "" if lines else "fits: "
        return [*lines, f"  {start}a rank needs {peak:.1f} of {memory:.1f} GiB"]

    # The largest parts, whether temporary or not.
    lines += [
        f"  does not fit: a rank needs {peak:.1f} GiB and has {memory:.1f}, "
        f"{peak - memory:.1f} are missing.",
        "  The largest parts:",
    ]
    largest = sorted(plan.parts, key=lambda part: -part.bytes)[:5]
    lines += [f"    {part.bytes / GIB:6.1f}  {part.name}" for part in largest]
    lines.append(REDUCES_MEMORY)

    # Devices with enough memory for the run as it is.
    larger = [name for name, device in DEVICES.items() if device.memory >= plan.peak]
    if larger:
        return [
            *lines,
            f"  As it is, it fits {plan.where.ranks} x {', '.join(larger)}.",
        ]
    return [*lines, "  None of the devices known here has enough memory."]
