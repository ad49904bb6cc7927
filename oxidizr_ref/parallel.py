"""Fixed tiles on a thread pool: all the parallelism there is.

Work is cut into tiles whose number and borders depend on shapes alone. Threads only decide who computes a tile, never what
is computed, so any number of threads gives the same bits. Three rules follow:

* BLAS runs with one thread a call (its own threading changes sums); this file sets and checks that at import.
* A CUDA device spreads its work itself: on one everything is a single tile, or a few large ones that one thread asks for.
* Tiles write to places of their own. What must be summed across tiles is summed afterwards by `tree_sum`, one fixed
  binary tree: T[i,j) splits at the largest power of two below j-i.
"""

from __future__ import annotations

import contextvars
import ctypes
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from threadpoolctl import ThreadpoolController

from oxidizr_ref.backend import Array, on_device, xp_of

_BLAS = ThreadpoolController()
_BLAS.limit(limits=1, user_api="blas")
_serial_libraries = [library for library in _BLAS.info() if library["user_api"] == "blas"]
if any(library["num_threads"] != 1 for library in _serial_libraries):
    raise RuntimeError(f"BLAS does not keep to one thread, so results would depend on threads: {_serial_libraries}")


def _keep_freed_memory() -> None:
    """Tell glibc to keep what is freed for the next step, instead of returning it and faulting every page in again.

    Parameters of mallopt(3): M_TRIM_THRESHOLD is -1; M_MMAP_MAX is -4, and 0 keeps even the largest arrays on the heap,
    which otherwise would be mapped afresh whenever they are made. Other C libraries have no such call.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(-1, 1 << 30)
    mallopt(-4, 0)


_keep_freed_memory()

#: Elements of one tile of elementwise work. Waking a thread costs about 60 µs, so a tile must be worth more than that.
ELEMENTS = 1 << 17
#: Elements of one piece inside a tile: a few float32 temporaries of this size stay in a core's L2 cache.
CACHED = 1 << 17
#: How long work that is in no hurry rests, in units of the time it worked.
_REST = 3
#: A matrix product with fewer multiplications than this is not worth waking a thread for.
SMALL_PRODUCT = 10_000_000

#: Rows of a tile of a matrix product: as a rule, and at least. More of them, and BLAS packs its other operand less often.
ROWS, FEWEST_ROWS = 512, 128

#: Up to so many rows a product with a weight, on whose bits no training hangs, is computed by `few_rows`.
_FEW_ROWS = 32
#: What BLAS multiplies where it lies, without packing it first (OpenBLAS with AVX-512): elements of the result, operations.
_UNPACKED_RESULT, _UNPACKED_PRODUCT = 1 << 10, 1_000_000

Tile = tuple[int, int]
T = TypeVar("T")


def blas_info() -> list[dict[str, Any]]:
    """The BLAS libraries in this process, as threadpoolctl reports them."""
    return _serial_libraries


# --- who works --------------------------------------------------------------------------------------------------------


def _available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_threads = _available_cores()
_jobs: SimpleQueue[Callable[[], object]] = SimpleQueue()
_workers: list[threading.Thread] = []
_inside_a_tile = threading.local()


def set_threads(count: int) -> None:
    """Use ``count`` threads from now on. Changes the speed and nothing else."""
    global _threads
    if count < 1:
        raise ValueError(f"threads must be at least 1, not {count}")
    _threads = count


def get_threads() -> int:
    """How many threads tiles are spread over."""
    return _threads


def _work_for_ever() -> None:
    while True:
        _jobs.get()()


def _forget_workers() -> None:
    """A forked child has none of its parent's threads."""
    global _jobs
    _workers.clear()
    _jobs = SimpleQueue()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)


