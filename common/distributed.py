"""Ranks: who am I, gather rows, agree on numbers, and seeds that do not depend on who computes them.

Every collective here is called by all ranks, in the same order; with one rank they are identities and need no
process group.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import math
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def init_process_group(
    *, timeout_s: float = 1800.0, for_deepspeed: bool = True
) -> None:
    """Join the other ranks: under the deepspeed launcher, under torchrun, or alone in a plain python process.

    CPU tensors travel over gloo; with CUDA, its tensors travel over NCCL and the local rank's device is selected.
    ``for_deepspeed=False`` is for scripts that build no engine and need not wait for deepspeed's import (about 6 s).
    A second call does nothing. Raises RuntimeError when a rank is missing after ``timeout_s``.
    """
    if dist.is_initialized():
        return
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ["MASTER_PORT"] = str(_free_port())
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    elif for_deepspeed:
        skip_cpu_op_build()
    choose_interface()
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_s))


def skip_cpu_op_build() -> None:
    """Keep deepspeed from compiling its shared-memory all-reduce at the first start on a CPU (up to minutes).

    Plain gloo gives the same numbers. The switch is a private table of deepspeed, hence the guards: without it the
    only loss is the wait.
    """
    try:
        import deepspeed.ops as ops
    except ImportError:
        return
    table = getattr(ops, "__compatible_ops__", None)
    if isinstance(table, dict) and "deepspeed_shm_comm" in table:
        table["deepspeed_shm_comm"] = False


@contextmanager
def joined(*, timeout_s: float = 1800.0, for_deepspeed: bool = True) -> Iterator[None]:
    """`init_process_group`, and `shutdown` afterwards. An error on its way out, SystemExit too, leaves the group as it
    is, for its ranks may be anywhere, and only waits for this process's threads.
    """
    init_process_group(timeout_s=timeout_s, for_deepspeed=for_deepspeed)
    try:
        yield
        shutdown()
    finally:
        if world_size() > 1:
            _let_threads_finish()


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        several = dist.get_world_size() > 1
        dist.destroy_process_group()
        if several:
            _let_threads_finish()


def _let_threads_finish(patience_s: float = 10.0) -> None:
    """Return when no other thread of this process has anything to do, on Linux as its system sees it.

    A thread of gloo frees its collective's tensors after it has reported the result, and takes the interpreter's lock
    for it; where it asks while the interpreter ends, it aborts the whole finished process (exit code 134, "terminate
    called without an active exception"). Destroying the group would join those threads, if deepspeed did not keep a
    reference to it. A sleeping main thread hands them the lock; then they run, or wait for a processor, as long as they
    have something to free.
    """
    end, quiet = time.monotonic() + patience_s, 0
    while quiet < 3 and time.monotonic() < end:
        time.sleep(0.02)
        quiet = 0 if _busy_threads() else quiet + 1


def _busy_threads() -> int:
    """How many threads of this process run or could; the caller's is not counted. 0 where the system does not say."""
    states = []
    for stat in Path("/proc/self/task").glob("*/stat"):
        if stat.parent.name != str(threading.get_native_id()):
            with suppress(OSError):  # it ended meanwhile
                states.append(stat.read_text().rpartition(")")[2].split()[0])
    return states.count("R")


def rank() -> int:
    """This process's number, 0 when alone."""
    return (
        dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
    )


def world_size() -> int:
    """How many processes take part, 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """True on rank 0."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        # an all-reduce of one number, because dist.barrier would claim a CUDA device where NCCL is around
        dist.all_reduce(torch.zeros(1))


def gather_rows(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order: (n, ...) on each -> (n * world, ...). Detached; x itself when alone.

    Raises ValueError, on every rank, when the shapes or dtypes differ between ranks.
    """
    if world_size() == 1:
        return x
    kinds = gather_objects((tuple(x.shape), str(x.dtype)))
    if len(set(kinds)) > 1:
        raise ValueError(
            f"gather_rows needs one shape and dtype on all ranks, got {kinds}"
        )
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in kinds]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def gather_objects(value: T) -> list[T]:
    """The small Python value of every rank, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(value: T) -> T:
    """Rank 0's small Python value, on every rank. What the other ranks pass is ignored."""
    return gather_objects(value if is_main() else None)[0]


def mean_over_ranks(metrics: dict[str, float]) -> dict[str, float]:
    """MEAN over the ranks that have a value: a rank without the key, or with NaN there, does not count.

    Keys come in order of first appearance over the ranks; a key that is NaN everywhere stays NaN.
    """
    gathered = gather_objects({key: float(value) for key, value in metrics.items()})
    result = {}
    for key in dict.fromkeys(key for one in gathered for key in one):
        values = [
            one[key] for one in gathered if key in one and not math.isnan(one[key])
        ]
        result[key] = sum(values) / len(values) if values else math.nan
    return result


def max_over_ranks(x: float) -> float:
    """Maximum over ranks; NaN if any rank has NaN."""
    values = gather_objects(float(x))
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def sum_over_ranks(x: float) -> float:
    """SUM over ranks, rounded once, so that it does not depend on the order."""
    return math.fsum(gather_objects(float(x)))


def any_rank(is_B: Tensor) -> bool:
    """True where any of it is, on any rank: for loops that all ranks must leave at the same time."""
    found = is_B.any().float().cpu()
    if world_size() > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def differing_ranks(tensors: Mapping[str, Tensor]) -> list[int]:
    """Ranks that do not hold rank 0's names and bits in tensors that all should hold alike. All ranks call it."""
    if world_size() == 1:
        return []
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    found = gather_objects(digest.hexdigest())
    return [i for i, one in enumerate(found) if one != found[0]]


def raise_on_all(problem: Exception | None) -> None:
    """Raise where any rank has a problem: its own there, one of the same kind that names the rank on the others.

    All ranks call it after what may fail on one of them: where only one left, the others would wait for it.
    """
    if not any_rank(torch.tensor([problem is not None])):
        return
    said = gather_objects(None if problem is None else (type(problem), str(problem)))
    if problem is not None:
        raise problem
    place, (kind, text) = next(
        (i, one) for i, one in enumerate(said) if one is not None
    )
    raise kind(f"on rank {place}: {text}")


def own_batches(count: int, size: int) -> list[list[int]]:
    """Rows rank, rank + world, ... of ``count``, ``size`` at a time: the same NUMBER of batches on every rank.

    The last may be empty where another rank has one more. Whoever calls a sharded model (ZeRO 3) for every batch calls
    it for an empty one too, on anything, since its weights are gathered from all ranks.
    """
    own, most = range(rank(), count, world_size()), range(0, count, world_size())
    return [list(own[start : start + size]) for start in range(0, len(most), size)]


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) from what it is for: ``derive_seed(seed, step, prompt_index, member, "noise")``.

    SHA-256 over the type and text of every part, so it is the same on every rank, machine and Python version, and
    (1, 23) is not (12, 3) or ("1", 23). Raises TypeError for anything but int and str.
    """
    for part in parts:
        if type(part) not in (int, str):
            raise TypeError(
                f"a seed is derived from int and str, got {part!r} ({type(part).__name__})"
            )
    text = "".join(f"{type(part).__name__}:{len(str(part))}:{part};" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU random generator seeded by `derive_seed`; noise drawn on the CPU is the same on every kind of machine."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


VARIABLE = "GLOO_SOCKET_IFNAME"


_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


def choose_interface() -> None:
    """Tell gloo the interface that leads to rank 0, unless the user has named one or rank 0 is on loopback.

    Left alone, gloo listens on the address that this machine's own name stands for. Many systems put the name beside
    127.0.0.1 or 127.0.1.1 in /etc/hosts, and then ranks of other nodes cannot connect. The name of the interface may
    differ from node to node, so each finds its own.
    """
    if (
        VARIABLE not in os.environ
        and (name := interface_towards(os.environ.get("MASTER_ADDR", ""))) is not None
    ):
        os.environ[VARIABLE] = name


def interface_towards(host: str) -> str | None:
    """The interface from which packets to ``host`` leave, or that has its address; None where it is the loopback, the
    name stands for nothing or the address is not IPv4.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # of a datagram socket: nothing is sent
            own = probe.getsockname()[0]
    except OSError:
        return None
    if own.startswith("127."):
        return None
    return next(
        (name for _, name in socket.if_nameindex() if _address_of(name) == own), None
    )


def _address_of(interface: str) -> str | None:
    """Its first IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            reply = fcntl.ioctl(
                probe, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15])
            )
        except OSError:
            return None  # it has none
    return socket.inet_ntoa(reply[20:24])
