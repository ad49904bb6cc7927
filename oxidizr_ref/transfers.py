"""From a device to the host without waiting: numbers that are read a step late, and snapshots for checkpoints.

A device works through what is asked of it in order. Who asks for a copy of its arrays therefore gets them as they are then,
however soon they are overwritten: a copy into page-locked memory is asked for, then an event, and whoever needs the numbers
waits for the event. On the host the same calls give the arrays themselves, at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from oxidizr_ref.backend import Array, module_of, on_device, xp_of


class HostCopies(dict[str, "np.ndarray[Any, Any]"]):
    """Arrays by name on the host; of a device, private copies that are complete after `wait`."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        super().__init__({name: _begin_copy(array) for name, array in arrays.items()})
        there = next((array for array in arrays.values() if on_device(array)), None)
        self._event = None if there is None else _record(there)

    @property
    def private(self) -> bool:
        """Whether nobody else holds these arrays."""
        return self._event is not None

    def wait(self) -> None:
        """Until every copy is complete."""
        if self._event is not None:
            self._event.synchronize()


class Reading:
    """Numbers on their way to the host. arrays: of one element each."""

    def __init__(self, arrays: Sequence[Array]) -> None:
        self._copies = HostCopies({str(index): array for index, array in enumerate(arrays)})

    @property
    def at_once(self) -> bool:
        """Whether reading them waits for nothing."""
        return not self._copies.private

    def numbers(self) -> list[float]:
        """The numbers, in the order of the arrays. Waits for what the device was asked before it was asked for them."""
        self._copies.wait()
        return [float(copy.reshape(())) for copy in self._copies.values()]


def _begin_copy(array: Array) -> np.ndarray[Any, Any]:
    if not on_device(array):
        return np.asarray(array)
    xp = xp_of(array)
    memory = xp.cuda.alloc_pinned_memory(max(1, array.nbytes))
    host = np.frombuffer(memory, dtype=array.dtype, count=math.prod(array.shape)).reshape(array.shape)
    xp.asnumpy(array, out=host, blocking=False)
    return host


def _record(array: Array) -> Any:
    event = xp_of(array).cuda.Event()
    event.record()
    return event


def device_bytes() -> tuple[int, int]:
    """Bytes that arrays hold on the CUDA device now, and what its memory pool took for them in all."""
    pool = module_of("gpu").get_default_memory_pool()
    return pool.used_bytes(), pool.total_bytes()


def free_device_bytes() -> int:
    """Bytes that could still be had on the CUDA device: its own, and what the pool holds unused."""
    gpu = module_of("gpu")
    used, taken = device_bytes()
    return int(gpu.cuda.runtime.memGetInfo()[0]) + taken - used


def synchronize(device: str) -> None:
    """Wait until ``"gpu"`` has done all it was asked; nothing to wait for on ``"cpu"``."""
    if device == "gpu":
        module_of("gpu").cuda.get_current_stream().synchronize()