def for_each(count: int, work: Callable[[int], None], like: Array | None = None) -> None:
    """Call ``work(i)`` once for every i in 0 … count-1, spread over the threads, and wait for all.

    ``work`` must write only to places that belong to its i. The first exception (lowest i) is raised after all are done.
    ``like``: an array that the work is about; on a device its thread asks for one thing after the other.
    """
    if count == 1 and getattr(_inside_a_tile, "hurry", None) is None:  # in a small model, nearly always
        work(0)
        return
    if like is not None and on_device(like):
        for index in range(count):
            work(index)
        return
    tickets = iter(range(count))  # next() on a range iterator is atomic
    errors: list[tuple[int, BaseException]] = []
    finished: SimpleQueue[None] = SimpleQueue()
    entered: list[None] = []  # by helpers, before they take their first ticket
    left: list[None] = []
    nested = getattr(_inside_a_tile, "flag", False)
    hurry: threading.Event | None = getattr(_inside_a_tile, "hurry", None)

    def take_tickets() -> int:
        done = 0
        _inside_a_tile.flag = True
        try:
            for index in tickets:
                began = time.perf_counter() if hurry else 0.0
                try:
                    work(index)
                except BaseException as error:
                    errors.append((index, error))
                done += 1
                if hurry:
                    hurry.wait(_REST * (time.perf_counter() - began))
        finally:
            _inside_a_tile.flag = nested
        return done

    def help_along() -> None:
        entered.append(None)
        for _ in range(take_tickets()):
            finished.put(None)
        left.append(None)

    try:
        if count > 1 and not nested:
            _call_helpers(min(_threads, count) - 1, help_along)
        # A helper that wakes up late finds no ticket left: only tiles are waited for, not helpers.
        for _ in range(count - take_tickets()):
            finished.get()
    except BaseException:  # Ctrl-C: nobody may still be at work on these tiles when this returns
        for _ in tickets:
            pass
        while len(left) < len(entered):
            time.sleep(0.001)
        raise
    if errors:
        raise min(errors, key=lambda pair: pair[0])[1]


def _call_helpers(count: int, task: Callable[[], object]) -> None:
    while len(_workers) < count:
        worker = threading.Thread(target=_work_for_ever, name=f"tiles-{len(_workers)}", daemon=True)
        _workers.append(worker)
        worker.start()
    for _ in range(count):
        # The caller's context (NumPy's error state, no_grad) holds in its tiles, whoever computes them.
        _jobs.put(functools.partial(contextvars.copy_context().run, task))


@contextmanager
def unhurried(hurry: threading.Event) -> Iterator[None]:
    """Inside this context this thread does all its tiles itself, and rests after each one `_REST` times as long as it took,
    so that the others hardly feel its work; until ``hurry`` is set, because somebody waits."""
    _inside_a_tile.flag, _inside_a_tile.hurry = True, hurry
    try:
        yield
    finally:
        _inside_a_tile.flag, _inside_a_tile.hurry = False, None


# --- how work is cut --------------------------------------------------------------------------------------------------


