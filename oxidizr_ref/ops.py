"""The primitive operations: each one class, its forward directly above its backward; the table of names at the end.

Together they are enough to write every architecture of this package down plainly. The fast versions in `fused` are
checked against such compositions. In backward code a leading ``d`` means "gradient of the loss with respect to".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple

from oxidizr_ref import parallel
from oxidizr_ref.autograd import Function, Tensor
from oxidizr_ref.backend import Array, compute_dtype, to_compute, to_device, xp_of
from oxidizr_ref.sums import running_sum, segment_sum

Operand: TypeAlias = Tensor | float
Axes: TypeAlias = int | tuple[int, ...] | None


def as_tensor(value: Operand, like: Tensor) -> Tensor:
    """``value`` itself, or an array or number as a tensor in the compute dtype (and on the device) of ``like``."""
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, int | float | np.number | type(like.data)):
        raise TypeError(f"expected a tensor or a number, found {type(value).__name__}")
    return Tensor(xp_of(like.data).asarray(value, dtype=compute_dtype(like.dtype)))


def unbroadcast(dy: Array, shape: tuple[int, ...]) -> Array:
    """Undo broadcasting: sum ``dy`` over every axis along which an operand of ``shape`` was repeated, one at a time."""
    while dy.ndim > len(shape):
        dy = dy.sum(axis=0)
    for axis, length in enumerate(shape):
        if length == 1 and dy.shape[axis] != 1:
            dy = dy.sum(axis=axis, keepdims=True)
    return dy


def _axes(axis: Axes, ndim: int) -> tuple[int, ...]:
    """The axes meant by ``axis`` (None: all), as sorted non-negative numbers."""
    return tuple(range(ndim)) if axis is None else tuple(sorted(normalize_axis_tuple(axis, ndim)))


# --- arithmetic on two operands, with broadcasting --------------------------------------------------------------------


class Add(Function):
    def forward(self, a: Array, b: Array) -> Array:
        self.shapes = a.shape, b.shape
        return parallel.add(a, b) if a.shape == b.shape else a + b

    def backward(self, dy: Array) -> tuple[Array, ...]:
        return unbroadcast(dy, self.shapes[0]), unbroadcast(dy, self.shapes[1])


class Sub(Function):
    def forward(self, a: Array, b: Array) -> Array:
        self.shapes = a.shape, b.shape
        return a - b

    def backward(self, dy: Array) -> tuple[Array, ...]:
        return unbroadcast(dy, self.shapes[0]), unbroadcast(-dy, self.shapes[1])


class Mul(Function):
    def forward(self, a: Array, b: Array) -> Array:
        self.a, self.b = a, b
        return a * b

    def backward(self, dy: Array) -> tuple[Array, ...]:
        return unbroadcast(dy * self.b, self.a.shape), unbroadcast(dy * self.a, self.b.shape)


class Div(Function):
    def forward(self, a: Array, b: Array) -> Array:
        self.a, self.b = a, b
        return a / b

    def backward(self, dy: Array) -> tuple[Array, ...]:
        da = dy / self.b
        return unbroadcast(da, self.a.shape), unbroadcast(-da * self.a / self.b, self.b.shape)


class MatMul(Function):
    """Matrix product over the last two axes; the leading ones broadcast. Both operands have at least two axes."""

    def forward(self, a: Array, b: Array) -> Array:
        if a.ndim < 2 or b.ndim < 2:
            raise ValueError(f"matmul needs matrices, not shapes {a.shape} and {b.shape}")
        self.a, self.b = a, b
        return xp_of(a).matmul(a, b)

    def backward(self, dy: Array) -> tuple[Array, ...]:
        xp = xp_of(dy)
        da = xp.matmul(dy, self.b.swapaxes(-1, -2)) if self.needs[0] else None
        db = xp.matmul(self.a.swapaxes(-1, -2), dy) if self.needs[1] else None
        return (
            None if da is None else unbroadcast(da, self.a.shape),
            None if db is None else unbroadcast(db, self.b.shape),
        )


class Where(Function):
    def forward(self, a: Array, b: Array, *, condition: Array) -> Array:
        self.condition, self.shapes = condition, (a.shape, b.shape)
        return xp_of(a).where(condition, a, b)

    def backward(self, dy: Array) -> tuple[Array, ...]:
        zero = xp_of(dy).zeros((), dtype=dy.dtype)
        da = xp_of(dy).where(self.condition, dy, zero)
        db = xp_of(dy).where(self.condition, zero, dy)
        return unbroadcast(da, self.shapes[0]), unbroadcast(db, self.shapes[1])


# --- functions of one operand, element by element ---------------------------------------------------------------------


class Power(Function):
    def forward(self, x: Array, *, exponent: float) -> Array:
        self.x, self.exponent = x, exponent
        return x**exponent

    def backward(self, dy: Array) -> tuple[Array, ...]:
        if self.exponent == 0:
            return (xp_of(dy).zeros_like(dy),)
        return (dy * self.exponent * self.x ** (self.exponent - 1),)


class Exp(Function):
    def forward(self, x: Array) -> Array:
        self.y = xp_of(x).exp(x)
        return self.y

    def backward(self, dy: Array) -> tuple[Array, ...]:
        return (dy * self.y,)


class Log(Function):
    def forward(self, x: Array) -> Array:
        self.x = x
        return xp_of(x).log(x)

    def backward(self, dy: Array) -> tuple[Array, ...]:
        return (dy / self.x,)


class Sqrt(Function):
    def forward(self, x: Array) -> Array:
        self.y = xp_of(x).sqrt(x)
        return self.y

    def backward(self, dy: Array) -> tuple[Array, ...]:
        return (0.5 * dy / self.y,)


class Sin(Function):
    def forward(self, x: Array) -> Array:
        self.x = x
        return xp_of(x).sin(x)

    def backward(self, dy: Array) -> tuple[Array, ...]:
        return (dy * xp_of(dy).cos(self.x),)


class Cos(Function):
    def forward(self, x: Array) -> Array:
        self.x = x
        return xp_of(x).cos(x)

    def backward(self, dy: Array) -> tuple[Array, ...]:
        return (-dy * xp_of(dy).sin(self.x),)


class Tanh(Function):
    def forward(self, x: Array) -> Array:
        self.y = xp_of(x).tanh(x)
        return self.y

    def backward(self, dy: Array) -> tuple[Array, ...]:
        return (dy * (1 - self.y * self.y),)


class Sigmoid(Function):
    """1 / (1 + exp(-x)), written with tanh so that no exponential can overflow."""

    def forward(self, x: Array) -> Array:
        self.y = 0.5 * xp_of(x).tanh(0.5 * x) + 0.5
        return self.y

    def backward(self, dy: Array) -> tuple[Array, ...]:
        return (dy * self.y * (1 - self.y),)


class Softplus(Function):
    """log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|)): the exponential's argument is never positive."""

    def forward(self, x: Array) -> Array:
        xp = xp_of(x)
        self.x = x
        return xp.maximum(x, 0) + xp.log1p(xp.exp(-xp.abs(x)))

    def backward(self, dy: Array) -> tuple[Array, ...]:
        return (dy * (0.5 * xp_of(dy).tanh(0.5 * self.x) + 0.5),)


