"""The result of a rehearsal: a table for the console, and JSON with every count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from common.files import write_json
from launch.planning.plan import GIB
from launch.rehearsal.ledger import LOADING, OPTIMIZER_STEP, Costs, rounded, source_line

if TYPE_CHECKING:
    from launch.planning.plan import Where
    from launch.rehearsal.cots import ShortCots
    from launch.rehearsal.device import SimulatedGpu
    from launch.rehearsal.ledger import Ledger
    from launch.rehearsal.stand_ins import Adapted

BLIND_SPOTS = (
    "NCCL: collectives return at once, and their time is not counted",
    "streams and races: kernels run one after the other",
    "code under torch.cuda.is_available()",
    "which kernels an installed library really offers, and which one it chooses",
    "nondeterminism of kernels",
    "fragmentation of the allocator",
    "halving of batches when memory runs out",
    "branches that depend on a guessed value (listed above)",
    "checkpoints, exports and evaluations",
)
# Lines of the console.
TOP = 6
MIB = 2.0**20


@dataclass
class Rehearsal:
    """What a rehearsal found.

    phases  Costs of each phase of a whole unit.
    notes   What stands for what, and what was counted by multiplication.
    faults  What was refused, with the line.
    """

    command: str
    device: str
    ranks: int
    memory: float
    host: float
    unit: str
    phases: dict[str, Costs]
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    cpu_minutes: float = 0.0
    process_gib: float = 0.0

    @property
    def seconds(self) -> float:
        """Roofline seconds of a unit, SUM over its phases without loading."""
        costs = [c for name, c in self.phases.items() if name != LOADING]
        return sum(cost.total_seconds(self.host) for cost in costs)

    @property
    def peak(self) -> float:
        """Bytes alive at most, over all phases."""
        return float(max(cost.peak for cost in self.phases.values()))


def rehearsal_of(
    command: str,
    where: Where,
    gpu: SimulatedGpu,
    adapted: Adapted,
    cots: ShortCots,
) -> Rehearsal:
    """Collect a result; parts of a unit that were left out are counted by multiplication."""
    notes = list(adapted.notes)
    for note, times in cots.notes.items():
        notes.append(f"{note} ({times} batches); the rest is extrapolated")
    if adapted.repeats > 1:
        once = {LOADING}
        if adapted.unit == "update":
            once.add(OPTIMIZER_STEP)
        repeated = [name for name in gpu.ledger.phases if name not in once]
        for name in repeated:
            costs = gpu.ledger.phases[name]
            part = Costs()
            part.add(costs, adapted.repeats - 1)
            part.peak = 0
            costs.add(part)
        notes.append(
            f"1 / {adapted.repeats:g} of the {adapted.unit} was run and multiplied, in the phases "
            + ", ".join(n for n in repeated if gpu.ledger.phases[n].kernels)
        )
        grown = _growth(gpu.ledger, adapted.repeats)
        if grown:
            for name, costs in gpu.ledger.phases.items():
                costs.peak += 0 if name == LOADING else grown
            notes.append(
                f"what all parts hold at the same time adds {grown / GIB:.2f} GiB"
            )
    return Rehearsal(
        command=command,
        device=where.device.name,
        ranks=where.ranks,
        memory=where.device.memory,
        host=gpu.rates.host,
        unit=adapted.unit,
        phases={n: c for n, c in gpu.ledger.phases.items() if c.kernels},
        notes=notes,
        faults=list(gpu.faults),
    )


def _growth(ledger: Ledger, repeats: float) -> int:
    """Bytes that parts of a unit that were not run would hold, by the growth from part to part.

    All videos of a step are scored before any is trained on, so their inputs add up.
    """
    alive = ledger.entered.get("score", [])
    if len(alive) < 2:
        return 0
    each = (alive[-1] - alive[0]) / (len(alive) - 1)
    return round(each * len(alive) * (repeats - 1))


def write(result: Rehearsal, file: Path) -> None:
    """Write a result as JSON."""
    phases = {}
    for name, costs in result.phases.items():
        phases[name] = {
            "seconds": round(costs.total_seconds(result.host), 4),
            "device_seconds": round(costs.device_seconds, 4),
            "host_seconds": round(costs.num_kernels * result.host, 4),
            "peak_gib": round(costs.peak / GIB, 3),
            "seconds_by_kernel": rounded(costs.seconds),
            "kernels": rounded(costs.kernels),
            "waits": rounded(costs.waits),
            "host_to_device_bytes": rounded(costs.h2d),
            "device_to_host_bytes": rounded(costs.d2h),
            "cast_bytes": rounded(costs.casts),
            "guesses": rounded(costs.guesses),
        }
    file.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "command": result.command,
        "device": result.device,
        "ranks": result.ranks,
        "unit": result.unit,
        "seconds": round(result.seconds, 3),
        "peak_gib": round(result.peak / GIB, 3),
        "phases": phases,
        "notes": result.notes,
        "faults": result.faults,
        "blind_spots": list(BLIND_SPOTS),
        "cpu_minutes": result.cpu_minutes,
        "process_gib": result.process_gib,
    }
    write_json(file, record)


def lines_of(result: Rehearsal) -> list[str]:
    """Format a result for the console."""
    return [
        f"rehearsal of a {result.command} as rank 0 of {result.ranks} x {result.device}, "
        f"{result.cpu_minutes:g} minutes of a core, {result.process_gib:g} GiB",
        *(f"  NOTE {note}" for note in result.notes),
        "",
        *_table(result),
        *_details(result),
        "",
        "  not seen by a rehearsal:",
        *(f"    {spot}" for spot in BLIND_SPOTS),
        *_verdict(result),
    ]


def _table(result: Rehearsal) -> Iterator[str]:
    """A line for every phase, and the sum."""
    yield f"  one {result.unit:24} seconds  peak GiB   kernels   waits  guesses"
    for name, costs in result.phases.items():
        seconds = costs.total_seconds(result.host)
        by_host = "  bound by Python" if seconds > costs.device_seconds else ""
        yield (
            f"    {name:22}{seconds:10,.2f}{costs.peak / GIB:10.2f}"
            f"{costs.num_kernels:10,.0f}{sum(costs.waits.values()):8,.0f}"
            f"{sum(costs.guesses.values()):9,.0f}{by_host}"
        )
    yield f"    {'together, but loading':22}{result.seconds:10,.2f}{result.peak / GIB:10.2f}"


def _details(result: Rehearsal) -> Iterator[str]:
    """The largest kernels of each phase, and waits, traffic and guesses by line."""
    for name, costs in result.phases.items():
        if name == LOADING:
            continue
        top = ", ".join(
            f"{kind} {value:.2f}" for kind, value in costs.seconds.most_common(TOP)
        )
        yield f"  {name}: seconds by kernel: {top}"
    # Of all phases together, as most lines belong to one of them.
    total = Costs()
    for name, costs in result.phases.items():
        if name != LOADING:
            total.add(costs)
    yield from _by_line("waits for the device", total.waits, 1.0, "")
    yield from _by_line("from host to device", total.h2d, MIB, " MiB")
    yield from _by_line("from device to host", total.d2h, MIB, " MiB")
    yield from _by_line("guessed values", total.guesses, 1.0, "")


def _by_line(title: str, counts: Counter[str], unit: float, name: str) -> Iterator[str]:
    if not counts:
        return
    yield f"  {title}, by line:"
    for where, value in counts.most_common(TOP):
        yield f"    {value / unit:12,.1f}{name}  {where}  {source_line(where)[:70]}"


def _verdict(result: Rehearsal) -> Iterator[str]:
    """Faults, and whether the peak fits."""
    for fault in dict.fromkeys(result.faults):
        yield f"  FAULT {fault}"
        where = fault.partition(": ")[0]
        yield f"        {source_line(where)}"
    peak = result.peak / GIB
    memory = result.memory / GIB
    fits = "fits" if peak <= memory else "DOES NOT FIT"
    yield f"  {fits}: tensors of {peak:.1f} GiB at most, the device has {memory:.1f} GiB"
