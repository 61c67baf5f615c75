"""A plan: memory of a rank by part, FLOPs and seconds by phase, disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from launch.planning.roofline import Rates, rates_of

if TYPE_CHECKING:
    from launch.planning.meter import Cost
    from launch.planning.models import Sizes

GIB = 2.0**30


@dataclass(frozen=True)
class Device:
    """An accelerator; ``memory`` is what a process can allocate, in bytes."""

    name: str
    memory: float


# Rates of their kernels are in `launch.planning.roofline`.
DEVICES = {
    "h100": Device("H100 SXM 80 GB", 79.6 * GIB),
    "h200": Device("H200 SXM 141 GB", 140.4 * GIB),
    "a100": Device("A100 SXM 80 GB", 79.3 * GIB),
    "4090": Device("RTX 4090 24 GB", 23.6 * GIB),
}
# An estimate for the driver, the communication library and gaps between allocated blocks.
RESERVE = 4 * GIB
# Elements, DeepSpeed's default of zero_optimization.reduce_bucket_size, and the name of the part.
REDUCE_BUCKET = 5e8
BUCKET = "reduce bucket"


@dataclass(frozen=True)
class Part:
    """Bytes on a rank; of the parts that are only ``temporary`` the largest counts."""

    name: str
    bytes: float
    temporary: bool = False


@dataclass(frozen=True)
class Phase:
    """FLOPs and seconds on a rank."""

    name: str
    flops: float
    seconds: float


@dataclass(frozen=True)
class Where:
    """Ranks and their device.

    utilisation  The share of the roofline that is reached.
    measured     A file of measured rates, see `launch.planning.roofline.read_measured`.
    """

    device: Device
    ranks: int = 1
    utilisation: float = 1.0
    measured: Path | None = None

    @property
    def key(self) -> str:
        """The device's key in `DEVICES`."""
        return next(key for key, device in DEVICES.items() if device == self.device)

    @property
    def rates(self) -> Rates:
        """Rates of the device's kernels."""
        return rates_of(self.key, self.measured)


@dataclass
class Plan:
    """Needs of a run on a rank.

    unit      The phases are those of a unit: update, step or prompt.
    count     Number of units that a rank does, 0 where it is not known.
    disk      Bytes of what the run saves.
    host      Bytes of a rank in the memory of its machine.
    facts     Lines about the models and the batch.
    problems  Why the ranks cannot share the batch.
    assumed   Which models do not exist, and which are planned instead.
    """

    # What is planned.
    where: Where
    unit: str
    count: int
    disk: float
    # What it needs, and what is wrong with it.
    parts: list[Part] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)
    host: list[Part] = field(default_factory=list)

    def add(self, name: str, size: float, *, temporary: bool = False) -> None:
        """Add a part of the memory."""
        self.parts.append(Part(name, size, temporary))

    def hold(self, name: str, size: float) -> None:
        """Add a part of the host's memory."""
        self.host.append(Part(name, size))

    def phase(self, name: str, cost: Cost) -> None:
        """Add a phase: what it costs, and the bytes that it needs while it runs."""
        seconds = cost.seconds / self.where.utilisation
        self.phases.append(Phase(name, cost.flops, seconds))
        if cost.peak:
            self.add(name, cost.peak, temporary=True)

    def divide(self, key: str, count: int) -> None:
        """Note a problem where the ranks do not divide a batch of ``count``."""
        ranks = self.where.ranks
        if count % ranks:
            self.problems.append(f"{ranks} ranks do not divide {key}={count}")

    @property
    def permanent(self) -> float:
        """Bytes of the permanent parts and the reserve."""
        return sum(part.bytes for part in self.parts if not part.temporary) + RESERVE

    @property
    def peak(self) -> float:
        """Bytes of the permanent parts, the reserve, and the largest temporary part."""
        temporary = [part.bytes for part in self.parts if part.temporary]
        return self.permanent + max(temporary, default=0.0)

    @property
    def seconds(self) -> float:
        """Seconds of a unit, SUM over its phases."""
        return sum(phase.seconds for phase in self.phases)


def training_parts(
    name: str,
    sizes: Sizes,
    *,
    zero_stage: int,
    ranks: int,
    bucket: float = REDUCE_BUCKET,
) -> list[Part]:
    """List the memory of a trained model under ZeRO (Rajbhandari et al. 2020, section 5).

    The fp32 master, exp_avg and exp_avg_sq take 12 bytes a trained parameter, and 8 in ZeRO 0,
    whose masters are the weights. Stage 1 splits them over ranks, stage 2 the gradients too, which
    are fp32 from there on, and stage 3 the weights too. A step of the optimizer takes an fp32
    gradient and two more copies. DeepSpeed collects gradients in a buffer of ``bucket`` elements
    before it reduces them.
    """

    def share(stage: int) -> int:
        return ranks if zero_stage >= stage else 1

    # In ZeRO 0 the weights are the masters.
    state = (12.0 if zero_stage else 8.0) * sizes.trained
    step = 12.0 * sizes.trained
    gradients = 4.0 * sizes.trained if zero_stage >= 2 else sizes.trained_bytes
    # In the dtype of the gradients, and only under ZeRO.
    buffer = bucket * sizes.trained_bytes / sizes.trained if zero_stage else 0.0
    return [
        Part(f"{name}: weights", sizes.bytes / share(3)),
        Part(f"{name}: gradients", gradients / share(2)),
        Part(f"{name}: optimizer", state / share(1)),
        Part(f"{name}: {BUCKET}", buffer),
        Part(f"{name}: optimizer's step", step / share(1), temporary=True),
    ]
