"""The stand-in for CuPy refuses, counts and scrambles what it promises to: else tests on it would prove nothing."""

from __future__ import annotations

import gc
import math
import operator
import sys
from collections.abc import Callable, Iterator
from typing import Any

import cuda_on_host
import ml_dtypes
import numpy as np
import pytest
import stand_in

from oxidizr_ref import backend, ops
from oxidizr_ref.autograd import Tensor
from oxidizr_ref.errors import DeviceError
from oxidizr_ref.kernels import Kernel

BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)

on_the_host = pytest.mark.skipif(not cuda_on_host.available(), reason="kernels run on the host through g++; there is none")


def device(*shape: int, dtype: Any = np.float32) -> Any:
    return stand_in.asarray(np.arange(math.prod(shape)).reshape(shape).astype(dtype))


@pytest.fixture(autouse=True)
def _no_limit() -> Iterator[None]:
    yield
    stand_in.get_default_memory_pool().set_limit(0)


# --- the border between host and device -------------------------------------------------------------------------------


def test_its_arrays_are_known_by_their_module() -> None:
    assert type(device(2)).__module__ == "stand_in"
    assert backend.xp_of(device(2)) is stand_in
    assert backend.on_device(device(2))


@pytest.mark.parametrize(
    "convert",
    [
        np.asarray,
        np.exp,
        np.sum,
        np.concatenate,
        np.stack,
        lambda x: np.array([x, x]),
        lambda x: np.add(np.ones(3), x),
        lambda x: np.where(np.ones(3, dtype=bool), x, 0),
        lambda x: np.einsum("i->", x),
        lambda x: np.add(1, 2, out=x),
        lambda x: np.testing.assert_array_equal(x, np.arange(3)),
        lambda x: operator.setitem(np.ones(3), slice(None), x),
        lambda x: memoryview(x),
        lambda x: x.__reduce_ex__(2),
    ],
)
def test_numpy_never_gets_the_numbers_by_itself(convert: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError):
        convert(device(3))


def test_a_device_number_is_no_index_of_the_host() -> None:
    for use in (range, [1, 2].__getitem__, np.arange(3).__getitem__, np.zeros):
        with pytest.raises((TypeError, IndexError)):
            use(stand_in.asarray(1))


OPERATORS = "add sub mul truediv floordiv mod pow matmul and_ or_ xor lshift rshift lt le gt ge eq ne"
IN_PLACE = "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift"


@pytest.mark.parametrize("name", [*OPERATORS.split(), *IN_PLACE.split()])
def test_no_operator_mixes_host_and_device(name: str) -> None:
    function, host = getattr(operator, name), np.ones(3, dtype=int)
    for other in (host, [1, 2, 3], np.array(1)):
        with pytest.raises(TypeError):
            function(device(3, dtype=int), other)
        with pytest.raises(TypeError):
            function(other, device(3, dtype=int))


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, host: stand_in.add(x, host),
        lambda x, host: stand_in.add(x, [1, 2, 3]),
        lambda x, host: stand_in.exp(host),
        lambda x, host: stand_in.exp(x, out=host),
        lambda x, host: stand_in.matmul(x, host),
        lambda x, host: stand_in.where(host > 0, x, x),
        lambda x, host: stand_in.where(x > 0, x, host),
        lambda x, host: stand_in.concatenate([x, host]),
        lambda x, host: stand_in.stack([host, host]),
        lambda x, host: stand_in.einsum("i,i->", x, host),
        lambda x, host: stand_in.zeros_like(host),
        lambda x, host: stand_in.asnumpy(host),
        lambda x, host: stand_in.array([x, x]),
        lambda x, host: stand_in.take_along_axis(x, host.astype(int), axis=0),
        lambda x, host: x.clip(host),
        lambda x, host: x.sum(out=host),
        lambda x, host: x.set(host.tolist()),
        lambda x, host: operator.setitem(x, ..., host),
        lambda x, host: operator.setitem(x, slice(1), [1.0]),
        lambda x, host: setattr(x.astype(complex), "real", host),
        lambda x, host: stand_in.RawKernel("", "nothing")((1,), (1,), (host,)),
    ],
)
def test_no_function_and_no_assignment_mixes_host_and_device(mix: Callable[[Any, Any], Any]) -> None:
    with pytest.raises((TypeError, IndexError)):
        mix(device(3), np.ones(3, dtype=np.float32))


