"""Real numbers behind tensors of the simulated device, as far as they are known.

A storage of at most ``limit`` bytes has a twin on the CPU as long as all that was written into it
is known: masks, lengths, positions and indices then steer Python as they would on a GPU. Of a
larger storage it may be known that all its elements are equal (`uniform`): a check for NaN has no
numbers and yet an expected result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from launch.rehearsal.memory import DeviceMemory

# Bytes of the largest storage with a twin.
LIMIT = 1 << 22


class Twins:
    """Twins by storage.

    everything  Gives a twin to every storage, of any size.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        *,
        everything: bool,
        limit: int = LIMIT,
    ) -> None:
        self.memory = memory
        self.everything = everything
        self.limit = limit
        # Both by the key of a storage.
        self._twins: dict[int, torch.UntypedStorage] = {}
        self._uniform: dict[int, Any] = {}
        memory.on_free = self._freed

    def fits(self, tensor: Tensor) -> bool:
        """True if the storage of a tensor may have a twin."""
        if self.everything:
            return True
        size = tensor.untyped_storage().nbytes()
        return size <= self.limit

    def real(self, tensor: Tensor) -> Tensor | None:
        """The numbers of a tensor of the device as a CPU tensor that shares them, or None."""
        twin = self._twins.get(_key(tensor))
        if twin is None:
            return None
        return _view(tensor, twin)

    def uniform(self, tensor: Tensor) -> Any:
        """The value that all elements are expected to have, or None."""
        return self._uniform.get(_key(tensor))

    def bind(self, tensor: Tensor, value: Tensor) -> None:
        """Make ``value`` the numbers of a tensor."""
        if not self.fits(tensor):
            return
        self.memory.track(tensor)
        key = _key(tensor)
        if key not in self._twins:
            size = tensor.untyped_storage().nbytes()
            self._twins[key] = torch.UntypedStorage(size)
        twin = self._twins[key]
        _view(tensor, twin).copy_(value)

    def expect(self, tensor: Tensor, value: Any) -> None:
        """Note that all elements are expected to be ``value``, and make a twin where it fits."""
        self.memory.track(tensor)
        key = _key(tensor)
        self._uniform[key] = value
        if self.fits(tensor):
            numbers = torch.full(
                tensor.shape,
                value,
                dtype=tensor.dtype,
            )
            self.bind(tensor, numbers)

    def forget(self, tensor: Tensor) -> None:
        """Drop the numbers of a tensor's storage."""
        key = _key(tensor)
        self._freed(key)

    def _freed(self, key: int) -> None:
        self._twins.pop(key, None)
        self._uniform.pop(key, None)


def _key(tensor: Tensor) -> int:
    # All views of a storage share it.
    return tensor.untyped_storage()._cdata


def _view(
    tensor: Tensor,
    storage: torch.UntypedStorage,
) -> Tensor:
    """A CPU tensor of another's dtype and strides on a storage."""
    view = torch.empty(0, dtype=tensor.dtype)
    return view.set_(
        storage,
        tensor.storage_offset(),
        tensor.size(),
        tensor.stride(),
    )
