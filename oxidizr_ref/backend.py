"""The array-module shim: NumPy or CuPy, decided by the array itself.

No global "current device" exists. Code that needs a module asks for the one its operands live in, ``xp = xp_of(x)``, and
works on either. Only this file knows both modules by name. What moves between them: `place` and `to_device` to a device,
`to_host` back (which waits for it), `transfers.py` back without waiting. Integers that say what is to be read or added
where (token ids, experts, orders) live on the host always: there they are checked and sorted, and ops send them along.

It also holds the one rule for dtypes. Parameters are *stored* as f64, f32, f16 or bf16; everything is *computed* in float64
for f64 storage and in float32 for the others (`compute_dtype`, `to_compute`).
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Hashable
from typing import Any, TypeAlias, TypeVar

import ml_dtypes
import numpy as np

from oxidizr_ref.errors import DeviceError

#: A numpy.ndarray or a cupy.ndarray. Any, because CuPy is optional and has no stubs.
Array: TypeAlias = Any

STORAGE_DTYPES: dict[str, np.dtype[Any]] = {
    "f64": np.dtype(np.float64),
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}

T = TypeVar("T")

#: The package whose arrays live on a CUDA device.
DEVICE_PACKAGE = "cupy"

_HOST = (np.ndarray, np.generic, float, int)
_COMPUTED_IN = {STORAGE_DTYPES["f64"], STORAGE_DTYPES["f32"]}


def xp_of(x: Array) -> Any:
    """The module that ``x`` belongs to: ``numpy``, or ``cupy`` for an array on a CUDA device."""
    if isinstance(x, _HOST):
        return np
    return sys.modules[type(x).__module__.partition(".")[0]]


def on_device(x: Array) -> bool:
    """Whether ``x`` lives on a CUDA device."""
    return not isinstance(x, _HOST)


def device_of(x: Array) -> str:
    """``"cpu"`` or ``"gpu"``: where ``x`` lives."""
    return "gpu" if on_device(x) else "cpu"


def by_device(like: Array, host: T, device: T) -> T:
    """One of two sizes, by where ``like`` lives: a device wants its work in larger pieces than a core's cache holds."""
    return device if on_device(like) else host


def module_of(device: str) -> Any:
    """The array module of ``"cpu"`` or ``"gpu"``."""
    return importlib.import_module(DEVICE_PACKAGE) if device == "gpu" else np


def compute_dtype(storage: Any) -> np.dtype[Any]:
    """The dtype arithmetic is done in: float64 for float64 storage, else float32."""
    return STORAGE_DTYPES["f64"] if np.dtype(storage) == np.float64 else STORAGE_DTYPES["f32"]


def slot_dtype(storage: Any, optimizer_dtype: str) -> np.dtype[Any]:
    """The dtype of the optimizer's slots (``trainer.optimizer_dtype``): bf16 where it says so, else the compute dtype."""
    return STORAGE_DTYPES["bf16"] if optimizer_dtype == "bf16" else compute_dtype(storage)


def to_compute(x: Array) -> Array:
    """``x`` in its compute dtype; ``x`` itself where it already is, and where it holds integers or booleans."""
    if x.dtype in _COMPUTED_IN or x.dtype.kind in "iub":
        return x
    return x.astype(np.float32)


def owned(x: Array) -> Array:
    """A C-contiguous, aligned copy of ``x`` that no other array shares: what every persistent array must be.

    BLAS takes another path for another memory layout, and another path may round differently.
    """
    return xp_of(x).array(x, order="C", copy=True)


def product_operands(x: Array, weight: Array) -> tuple[Array, Array]:
    """``x`` and a parameter as their product reads them: in the compute dtype, or on a device in the 16 bits of ``weight``.

    A device has fast products of 16-bit numbers, which it sums in float32 (cuBLAS, CUBLAS_COMPUTE_32F) and rounds once, to
    16 bits: follow them by `to_compute`.
    """
    if on_device(weight) and weight.dtype.itemsize == 2:
        return x.astype(weight.dtype, copy=False), weight
    return to_compute(x), to_compute(weight)