@pytest.mark.parametrize("index", [np.array([0, 1]), [0, 1], (0, [0, 1]), np.array([True, False, True]), 1.0])
def test_only_numbers_slices_and_device_arrays_are_indices(index: Any) -> None:
    with pytest.raises(IndexError, match="Unsupported type"):
        device(3, 3)[index]
    with pytest.raises(IndexError, match="Unsupported type"):
        device(3, 3)[index] = 1


def test_numbers_of_python_are_weak_and_those_of_numpy_are_not() -> None:
    x = device(3)
    for result in (x * 2.0, 2.0 * x, x**2, 1 - x, x + True, np.float32(2) * x, x / np.float16(2)):
        assert (type(result), result.dtype) == (stand_in.ndarray, np.float32)
    for result in (x * np.float64(2), np.float64(2) * x):
        assert (type(result), result.dtype) == (stand_in.ndarray, np.float64)
    assert (device(3, dtype=int) * 2.5).dtype == np.float64
    assert (x + device(3, dtype=np.float64)).dtype == np.float64
    assert stand_in.result_type(x.dtype, np.complex64) == np.complex64
    x[1:] = np.float64(7)
    x[0] = 3
    assert x.tolist() == [3, 7, 7]


def test_a_tensor_does_its_own_arithmetic() -> None:
    x, tensor = device(3), Tensor(device(3))
    assert "__mul__" in ops.OPERATORS
    assert {type(tensor * tensor), type(2.0 * tensor)} == {Tensor}
    assert x.__add__(tensor) is NotImplemented
    with pytest.raises(TypeError):
        x.__add__(object())


# --- who waits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.get(),
        lambda x: stand_in.asnumpy(x),
        lambda x: stand_in.asnumpy(x, out=np.empty(1, dtype=np.float32)),
        lambda x: x.item(),
        lambda x: x.tolist(),
        lambda x: float(x[0]),
        lambda x: int(x[0]),
        lambda x: bool(x[0] > 0),
        lambda x: math.isfinite(x[0]),
        lambda x: np.float64(x[0]),
        lambda x: operator.setitem(np.ones(3), 0, x[0]),
        lambda x: repr(x),
        lambda x: f"{x[0]:.3f}",
        lambda x: x[x > 0],
        lambda x: operator.setitem(x, x >= 0, x),
        lambda x: stand_in.nonzero(x),
        lambda x: stand_in.flatnonzero(x),
        lambda x: stand_in.argwhere(x),
        lambda x: stand_in.sort(x),
        lambda x: stand_in.argsort(x),
        lambda x: x.argsort(),
        lambda x: stand_in.cuda.get_current_stream().synchronize(),
    ],
)
def test_what_makes_the_host_wait_is_counted(read: Callable[[Any], Any]) -> None:
    x = device(1)
    with stand_in.counted() as counts:
        read(x)
        assert counts() == (1, 0)


def test_work_on_the_device_makes_nobody_wait() -> None:
    x, index = device(4, 3), stand_in.asarray(np.array([0, 2]))
    with stand_in.counted() as counts:
        y = stand_in.exp(x) @ x.T + x.sum() / x.max(axis=0, keepdims=True).reshape(-1)[:1]
        y[y > 3] = 0
        y[index] += y[index, :1]
        stand_in.asnumpy(y, out=np.empty(y.shape, dtype=y.dtype), blocking=False)
        list(y)
        assert counts() == (0, 0)


