"""Functions of PyTorch and diffusers that choose by the device, as they choose on CUDA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from alignment import scoring

if TYPE_CHECKING:
    from torch import Tensor, nn

    from launch.rehearsal.device import SimulatedGpu

# diffusers' names of attention backends, and the kernels that they are.
BACKENDS = {
    "native": "",
    "_native_flash": "flash",
    "_native_efficient": "efficient",
    "_native_math": "math",
    "_native_cudnn": "cudnn",
    "flash": "flash",
    "flash_hub": "flash",
    "flash_varlen": "flash",
    "_flash_3": "fa3",
    "_flash_3_hub": "fa3",
    "_flash_varlen_3": "fa3",
    "sage": "sage",
    "sage_hub": "sage",
    "sage_varlen": "sage",
    "_sage_qk_int8_pv_fp16_cuda": "sage",
    "_sage_qk_int8_pv_fp8_cuda": "sage",
    "_sage_qk_int8_pv_fp8_cuda_sm90": "sage",
}


@contextmanager
def as_on_cuda(gpu: SimulatedGpu) -> Iterator[None]:
    """Inside, attention, tensors of numbers, threads and compilation are those of the device."""
    from torch.utils._device import _device_constructors

    from launch.server import app

    # PyTorch caches the functions that obey `with torch.device(...)` at their first use. With the
    # replacements in that cache, the real torch.tensor would ignore the device ever after, and
    # transformers would leave the buffers of every model that it loads uninitialised.
    _device_constructors()
    functional = torch.nn.functional
    with ExitStack() as stack:
        for owner, name, value in (
            (functional, "scaled_dot_product_attention", _attention(gpu)),
            (torch, "tensor", _tensor(gpu, torch.tensor)),
            (torch, "as_tensor", _tensor(gpu, torch.as_tensor)),
            (torch.Tensor, "new_tensor", _new_tensor(torch.Tensor.new_tensor)),
            (scoring, "ThreadPoolExecutor", _inline(gpu)),
            (app, "ThreadPoolExecutor", _inline(gpu)),
            (torch.nn.Module, "compile", _compile(gpu)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        _patch_diffusers(gpu, stack)
        yield


# ------------------------------------------------------------------ attention


def _attention(gpu: SimulatedGpu) -> Callable[..., Tensor]:
    """SDPA as CUDA chooses: flash without a mask in half precision, else the efficient kernel."""
    plain = torch.nn.functional.scaled_dot_product_attention

    def sdpa(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,  # noqa: FBT001, FBT002
        scale: float | None = None,
        enable_gqa: bool = False,  # noqa: FBT001, FBT002
    ) -> Tensor:
        if not query.is_meta or gpu.everything:
            return plain(
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        _check(gpu, query, key, value, attn_mask)
        half = query.dtype.itemsize == 2
        implementation = "efficient"
        if half and attn_mask is None:
            implementation = gpu.attention
        elif gpu.attention == "cudnn" and half:
            implementation = "cudnn"

        # The kernels read the key of a group of queries once.
        if enable_gqa and query.shape[1] != key.shape[1]:
            copies = query.shape[1] // key.shape[1]
            with gpu.silently():
                key = key.repeat_interleave(copies, 1)
                value = value.repeat_interleave(copies, 1)
        # They want an additive mask, which the backward pass needs again.
        bias = attn_mask
        if bias is not None and bias.dtype == torch.bool:
            bias = torch.zeros(bias.shape, dtype=query.dtype, device="meta")
        with gpu.attention_by(implementation):
            result = torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, scale=scale
            )[0]
        if result.grad_fn is not None:
            result.grad_fn.metadata["bias"] = bias
        return result

    return sdpa


def _check(gpu: SimulatedGpu, query: Tensor, *others: Tensor | None) -> None:
    """Refuse keys, values and masks of another device, and keys and values of another dtype."""
    key, value, mask = others
    for name, tensor in (("key", key), ("value", value), ("attn_mask", mask)):
        if tensor is not None and not tensor.is_meta:
            gpu.refuse(f"scaled_dot_product_attention: {name} is on the cpu")
    if not query.dtype == key.dtype == value.dtype:
        gpu.refuse(
            "scaled_dot_product_attention: query, key and value are "
            f"{query.dtype}, {key.dtype} and {value.dtype}"
        )


def _patch_diffusers(gpu: SimulatedGpu, stack: ExitStack) -> None:
    """Let every attention backend of diffusers run, by its kernel's rate."""
    try:
        from diffusers.models import attention_dispatch as dispatch
    except ImportError:
        return
    registry = dispatch._AttentionBackendRegistry
    for name in ("_check_attention_backend_requirements", "_check_shape"):
        if hasattr(dispatch, name):
            stack.enter_context(mock.patch.object(dispatch, name, _nothing))
    for name in ("_maybe_download_kernel_for_backend",):
        if hasattr(dispatch, name):
            stack.enter_context(mock.patch.object(dispatch, name, _nothing))

    # The native function computes all of them, at another rate.
    native = registry._backends[dispatch.AttentionBackendName.NATIVE]
    backends = dict(registry._backends)
    arguments = dict(registry._supported_arg_names)
    for backend in dispatch.AttentionBackendName:
        kernel = BACKENDS.get(backend.value)
        if kernel:
            backends[backend] = _by(gpu, kernel, native)
            arguments[backend] = arguments[dispatch.AttentionBackendName.NATIVE]
    stack.enter_context(mock.patch.object(registry, "_backends", backends))
    stack.enter_context(mock.patch.object(registry, "_supported_arg_names", arguments))
    constraints = {backend: [] for backend in backends}
    stack.enter_context(mock.patch.object(registry, "_constraints", constraints))