# --- which device -----------------------------------------------------------------------------------------------------


def resolve_device(preference: str, *, demanded_by: str | None = None) -> str:
    """``"cpu"`` or ``"gpu"`` for a wish of either; a wish that no flag (``demanded_by``) demands falls back to the CPU.

    Raises DeviceError when a GPU is demanded and CuPy, the driver or a device is missing.
    """
    if preference != "gpu":
        return "cpu"
    why = _why_no_gpu()
    if why is None:
        return "gpu"
    if demanded_by is not None:
        raise DeviceError(f"{demanded_by}: {why}; train on the CPU without it")
    return "cpu"


def use_device(number: int, *, demanded_by: str) -> None:
    """Compute on CUDA device ``number`` (counted from 0) from now on. Raises DeviceError when there is none of it."""
    gpu = module_of("gpu")
    count = gpu.cuda.runtime.getDeviceCount()
    if not 0 <= number < count:
        raise DeviceError(f"{demanded_by}: CUDA has {count} device{'s' if count > 1 else ''}, numbered from 0")
    gpu.cuda.Device(number).use()


def _why_no_gpu() -> str | None:
    try:
        cupy = importlib.import_module(DEVICE_PACKAGE)
    except ImportError:
        return "CuPy is not installed (pip install 'oxidizr-ref[cuda12]' or '[cuda13]')"
    try:
        if not cupy.cuda.runtime.getDeviceCount():
            return "CUDA finds no device (nvidia-smi lists what the driver sees)"
        cupy.zeros(1).sum().item()  # compiles and runs: a toolkit that does not fit the driver shows here
    except Exception as error:  # CuPy raises errors of its own, for the driver, the runtime and the compiler
        return f"CUDA does not start ({' '.join(str(error).split())[:200]})"
    return None


# --- from one to the other --------------------------------------------------------------------------------------------


def to_host(x: Array) -> np.ndarray[Any, Any]:
    """``x`` as a NumPy array (a copy when it lives on a device, made when all that was asked of the device is done)."""
    if isinstance(x, _HOST):
        return np.asarray(x)
    host: np.ndarray[Any, Any] = x.get()
    return host


def to_device(x: np.ndarray[Any, Any], like: Array) -> Array:
    """The host array ``x`` where ``like`` lives. CuPy sends it through page-locked memory, and nobody waits."""
    return xp_of(like).asarray(x)


def place(x: np.ndarray[Any, Any], device: str) -> Array:
    """An `owned` copy of the host array ``x`` on ``"cpu"`` or ``"gpu"``."""
    return module_of(device).array(x, order="C", copy=True)


def assign(target: Array, source: Array) -> None:
    """Overwrite ``target`` by ``source`` (from anywhere), rounded to nearest where its dtype is smaller."""
    if on_device(target) or on_device(source):
        source = to_host(source).astype(target.dtype, copy=False)
    target[...] = to_device(source, target) if on_device(target) else source


def constant(make: Callable[..., np.ndarray[Any, Any]], *key: Hashable, like: Array) -> Array:
    """``make(*key)``, computed on the host once and kept where ``like`` lives. Nobody may change it."""
    if not on_device(like):
        return _on_host(make, key)
    return _on_device(make, key, xp_of(like), xp_of(like).cuda.runtime.getDevice())


@functools.lru_cache(maxsize=256)
def _on_host(make: Callable[..., np.ndarray[Any, Any]], key: tuple[Hashable, ...]) -> np.ndarray[Any, Any]:
    return make(*key)


@functools.lru_cache(maxsize=256)
def _on_device(make: Callable[..., np.ndarray[Any, Any]], key: tuple[Hashable, ...], xp: Any, number: int) -> Array:  # noqa: ARG001
    return xp.asarray(_on_host(make, key))
