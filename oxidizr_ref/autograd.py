"""Reverse-mode automatic differentiation: a tape of `Function` nodes behind `Tensor` values.

Applying an op to tensors computes its result at once and, where a gradient will be wanted, remembers the op as a node that
points at the nodes of its inputs. `Tensor.backward` walks these nodes from the loss to the leaves, consumers before
producers, and applies the chain rule (Griewank & Walther 2008, ch. 3). A node points at nodes, not at tensors: an
intermediate value lives exactly as long as some backward formula needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from oxidizr_ref import parallel
from oxidizr_ref.backend import Array, compute_dtype, on_device, owned, to_compute, xp_of
from oxidizr_ref.pictured import Pictured
from oxidizr_ref.watch import watching

F = TypeVar("F", bound="type[Function]")

_gradients_wanted: ContextVar[bool] = ContextVar("gradients_wanted", default=True)


@contextmanager
def no_grad() -> Iterator[None]:
    """Inside this context nothing is remembered for a backward pass."""
    token = _gradients_wanted.set(False)
    try:
        yield
    finally:
        _gradients_wanted.reset(token)


class Tensor(Pictured):
    """An array that knows how it was computed.

    data: a NumPy or CuPy array. grad: None, or an array of the same shape in the compute dtype, which every `backward`
    adds to. Only leaves (tensors not computed from others) with ``requires_grad`` receive one. The arithmetic operators
    are attached by `ops`.
    """

    __slots__ = ("__weakref__", "data", "grad", "node", "requires_grad")
    __array_ufunc__ = None  # NumPy must not swallow `array * tensor` element by element

    def __init__(self, data: Any, requires_grad: bool = False) -> None:
        self.data: Array = data if hasattr(data, "dtype") else np.asarray(data)
        self.grad: Array | None = None
        self.node: Function | None = None
        self.requires_grad = requires_grad

    @property
    def shape(self) -> tuple[int, ...]:
        """The lengths of the axes."""
        shape: tuple[int, ...] = self.data.shape
        return shape

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the stored array."""
        dtype: np.dtype[Any] = self.data.dtype
        return dtype

    def item(self) -> float:
        """The only element as a Python float. On a device this waits for the computation."""
        return float(self.data.item())

    def detach(self) -> Tensor:
        """The same array without its history."""
        return Tensor(self.data)

    if TYPE_CHECKING:  # attached by the operator table of ops.py

        def __add__(self, other: Tensor | float) -> Tensor: ...
        def __radd__(self, other: float) -> Tensor: ...
        def __sub__(self, other: Tensor | float) -> Tensor: ...
        def __rsub__(self, other: float) -> Tensor: ...
        def __mul__(self, other: Tensor | float) -> Tensor: ...
        def __rmul__(self, other: float) -> Tensor: ...
        def __truediv__(self, other: Tensor | float) -> Tensor: ...
        def __rtruediv__(self, other: float) -> Tensor: ...
        def __neg__(self) -> Tensor: ...
        def __pow__(self, exponent: float) -> Tensor: ...
        def __matmul__(self, other: Tensor) -> Tensor: ...
        def __getitem__(self, index: Any) -> Tensor: ...
        def sum(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor: ...
        def mean(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor: ...
        def reshape(self, *shape: int) -> Tensor: ...
        def swapaxes(self, a: int, b: int) -> Tensor: ...

    def __repr__(self) -> str:
        origin = f", from {type(self.node).__name__}" if self.node else ""
        return f"Tensor(shape={self.shape}, dtype={self.dtype}{origin})"

    def backward(self, gradient: Array | None = None) -> None:
        """Add d(self)/d(leaf), weighted by ``gradient``, to ``leaf.grad`` of every leaf that requires one.

        ``gradient`` has this tensor's shape and may be left out for a scalar. What the forward pass kept for this is freed
        on the way, so a graph can be walked once; RuntimeError on the second try or when there is nothing to walk.
        """
        if gradient is None:
            if self.data.size != 1:
                raise RuntimeError(f"backward() of a tensor of shape {self.shape} needs a gradient of that shape")
            gradient = xp_of(self.data).ones_like(self.data)
        if gradient.shape != self.shape:
            raise RuntimeError(f"backward() of a tensor of shape {self.shape} got a gradient of shape {gradient.shape}")
        gradient = gradient.astype(compute_dtype(self.dtype), copy=False)
        if self.node is None:
            if not self.requires_grad:
                raise RuntimeError("backward() of a tensor that was not computed from any tensor requiring a gradient")
            _add_to_leaf(self, owned(gradient))
            return

        waiting, watcher = {self.node: gradient}, watching()
        for node in consumers_first(self.node):
            dy = waiting.pop(node)
            if watcher is not None:
                dy = watcher.gradient(node, dy)
            for parent, dx in zip(node.parents, node.differentiate(dy), strict=True):
                if parent is None or dx is None:
                    continue
                if isinstance(parent, Tensor):
                    _add_to_leaf(parent, owned(dx) if _may_alias(dx, dy) else dx)
                else:
                    waiting[parent] = parallel.add(waiting[parent], dx) if parent in waiting else dx
            node.free()
        if watcher is not None:
            watcher.walked()


class Function:
    """One application of an op: the node of the tape.

    A subclass writes ``forward(self, *arrays, **options) -> array``, keeping on ``self`` what it will need, and directly
    below it ``backward(self, dy) -> tuple of (array or None), one for each input``. Neither may change its arguments, and
    a returned gradient shares memory with nothing but ``dy``. ``self.needs[i]`` says whether input i wants a gradient.
    """

    #: Inputs arrive in their compute dtype. Ops that cast tile by tile themselves set this to False.
    casts_inputs: ClassVar[bool] = True
    #: The same op as CUDA kernels. Without them `forward` and `backward` work on a device as they are.
    kernels: ClassVar[type[Function] | None] = None

    forward: Callable[..., Array]
    backward: Callable[..., tuple[Array | None, ...]]

    needs: tuple[bool, ...]
    parents: tuple[Function | Tensor | None, ...]
    input_shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def apply(cls, *inputs: Tensor, **options: Any) -> Tensor:
        """Compute the op on ``inputs`` and, if any of them wants a gradient, remember it."""
        node = cls.kernels() if cls.kernels is not None and on_device(inputs[0].data) else cls()
        wanted = _gradients_wanted.get()
        node.needs = tuple(wanted and x.requires_grad for x in inputs)
        arrays = [to_compute(x.data) if node.casts_inputs else x.data for x in inputs]
        watcher = watching()
        if watcher is not None:
            arrays = watcher.operands(node, arrays)
        y = node.forward(*arrays, **options)
        if watcher is not None:
            y = watcher.result(node, y)
        result = Tensor(y, requires_grad=any(node.needs))
        if result.requires_grad:
            node.parents = tuple((x.node or x) if need else None for x, need in zip(inputs, node.needs, strict=True))
            node.input_shapes = tuple(x.shape for x in inputs)
            result.node = node
        return result

    @classmethod
    def on_device(cls, kernels: F) -> F:
        """Decorate the `Function` that does on a device, with kernels, what this one does: same inputs, same options."""
        cls.kernels = kernels
        return kernels

    def differentiate(self, dy: Array) -> tuple[Array | None, ...]:
        """`backward`, with the promise checked that each gradient has its input's shape."""
        gradients = self.backward(dy)
        for need, dx, shape in zip(self.needs, gradients, self.input_shapes, strict=True):
            assert not need or (dx is not None and dx.shape == shape), f"gradient of {type(self).__name__} for {shape}"
        return gradients

    def free(self) -> None:
        """Drop everything kept for the backward pass."""
        self.__dict__.clear()

    def living_parents(self) -> Iterator[Function | Tensor | None]:
        """The parents of a node that was not freed yet; RuntimeError if it was."""
        if "parents" not in self.__dict__:
            raise RuntimeError(f"the graph behind {type(self).__name__} was already walked backward and freed")
        return iter(self.parents)


def _may_alias(a: Array, b: Array) -> bool:
    return a is b or bool(xp_of(a).may_share_memory(a, b))


def _add_to_leaf(leaf: Tensor, gradient: Array) -> None:
    if leaf.grad is not None:
        gradient = leaf.grad + gradient
    # NumPy keeps the order of a transposed operand, and makes scalars of 0-d arrays; a persistent array is neither.
    leaf.grad = xp_of(gradient).asarray(gradient, dtype=compute_dtype(leaf.dtype), order="C")


def consumers_first(root: Function) -> list[Function]:
    """All nodes below ``root``, each before the nodes its inputs come from. No recursion: graphs are deep."""
    finished: list[Function] = []
    seen = {root}
    stack = [(root, root.living_parents())]
    while stack:
        node, parents = stack[-1]
        for parent in parents:
            if isinstance(parent, Function) and parent not in seen:
                seen.add(parent)
                stack.append((parent, parent.living_parents()))
                break
        else:
            finished.append(node)
            stack.pop()
    return finished[::-1]
