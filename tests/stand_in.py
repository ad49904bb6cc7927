"""A strict stand-in for CuPy (14.2) on machines without a GPU: its names, on memory of the host, with less forgiveness.

What CuPy refuses, or lets pass on a machine that it would slow down or make irreproducible, is refused here or counted:

* a device array never becomes a NumPy array by itself, and never mixes with one: in by `asarray` and `array`, out by ``get``
  and `asnumpy`; whatever makes the host wait is counted (`counted`);
* memory that nobody wrote holds NaN or nonsense; indices out of range wrap; of several writes to one element any may win;
* copies out of the device that nobody waited for have not arrived;
* numbers of 16 bits can be moved and multiplied as matrices, and nothing else;
* memory is counted, and can be limited, as CuPy's pool does it.

Kernels run through cuda_on_host.py. Nothing here is fast.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import cuda_on_host
import ml_dtypes
import numpy as np

import oxidizr_ref.backend

__version__ = "14.2.0"

_F16, _BF16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
_NUMBERS = (bool, int, float, complex, np.generic)
_GUARD = 64  # bytes before and after each array, where no kernel may write

# --- what the host waited for -----------------------------------------------------------------------------------------

#: How often the host waited for all that the device was asked, and for an event.
syncs = 0
waits = 0

#: Copies on their way to the host: where to, and the numbers.
_arriving: list[tuple[np.ndarray, np.ndarray]] = []
#: Held to change what all threads share. What is collected meanwhile gives its memory back under it, too.
_lock = threading.RLock()


class Counts(NamedTuple):
    """What `counted` counted."""

    syncs: int
    waits: int


@contextmanager
def counted() -> Iterator[Callable[[], Counts]]:
    """Gives a function that tells how often the host has waited since."""
    before = syncs, waits
    yield lambda: Counts(syncs - before[0], waits - before[1])


def _synchronize() -> None:
    global syncs
    syncs += 1
    _arrive(_arriving[:])


def _arrive(copies: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Complete those ``copies`` that are still on their way."""
    with _lock:
        wanted = {id(copy) for copy in copies}
        for out, numbers in [copy for copy in _arriving if id(copy) in wanted]:
            out[...] = numbers
        _arriving[:] = [copy for copy in _arriving if id(copy) not in wanted]


# --- memory -----------------------------------------------------------------------------------------------------------

_TOTAL = 1 << 34
#: The most bytes that arrays held at once since it was set to 0.
peak_bytes = 0


class OutOfMemoryError(MemoryError):
    """As CuPy words it."""


