"""Attention backends of diffusers, for one transformer instead of for the whole process.

diffusers' `set_attention_backend` also changes the default of every other model in the process,
and nothing undoes it. Here only the transformer's own layers are told.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

# The others raise on a CPU, in the first forward only.
CPU_BACKENDS = ("native", "_native_flash", "_native_math")


def require_backend(key: str, name: str, device: torch.device) -> None:
    """Load what a backend needs, for kernels of the hub by downloading them.

    Raises ValueError, naming the config's key, when a package is missing or too old, or when the
    backend cannot run on this kind of device.
    """
    from diffusers.models.attention_dispatch import (
        AttentionBackendName,
        _check_attention_backend_requirements,
        _maybe_download_kernel_for_backend,
    )

    if device.type == "cpu" and name not in CPU_BACKENDS:
        raise ValueError(
            f"{key}={name} does not run on a CPU; use one of {', '.join(CPU_BACKENDS)}"
        )
    try:
        _check_attention_backend_requirements(AttentionBackendName(name))
        _maybe_download_kernel_for_backend(AttentionBackendName(name))
    except (ImportError, RuntimeError, ValueError) as error:
        raise ValueError(f"{key}={name} cannot be used here: {error}") from error


def processors_of(transformer: nn.Module) -> list[Any]:
    """Return the objects that compute the attention of the transformer's layers."""
    processors = [
        getattr(module, "processor", None) for module in transformer.modules()
    ]
    return [
        processor
        for processor in processors
        if hasattr(processor, "_attention_backend")
    ]


def set_backend(transformer: nn.Module, name: str | None) -> None:
    """Let a transformer compute its attention with a backend; None keeps what it has."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    if name is None:
        return
    for processor in processors_of(transformer):
        processor._attention_backend = AttentionBackendName(name)


@contextmanager
def backend(transformer: nn.Module, name: str | None) -> Iterator[None]:
    """Inside, the transformer computes its attention with this backend; None changes nothing."""
    if name is None:
        yield
        return
    processors = processors_of(transformer)
    before = [processor._attention_backend for processor in processors]
    try:
        set_backend(transformer, name)
        yield
    finally:
        for processor, previous in zip(processors, before, strict=True):
            processor._attention_backend = previous
