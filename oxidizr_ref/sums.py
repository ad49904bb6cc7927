"""Sums in a fixed order, where the libraries' own would not keep to one: rows by id, and running along an axis."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from oxidizr_ref.backend import Array, on_device, to_device, xp_of
from oxidizr_ref.kernels import Kernel

# --- rows with equal ids ----------------------------------------------------------------------------------------------


def segment_sum(rows: Array, ids: np.ndarray[Any, Any], num_segments: int) -> Array:
    """``out[i] = sum of rows[j] over all j with ids[j] == i``; each sum depends on its own rows, in the order of j, alone.

    This is the gradient of a row lookup. ``np.add.at`` is slow, and the atomic scatter of a device adds in varying order, so
    the rows are sorted by id (stably, on the host) and summed segment by segment.

    rows: ``[n, width]``; ids: int ``[n]`` in ``[0, num_segments)``, on the host. Returns ``[num_segments, width]``.
    """
    xp = xp_of(rows)
    out = xp.zeros((num_segments, rows.shape[1]), dtype=rows.dtype)
    if len(ids) == 0:
        return out
    order = np.argsort(ids, kind="stable")
    sorted_ids = ids[order]
    starts = np.flatnonzero(np.concatenate([np.ones(1, dtype=bool), sorted_ids[1:] != sorted_ids[:-1]]))
    if on_device(rows):
        _segment_sum_on_device(rows, order, np.append(starts, len(ids)), sorted_ids[starts], out)
    else:
        out[sorted_ids[starts]] = np.add.reduceat(rows[order], starts, axis=0)
    return out


def _segment_sum_on_device(rows: Array, order: Any, borders: Any, present: Any, out: Array) -> None:
    """CuPy's ``add.reduceat`` subtracts running sums, which cancels; a thread adds the rows of one segment in turn."""
    order, borders, present = (to_device(v.astype(np.int64, copy=False), rows) for v in (order, borders, present))
    width = rows.shape[1]
    _SEGMENT_SUM.threads(
        len(present) * width, xp_of(rows).ascontiguousarray(rows), order, borders, present, out, width, len(present)
    )


_SEGMENT_SUM = Kernel("""
__global__ void segment_sum(const T* rows, const long long* order, const long long* borders, const long long* present,
                            T* out, long long width, long long segments) {
    long long segment = THREAD / width, column = THREAD % width;
    if (segment >= segments) return;
    T sum = 0;
    for (long long j = borders[segment]; j < borders[segment + 1]; j++) sum += rows[order[j] * width + column];
    out[present[segment] * width + column] = sum;
}
""")

# --- along an axis ----------------------------------------------------------------------------------------------------


def running_sum(x: Array, axis: int, reverse: bool = False) -> Array:
    """The sums along ``axis`` from its first element to each, or from its last one (``reverse``). A new array.

    On a device one thread adds a lane in turn: what CuPy's own ``cumsum`` gives may vary from run to run.
    """
    xp = xp_of(x)
    if not on_device(x):
        return xp.flip(xp.cumsum(xp.flip(x, axis), axis=axis), axis) if reverse else xp.cumsum(x, axis=axis)
    x = xp.ascontiguousarray(x)
    y, length, inner = xp.empty_like(x), x.shape[axis], math.prod(x.shape[axis % x.ndim + 1 :])
    lanes = x.size // max(1, length)
    _RUNNING_SUM.threads(lanes, x, y, lanes, length, inner, int(reverse))
    return y


_RUNNING_SUM = Kernel("""
__global__ void running_sum(const T* x, T* y, long long lanes, long long length, long long inner, long long reverse) {
    if (THREAD >= lanes) return;
    long long begin = THREAD / inner * length * inner + THREAD % inner;
    T sum = 0;
    for (long long k = 0; k < length; k++) {
        long long at = begin + (reverse ? length - 1 - k : k) * inner;
        sum += x[at];
        y[at] = sum;
    }
}
""")