class _Pool:
    def __init__(self) -> None:
        self.used = self.total = self.limit = 0

    def take(self, nbytes: int) -> int:
        """Count a new array; CuPy gives memory in multiples of 512 bytes."""
        global peak_bytes
        size = -(-nbytes // 512) * 512
        with _lock:
            if self.limit and self.used + size > self.limit:
                raise OutOfMemoryError(
                    f"Out of memory allocating {size:,} bytes "
                    f"(allocated so far: {self.used:,} bytes, limit set to: {self.limit:,} bytes)."
                )
            self.used += size
            self.total = max(self.total, self.used)
            peak_bytes = max(peak_bytes, self.used)
        return size

    def give_back(self, size: int) -> None:
        with _lock:
            self.used -= size

    def used_bytes(self) -> int:
        return self.used

    def total_bytes(self) -> int:
        return self.total

    def free_bytes(self) -> int:
        return self.total - self.used

    def free_all_blocks(self) -> None:
        self.total = self.used

    def set_limit(self, size: int | None = None, fraction: float | None = None) -> None:
        self.limit = int(size or _TOTAL * (fraction or 0))

    def get_limit(self) -> int:
        return self.limit


_pool = _Pool()


def get_default_memory_pool() -> _Pool:
    return _pool


class _Memory:
    """What an array and all its views live in."""

    __slots__ = ("__weakref__", "guarded", "root")

    def __init__(self, root: np.ndarray, nbytes: int, guarded: bool = False) -> None:
        self.root, self.guarded = root, guarded
        weakref.finalize(self, _pool.give_back, _pool.take(nbytes)).atexit = False

    def intact(self) -> bool:
        return not self.guarded or bool((self.root[:_GUARD] == 255).all() and (self.root[-_GUARD:] == 255).all())


def _new(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    """An array that nobody wrote to: NaN, True, or integers far below zero; between guards."""
    shape = tuple(shape) if isinstance(shape, tuple | list) else (shape,)
    if any(isinstance(n, ndarray) for n in shape):
        raise TypeError("a shape is made of Python integers")
    dtype = np.dtype(float if dtype is None else dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if nbytes < 0:
        raise ValueError("negative dimensions are not allowed")
    root = np.full(nbytes + 2 * _GUARD, 255, dtype=np.uint8)
    inner = root[_GUARD : _GUARD + nbytes]
    if dtype.kind in "iub":
        inner[...] = 1 if dtype.kind == "b" else 0x9B
    return ndarray(inner.view(dtype).reshape(shape, order="F" if order == "F" else "C"), _Memory(root, nbytes, True))


def _wrapped(result: Any, operands: list[ndarray]) -> Any:
    """What NumPy made of the ``operands``: a view of one of them, or an array of its own."""
    if isinstance(result, list | tuple):
        return type(result)([_wrapped(part, operands) for part in result])
    result = np.asarray(result)
    if result.dtype.hasobject:
        raise TypeError("CuPy has no arrays of objects")
    for operand in operands:
        if np.may_share_memory(result, operand._memory.root):
            return ndarray(result, operand._memory)
    return ndarray(result, _Memory(result, result.nbytes))


# --- functions --------------------------------------------------------------------------------------------------------


def _raw(value: Any, found: list[ndarray]) -> Any:
    """What NumPy works on; the device arrays in it are added to ``found``. TypeError for arrays of the host."""
    if isinstance(value, ndarray):
        found.append(value)
        return value._array
    if isinstance(value, list | tuple):
        return type(value)(_raw(part, found) for part in value)
    if isinstance(value, np.ndarray) or (hasattr(value, "__array__") and not isinstance(value, np.generic | type)):
        raise TypeError(f"Unsupported type {type(value)}: arrays of the host and of the device do not mix")
    return value


def _refuse_16_bits(name: str, arrays: list[ndarray]) -> None:
    if any(x.dtype in (_F16, _BF16) for x in arrays):
        raise TypeError(f"{name}: numbers of 16 bits can be moved and multiplied as matrices, and nothing else")


def _apply(function: Any, args: Any, kwargs: Any, *, moves: bool = False) -> Any:
    """Call NumPy's ``function``. moves: it only moves numbers, whatever they are."""
    found: list[ndarray] = []
    raw_args, raw_kwargs = _raw(args, found), {key: _raw(value, found) for key, value in kwargs.items()}
    if not moves:
        _refuse_16_bits(function.__name__, found)
    with np.errstate(all="ignore"):  # a device warns of nothing
        result = function(*raw_args, **raw_kwargs)
    result = kwargs["out"] if kwargs.get("out") is not None else _wrapped(result, found)
    if not moves:
        _refuse_16_bits(function.__name__, [result] if isinstance(result, ndarray) else [])
    return result


def _elementwise(name: str) -> Callable[..., Any]:
    function = getattr(np, name)

    def call(*args: Any, out: ndarray | None = None, dtype: Any = None) -> Any:
        if len(args) != function.nin or any(not isinstance(x, (ndarray, *_NUMBERS)) for x in args):
            raise TypeError(f"{name} of {', '.join(str(type(x)) for x in args)}")
        if out is not None and not isinstance(out, ndarray):
            raise TypeError(f"{name}: out is {type(out)}")
        return _apply(function, args, {"out": out} | ({} if dtype is None else {"dtype": dtype}))

    return call


def _from_array(function: Any, *, moves: bool = False, syncing: bool = False) -> Callable[..., Any]:
    """``function`` of at least one device array. syncing: the host learns the result's shape, or Thrust makes it wait."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(x, ndarray | list | tuple) for x in args) or "where" in kwargs or "initial" in kwargs:
            raise TypeError(f"{function.__name__} of {args} with {kwargs}")
        if syncing:
            _synchronize()
        return _apply(function, args, kwargs, moves=moves)

    return call


#: What CuPy has as NumPy has it, by what it does. What needs more care has a function of its own further down.
_NAMES = {
    "elementwise": """abs absolute add arctan bitwise_and bitwise_or bitwise_xor ceil conj conjugate copysign cos cosh divide
        equal exp exp2 expm1 floor floor_divide fmod greater greater_equal hypot invert isfinite isinf isnan left_shift less
        less_equal log log1p log2 logical_and logical_not logical_or maximum minimum multiply negative not_equal power
        reciprocal remainder right_shift rint sign signbit sin sinh sqrt square subtract tanh true_divide""",
    "moving": """atleast_1d broadcast_arrays broadcast_to concatenate copy expand_dims flip hstack moveaxis pad ravel repeat
        reshape roll split squeeze stack swapaxes tile transpose vstack""",
    "computing": """all amax amin any argmax argmin array_equal clip count_nonzero dot imag isclose max mean min outer prod
        real std sum tensordot tril triu var where""",
    "waiting": "argsort argwhere flatnonzero nonzero sort",
}

_FUNCTIONS = (
    {name: _elementwise(name) for name in _NAMES["elementwise"].split()}
    | {name: _from_array(getattr(np, name), moves=True) for name in _NAMES["moving"].split()}
    | {name: _from_array(getattr(np, name)) for name in _NAMES["computing"].split()}
    | {name: _from_array(getattr(np, name), syncing=True) for name in _NAMES["waiting"].split()}
)


def __getattr__(name: str) -> Any:
    """The functions of `_NAMES`; not as variables of this module, which needs Python's own ``any`` and ``max``."""
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    raise AttributeError(f"{name!r}: CuPy has none, or none that may be used (cumsum, random), or none was needed so far")


def take_along_axis(a: ndarray, indices: ndarray, axis: int) -> ndarray:
    """As CuPy does it: by indexing, which wraps."""
    axis %= a.ndim
    index = [_wrapped(i, []) for i in np.ix_(*(range(n) for n in a.shape))]
    index[axis] = indices
    return a[tuple(index)]


def take(a: ndarray, indices: ndarray, axis: int | None = None) -> ndarray:
    return a.ravel()[indices] if axis is None else a[(slice(None),) * (axis % a.ndim) + (indices,)]


def einsum(subscripts: str, *operands: ndarray, optimize: bool = False) -> ndarray:
    return _apply(np.einsum, (subscripts, *operands), {"optimize": optimize})


def result_type(*arrays_and_dtypes: Any) -> np.dtype:
    return np.result_type(*_raw(arrays_and_dtypes, []))


def may_share_memory(a: ndarray, b: ndarray, max_work: None = None) -> bool:  # noqa: ARG001
    return bool(np.may_share_memory(*_raw((a, b), [])))


def matmul(a: ndarray, b: ndarray, out: ndarray | None = None) -> ndarray:
    """The product as cuBLAS gives it: of 16 bits summed in float32 and rounded once. ``out`` must fit to the last."""
    if not isinstance(a, ndarray) or not isinstance(b, ndarray):
        raise TypeError(f"matmul of {type(a)} and {type(b)}")
    if a.dtype != b.dtype:
        raise TypeError(f"matmul of {a.dtype} and {b.dtype}")
    x, y = a._array, b._array
    if a.dtype in (_F16, _BF16):
        if min(a.ndim, b.ndim) < 2 or (a.dtype == _BF16 and max(a.ndim, b.ndim) > 2):
            raise TypeError(f"matmul of {a.dtype} with {a.ndim} and {b.ndim} dimensions")
        x, y = x.astype(np.float32), y.astype(np.float32)
    with np.errstate(all="ignore"):
        product = np.asarray(np.matmul(x, y)).astype(a.dtype, copy=False)
    if out is None:
        return _wrapped(product, [])
    if not isinstance(out, ndarray) or (out.dtype, out.shape) != (product.dtype, product.shape):
        raise TypeError(f"matmul: the result is {product.dtype} {product.shape}; out is {type(out)}")
    out._array[...] = product
    return out


# --- making arrays, and taking them out ---------------------------------------------------------------------------------


def empty(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return _new(shape, dtype, order)


def full(shape: Any, fill_value: Any, dtype: Any = None, order: str = "C") -> ndarray:
    if isinstance(fill_value, np.ndarray | list | tuple):
        raise TypeError(f"full of {type(fill_value)}")
    out = _new(shape, np.asarray(_raw(fill_value, [])).dtype if dtype is None else dtype, order)
    out[...] = fill_value
    return out


def zeros(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return full(shape, 0, np.dtype(dtype), order)


def ones(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return full(shape, 1, np.dtype(dtype), order)


def empty_like(prototype: ndarray, dtype: Any = None, order: str = "K", shape: Any = None) -> ndarray:
    return _laid_out_as(np.empty_like(_device(prototype)._array, dtype=dtype, order=order, shape=shape))


def _laid_out_as(template: np.ndarray) -> ndarray:
    """A new array of the same shape and dtype, its axes in the same order in memory."""
    out = _new(template.shape, template.dtype)
    axes = sorted(range(template.ndim), key=lambda axis: -abs(template.strides[axis]))
    laid_out = out._array.reshape([template.shape[axis] for axis in axes])
    return ndarray(laid_out.transpose([axes.index(axis) for axis in range(template.ndim)]), out._memory)


def full_like(a: ndarray, fill_value: Any, dtype: Any = None, order: str = "K", shape: Any = None) -> ndarray:
    out = empty_like(a, dtype, order, shape)
    out[...] = fill_value
    return out


def zeros_like(a: ndarray, dtype: Any = None, order: str = "K", shape: Any = None) -> ndarray:
    return full_like(a, 0, dtype, order, shape)


def ones_like(a: ndarray, dtype: Any = None, order: str = "K", shape: Any = None) -> ndarray:
    return full_like(a, 1, dtype, order, shape)


def arange(start: Any, stop: Any = None, step: Any = 1, dtype: Any = None) -> ndarray:
    start, stop = (0, start) if stop is None else (start, stop)
    return array(np.arange(*_numbers(start, stop, step), dtype=dtype))


def eye(N: int, M: int | None = None, k: int = 0, dtype: Any = float) -> ndarray:
    return array(np.eye(N, M, k, dtype=dtype))


def array(obj: Any, dtype: Any = None, copy: bool = True, order: str = "K") -> ndarray:
    """From the host or the device; lists of numbers too."""
    source = obj._array if isinstance(obj, ndarray) else np.asarray(obj)  # refuses a list with device arrays in it
    with np.errstate(all="ignore"):
        wanted = np.array(source, dtype=dtype, order=order, copy=None)
    if isinstance(obj, ndarray) and not copy and wanted is source:
        return obj
    if wanted.dtype.hasobject:
        raise TypeError("CuPy has no arrays of objects")
    if isinstance(obj, ndarray):
        out = _laid_out_as(np.empty_like(wanted, order=order))
    else:
        out = _new(wanted.shape, wanted.dtype, "C" if wanted.flags.c_contiguous or not wanted.flags.f_contiguous else "F")
    out._array[...] = wanted
    return out


def asarray(a: Any, dtype: Any = None, order: str = "K") -> ndarray:
    return array(a, dtype, False, order or "K")


def ascontiguousarray(a: Any, dtype: Any = None) -> ndarray:
    return array(a, dtype, False, "C")


def asnumpy(a: ndarray, stream: None = None, order: str = "C", out: Any = None, *, blocking: bool = True) -> np.ndarray:
    """A copy on the host. Without ``blocking`` it arrives when somebody waits for an event recorded later, or for all."""
    assert stream is None and order == "C"
    if out is not None and (out.dtype, out.shape) != (a.dtype, a.shape):
        raise ValueError(f"out is {out.dtype} {out.shape}, not {a.dtype} {a.shape}")
    snapshot = np.array(_device(a)._array, order="C")
    if blocking or out is None:
        _synchronize()
    if out is None:
        return snapshot
    with _lock:
        _arriving.append((out, snapshot))
    if blocking:
        _arrive(_arriving[:])
    return out


def _device(x: Any) -> ndarray:
    if not isinstance(x, ndarray):
        raise TypeError(f"{type(x)} does not live on the device")
    return x


def _numbers(*values: Any) -> tuple[Any, ...]:
    if not all(isinstance(x, _NUMBERS) for x in values):
        raise TypeError(f"numbers of the host are needed, not {[type(x) for x in values]}")
    return values


# --- the array ----------------------------------------------------------------------------------------------------------


def _refuses(what: str) -> Callable[..., Any]:
    def method(*_args: Any, **_kwargs: Any) -> Any:
        raise TypeError(f"Implicit conversion to a NumPy array is not allowed ({what}): use .get() or asnumpy")

    return method


class ndarray:  # noqa: N801
    """A view of device memory. Its numbers are told by ``get``, ``item`` and the like, each of which waits."""

    __slots__ = ("__weakref__", "_array", "_memory")
    __hash__ = None  # type: ignore[assignment]
    __array_ufunc__ = None  # NumPy's own operators and scalars leave the work to the methods below
    __array__ = _refuses("__array__")
    __array_function__ = _refuses("a function of NumPy")
    __reduce_ex__ = _refuses("pickle")

    def __init__(self, array: np.ndarray, memory: _Memory) -> None:
        self._array, self._memory = array, memory

    shape = property(lambda self: self._array.shape)
    strides = property(lambda self: self._array.strides)
    dtype = property(lambda self: self._array.dtype)
    ndim = property(lambda self: self._array.ndim)
    size = property(lambda self: self._array.size)
    nbytes = property(lambda self: self._array.nbytes)
    itemsize = property(lambda self: self._array.itemsize)
    T = property(lambda self: self.transpose())
    data = property(lambda self: SimpleNamespace(ptr=self._array.ctypes.data))

    @property
    def flags(self) -> SimpleNamespace:
        flags = self._array.flags
        return SimpleNamespace(c_contiguous=flags.c_contiguous, f_contiguous=flags.f_contiguous)

    def _part(self, name: str) -> ndarray:
        return ndarray(getattr(self._array, name), self._memory) if self.dtype.kind == "c" or name == "imag" else self

    def _set_part(self, value: Any, name: str) -> None:
        self._part(name)[...] = value

    real = property(lambda self: self._part("real"), lambda self, value: self._set_part(value, "real"))
    imag = property(lambda self: self._part("imag"), lambda self, value: self._set_part(value, "imag"))

    def view(self, dtype: Any = None) -> ndarray:
        return ndarray(self._array.view() if dtype is None else self._array.view(dtype), self._memory)

    def astype(self, dtype: Any, order: str = "K", casting: None = None, subok: None = None, copy: bool = True) -> ndarray:
        assert casting is None and subok is None
        return array(self, dtype, copy, order)

    def copy(self, order: str = "C") -> ndarray:
        return array(self, order=order)

    def fill(self, value: Any) -> None:
        self[...] = value

    def set(self, arr: np.ndarray) -> None:
        if not isinstance(arr, np.ndarray) or (arr.dtype, arr.shape) != (self.dtype, self.shape):
            raise TypeError(f"set to {arr!r}")
        self._array[...] = arr

    def get(self, out: Any = None, blocking: bool = True) -> np.ndarray:
        return asnumpy(self, out=out, blocking=blocking)

    def item(self) -> Any:
        return self.get().item()

    def tolist(self) -> Any:
        return self.get().tolist()

    def _scalar(self, kind: type) -> Any:
        return kind(self.item())

    __float__ = functools.partialmethod(_scalar, float)
    __int__ = functools.partialmethod(_scalar, int)
    __bool__ = functools.partialmethod(_scalar, bool)
    __complex__ = functools.partialmethod(_scalar, complex)

    def __repr__(self) -> str:
        return repr(self.get())

    def __format__(self, spec: str) -> str:
        return format(self.get() if self.ndim else self.item(), spec)

    def __len__(self) -> int:
        return len(self._array)

    def __iter__(self) -> Iterator[ndarray]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, key: Any) -> ndarray:
        key, advanced = self._checked(key)
        if not advanced:
            return ndarray(self._array[key], self._memory)
        if any(part.dtype == bool for part in advanced):
            _synchronize()  # how many it takes is the shape of the result
        return _wrapped(np.array(self._array[key]), [])

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(value, (ndarray, *_NUMBERS)):
            raise TypeError(f"Unsupported type {type(value)}: only device arrays and numbers are assigned to a device array")
        key, advanced = self._checked(key)
        value = value._array if isinstance(value, ndarray) else value
        if any(part.dtype == bool for part in advanced) and np.ndim(value):
            _synchronize()
        if not advanced:
            with np.errstate(all="ignore"):
                self._array[key] = value
            return
        # Threads write in any order: where places are written twice, not the last in the list wins, but one that a fixed
        # shuffle makes last.
        places = np.arange(self.size).reshape(self.shape)[key]
        order = np.random.default_rng(0).permutation(places.size)
        self._array.flat[places.reshape(-1)[order]] = np.broadcast_to(value, places.shape).reshape(-1)[order]

    def _checked(self, key: Any) -> tuple[tuple[Any, ...], list[np.ndarray]]:
        """``key`` as NumPy takes it, always giving an array, and the arrays in it. Integers out of range wrap."""
        parts = key if isinstance(key, tuple) else (key,)
        for part in parts:
            if not (part is None or part is Ellipsis or isinstance(part, int | np.integer | slice | ndarray)):
                raise IndexError(f"Unsupported type {type(part)}: an index is made of numbers, slices and device arrays")
        if not any(part is Ellipsis for part in parts):
            parts = (*parts, Ellipsis)
        widths = [0 if p is None or p is Ellipsis else p.ndim if _is_mask(p) else 1 for p in parts]
        axis, raw = 0, []
        for part, width in zip(parts, widths, strict=True):
            if isinstance(part, ndarray):
                if not _is_mask(part) and part.dtype.kind not in "iu":
                    raise IndexError("arrays used as indices must be of integer or boolean type")
                part = part._array if _is_mask(part) else part._array % self.shape[axis]
            raw.append(part)
            axis += self.ndim - sum(widths) if part is Ellipsis else width
        return tuple(raw), [part for part in raw if isinstance(part, np.ndarray)]


def _is_mask(x: Any) -> bool:
    return isinstance(x, ndarray) and x.dtype == bool


ndarray.__module__ = "stand_in"


def _method(name: str, names: str, *, moves: bool = False, syncing: bool = False) -> Callable[..., Any]:
    """NumPy's method of this name, which CuPy gives the arguments ``names``, and no others."""

    def method(self: ndarray, *args: Any, **kwargs: Any) -> Any:
        if not set(kwargs) <= set(names.split()):
            raise TypeError(f"{name} takes {names}, not {kwargs}")
        if syncing:
            _synchronize()
        bound = functools.wraps(getattr(np.ndarray, name))(lambda x, *a, **k: getattr(x, name)(*a, **k))
        return _apply(bound, (self, *args), kwargs, moves=moves)

    return method


for _name in ["sum", "prod", "mean"]:
    setattr(ndarray, _name, _method(_name, "axis dtype out keepdims"))
for _name in ["max", "min", "any", "all", "argmax", "argmin"]:
    setattr(ndarray, _name, _method(_name, "axis out keepdims"))
for _name in ["var", "std"]:
    setattr(ndarray, _name, _method(_name, "axis dtype out ddof keepdims"))
for _name, _names in {"clip": "min max out", "conj": "", "round": "decimals out", "dot": "out"}.items():
    setattr(ndarray, _name, _method(_name, _names))
for _name, _names in {
    "reshape": "order", "ravel": "order", "flatten": "order", "transpose": "", "swapaxes": "", "squeeze": "axis",
    "diagonal": "offset axis1 axis2", "repeat": "axis",
}.items():  # fmt: skip
    setattr(ndarray, _name, _method(_name, _names, moves=True))
for _name in ["argsort", "nonzero"]:
    setattr(ndarray, _name, _method(_name, "axis", syncing=True))
ndarray.take = lambda self, indices, axis=None: take(self, indices, axis)


def _operator(function: Callable[..., Any], *, reflected: bool = False, in_place: bool = False) -> Callable[..., Any]:
    def method(self: ndarray, other: Any) -> Any:
        if not isinstance(other, ndarray) and getattr(other, "__array_ufunc__", self) is None:
            return NotImplemented  # it wants to do it itself, as a Tensor does
        operands = (other, self) if reflected else (self, other)
        return function(*operands, out=self) if in_place else function(*operands)

    return method


def _unary(function: Callable[..., Any]) -> Callable[[ndarray], ndarray]:
    return lambda self: function(self)


_BINARY = {
    "add": "add", "sub": "subtract", "mul": "multiply", "truediv": "divide", "floordiv": "floor_divide", "mod": "remainder",
    "pow": "power", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor", "lshift": "left_shift",
    "rshift": "right_shift",
}  # fmt: skip
for _name, _function in _BINARY.items():
    setattr(ndarray, f"__{_name}__", _operator(_FUNCTIONS[_function]))
    setattr(ndarray, f"__r{_name}__", _operator(_FUNCTIONS[_function], reflected=True))
    setattr(ndarray, f"__i{_name}__", _operator(_FUNCTIONS[_function], in_place=True))
ndarray.__matmul__ = _operator(matmul)
ndarray.__rmatmul__ = _operator(matmul, reflected=True)
for _name, _function in {
    "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal", "eq": "equal", "ne": "not_equal",
}.items():  # fmt: skip
    setattr(ndarray, f"__{_name}__", _operator(_FUNCTIONS[_function]))
for _name, _function in {"neg": "negative", "abs": "absolute", "invert": "invert"}.items():
    setattr(ndarray, f"__{_name}__", _unary(_FUNCTIONS[_function]))


# --- kernels, events and the device ---------------------------------------------------------------------------------------


class RawKernel:
    """CUDA C++, run on the host. A write before or after an array that was made by `empty` and its like is found."""

    def __init__(self, code: str, name: str) -> None:
        self.code, self.name = code, name

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...]) -> None:
        (blocks,), (threads,) = grid, block
        found: list[ndarray] = []
        passed = [_argument(_raw(x, found)) for x in args]
        cuda_on_host.compile(self.code, self.name)(int(blocks), int(threads), passed)
        for x in found:
            if not x._memory.intact():
                raise RuntimeError(f"{self.name} wrote outside of an array of shape {x.shape}")


def _argument(x: Any) -> Any:
    if isinstance(x, np.ndarray | np.generic):
        return x
    return {bool: np.bool_, int: np.int64, float: np.float64}[type(x)](x)


class Event:
    """What was asked of the device before `record`."""

    def __init__(self, block: bool = False, disable_timing: bool = False) -> None:  # noqa: ARG002
        self._copies: list[tuple[np.ndarray, np.ndarray]] = []

    def record(self) -> None:
        self._copies = _arriving[:]

    def synchronize(self) -> None:
        global waits
        waits += 1
        _arrive(self._copies)

    @property
    def done(self) -> bool:
        return not any(copy is other for copy in self._copies for other in _arriving)


def _pinned(nbytes: int) -> bytearray:
    """Page-locked memory, of which CuPy gives more than was asked for."""
    return bytearray(b"\xff" * (-(-nbytes // 512) * 512))


_stream = SimpleNamespace(synchronize=_synchronize)
cuda = SimpleNamespace(
    runtime=SimpleNamespace(
        getDeviceCount=lambda: 1,
        getDevice=lambda: 0,
        getDeviceProperties=lambda device: {"name": b"Stand-In", "major": 9, "minor": 0},
        runtimeGetVersion=lambda: 12090,
        memGetInfo=lambda: (_TOTAL - _pool.total, _TOTAL),
    ),
    memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
    Event=Event,
    Stream=SimpleNamespace(null=_stream),
    get_current_stream=lambda: _stream,
    alloc_pinned_memory=_pinned,
)


def install(monkeypatch: Any = None) -> None:
    """Make this module the device of oxidizr_ref: until the end of a test, or for good."""
    if monkeypatch is None:
        oxidizr_ref.backend.DEVICE_PACKAGE = "stand_in"
    else:
        monkeypatch.setattr(oxidizr_ref.backend, "DEVICE_PACKAGE", "stand_in")