def test_a_copy_that_nobody_waited_for_has_not_arrived() -> None:
    x = device(3)
    memory = stand_in.cuda.alloc_pinned_memory(x.nbytes)
    host = np.frombuffer(memory, dtype=np.float32, count=3)
    early, late = stand_in.cuda.Event(), stand_in.cuda.Event()
    early.record()
    stand_in.asnumpy(x, out=host, blocking=False)
    late.record()
    x[...] = 9  # after the copy in the order of the device
    early.synchronize()
    assert np.isnan(host).all()
    assert not late.done
    with stand_in.counted() as counts:
        late.synchronize()
        assert counts() == (0, 1)
    assert late.done
    assert host.tolist() == [0, 1, 2]
    host[...] = 5
    late.synchronize()
    assert host.tolist() == [5, 5, 5]


def test_whoever_waits_for_everything_waits_for_copies_too() -> None:
    host = np.zeros(3, dtype=np.float32)
    stand_in.asnumpy(device(3), out=host, blocking=False)
    assert host.tolist() == [0, 0, 0]
    device(1).item()
    assert host.tolist() == [0, 1, 2]


# --- what is in memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64, F16, BF16, np.complex64], ids=str)
def test_memory_that_nobody_wrote_holds_nan(dtype: Any) -> None:
    for x in (stand_in.empty((2, 3), dtype=dtype), stand_in.empty_like(device(2, 3, dtype=dtype))):
        assert x.dtype == dtype
        assert np.isnan(x.get().astype(np.complex128)).all()


def test_integers_that_nobody_wrote_are_nonsense() -> None:
    assert (stand_in.empty(3, dtype=np.int64).get() < -(2**60)).all()


def test_made_arrays_hold_what_they_are_asked_for() -> None:
    assert stand_in.zeros(2).dtype == np.float64
    assert stand_in.zeros((2, 1), dtype=BF16).get().astype(float).tolist() == [[0], [0]]
    assert stand_in.ones((), dtype=np.float32).item() == 1
    assert (stand_in.full((), 2).dtype, stand_in.full(2, 0.5, dtype=np.float32).dtype) == (np.int64, np.float32)
    assert stand_in.ones_like(device(2, dtype=int)).tolist() == [1, 1]
    assert stand_in.arange(1, 4, dtype=np.float32).tolist() == [1, 2, 3]


@pytest.mark.parametrize("name", ["sum", "max", "min", "mean", "prod", "argmax", "argmin", "any", "all", "var", "std"])
def test_reductions_give_arrays_without_axes(name: str) -> None:
    for x in (getattr(device(2, 3), name)(), getattr(stand_in, name)(device(2, 3))):
        assert (type(x), x.shape) == (stand_in.ndarray, ())
        assert x.item() == getattr(np.arange(6, dtype=np.float32), name)()


def test_elements_are_views_without_axes() -> None:
    x = device(3)
    x[1][...] = 7
    assert (type(x[1]), x[1].shape) == (stand_in.ndarray, ())
    assert x.tolist() == [0, 7, 2]


def test_indices_out_of_range_wrap_without_a_word() -> None:
    x, index = device(3, 2), stand_in.asarray(np.array([3, -1, 7]))
    assert x[index].tolist() == [[0, 1], [4, 5], [2, 3]]
    assert x[..., index].shape == (3, 3)
    assert x[:, None, index].get()[0, 0].tolist() == [1, 1, 1]
    assert x.take(index, axis=1).get()[0].tolist() == [1, 1, 1]
    assert stand_in.take_along_axis(x, index[:, None], axis=1).tolist() == [[1], [3], [5]]
    x[index] = 0
    assert x.tolist() == [[0, 0]] * 3
    with pytest.raises(IndexError):
        x[3]  # as in CuPy: a number of the host is checked


def test_of_several_writes_to_one_element_not_the_last_one_wins() -> None:
    x, index = device(2), stand_in.asarray(np.zeros(50, dtype=int))
    x[index] = stand_in.arange(50, dtype=np.float32)
    winner = x[0].item()
    assert 0 < winner < 49
    y = device(2, 2)
    y[:, index] = stand_in.arange(50, dtype=np.float32)
    assert y[0, 0].item() != 49
    x[index] = stand_in.arange(50, dtype=np.float32)
    assert x[0].item() == winner


