"""Ranks: join them, gather values, agree on numbers, and derive seeds from their purpose.

Every collective here is called by all ranks, in the same order. With a single rank collectives
return their input and need no process group.
"""

from __future__ import annotations

import datetime
import hashlib
import math
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

INTERFACE_VARIABLE = "GLOO_SOCKET_IFNAME"


# ---- joining and leaving ----


def init_process_group(
    *, timeout_s: float = 1800.0, for_deepspeed: bool = True
) -> None:
    """Join the other ranks: under the deepspeed launcher, under torchrun, or alone.

    CPU tensors travel over gloo. With CUDA, GPU tensors travel over NCCL, and the device of the
    local rank is selected. ``for_deepspeed=False`` is for scripts that build no engine and need
    not import deepspeed (about 6 s). A second call does nothing. Raises RuntimeError when a rank
    is missing after ``timeout_s``.
    """
    if dist.is_initialized():
        return
    # 1. A plain python process is a world of its own.
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        os.environ.update(
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
        )
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ["MASTER_PORT"] = str(_free_port())

    # 2. Device, network interface, process group.
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    elif for_deepspeed:
        skip_cpu_op_build()
    choose_interface()
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_s))


def skip_cpu_op_build() -> None:
    """Keep deepspeed from compiling its shared-memory all-reduce at the first start on a CPU.

    The build takes up to minutes, and plain gloo gives the same numbers.
    """
    import deepspeed.ops

    # a private table of deepspeed; without it the only loss is the wait
    table = getattr(deepspeed.ops, "__compatible_ops__", {})
    if "deepspeed_shm_comm" in table:
        table["deepspeed_shm_comm"] = False


@contextmanager
def joined(**options: Any) -> Iterator[None]:
    """Join the ranks inside the block by `init_process_group`, and leave afterwards.

    After an error, SystemExit included, the group stays as it is, since its ranks may be anywhere;
    only the threads of this process are waited for.
    """
    init_process_group(**options)
    try:
        yield
        shutdown()
    finally:
        if world_size() > 1:
            _let_threads_finish()


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if not dist.is_initialized():
        return
    # Alone there are no threads of gloo.
    several = dist.get_world_size() > 1
    dist.destroy_process_group()
    if several:
        _let_threads_finish()


def _let_threads_finish(patience_s: float = 10.0) -> None:
    """Wait until no other thread of this process has work to do, as Linux reports it.

    A thread of gloo frees the tensors of its collective after it has reported the result, and takes
    the interpreter's lock for that. If it asks for the lock while the interpreter ends, it aborts
    the finished process (exit code 134, "terminate called without an active exception").
    Destroying the group would join those threads, if deepspeed held no reference to it. While the
    main thread sleeps, they get the lock.
    """
    # Give up after a while: a busy thread may be somebody else's.
    end = time.monotonic() + patience_s
    quiet = 0
    # three looks in a row: a thread may wait for a processor in between
    while quiet < 3 and time.monotonic() < end:
        time.sleep(0.02)
        quiet = 0 if _busy_threads() else quiet + 1


def _busy_threads() -> int:
    """Number of running threads besides the caller's; 0 where there is no /proc."""
    busy = 0
    for stat in Path("/proc/self/task").glob("*/stat"):
        if stat.parent.name == str(threading.get_native_id()):
            continue
        # OSError: the thread has ended
        with suppress(OSError):
            state = stat.read_text().rpartition(")")[2].split()[0]
            busy += int(state == "R")
    return busy


# ---- ranks ----


def rank() -> int:
    """Number of this process, 0 when alone."""
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes, 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """True on rank 0."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        # not dist.barrier, which would claim a CUDA device where NCCL is there
        dist.all_reduce(torch.zeros(1))


def rank_batches(count: int, size: int) -> list[list[int]]:
    """Batches of this rank's rows, see `DataRanks.batches`."""
    return DataRanks().batches(count, size)


@dataclass(frozen=True)
class DataRanks:
    """Ranks by the data that they hold: sets of consecutive ranks hold the same samples.

    ranks_per_sample  ranks of a set; 1 unless ranks share the tokens of a sample
                      (`generator.context_parallel`)
    """

    ranks_per_sample: int = 1

    @property
    def count(self) -> int:
        """The number of sets."""
        return world_size() // self.ranks_per_sample

    @property
    def index(self) -> int:
        """The number of this rank's set."""
        return rank() // self.ranks_per_sample

    @property
    def place(self) -> int:
        """The number of this rank within its set."""
        return rank() % self.ranks_per_sample

    def batches(self, count: int, size: int) -> list[list[int]]:
        """Batches of this set's rows (index, index + sets, ...), the same NUMBER on every rank.

        The last batch may be empty where another set has a row more. A sharded model (ZeRO 3)
        must be called for an empty batch too, on any input, since its weights are gathered from
        all ranks.
        """
        # The first set has most rows, and every set makes as many batches.
        rows = range(self.index, count, self.count)
        most = len(range(0, count, self.count))
        return [list(rows[start : start + size]) for start in range(0, most, size)]

    def gather_rows(self, x: Tensor) -> Tensor:
        """Rows (n, ...) of every set, in order, as its first rank has them; see `gather_rows`."""
        rows = gather_rows(x)
        sets = rows.view(self.count, self.ranks_per_sample, *x.shape)
        return sets[:, 0].flatten(0, 1)

    def gather_objects(self, value: T) -> list[T]:
        """The small Python value of every set, in order, as its first rank has it."""
        return gather_objects(value)[:: self.ranks_per_sample]