def tiles(count: int, size: int) -> list[Tile]:
    """``[0, count)`` cut every ``size``: the borders of the tiles."""
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def row_tiles(rows: int, width: int, elements: int | None = None, like: Array | None = None) -> list[Tile]:
    """Tiles of whole rows for elementwise work on ``[rows, width]``, about ``elements`` (default: `ELEMENTS`) each.

    On a device (``like``) a single one.
    """
    if like is not None and on_device(like):
        return [(0, rows)]
    return tiles(rows, max(1, (elements or ELEMENTS) // max(1, width)))


def for_tiles(borders: Sequence[Tile], work: Callable[[int, int], None]) -> None:
    """Call ``work(start, stop)`` for every tile, spread over the threads."""
    for_each(len(borders), lambda index: work(*borders[index]))


def product_tiles(extent: int, each: int, like: Array | None = None) -> list[Tile]:
    """Tiles along one side of a matrix product: coarse, because BLAS packs its operands anew for every call.

    Two tiles up to 1,024 rows, four up to 4,096, then 1,024 rows each; never fewer than 128. A single one where all is less
    than `SMALL_PRODUCT`, and on a device (``like``). each: multiplications that a row takes.
    """
    if extent * each < SMALL_PRODUCT or (like is not None and on_device(like)):
        return [(0, extent)]
    half, quarter = (-(-extent // parts // 64) * 64 for parts in (2, 4))
    return tiles(extent, max(FEWEST_ROWS, min(ROWS, half), min(2 * ROWS, quarter)))


def matmul(a: Array, b: Array, out: Array | None = None) -> Array:
    """``a @ b`` of two matrices, cut along the longer side of the result. Returns ``[m, n]``, C-contiguous or ``out``."""
    if out is None:
        out = xp_of(a).empty((a.shape[0], b.shape[1]), dtype=a.dtype)
    _run_products(_product_tiles_of(a, b, out))
    return out


def matmuls(*pairs: tuple[Array, Array]) -> tuple[Array, ...]:
    """Several independent products, each as `matmul` does it, in one go: threads are woken once."""
    if sum(a.shape[0] * a.shape[1] * b.shape[1] for a, b in pairs) < SMALL_PRODUCT:
        return tuple(matmul(a, b) for a, b in pairs)
    outs = tuple(xp_of(a).empty((a.shape[0], b.shape[1]), dtype=a.dtype) for a, b in pairs)
    _run_products([part for (a, b), out in zip(pairs, outs, strict=True) for part in _product_tiles_of(a, b, out)])
    return outs


Product = tuple[Array, Array, Array]


def _product_tiles_of(a: Array, b: Array, out: Array) -> list[Product]:
    (m, k), n = a.shape, b.shape[1]
    if m >= n:
        return [(a[i:j], b, out[i:j]) for i, j in product_tiles(m, n * k, a)]
    return [(a, b[:, i:j], out[:, i:j]) for i, j in product_tiles(n, m * k, a)]


def _run_products(products: list[Product]) -> None:
    def product(index: int) -> None:
        a, b, out = products[index]
        xp_of(a).matmul(a, b, out=out)

    for_each(len(products), product, like=products[0][0])


def are_few(x: Array) -> bool:
    """Whether `few_rows` is the faster way for x: one token ``[B,1,k]`` of each of a few sequences; a device has its own.

    Whole sequences take the way of training, however few rows they have, so that without gradients too they give its bits.
    """
    return x.ndim == 3 and x.shape[1] == 1 and 1 < x.shape[0] <= _FEW_ROWS and not on_device(x)


def few_rows(x: Array, weight: Array) -> Array:
    """``x weightᵀ`` of few rows, one token of each sequence: ``[m, k], [n, k]`` to ``[m, n]``, not C-contiguous.

    As ``(weight xᵀ)ᵀ``, where BLAS copies the rows for its kernel, not the weight, which is so much larger; and in pieces so
    small that it copies nothing: a half and a third of the time of ``x weightᵀ``. Other bits than those of `matmul`.
    """
    (m, k), n = x.shape, weight.shape[0]
    out, piece = xp_of(x).empty((n, m), dtype=x.dtype), min(_UNPACKED_RESULT // m, _UNPACKED_PRODUCT // (m * k))

    def rows(low: int, high: int) -> None:
        for i, j in tiles(high - low, piece if piece >= 64 else high - low):
            xp_of(x).matmul(weight[low + i : low + j], x.T, out=out[low + i : low + j])

    for_tiles(product_tiles(n, m * k), rows)
    return out.T


def add_matmul(out: Array, a: Array, b: Array) -> None:
    """``out += a @ b`` over tiles of rows, so that no second array of the size of ``out`` is made."""
    (m, k), n, xp = a.shape, b.shape[1], xp_of(a)

    def rows(i: int, j: int) -> None:
        out[i:j] += xp.matmul(a[i:j], b)

    for_tiles(product_tiles(m, n * k, a), rows)


def add(a: Array, b: Array) -> Array:
    """``a + b`` of equal shapes, a new array."""
    xp = xp_of(a)
    if a.dtype != b.dtype or not (a.flags.c_contiguous and b.flags.c_contiguous):
        return a + b
    out = xp.empty(a.shape, dtype=a.dtype)
    flat_a, flat_b, flat = a.reshape(-1), b.reshape(-1), out.reshape(-1)
    for_tiles(row_tiles(a.size, 1, like=a), lambda i, j: xp.add(flat_a[i:j], flat_b[i:j], out=flat[i:j]))
    return out


# --- how parts are summed ---------------------------------------------------------------------------------------------


def tree_sum(parts: Sequence[T], add: Callable[[T, T], T] = lambda a, b: a + b) -> T:  # type: ignore[operator]
    """The sum of ``parts`` over the fixed binary tree T[i,j), which splits at the largest power of two below j-i.

    The order is a function of ``len(parts)`` alone. Raises ValueError when there is nothing to sum.
    """
    counter = TreeCounter(add)
    for part in parts:
        counter.push(part)
    return counter.total()


class TreeCounter(Generic[T]):
    """`tree_sum` for parts that arrive one by one: a binary counter holding about log2(n) partial sums.

    After n pushes the stack holds one sum for each set bit of n, largest first. Folding it from the right end is exactly
    T[0,n).
    """

    def __init__(self, add: Callable[[T, T], T] = lambda a, b: a + b) -> None:  # type: ignore[operator]
        self._add = add
        self._stack: list[tuple[int, T]] = []  # (number of parts, their sum)

    def push(self, part: T) -> None:
        """Add one part, merging equal-sized sums as a carry does."""
        size = 1
        while self._stack and self._stack[-1][0] == size:
            part = self._add(self._stack.pop()[1], part)
            size *= 2
        self._stack.append((size, part))

    def total(self) -> T:
        """The sum of all parts so far. Raises ValueError when there are none."""
        if not self._stack:
            raise ValueError("nothing to sum")
        total = self._stack[-1][1]
        for _, partial in reversed(self._stack[:-1]):
            total = self._add(partial, total)
        return total