def test_writes_through_arrays_of_indices_land_where_numpy_puts_them() -> None:
    rng = np.random.default_rng(0)
    for shape, index in [
        ((4, 5), (np.array([3, 1]),)),
        ((4, 5), (slice(None), np.array([3, 1]))),
        ((4, 5), (np.array([[0], [2]]), np.array([3, 1, 4]))),
        ((3, 4, 5), (Ellipsis, np.array([3, 1]), slice(1, 3))),
        ((3, 4), (rng.random((3, 4)) > 0.5,)),
        ((3, 4), (rng.random(3) > 0.5, slice(1, None))),
    ]:
        host = rng.standard_normal(shape)
        there = stand_in.asarray(host.copy())
        value = rng.standard_normal(host[index].shape)
        key = tuple(stand_in.asarray(part) if isinstance(part, np.ndarray) else part for part in index)
        np.testing.assert_array_equal(there[key].get(), host[index])
        host[index], there[key] = value, stand_in.asarray(value)
        np.testing.assert_array_equal(there.get(), host)


# --- 16 bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x + x,
        lambda x: x * 2.0,
        lambda x: -x,
        lambda x: x > 0,
        lambda x: operator.iadd(x, 1.0),
        lambda x: x.sum(),
        lambda x: x.max(axis=0),
        lambda x: stand_in.exp(x),
        lambda x: stand_in.where(x.astype(bool), x, x),
        lambda x: stand_in.add(x.astype(np.float32), 1, out=x),
        lambda x: stand_in.einsum("ij->i", x),
        lambda x: x.astype(np.float32).sum(dtype=x.dtype),
        lambda x: x[0] @ x[1],
        lambda x: x @ x.astype(np.float32),
    ],
)
def test_numbers_of_16_bits_do_not_compute(compute: Callable[[Any], Any], dtype: Any) -> None:
    with pytest.raises(TypeError):
        compute(device(2, 2, dtype=dtype))


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_numbers_of_16_bits_can_be_moved(dtype: Any) -> None:
    x = device(2, 2, dtype=dtype)
    y = stand_in.concatenate([x.T.copy(), x.reshape(-1)[None, :2], stand_in.stack([x[0], x[1]])])
    y[1:] = y[:1]
    y[0] = device(2)
    y[stand_in.asarray(np.array([1]))] = x[:1]
    assert y.dtype == dtype
    assert y.astype(np.float32).tolist() == [[0, 1], [0, 1], [0, 2], [0, 2], [0, 2]]
    assert (y.view(np.int16).dtype, y.astype(np.float32).astype(dtype).dtype) == (np.int16, dtype)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_products_of_16_bits_are_summed_in_float32_and_rounded_once(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(dtype) for shape in ((5, 2000), (2000, 4)))
    wanted = np.matmul(a.astype(np.float32), b.astype(np.float32)).astype(dtype)
    out = stand_in.empty((5, 4), dtype=dtype)
    for product in (stand_in.asarray(a) @ stand_in.asarray(b), stand_in.matmul(*map(stand_in.asarray, (a, b)), out=out)):
        assert product.dtype == dtype
        assert product.get().tobytes() == wanted.tobytes()
    with pytest.raises(TypeError, match="out"):
        stand_in.matmul(*map(stand_in.asarray, (a, b)), out=stand_in.empty((5, 4), dtype=np.float32))


def test_bfloat16_has_no_products_of_stacks() -> None:
    for a, b in (((3, 2, 2), (3, 2, 2)), ((3, 2, 2), (2, 2))):
        with pytest.raises(TypeError, match="bfloat16 with"):
            stand_in.matmul(device(*a, dtype=BF16), device(*b, dtype=BF16))
    assert stand_in.matmul(device(3, 2, 2, dtype=F16), device(2, 2, dtype=F16)).dtype == F16


@pytest.mark.parametrize(
    "out", [stand_in.empty((2, 2)), stand_in.empty((3, 2), dtype=np.float32), stand_in.empty((1, 2, 2), dtype=np.float32), 1]
)
def test_the_place_of_a_product_must_fit(out: Any) -> None:
    with pytest.raises(TypeError, match="matmul"):
        stand_in.matmul(device(2, 3), device(3, 2), out=out)