# ---- gathering ----


def gather_rows(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order: (n, ...) -> (n * world, ...), detached, on the CPU.

    Returns x itself when alone. For a few numbers a step: it sends Python objects. Raises
    ValueError, on every rank, when shapes or dtypes differ between ranks.
    """
    if world_size() == 1:
        return x
    parts = gather_objects(x.detach().cpu())
    kinds = [(tuple(part.shape), str(part.dtype)) for part in parts]
    if len(set(kinds)) > 1:
        raise ValueError(
            f"gather_rows needs the same shape and dtype on all ranks, got {kinds}"
        )
    return torch.cat(parts)


def gather_objects(value: T) -> list[T]:
    """The small Python value of every rank, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(value: T) -> T:
    """Rank 0's small Python value, on every rank; values of other ranks are ignored."""
    return gather_objects(value if is_main() else None)[0]


def mean_over_ranks(metrics: dict[str, float]) -> dict[str, float]:
    """MEAN of every metric over the ranks that have it; NaN counts as not having it.

    Keys come in order of first appearance over the ranks. A key that is NaN everywhere stays NaN.
    """
    # A rank may lack a metric.
    values: dict[str, list[float]] = {}
    floats = {key: float(value) for key, value in metrics.items()}
    for rank_metrics in gather_objects(floats):
        for key, value in rank_metrics.items():
            present = values.setdefault(key, [])
            if not math.isnan(value):
                present.append(value)
    return {
        key: sum(present) / len(present) if present else math.nan
        for key, present in values.items()
    }


def max_over_ranks(x: float) -> float:
    """Maximum over ranks; NaN if any rank has NaN."""
    values = gather_objects(float(x))
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def sum_over_ranks(x: float) -> float:
    """SUM over ranks, rounded once, so that it does not depend on the order."""
    return math.fsum(gather_objects(float(x)))


def any_rank(is_B: Tensor) -> bool:
    """True if any element is true on any rank; lets all ranks leave a loop together."""
    flag = is_B.any().float().cpu()
    if world_size() > 1:
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def differing_ranks(tensors: Mapping[str, Tensor]) -> list[int]:
    """Ranks whose tensors differ from rank 0's in a name or a bit."""
    if world_size() == 1:
        return []
    # A digest travels faster than the tensors.
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    digests = gather_objects(digest.hexdigest())
    return [number for number, text in enumerate(digests) if text != digests[0]]


def raise_on_all(problem: Exception | None) -> None:
    """Raise on every rank if any rank has a problem.

    A rank with a problem raises it; the others raise an error of the same type that names the
    rank. All ranks call this after an operation that may fail on some of them: if a single rank
    left, the others would wait for it.
    """
    if not any_rank(torch.tensor([problem is not None])):
        return
    # The errors of all ranks, by type and text.
    summary = None if problem is None else (type(problem), str(problem))
    summaries = gather_objects(summary)
    if problem is not None:
        raise problem
    for number, failed in enumerate(summaries):
        if failed is not None:
            kind, text = failed
            raise kind(f"on rank {number}: {text}")


# ---- seeds ----


def derive_seed(*parts: int | str) -> int:
    """Derive a seed in [0, 2^63) from its purpose: ``derive_seed(seed, step, prompt, "noise")``.

    SHA-256 over type and text of every part: the same on every rank, machine and Python version,
    and (1, 23) differs from (12, 3) and from ("1", 23). Raises TypeError for a part that is
    neither int nor str.
    """
    text = ""
    for part in parts:
        # not isinstance: bool is an int
        if type(part) not in (int, str):
            raise TypeError(
                f"a seed is derived from int and str, got {part!r} ({type(part).__name__})"
            )
        text += f"{type(part).__name__}:{len(str(part))}:{part};"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seeded_generator(*parts: int | str) -> torch.Generator:
    """CPU random generator seeded by `derive_seed`; CPU noise is the same on every machine."""
    return torch.Generator().manual_seed(derive_seed(*parts))


# ---- network ----


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def choose_interface() -> None:
    """Tell gloo which network interface leads to rank 0, unless the user has named it.

    By default gloo listens on the address of the machine's host name. Many systems map that name
    to 127.0.0.1 or 127.0.1.1 in /etc/hosts, so that ranks of other nodes cannot connect. The name
    of the interface may differ from node to node, so each node looks it up.
    """
    if INTERFACE_VARIABLE in os.environ:
        return
    # Otherwise gloo's default stays.
    name = interface_towards(os.environ.get("MASTER_ADDR", ""))
    if name is not None:
        os.environ[INTERFACE_VARIABLE] = name


def interface_towards(host: str) -> str | None:
    """Name of the network interface that packets to ``host`` leave from.

    None where that is the loopback, the host is unknown, or its address is not IPv4.
    """
    # deepspeed brings this package
    import psutil

    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            # a datagram socket: nothing is sent
            probe.connect((host, 9))
            address = probe.getsockname()[0]
    except OSError:
        return None
    if address.startswith("127."):
        return None
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return name
    return None