# --- along axes -------------------------------------------------------------------------------------------------------


class Sum(Function):
    """Sum over some axes, one axis at a time, so that the order of additions does not depend on the memory layout."""

    def forward(self, x: Array, *, axis: Axes = None, keepdims: bool = False) -> Array:
        self.shape, self.axes, self.keepdims = x.shape, _axes(axis, x.ndim), keepdims
        for a in reversed(self.axes):
            x = x.sum(axis=a, keepdims=keepdims)
        return x

    def backward(self, dy: Array) -> tuple[Array, ...]:
        xp = xp_of(dy)
        if not self.keepdims:
            dy = xp.expand_dims(dy, self.axes)
        return (xp.broadcast_to(dy, self.shape).copy(),)


class Max(Function):
    """Largest element along one axis; equal largest elements share the gradient evenly."""

    def forward(self, x: Array, *, axis: int = -1, keepdims: bool = False) -> Array:
        y = x.max(axis=axis, keepdims=True)
        self.largest, self.axis, self.keepdims = x == y, axis, keepdims
        return y if keepdims else y.squeeze(axis)

    def backward(self, dy: Array) -> tuple[Array, ...]:
        if not self.keepdims:
            dy = xp_of(dy).expand_dims(dy, self.axis)
        share = self.largest.sum(axis=self.axis, keepdims=True).astype(dy.dtype)
        return (self.largest * (dy / share),)


class Softmax(Function):
    def forward(self, x: Array, *, axis: int = -1) -> Array:
        e = xp_of(x).exp(x - x.max(axis=axis, keepdims=True))
        self.y, self.axis = e / e.sum(axis=axis, keepdims=True), axis
        return self.y

    def backward(self, dy: Array) -> tuple[Array, ...]:
        return (self.y * (dy - (dy * self.y).sum(axis=self.axis, keepdims=True)),)


class LogSoftmax(Function):
    def forward(self, x: Array, *, axis: int = -1) -> Array:
        xp = xp_of(x)
        shifted = x - x.max(axis=axis, keepdims=True)
        self.y, self.axis = shifted - xp.log(xp.exp(shifted).sum(axis=axis, keepdims=True)), axis
        return self.y

    def backward(self, dy: Array) -> tuple[Array, ...]:
        return (dy - xp_of(dy).exp(self.y) * dy.sum(axis=self.axis, keepdims=True),)


