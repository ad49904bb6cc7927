"""The array-module shim: NumPy or CuPy, decided by the array itself.

No global "current device" exists. Code that needs a module asks for the one its operands live in, ``xp = xp_of(x)``, and
works on either. Only this file knows both modules by name, and only `to_device` and `to_host` move data between them.

It also holds the one rule for dtypes. Parameters are *stored* as f64, f32, f16 or bf16; everything is *computed* in float64
for f64 storage and in float32 for the others (`compute_dtype`, `to_compute`).
"""

from __future__ import annotations

import importlib
import sys
from typing import Any, TypeAlias

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

_HOST = (np.ndarray, np.generic)
_COMPUTED_IN = {STORAGE_DTYPES["f64"], STORAGE_DTYPES["f32"]}


def xp_of(x: Array) -> Any:
    """The module that ``x`` belongs to: ``numpy``, or ``cupy`` for an array on a CUDA device."""
    if isinstance(x, _HOST):
        return np
    return sys.modules[type(x).__module__.partition(".")[0]]


def compute_dtype(storage: Any) -> np.dtype[Any]:
    """The dtype arithmetic is done in: float64 for float64 storage, else float32."""
    return STORAGE_DTYPES["f64"] if np.dtype(storage) == np.float64 else STORAGE_DTYPES["f32"]


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


def _why_no_gpu() -> str | None:
    try:
        cupy = importlib.import_module("cupy")
    except ImportError:
        return "CuPy is not installed (pip install 'oxidizr-ref[cuda12]' or '[cuda13]')"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CuPy raises its own CUDARuntimeError without a driver
        return f"CUDA does not start ({error})"
    # The trainer's CUDA path is not finished: saying so beats a wrong number.
    return f"{count} CUDA device(s) found, but this version trains on the CPU only"


def to_host(x: Array) -> np.ndarray[Any, Any]:
    """``x`` as a NumPy array (a copy when it lives on a device)."""
    if isinstance(x, _HOST):
        return np.asarray(x)
    host: np.ndarray[Any, Any] = x.get()
    return host


def to_device(x: np.ndarray[Any, Any], like: Array) -> Array:
    """The host array ``x`` where ``like`` lives."""
    return xp_of(like).asarray(x)


def segment_sum(rows: Array, ids: Array, num_segments: int) -> Array:
    """``out[i] = sum of rows[j] over all j with ids[j] == i``; each sum depends on its own rows, in the order of j, alone.

    This is the gradient of a row lookup. ``np.add.at`` is slow, and the atomic scatter of a device adds in varying order, so
    the rows are sorted by id (stably) and summed segment by segment.

    rows: ``[n, width]``; ids: int ``[n]`` in ``[0, num_segments)``. Returns ``[num_segments, width]``.
    """
    xp = xp_of(rows)
    out = xp.zeros((num_segments, rows.shape[1]), dtype=rows.dtype)
    if len(ids) == 0:
        return out
    order = xp.argsort(ids, kind="stable")
    sorted_ids = ids[order]
    starts = xp.flatnonzero(xp.concatenate([xp.ones(1, dtype=bool), sorted_ids[1:] != sorted_ids[:-1]]))
    out[sorted_ids[starts]] = xp.add.reduceat(rows[order], starts, axis=0)
    return out