def test_products_of_different_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match="float32 and float64"):
        device(2, 2) @ device(2, 2, dtype=np.float64)


# --- what does not exist ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["cumsum", "cumprod", "vecdot", "random", "errstate", "newaxis", "put_along_axis", "bincount", "rsqrt"]
)
def test_what_cupy_lacks_or_nobody_may_use_does_not_exist(name: str) -> None:
    assert not hasattr(stand_in, name)
    assert not hasattr(stand_in.ndarray, name)


def test_ufuncs_only_compute() -> None:
    for name in ("at", "reduceat", "reduce", "accumulate", "outer"):
        assert not hasattr(stand_in.add, name)
    with pytest.raises(TypeError):
        stand_in.add(device(2), 1, where=device(2) > 0)
    with pytest.raises(TypeError):
        device(2).sum(where=device(2) > 0)
    with pytest.raises(TypeError):
        device(2).max(initial=3)


def test_everything_here_exists_in_cupy() -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    own = {
        name for name, value in vars(stand_in).items() if getattr(value, "__module__", "") == "stand_in" and name[0] != "_"
    }
    own -= {"Counts", "counted", "install", "OutOfMemoryError", "Event"}
    assert [name for name in sorted({*own, *stand_in._FUNCTIONS}) if not hasattr(cupy, name)] == []
    assert [name for name in vars(stand_in.ndarray) if not hasattr(cupy.ndarray, name) and name[0] != "_"] == []


# --- memory -----------------------------------------------------------------------------------------------------------


def test_living_arrays_are_counted_once_and_in_pieces_of_512_bytes() -> None:
    pool = stand_in.get_default_memory_pool()
    gc.collect()
    before = pool.used_bytes()
    x = stand_in.empty(1000, dtype=np.uint8)
    assert pool.used_bytes() - before == 1024
    view, other = x[5:].reshape(5, -1).T, x.view(np.int64)
    assert pool.used_bytes() - before == 1024
    y = x + x
    assert pool.used_bytes() - before == 2048
    del x, y
    assert pool.used_bytes() - before == 1024
    del view
    assert other.shape == (125,)
    del other
    assert pool.used_bytes() == before


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[1:],
        lambda x: x[0, 0],
        lambda x: x.T,
        lambda x: x.swapaxes(0, 1),
        lambda x: x.reshape(-1),
        lambda x: x.ravel(),
        lambda x: x.view(np.int32),
        lambda x: x.diagonal(),
        lambda x: x[None].squeeze(0),
        lambda x: x.real,
        lambda x: x.astype(np.float32, copy=False),
        lambda x: next(iter(x)),
        lambda x: stand_in.broadcast_to(x, (3, 2, 2)),
        lambda x: stand_in.expand_dims(x, 0),
        lambda x: stand_in.moveaxis(x, 0, 1),
        lambda x: stand_in.flip(x, 0),
        lambda x: stand_in.split(x, 2)[1],
        lambda x: stand_in.asarray(x),
        lambda x: stand_in.ascontiguousarray(x),
        lambda x: stand_in.einsum("ii->i", x),
    ],
)
def test_views_take_no_memory(view: Callable[[Any], Any]) -> None:
    x = device(2, 2)
    before = stand_in.get_default_memory_pool().used_bytes()
    y = view(x)
    assert stand_in.get_default_memory_pool().used_bytes() == before
    assert stand_in.may_share_memory(x, y)


@pytest.mark.parametrize(
    "copy",
    [
        lambda x: x.copy(),
        lambda x: x.astype(np.float32),
        lambda x: x.flatten(),
        lambda x: x + 0,
        lambda x: x.sum(),
        lambda x: x[x > 0],
        lambda x: stand_in.array(x),
        lambda x: stand_in.ascontiguousarray(x.T),
        lambda x: stand_in.concatenate([x]),
        lambda x: stand_in.empty_like(x),
    ],
)
def test_copies_take_memory(copy: Callable[[Any], Any]) -> None:
    x = device(2, 2)
    before = stand_in.get_default_memory_pool().used_bytes()
    y = copy(x)
    assert stand_in.get_default_memory_pool().used_bytes() == before + 512
    assert not stand_in.may_share_memory(x, y)