def _by(gpu: SimulatedGpu, kernel: str, native: Callable[..., Any]) -> Any:
    def attend(*args: Any, **kwargs: Any) -> Any:
        with gpu.attention_by(kernel):
            return native(*args, **kwargs)

    return attend


def _nothing(*_: Any, **__: Any) -> None:
    """Stand in for a check of what is installed."""


# ------------------------------------------------------------------ tensors of numbers


def _tensor(gpu: SimulatedGpu, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.tensor, which would forget the numbers of a meta tensor; CUDA copies them."""

    def tensor(
        data: Any, *, dtype: Any = None, device: Any = None, **options: Any
    ) -> Tensor:
        target = torch.empty(0).device if device is None else torch.device(device)
        if isinstance(data, torch.Tensor) and device is None:
            return plain(data, dtype=dtype, **options)
        if target.type != "meta":
            return plain(data, dtype=dtype, device=device, **options)
        wants_grad = options.pop("requires_grad", False)
        if isinstance(data, torch.Tensor) and data.is_meta:
            return data.to(dtype=dtype or data.dtype)
        made = plain(data, dtype=dtype, device="cpu", **options).to("meta")
        return made.requires_grad_() if wants_grad else made

    return tensor


def _new_tensor(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def new_tensor(self: Tensor, data: Any, **options: Any) -> Tensor:
        device = torch.device(options.pop("device", None) or self.device)
        options.setdefault("dtype", self.dtype)
        if device.type != "meta":
            return plain(self, data, device=device, **options)
        return torch.tensor(data, device=device, **options)

    return new_tensor


# ------------------------------------------------------------------ threads and compilation


def _inline(gpu: SimulatedGpu) -> type[Executor]:
    """An executor without a thread: a dispatch mode belongs to the thread that entered it."""

    class InlineExecutor(Executor):
        """Runs every call when it is submitted, in a phase of its own."""

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def submit(
            self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any
        ) -> Future[Any]:
            future: Future[Any] = Future()
            before = gpu.ledger.phase
            gpu.ledger.enter("in a thread")
            # An error ends the rehearsal here.
            future.set_result(fn(*args, **kwargs))
            gpu.ledger.enter(before)
            return future

    return InlineExecutor


def _compile(gpu: SimulatedGpu) -> Callable[..., None]:
    """torch.nn.Module.compile: nothing is compiled, and pointwise kernels are counted fused."""

    def compile_module(self: nn.Module, *_: Any, **__: Any) -> None:
        forward = self.forward

        def fused(*args: Any, **kwargs: Any) -> Any:
            with gpu.fusion.region():
                return forward(*args, **kwargs)

        self.forward = fused

    return compile_module
