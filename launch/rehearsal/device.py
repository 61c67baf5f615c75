"""A simulated GPU: torch's meta device computes shapes, and a dispatch mode does the rest.

    with SimulatedGpu(rates) as gpu:
        ...          # modules and tensors on torch.device("meta") are on the GPU

Everything that runs on the meta device passes `SimulatedGpu.__torch_dispatch__`, which

- refuses what CUDA refuses (`launch.rehearsal.cuda_rules`), with the line of the project;
- keeps the numbers of small storages on the CPU (`launch.rehearsal.twins`), so that masks, lengths
  and indices steer Python as on a GPU; with ``everything`` those of all storages, so that a tiny
  model really computes, on a device that is not the CPU;
- counts waits, traffic, kernels, their roofline seconds, and bytes by the lifetime of storages.

A number that is read and that nobody computed is a guess, which is counted with its line.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from launch.planning.roofline import kernel_seconds
from launch.rehearsal.blank_videos import BlankVideos
from launch.rehearsal.cuda_rules import (
    INDEXED,
    SimulatedCudaError,
    device_problem,
    dtype_problem,
    generator_problem,
)
from launch.rehearsal.fusion import Fusion
from launch.rehearsal.kernels import DeviceKernel, kernel_of
from launch.rehearsal.ledger import Ledger, place
from launch.rehearsal.memory import DeviceMemory, is_note
from launch.rehearsal.quick_shapes import quick_result
from launch.rehearsal.twins import Twins

if TYPE_CHECKING:
    from torch import Tensor

    from launch.planning.roofline import Rates

aten = torch.ops.aten
META = torch.device("meta")
# A tensor of at most so many numbers is guessed as different numbers between 0 and 1, a larger one
# as zeros: rewards that are all equal would teach nothing.
SMALL = 1 << 16
GUESSED_FLOAT = 0.5

# Results whose size depends on numbers: CUDA waits for them.
_SIZED_BY_DATA = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.equal.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
}
# What their results are expected to be where the numbers are not known.
_EXPECTED = {"isnan": False, "isinf": False, "isfinite": True}
# They turn expected values into expected values.
_LOGIC = {
    "any", "all", "logical_not", "bitwise_not", "logical_and", "bitwise_and", "logical_or",
    "bitwise_or", "_to_copy", "clone", "cat", "stack", "mul",
}  # fmt: skip
_ALLOCATIONS = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
}
_FILLS = {"zero_", "fill_"}


class SimulatedGpu(TorchDispatchMode):
    """The simulated device of one rank; use it as a context manager.

    rates       Of the device that is simulated.
    everything  Computes all numbers, for tiny models.
    ledger      Receives the counts.
    faults      What the device has refused, also where somebody caught the exception.
    """

    def __init__(self, rates: Rates, *, everything: bool = False) -> None:
        super().__init__()
        self.rates = rates
        self.everything = everything
        self.ledger = Ledger()
        self.memory = DeviceMemory(self.ledger)
        self.twins = Twins(self.memory, everything=everything)
        self.fusion = Fusion(self._charge)
        self.faults: list[str] = []
        self.device = META
        # Which kernel computes the next fused attention, and by which the earlier ones were.
        self.attention = "flash"
        self._attention_of: dict[int, str] = {}
        # Tokens that a language model without numbers chooses.
        self.choose_tokens: Callable[[Tensor], Tensor] | None = None
        self.videos = BlankVideos()
        self._lock = threading.RLock()
        self._silent = False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors(args, kwargs)
        on_gpu = [tensor for tensor in tensors if tensor.is_meta]
        target = kwargs.get("device")
        target = None if target is None else torch.device(target)
        if not on_gpu and (target is None or target.type != "meta"):
            blank = None
            if func is aten.cat.default and args[1:] in ((), (0,)):
                blank = self.videos.cat(args[0])
            return func(*args, **kwargs) if blank is None else blank
        # Rewards may run in a thread beside the rollout.
        with self._lock:
            return self._run(func, args, dict(kwargs), tensors, target)

    def _run(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        target: torch.device | None,
    ) -> Any:
        # 1. Between host and device, and from the device to Python.
        if func is aten._to_copy.default:
            return self._to_copy(args[0], kwargs, target)
        if func is aten.copy_.default:
            return self._copy_into(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return self._scalar(args[0])

        # 2. What CUDA refuses.
        self._check(func, args, kwargs, tensors)

        # 3. Results whose size depends on numbers.
        if func in _SIZED_BY_DATA:
            return self._sized_by_data(func, args, kwargs)
        if func in INDEXED:
            args = self._with_indices(args)
            tensors = _tensors(args, kwargs)

        # 4. The shapes, by the meta device.
        on_gpu = [tensor for tensor in tensors if tensor.is_meta]
        meta_args, meta_kwargs = args, kwargs
        if len(on_gpu) < len(tensors):
            meta_args, meta_kwargs = tree_map_only(
                torch.Tensor, _on_meta, (args, kwargs)
            )
        result = quick_result(func, meta_args, meta_kwargs)
        if result is None:
            result = func(*meta_args, **meta_kwargs)
        outputs = [tensor for tensor in _tensors((result,), {}) if tensor.is_meta]

        # 5. The costs and the numbers.
        note = func is aten.zeros_like.default and is_note()
        for output in outputs:
            if note:
                self.memory.leave_out(output)
            else:
                self.memory.track(output)
        written = _written(func, args, kwargs)
        self._count(func, args, on_gpu, written, outputs)
        if not note:
            self._compute(func, args, kwargs, written, outputs)
        return result

    # ------------------------------------------------------------------ refusals

    def _check(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        tensors: Sequence[Tensor],
    ) -> None:
        problem = (
            device_problem(func, args, tensors)
            or dtype_problem(func.overloadpacket.__name__, args)
            or generator_problem(kwargs.get("generator"))
        )
        if problem:
            self.refuse(f"{func}: {problem}")

    def refuse(self, problem: str) -> None:
        """Raise SimulatedCudaError with the line of the project, and keep its message."""
        message = f"{place()}: {problem}"
        self.faults.append(message)
        raise SimulatedCudaError(message)

    # ------------------------------------------------------------------ copies and waits

    def _to_copy(
        self, source: Tensor, kwargs: dict[str, Any], target: torch.device | None
    ) -> Tensor:
        """Tensor.to: between devices, or to another dtype on the device."""
        target = source.device if target is None else target
        dtype = kwargs.get("dtype") or source.dtype
        waits = not kwargs.get("non_blocking", False)
        if target.type != "meta":
            return self._to_host(source, dtype, waits=waits)
        layout = kwargs.get("memory_format") or torch.preserve_format
        if layout == torch.preserve_format and source.is_contiguous():
            result = torch.empty(source.shape, dtype=dtype, device="meta")
        else:
            result = torch.empty_like(
                source, dtype=dtype, device="meta", memory_format=layout
            )
        self.memory.track(result)
        if source.is_meta:
            if source.dtype != dtype:
                moved = source.numel() * (source.element_size() + dtype.itemsize)
                self.ledger.now.casts[f"{source.dtype}->{dtype}"] += moved
            func = aten._to_copy.default
            self._count(func, (source,), [source], [], [result])
            self._inherit(func, (source,), [source], [result])
            value = self.twins.real(source)
        else:
            self._from_host(source, waits=waits)
            value = source
        if value is not None:
            self.twins.bind(result, value)
        return result

    def _from_host(self, source: Tensor, *, waits: bool) -> None:
        # PyTorch waits for a copy, unless it is told not to.
        self.ledger.now.h2d[place()] += source.numel() * source.element_size()
        if waits:
            self.ledger.now.waits[place()] += 1

    def _to_host(self, source: Tensor, dtype: torch.dtype, *, waits: bool) -> Tensor:
        self.ledger.now.d2h[place()] += source.numel() * source.element_size()
        if waits:
            self.ledger.now.waits[place()] += 1
        value = self.twins.real(source)
        if value is None:
            return self.guess(source).to(dtype)
        return value.to(dtype, copy=True).contiguous()

    def _copy_into(
        self,
        target: Tensor,
        source: Tensor,
        non_blocking: bool = False,  # noqa: FBT001, FBT002
    ) -> Tensor:
        """Tensor.copy_ in every direction."""
        if not target.is_meta:
            value = self._to_host(source, target.dtype, waits=not non_blocking)
            return target.copy_(value)
        if source.is_meta:
            self._count(aten.copy_.default, (), [source], [target], [target])
            value = self.twins.real(source)
        else:
            self._from_host(source, waits=not non_blocking)
            value = source
        # Known in a part of the storage only is not known.
        known = self.twins.real(target) is not None
        whole = target.numel() * target.element_size()
        if value is None or not (known or whole == target.untyped_storage().nbytes()):
            self.twins.forget(target)
        else:
            self.twins.bind(target, value.expand(target.shape))
        return target

    def _scalar(self, tensor: Tensor) -> Any:
        """Tensor.item: Python waits for a number."""
        self.ledger.now.waits[place()] += 1
        self.ledger.now.d2h[place()] += tensor.element_size()
        value = self.twins.real(tensor)
        if value is not None:
            return value.item()
        self.ledger.now.guesses[place()] += 1
        if tensor.dtype == torch.bool:
            return True
        return GUESSED_FLOAT if tensor.is_floating_point() else 1

    def guess(self, tensor: Tensor) -> Tensor:
        """Make numbers for a tensor that Python reads and that nobody computed."""
        self.ledger.now.guesses[place()] += 1
        if tensor.dtype == torch.uint8 and tensor.dim() > 3:
            return self.videos.make(tensor.shape)
        value = torch.zeros(tensor.shape, dtype=tensor.dtype)
        expected = self.twins.uniform(tensor)
        if expected is not None:
            return value.fill_(expected)
        if tensor.dtype == torch.bool:
            return value.fill_(True)  # noqa: FBT003
        if tensor.is_floating_point() and 1 < tensor.numel() <= SMALL:
            numbers = torch.linspace(0, 1, tensor.numel(), dtype=torch.float32)
            return numbers.view(tensor.shape).to(tensor.dtype)
        return value

    # ------------------------------------------------------------------ sizes by data

    def _sized_by_data(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.ledger.now.waits[place()] += 1
        reals = tree_map_only(torch.Tensor, self._real_or_guess, (args, kwargs))
        result = func(*reals[0], **reals[1])
        return tree_map_only(torch.Tensor, self.upload, result)

    def _real_or_guess(self, tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        value = self.twins.real(tensor)
        return self.guess(tensor) if value is None else value

    def upload(self, value: Tensor) -> Tensor:
        """Put a CPU tensor on the device with its numbers, without counting traffic."""
        result = torch.empty_strided(
            value.size(), value.stride(), dtype=value.dtype, device="meta"
        )
        self.memory.track(result)
        self.twins.bind(result, value)
        return result

    def _with_indices(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Put indices on the device of what is indexed, and write masks out as indices."""
        table, indices, *rest = args
        done = []
        for index in indices:
            if index is None:
                done.append(None)
            elif index.dtype in (torch.bool, torch.uint8):
                mask = index
                if index.is_meta:
                    self.ledger.now.waits[place()] += 1
                    mask = self._real_or_guess(index)
                done += [self.upload(part) for part in mask.nonzero(as_tuple=True)]
            elif not index.is_meta:
                self.ledger.now.h2d[place()] += index.numel() * index.element_size()
                done.append(self.upload(index))
            else:
                done.append(index)
        return (table, done, *rest)

    # ------------------------------------------------------------------ costs

    def _count(
        self,
        func: Any,
        args: Sequence[Any],
        inputs: Sequence[Tensor],
        written: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> None:
        """Charge the kernel of an operation, or let its neighbours take it in."""
        if self._silent:
            return
        implementation = self.attention
        if func.overloadpacket.__name__.startswith("_scaled_dot_product"):
            implementation = self._implementation(func, args, outputs)
        kernel = kernel_of(
            func, args, inputs, written, outputs, attention=implementation
        )
        if kernel is None:
            return
        if self.fusion.takes(kernel):
            self.fusion.add(inputs, [*outputs, *written])
            return
        self.fusion.flush()
        self._charge(kernel)

    def _charge(self, kernel: DeviceKernel) -> None:
        costs = self.ledger.now
        costs.kernels[kernel.name] += 1
        costs.flops += kernel.flops
        costs.seconds[kernel.name] += kernel_seconds(
            kernel.kind,
            flops=kernel.flops,
            bytes_moved=kernel.bytes_moved,
            rates=self.rates,
        )

    def _implementation(
        self, func: Any, args: Sequence[Any], outputs: Sequence[Tensor]
    ) -> str:
        """Which attention this is; a backward pass is that of its forward."""
        # The log-sum-exp goes from a forward to its backward: output 1, argument 5.
        if "backward" in func.overloadpacket.__name__:
            key = args[5].untyped_storage()._cdata
            return self._attention_of.get(key, "flash")
        key = outputs[1].untyped_storage()._cdata
        self._attention_of[key] = self.attention
        return self.attention

    @contextmanager
    def attention_by(self, implementation: str) -> Iterator[None]:
        """Inside, fused attentions are computed by this implementation."""
        before = self.attention
        self.attention = implementation
        try:
            yield
        finally:
            self.attention = before

    @contextmanager
    def silently(self) -> Iterator[None]:
        """Inside, no kernel is counted."""
        before = self._silent
        self._silent = True
        try:
            yield
        finally:
            self._silent = before

    # ------------------------------------------------------------------ numbers

    def _compute(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        written: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> None:
        """Compute the numbers of small results on the CPU, where their inputs are known."""
        name = func.overloadpacket.__name__
        if name in _ALLOCATIONS:
            for output in outputs:
                self.twins.bind(output, torch.zeros((), dtype=output.dtype))
            return
        inputs = [t for t in _tensors(args, kwargs) if t.is_meta]
        sources = {tensor.untyped_storage()._cdata for tensor in inputs}
        fresh = [t for t in outputs if t.untyped_storage()._cdata not in sources]
        # A view shares the numbers of its storage.
        if not fresh and not written:
            return
        for tensor in written:
            if name in _FILLS and self._is_whole(tensor):
                self.twins.bind(tensor, torch.zeros((), dtype=tensor.dtype))

        results = [*fresh, *written]
        known = all(self.twins.real(tensor) is not None for tensor in inputs)
        # A CPU has no fused attention.
        known = known and not name.startswith("_scaled_dot_product")
        if known and all(map(self.twins.fits, results)):
            self._compute_twins(func, args, kwargs, written, outputs)
            return
        for tensor in written:
            self.twins.forget(tensor)
        if name in ("argmax", "searchsorted") and self.choose_tokens is not None:
            self.twins.bind(outputs[0], self.choose_tokens(outputs[0]))
        elif not written:
            self._inherit(func, args, inputs, fresh)

    def _compute_twins(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        written: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> None:
        real_args, real_kwargs = tree_map_only(
            torch.Tensor,
            lambda tensor: self.twins.real(tensor) if tensor.is_meta else tensor,
            (args, kwargs),
        )
        if "device" in real_kwargs:
            real_kwargs["device"] = torch.device("cpu")
        real_kwargs.pop("pin_memory", None)
        with torch.no_grad():
            result = func(*real_args, **real_kwargs)
        # What is written in place shares its numbers with the twin.
        if written:
            return
        values = _tensors((result,), {})
        for output, value in zip(outputs, values, strict=True):
            self.twins.bind(output, value)

    def _is_whole(self, tensor: Tensor) -> bool:
        size = tensor.numel() * tensor.element_size()
        return size == tensor.untyped_storage().nbytes()

    def _inherit(
        self,
        func: Any,
        args: Sequence[Any],
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> None:
        """Expect values of checks for NaN, and of what follows from them."""
        name = func.overloadpacket.__name__
        expected = _EXPECTED.get(name)
        if name in ("eq", "ne", "lt"):
            expected = _compared(name, args)
        elif name in _LOGIC and outputs and outputs[0].dtype == torch.bool:
            expected = self._follow(name, inputs)
        if expected is None:
            return
        for output in outputs:
            self.twins.expect(output, expected)

    def _follow(self, name: str, inputs: Sequence[Tensor]) -> bool | None:
        values = []
        for tensor in inputs:
            value = self.twins.uniform(tensor)
            real = self.twins.real(tensor)
            if value is None and real is not None and real.numel() == 1:
                value = real.item()
            values.append(value)
        if not values or None in values:
            return None
        if name in ("logical_not", "bitwise_not"):
            return not values[0]
        if name in ("logical_or", "bitwise_or"):
            return any(values)
        return all(values)


def _compared(name: str, args: Sequence[Any]) -> bool | None:
    """Expected value of a comparison that tells NaN, infinity, or a norm that is no norm."""
    first, second = args[:2]
    if name == "lt":
        return False if isinstance(second, int | float) and second == 0 else None
    if first is second:
        return name == "eq"
    if isinstance(second, float) and math.isinf(second):
        return name == "ne"
    return None


def _tensors(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """All tensors among arguments, also those in lists."""
    found = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [item for item in value if isinstance(item, torch.Tensor)]
    return found


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors of the device that an operation writes in place."""
    found = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = kwargs.get(argument.name)
        if number < len(args):
            value = args[number]
        values = value if isinstance(value, list | tuple) else [value]
        found += [v for v in values if isinstance(v, torch.Tensor) and v.is_meta]
    return found


def _on_meta(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta or tensor.dim() == 0 else tensor.to("meta")
