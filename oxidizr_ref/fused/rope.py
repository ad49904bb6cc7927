"""Rotary position embedding (Su et al. 2021, section 3.4), in the rotate-half layout of Llama and Hugging Face.

Channel i of the first half and channel i of the second half form a pair, turned by the angle ``t * theta^(-2i/d)`` at
position t::

    y1 = x1 cos - x2 sin
    y2 = x2 cos + x1 sin
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from oxidizr_ref import ops, parallel
from oxidizr_ref.autograd import Function, Tensor
from oxidizr_ref.backend import Array, to_device, xp_of
from oxidizr_ref.fused.register import fused


@functools.lru_cache(maxsize=64)
def _host_tables(start: int, stop: int, width: int, theta: float, dtype: str) -> tuple[np.ndarray[Any, Any], ...]:
    inverse_frequency = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    angles = np.outer(np.arange(start, stop, dtype=np.float64), inverse_frequency)
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


@functools.lru_cache(maxsize=64)
def _tables_of_heads(*key: Any) -> tuple[np.ndarray[Any, Any], ...]:
    """``[cos, cos]`` and ``[-sin, sin]``, for whole heads, each ``[time, 1, width]``; arguments as of `_host_tables`."""
    cos, sin = _host_tables(*key)
    return np.concatenate([cos, cos], axis=-1)[:, None], np.concatenate([-sin, sin], axis=-1)[:, None]


def rope_tables(start: int, stop: int, like: Array, theta: float) -> tuple[Array, Array]:
    """cos and sin of the angles at positions start … stop-1, computed in float64. Each ``[stop-start, 1, width/2]``."""
    cos, sin = _host_tables(start, stop, like.shape[-1], theta, like.dtype.name)
    return to_device(cos[:, None], like), to_device(sin[:, None], like)


def rope_ref(x: Tensor, theta: float, start: int = 0) -> Tensor:
    """The same, composed from primitives."""
    half = x.shape[-1] // 2
    cos, sin = (Tensor(table) for table in rope_tables(start, start + x.shape[1], x.data, theta))
    x1, x2 = x[..., :half], x[..., half:]
    return ops.concatenate(x1 * cos - x2 * sin, x2 * cos + x1 * sin, axis=-1)


class RoPE(Function):
    def forward(self, x: Array, *, theta: float, start: int) -> Array:
        tables = _tables_of_heads(start, start + x.shape[1], x.shape[-1], theta, x.dtype.name)
        self.cos, self.sin = (to_device(table, x) for table in tables)
        return _rotate(x, self.cos, self.sin)

    def backward(self, dy: Array) -> tuple[Array, ...]:
        # The transpose of a rotation is the rotation by the opposite angle.
        return (_rotate(dy, self.cos, -self.sin),)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    """``y = x [cos, cos] + [x2, x1] [-sin, sin]``: rows of whole heads are longer, thus faster, than rows of half ones."""
    xp, half = xp_of(x), x.shape[-1] // 2
    y = xp.empty(x.shape, dtype=x.dtype)
    width = math.prod(x.shape[2:])
    steps, sequences = parallel.row_tiles(x.shape[1], width), parallel.row_tiles(x.shape[0], x.shape[1] * width)
    places = [(b, i) for b in sequences for i in steps]

    def rows(index: int) -> None:
        b, i = map(slice, *zip(*places[index], strict=True))
        tile = x[b, i]
        swapped = xp.concatenate([tile[..., half:], tile[..., :half]], axis=-1)
        swapped *= sin[i]
        tile = xp.multiply(tile, cos[i], out=y[b, i])
        tile += swapped

    parallel.for_each(len(places), rows)
    return y


@fused(rope_ref)
def rope(x: Tensor, theta: float, start: int = 0) -> Tensor:
    """Turn x ``[batch, time, heads, width]`` by its positions, which begin at ``start``. Returns the same shape."""
    return RoPE.apply(x, theta=theta, start=start)