def test_the_peak_is_kept_until_it_is_set_back() -> None:
    pool = stand_in.get_default_memory_pool()
    before, stand_in.peak_bytes = pool.used_bytes(), 0
    x = stand_in.zeros(512, dtype=np.uint8)
    del x
    assert stand_in.peak_bytes - before == 512
    assert pool.total_bytes() >= stand_in.peak_bytes
    pool.free_all_blocks()
    assert pool.total_bytes() == pool.used_bytes() == before


def test_memory_beyond_the_limit_is_refused_in_the_words_of_cupy() -> None:
    pool = stand_in.get_default_memory_pool()
    used = pool.used_bytes()
    x = stand_in.empty(1025, dtype=np.uint8)
    pool.set_limit(size=used + 2000)
    with pytest.raises(stand_in.cuda.memory.OutOfMemoryError) as refused:
        stand_in.empty(1000, dtype=np.uint8)
    assert str(refused.value) == (
        f"Out of memory allocating 1,024 bytes (allocated so far: {used + 1536:,} bytes, "
        f"limit set to: {used + 2000:,} bytes)."
    )
    assert isinstance(refused.value, MemoryError)
    del x
    stand_in.empty(1000, dtype=np.uint8)


# --- what arrays can do -----------------------------------------------------------------------------------------------


def test_layout_is_kept_told_and_changed() -> None:
    x = device(2, 3)
    assert (x.strides, x.flags.c_contiguous, x.T.flags.c_contiguous, x.T.flags.f_contiguous) == ((12, 4), True, False, True)
    assert (len(x), x.ndim, x.size, x.nbytes, x.itemsize) == (2, 2, 6, 24, 4)
    assert stand_in.empty_like(x.T).strides == x.T.strides
    assert x.T.astype(np.float64).strides == (8, 24)
    assert x.T.astype(np.float32, order="C", copy=False).flags.c_contiguous
    assert x.T.copy().flags.c_contiguous
    assert stand_in.asarray(x.T, order="C").flags.c_contiguous
    cube = device(2, 3, 4).transpose(2, 0, 1)
    assert stand_in.empty_like(cube).strides == cube.strides
    assert stand_in.asarray(np.ones((2, 3), order="F")).flags.f_contiguous
    assert x[1].data.ptr == x.data.ptr + 12


def test_parts_of_complex_numbers_can_be_written() -> None:
    z = stand_in.zeros(2, dtype=np.complex64)
    z.real = device(2)
    z.imag[...] = 3
    z.imag += 1
    assert z.tolist() == [4j, 1 + 4j]
    assert z.view(np.float32).tolist() == [0, 4, 1, 4]
    assert z.conj().tolist() == [-4j, 1 - 4j]
    x = device(2)
    x.real = 5
    assert x.tolist() == [5, 5]


def test_work_in_place_stays_in_place() -> None:
    x = y = device(3)
    x += 1
    x *= device(3)
    assert x is y
    assert stand_in.multiply(x, 2, out=x) is x
    assert x.tolist() == [0, 4, 12]
    x.fill(1)
    x.set(np.full(3, 2, dtype=np.float32))
    assert x.clip(0, 1).tolist() == [1, 1, 1]
    with pytest.raises(TypeError):
        x += device(3, dtype=np.float64) * 1j


def test_a_device_warns_of_nothing() -> None:
    x = device(2) * 1e38
    assert (x * x).tolist() == [0, math.inf]
    assert np.isnan(((x - x) / (x - x)).get()).all()
    assert stand_in.log(x - x).tolist() == [-math.inf, -math.inf]
    assert x.astype(F16).get().astype(float).tolist() == [0, math.inf]


# --- kernels ----------------------------------------------------------------------------------------------------------


def test_the_device_of_the_package_can_be_the_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as changed:
        stand_in.install(changed)
        assert backend.resolve_device("gpu", demanded_by="--target-device gpu") == "gpu"
        assert backend.module_of("gpu") is stand_in
    assert backend.DEVICE_PACKAGE == "cupy"
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceError):
        backend.resolve_device("gpu", demanded_by="--target-device gpu")


