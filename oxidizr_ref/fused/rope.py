"""Rotary position embedding (Su et al. 2021, section 3.4), in the rotate-half layout of Llama and Hugging Face.

Channel i of the first half and channel i of the second half form a pair, turned by the angle ``t * theta^(-2i/d)`` at
position t::

    y1 = x1 cos - x2 sin
    y2 = x2 cos + x1 sin
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from oxidizr_ref import ops, parallel
from oxidizr_ref.autograd import Function, Tensor
from oxidizr_ref.backend import Array, constant, xp_of
from oxidizr_ref.fused.register import fused
from oxidizr_ref.kernels import Kernel


def _tables(start: int, stop: int, width: int, theta: float, dtype: str) -> np.ndarray[Any, Any]:
    """cos and sin of the angles at positions start … stop-1, computed in float64: ``[2, time, width/2]``."""
    inverse_frequency = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    angles = np.outer(np.arange(start, stop, dtype=np.float64), inverse_frequency)
    return np.stack([np.cos(angles), np.sin(angles)]).astype(dtype)


def _tables_of_heads(*key: Any) -> np.ndarray[Any, Any]:
    """``[cos, cos]`` and ``[-sin, sin]``, for whole heads: ``[2, time, 1, width]``; arguments as of `_tables`."""
    cos, sin = _tables(*key)
    return np.stack([np.concatenate([cos, cos], axis=-1), np.concatenate([-sin, sin], axis=-1)])[:, :, None]


def rope_tables(start: int, stop: int, like: Array, theta: float) -> tuple[Array, Array]:
    """cos and sin of the angles at positions start … stop-1. Each ``[stop-start, 1, width/2]``."""
    tables = constant(_tables, start, stop, like.shape[-1], theta, like.dtype.name, like=like)
    return tables[0, :, None], tables[1, :, None]


def rope_ref(x: Tensor, theta: float, start: int = 0) -> Tensor:
    """The same, composed from primitives."""
    half = x.shape[-1] // 2
    cos, sin = (Tensor(table) for table in rope_tables(start, start + x.shape[1], x.data, theta))
    x1, x2 = x[..., :half], x[..., half:]
    return ops.concatenate(x1 * cos - x2 * sin, x2 * cos + x1 * sin, axis=-1)


class RoPE(Function):
    def forward(self, x: Array, *, theta: float, start: int) -> Array:
        self.cos, self.sin = constant(_tables_of_heads, start, start + x.shape[1], x.shape[-1], theta, x.dtype.name, like=x)
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


@RoPE.on_device
class RoPEKernels(Function):
    """The same as a kernel: one thread turns one pair."""

    def forward(self, x: Array, *, theta: float, start: int) -> Array:
        self.cos, self.sin = rope_tables(start, start + x.shape[1], x, theta)
        return _turned(x, self.cos, self.sin, 1)

    def backward(self, dy: Array) -> tuple[Array, ...]:
        return (_turned(dy, self.cos, self.sin, -1),)


def _turned(x: Array, cos: Array, sin: Array, direction: int) -> Array:
    xp, heads, half = xp_of(x), math.prod(x.shape[2:-1]), x.shape[-1] // 2
    x = xp.ascontiguousarray(x)
    y, pairs = xp.empty_like(x), x.size // 2
    _ROTATE.threads(pairs, x, cos, sin, y, pairs, x.shape[1], heads, half, direction)
    return y


_ROTATE = Kernel("""
__global__ void rope(const T* x, const T* cosines, const T* sines, T* y,
                     long long pairs, long long time, long long heads, long long half, long long direction) {
    if (THREAD >= pairs) return;
    long long head = THREAD / half, i = THREAD % half, angle = head / heads % time * half + i;
    T c = cosines[angle], s = direction * sines[angle];
    long long first = head * 2 * half + i, second = first + half;
    T x1 = x[first], x2 = x[second];
    y[first] = x1 * c - x2 * s;
    y[second] = x2 * c + x1 * s;
}
""")


@fused(rope_ref)
def rope(x: Tensor, theta: float, start: int = 0) -> Tensor:
    """Turn x ``[batch, time, heads, width]`` by its positions, which begin at ``start``. Returns the same shape.

    Raises ValueError for an odd width.
    """
    if x.shape[-1] % 2:  # a kernel would not notice
        raise ValueError(f"rope turns pairs of channels; a width of {x.shape[-1]} is odd")
    return RoPE.apply(x, theta=theta, start=start)