class CumSum(Function):
    """Running sum along one axis; its gradient is the running sum from the other end."""

    def forward(self, x: Array, *, axis: int) -> Array:
        self.axis = axis
        return running_sum(x, axis)

    def backward(self, dy: Array) -> tuple[Array, ...]:
        return (running_sum(dy, self.axis, reverse=True),)


# --- shape ------------------------------------------------------------------------------------------------------------


class Reshape(Function):
    def forward(self, x: Array, *, shape: tuple[int, ...]) -> Array:
        self.shape = x.shape
        return x.reshape(shape)

    def backward(self, dy: Array) -> tuple[Array, ...]:
        return (dy.reshape(self.shape),)


class Transpose(Function):
    def forward(self, x: Array, *, order: tuple[int, ...]) -> Array:
        self.order = order
        return x.transpose(order)

    def backward(self, dy: Array) -> tuple[Array, ...]:
        return (dy.transpose(tuple(int(a) for a in np.argsort(self.order))),)


class BroadcastTo(Function):
    def forward(self, x: Array, *, shape: tuple[int, ...]) -> Array:
        self.shape = x.shape
        return xp_of(x).broadcast_to(x, shape)

    def backward(self, dy: Array) -> tuple[Array, ...]:
        return (unbroadcast(dy, self.shape),)


class GetItem(Function):
    """Basic indexing (integers, slices, None, Ellipsis). Rows by an array of ids are `lookup`, elements `take_along`."""

    def forward(self, x: Array, *, index: Any) -> Array:
        parts = index if isinstance(index, tuple) else (index,)
        if not all(part is None or part is Ellipsis or isinstance(part, int | slice) for part in parts):
            raise TypeError(f"a tensor takes integers and slices as index, not {index!r}; see lookup and take_along")
        self.index, self.shape = index, x.shape
        return x[index]

    def backward(self, dy: Array) -> tuple[Array, ...]:
        dx = xp_of(dy).zeros(self.shape, dtype=dy.dtype)
        dx[self.index] = dy
        return (dx,)


class Pad(Function):
    """Zeros before and after along each axis."""

    def forward(self, x: Array, *, widths: tuple[tuple[int, int], ...]) -> Array:
        self.inner = tuple(slice(before, before + n) for (before, _), n in zip(widths, x.shape, strict=True))
        return xp_of(x).pad(x, widths)

    def backward(self, dy: Array) -> tuple[Array, ...]:
        return (dy[self.inner],)


class Concatenate(Function):
    def forward(self, *parts: Array, axis: int) -> Array:
        (self.axis,) = _axes(axis, parts[0].ndim)
        self.lengths = [part.shape[self.axis] for part in parts]
        return xp_of(parts[0]).concatenate(parts, axis=self.axis)

    def backward(self, dy: Array) -> tuple[Array, ...]:
        before = (slice(None),) * self.axis
        ends = [sum(self.lengths[: i + 1]) for i in range(len(self.lengths))]
        return tuple(dy[(*before, slice(end - n, end))] for end, n in zip(ends, self.lengths, strict=True))


class Whole(Function):
    """The array that `Part`s are taken from: their gradients meet in one array, ``dx``."""

    def forward(self, x: Array) -> Array:
        self.dx: Array = None
        return x

    def backward(self, dy: Array) -> tuple[Array, ...]:
        return (dy,)


class Part(Function):
    """A slice of a `Whole`. Slices that overlap, or `GetItem`, would each need an array of the whole for its gradient."""

    def forward(self, x: Array, *, index: tuple[slice, ...], whole: Whole | None) -> Array:
        self.index, self.whole, self.shape = index, whole, x.shape
        return x[index]

    def differentiate(self, dy: Array) -> tuple[Array | None, ...]:
        assert self.whole is not None
        dx, first = self.whole.dx, self.whole.dx is None
        if first:
            dx = self.whole.dx = xp_of(dy).zeros(self.shape, dtype=dy.dtype)
        dx[self.index] = dy
        return (dx if first else None,)


# --- lookups by integer arrays (int64 NumPy arrays, wherever the tensor lives) ----------------------------------------


class Lookup(Function):
    """``y[...] = table[ids[...]]``: rows of a table, for ids in [0, rows). Only the rows that are read are cast."""

    casts_inputs = False

    def forward(self, table: Array, *, ids: Array) -> Array:
        self.ids, self.rows = ids, table.shape[0]
        return to_compute(table[to_device(ids, table)])

    def backward(self, dy: Array) -> tuple[Array, ...]:
        rows = dy.reshape(self.ids.size, math.prod(dy.shape[self.ids.ndim :]))
        dtable = segment_sum(rows, self.ids.reshape(-1), self.rows)
        return (dtable.reshape(self.rows, *dy.shape[self.ids.ndim :]),)