@on_the_host
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_kernel_computes_what_its_source_says_with_every_function_it_may_use(dtype: Any) -> None:
    kernel = Kernel("""
__global__ void functions(const T* x, T* y, long long count) {
    long long i = THREAD;
    if (i >= count) return;
    T v = x[i];
    y[i] = exp(v) + log(v) + tanh(v) + sqrt(v) + log1p(v) + fabs(-v) + pow(v, (T)2) + (isfinite(v) ? 1 : 0);
}""")
    x = np.linspace(0.1, 2, 1000).astype(dtype)
    y = stand_in.empty(1000, dtype=dtype)
    kernel.threads(1000, stand_in.asarray(x), y, 1000)
    wanted = np.exp(x) + np.log(x) + np.tanh(x) + np.sqrt(x) + np.log1p(x) + x + x**2 + 1
    # Fifteen operations on numbers below 32, each rounded by half an eps of that at most (functions of libm by twice that).
    np.testing.assert_allclose(y.get(), wanted, rtol=0, atol=30 * 32 * np.finfo(dtype).eps / 2)


@on_the_host
def test_the_high_half_of_a_product_is_that_of_python() -> None:
    kernel = Kernel("""
__global__ void high(unsigned long long* out, unsigned long long a, unsigned long long b) { out[0] = __umul64hi(a, b); }""")
    a, b, out = 0xD2E7470EE14C6C93, 0xCA5A826395121157, stand_in.zeros(1, dtype=np.uint64)
    kernel.blocks(1, out, np.uint64(a), np.uint64(b))
    assert out.item() == a * b >> 64


@on_the_host
def test_the_threads_of_a_block_wait_for_each_other() -> None:
    kernel = Kernel("""
__global__ void block_sums(const T* x, T* y) {
    T v = x[THREAD];
    for (int i = 0; i < 2; i++) y[2 * THREAD + i] = i ? block_max(v) : block_sum(v);
}""")
    x = np.random.default_rng(0).integers(-100, 100, (7, 256)).astype(np.float32)
    y = stand_in.empty((7, 256, 2), dtype=np.float32)
    kernel.blocks(7, stand_in.asarray(x), y)
    wanted = np.stack([x.sum(axis=1), x.max(axis=1)], axis=-1)[:, None]
    np.testing.assert_array_equal(y.get(), np.broadcast_to(wanted, y.shape))


@on_the_host
def test_shared_memory_that_is_read_before_the_others_wrote_gives_a_wrong_result() -> None:
    source = """
__global__ void reversed{name}(const T* x, T* y) {{
    __shared__ T row[BLOCK];
    row[threadIdx.x] = x[THREAD];
    {barrier}
    y[THREAD] = row[BLOCK - 1 - threadIdx.x];
}}"""
    x, results = np.arange(512, dtype=np.float32).reshape(2, 256), []
    for name, barrier in (("", "__syncthreads();"), ("_too_early", "")):
        y = stand_in.empty_like(stand_in.asarray(x))
        Kernel(source.format(name=name, barrier=barrier)).blocks(2, stand_in.asarray(x), y)
        results.append(np.array_equal(y.get(), x[:, ::-1]))
    assert results == [True, False]


@on_the_host
@pytest.mark.parametrize(
    "body",
    [
        "if (threadIdx.x < 3) return; x[0] = block_sum((T)1);",
        "if (threadIdx.x < 3) { x[0] = block_sum((T)1); }",
        "if (threadIdx.x < 3) {\n__syncthreads();\n} else {\n__syncthreads();\n}",
        "for (int i = 0; i < threadIdx.x + 1; i++) __syncthreads();",
    ],
)
def test_a_barrier_that_some_threads_do_not_reach_is_an_error_and_the_next_kernel_runs(body: str) -> None:
    with pytest.raises(RuntimeError, match="lonely: not all threads"):
        Kernel("__global__ void lonely(T* x) { " + body + " }").blocks(2, device(256))
    x = device(256)
    Kernel("__global__ void together(T* x) { T sum = block_sum(x[THREAD]); x[THREAD] = sum; }").blocks(1, x)
    assert set(x.tolist()) == {255 * 128}


@on_the_host
def test_blocks_and_threads_run_in_no_order_that_one_could_lean_on() -> None:
    x = stand_in.zeros(1, dtype=np.float64)
    last = Kernel("__global__ void last(T* x) { x[0] = THREAD; }", block=4)
    last.blocks(3, x)
    assert x.item() == 3  # the last thread of the first block, not of the last one
    turns = stand_in.zeros(2, dtype=np.float64)
    Kernel("__global__ void last_of_each(T* x) { x[blockIdx.x] = threadIdx.x; }", block=4).blocks(2, turns)
    assert turns.tolist() == [3, 0]


@on_the_host
@pytest.mark.parametrize("at", [-1, 4])
def test_a_write_beside_an_array_is_found(at: int) -> None:
    kernel = Kernel("__global__ void beside(T* x, long long at) { if (THREAD == 0) x[at] = 1; }")
    for make in (stand_in.empty, stand_in.zeros, lambda n, dtype: stand_in.asarray(np.ones(n, dtype=dtype))):
        with pytest.raises(RuntimeError, match="beside wrote outside"):
            kernel.blocks(1, make(4, dtype=np.float32), at)


@on_the_host
def test_a_read_beside_an_array_gives_nan() -> None:
    x = device(4)
    Kernel("__global__ void next(T* x) { if (THREAD < 4) x[THREAD] = x[THREAD + 4]; }").blocks(1, x)
    assert np.isnan(x.get()).all()


@on_the_host
@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((device(2), 1), "takes 3 arguments, not 2"),
        ((device(2), device(2), 1.0), "argument 1: ndarray for a number"),
        ((2, 1, 1.0), "argument 0: int64 for a pointer"),
        ((device(2, dtype=np.float64), 1, np.float32(1)), "argument 0: float64"),
        ((device(2, dtype=np.int32), 1, np.float32(1)), "argument 0: int32"),
        ((device(2), np.int32(1), np.float32(1)), "argument 1: int32"),
        ((device(2), 1.0, np.float32(1)), "argument 1: float64"),
        ((device(2), 1, 1.0), "argument 2: float64"),
    ],
)
def test_arguments_must_have_the_types_that_the_kernel_declares(arguments: tuple[Any, ...], why: str) -> None:
    code = 'extern "C" __global__ void takes(float* x, const long long n, float f) {}'
    with pytest.raises(TypeError, match=why):
        stand_in.RawKernel(code, "takes")((1,), (1,), arguments)
    stand_in.RawKernel(code, "takes")((1,), (1,), (device(2), 1, np.float32(1)))


@on_the_host
@pytest.mark.parametrize(("blocks", "threads"), [(0, 1), (1, 0), (1, 1025)])
def test_a_launch_that_cuda_refuses_is_refused(blocks: int, threads: int) -> None:
    with pytest.raises(RuntimeError, match="invalid configuration"):
        stand_in.RawKernel('extern "C" __global__ void idle(float* x) {}', "idle")((blocks,), (threads,), (device(2),))


@on_the_host
@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("x[0] = std::exp(1.0f);", "std::"),
        ("uint32_t i = 0;", "uint32_t"),
        ("x[0] = INFINITY;", "INFINITY"),
        ("x[blockIdx.y] = 0;", "no member named"),
        ("x[0] = y;", "not declared"),
    ],
)
def test_a_source_that_nvrtc_would_refuse_is_refused(body: str, why: str) -> None:
    with pytest.raises(RuntimeError, match=why):
        Kernel("__global__ void wrong(T* x) { " + body + " }").blocks(1, device(2))


def test_without_a_compiler_kernels_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_on_host, "available", lambda: False)
    with pytest.raises(RuntimeError, match="through g\\+\\+, and there is none"):
        cuda_on_host.compile('extern "C" __global__ void without_a_compiler(float* x) {}', "without_a_compiler")