class TakeAlong(Function):
    """``y[..., j] = x[..., ids[..., j]]``, ids in [0, n); an element taken twice receives both gradients."""

    def forward(self, x: Array, *, ids: Array) -> Array:
        self.ids, self.shape = ids, x.shape
        return xp_of(x).take_along_axis(x, to_device(ids, x), axis=-1)

    def backward(self, dy: Array) -> tuple[Array, ...]:
        width, rows = self.shape[-1], math.prod(self.shape[:-1])
        flat_ids = self.ids.reshape(rows, self.ids.shape[-1]) + width * np.arange(rows)[:, None]
        return (segment_sum(dy.reshape(-1, 1), flat_ids.reshape(-1), rows * width).reshape(self.shape),)


# --- the table of names: each is called with tensors first, then the keyword options of the class's forward ------------

exp, log, sqrt, sin, cos = Exp.apply, Log.apply, Sqrt.apply, Sin.apply, Cos.apply
tanh, sigmoid, softplus, matmul, where = Tanh.apply, Sigmoid.apply, Softplus.apply, MatMul.apply, Where.apply
amax, softmax, log_softmax, cumsum = Max.apply, Softmax.apply, LogSoftmax.apply, CumSum.apply
reshape, transpose, broadcast_to = Reshape.apply, Transpose.apply, BroadcastTo.apply
pad, concatenate, lookup, take_along = Pad.apply, Concatenate.apply, Lookup.apply, TakeAlong.apply


def silu(x: Tensor) -> Tensor:
    """``x * sigmoid(x)`` (Elfwing et al. 2017)."""
    return Mul.apply(x, sigmoid(x))


def mean(x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
    """The sum over ``axis`` (default: all axes) divided by the number of elements summed."""
    return Sum.apply(x, axis=axis, keepdims=keepdims) / math.prod(x.shape[a] for a in _axes(axis, x.ndim))


def split(x: Tensor, sizes: Sequence[int], axis: int = -1) -> tuple[Tensor, ...]:
    """``x`` cut along an axis into neighbouring parts of these sizes, which add up to its length."""
    assert sum(sizes) == x.shape[axis], (sizes, x.shape)
    before = (slice(None),) * (axis % x.ndim)
    whole = Whole.apply(x)
    ends = itertools.accumulate(sizes)
    indices = [(*before, slice(end - size, end)) for end, size in zip(ends, sizes, strict=True)]
    return tuple(Part.apply(whole, index=index, whole=whole.node) for index in indices)


def swapaxes(x: Tensor, a: int, b: int) -> Tensor:
    """``x`` with two axes exchanged."""
    order = list(range(x.ndim))
    order[a], order[b] = order[b], order[a]
    return Transpose.apply(x, order=tuple(order))


def _power(x: Tensor, exponent: float) -> Tensor:
    if isinstance(exponent, Tensor):
        raise TypeError("the exponent must be a number; write exp(log(x) * y) for a tensor exponent")
    # A Python number leaves the dtype alone; a NumPy one would raise float32 to float64.
    return Power.apply(x, exponent=exponent.item() if isinstance(exponent, np.number) else exponent)


OPERATORS = {
    "__add__": lambda a, b: Add.apply(a, as_tensor(b, like=a)),
    "__radd__": lambda a, b: Add.apply(as_tensor(b, like=a), a),
    "__sub__": lambda a, b: Sub.apply(a, as_tensor(b, like=a)),
    "__rsub__": lambda a, b: Sub.apply(as_tensor(b, like=a), a),
    "__mul__": lambda a, b: Mul.apply(a, as_tensor(b, like=a)),
    "__rmul__": lambda a, b: Mul.apply(as_tensor(b, like=a), a),
    "__truediv__": lambda a, b: Div.apply(a, as_tensor(b, like=a)),
    "__rtruediv__": lambda a, b: Div.apply(as_tensor(b, like=a), a),
    "__neg__": lambda a: Mul.apply(a, as_tensor(-1.0, like=a)),
    "__pow__": _power,
    "__matmul__": lambda a, b: MatMul.apply(a, b),
    "__getitem__": lambda x, index: GetItem.apply(x, index=index),
    "sum": lambda x, axis=None, keepdims=False: Sum.apply(x, axis=axis, keepdims=keepdims),
    "mean": mean,
    "reshape": lambda x, *shape: Reshape.apply(x, shape=shape),
    "swapaxes": swapaxes,
}
for _name, _operation in OPERATORS.items():
    setattr(Tensor, _name, _operation)
