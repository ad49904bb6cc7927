"""Tiles and trees: what is computed never depends on who computes it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import warnings
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oxidizr_ref import parallel
from oxidizr_ref.parallel import TreeCounter, tree_sum

THREADS = (1, 2, 3, 5, 8)

# --- the tree ---------------------------------------------------------------------------------------------------------


def pair(a: Any, b: Any) -> Any:
    """The freest operation there is: neither associative nor commutative, it writes down how it was used."""
    return (a, b)


def tree_by_definition(i: int, j: int) -> Any:
    """T[i,j): one part, or split at the largest power of two below j - i."""
    if j - i == 1:
        return i
    split = 1
    while split * 2 < j - i:
        split *= 2
    return pair(tree_by_definition(i, i + split), tree_by_definition(i + split, j))


@pytest.mark.parametrize("n", range(1, 201))
def test_tree_sum_is_the_tree_of_the_definition(n: int) -> None:
    assert tree_sum(range(n), pair) == tree_by_definition(0, n)


def test_tree_counter_equals_tree_sum_after_every_push_and_holds_one_partial_a_set_bit() -> None:
    counter: TreeCounter[Any] = TreeCounter(pair)
    for n in range(1, 201):
        counter.push(n - 1)
        assert counter.total() == tree_by_definition(0, n)  # asking for the total changes nothing: asked after each
        assert len(counter._stack) == n.bit_count() <= n.bit_length()  # n.bit_length() is floor(log2 n) + 1


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=64))
def test_tree_sum_of_a_power_of_two_halves_is_the_sum_of_its_halves(parts: list[float]) -> None:
    size = 1 << (len(parts).bit_length() - 1)
    parts = parts[:size]
    if size > 1:
        assert tree_sum(parts) == tree_sum(parts[: size // 2]) + tree_sum(parts[size // 2 :])


def test_tree_sum_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to sum"):
        tree_sum([])
    with pytest.raises(ValueError, match="nothing to sum"):
        TreeCounter().total()


def test_tree_sum_never_changes_its_parts() -> None:
    parts = [np.full(2, float(i)) for i in range(7)]
    np.testing.assert_array_equal(tree_sum(parts), [21.0, 21.0])
    assert [part[0] for part in parts] == list(range(7))


# --- who works --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 100])
def test_for_each_runs_every_index_once(threads: int, count: int) -> None:
    parallel.set_threads(threads)
    seen = [0] * count

    def work(index: int) -> None:
        seen[index] += 1

    for _ in range(30):
        parallel.for_each(count, work)
    assert seen == [30] * count


def test_for_each_thousands_of_times_loses_nothing_and_starts_no_more_threads_than_asked() -> None:
    parallel.set_threads(3)
    total = np.zeros(5, dtype=np.int64)

    def work(index: int) -> None:
        total[index] += 1

    for _ in range(3000):
        parallel.for_each(5, work)
    np.testing.assert_array_equal(total, 3000)
    # Never more helpers than the largest number of threads any test here asked for, less the caller.
    assert sum(thread.name.startswith("tiles-") for thread in threading.enumerate()) <= max(THREADS) - 1


@pytest.mark.parametrize("threads", THREADS)
def test_for_each_raises_the_exception_of_the_lowest_index(threads: int) -> None:
    parallel.set_threads(threads)

    def work(index: int) -> None:
        if index in (3, 4, 7):
            raise LookupError(index)

    for _ in range(50):
        with pytest.raises(LookupError) as caught:
            parallel.for_each(10, work)
        assert caught.value.args == (3,)
    parallel.for_each(10, lambda index: None)  # and works afterwards


@pytest.mark.parametrize("threads", THREADS)
def test_for_each_finishes_all_other_tiles_before_it_raises(threads: int) -> None:
    parallel.set_threads(threads)
    done = set()

    def work(index: int) -> None:
        if index == 2:
            raise LookupError
        done.add(index)

    with pytest.raises(LookupError):
        parallel.for_each(6, work)
    assert done == {0, 1, 3, 4, 5}


@pytest.mark.parametrize("threads", THREADS)
def test_nested_calls_finish(threads: int) -> None:
    parallel.set_threads(threads)
    seen = np.zeros((6, 5, 4), dtype=np.int64)

    def outer(i: int) -> None:
        def middle(j: int) -> None:
            def inner(k: int) -> None:
                seen[i, j, k] += 1

            parallel.for_each(4, inner)

        parallel.for_each(5, middle)

    for _ in range(10):
        parallel.for_each(6, outer)
    np.testing.assert_array_equal(seen, 10)


def test_call_after_an_exception_in_a_nested_call_is_spread_over_threads_again() -> None:
    parallel.set_threads(3)

    def fail(_: int) -> None:
        raise LookupError

    with pytest.raises(LookupError):
        parallel.for_each(3, lambda _: parallel.for_each(3, fail))
    barrier = threading.Barrier(3, timeout=20)
    parallel.for_each(3, lambda _: barrier.wait())  # passes only if three threads take a tile each


def test_two_callers_at_a_time_each_get_all_of_their_work_done() -> None:
    parallel.set_threads(3)
    totals = np.zeros((2, 7), dtype=np.int64)

    def call(row: int) -> None:
        def work(index: int) -> None:
            totals[row, index] += 1

        for _ in range(300):
            parallel.for_each(7, work)

    callers = [threading.Thread(target=call, args=(row,)) for row in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
        assert not caller.is_alive()
    np.testing.assert_array_equal(totals, 300)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_for_each_works_in_a_forked_child() -> None:
    parallel.set_threads(3)
    parallel.for_each(8, lambda _: None)  # the parent has worker threads, the child will have none
    a = np.random.default_rng(0).standard_normal((600, 200)).astype(np.float32)
    wanted = parallel.matmul(a, a.T)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12+ warns of forking with threads: the point here
        child = os.fork()
    if child == 0:
        try:
            same = parallel.matmul(a, a.T).tobytes() == wanted.tobytes()
            barrier = threading.Barrier(3, timeout=20)
            parallel.for_each(3, lambda _: barrier.wait())  # the child has three threads of its own
            os._exit(0 if same else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    parallel.for_each(8, lambda _: None)  # the parent's threads still work


def test_fewer_than_one_thread_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        parallel.set_threads(0)


# --- how work is cut --------------------------------------------------------------------------------------------------


@given(count=st.integers(0, 1000), size=st.integers(1, 300))
def test_tiles_cover_every_index_exactly_once_and_only_the_last_is_short(count: int, size: int) -> None:
    borders = parallel.tiles(count, size)
    assert [index for i, j in borders for index in range(i, j)] == list(range(count))
    assert all(j - i == size for i, j in borders[:-1])
    assert all(1 <= j - i <= size for i, j in borders[-1:])


@given(rows=st.integers(0, 500), width=st.integers(0, 200), elements=st.none() | st.integers(1, 500))
def test_row_tiles_cover_every_row_once_within_their_number_of_elements(rows: int, width: int, elements: int | None) -> None:
    borders = parallel.row_tiles(rows, width, elements)
    assert [index for i, j in borders for index in range(i, j)] == list(range(rows))
    assert all((j - i) * width <= max(width, elements or parallel.ELEMENTS) for i, j in borders)


@given(extent=st.integers(1, 100_000))
def test_product_tiles_cover_the_side_once_in_coarse_tiles_at_multiples_of_64(extent: int) -> None:
    borders = parallel.product_tiles(extent, parallel.SMALL_PRODUCT)
    assert [i for i, _ in borders] == [0, *(j for _, j in borders[:-1])]
    assert borders[-1][1] == extent
    assert all(i % 64 == 0 and 0 < j - i <= 1024 for i, j in borders)
    assert all(j - i >= 128 for i, j in borders[:-1])


@given(extent=st.integers(0, 10_000), each=st.integers(0, 10_000))
def test_a_product_that_is_not_worth_a_second_thread_is_one_tile(extent: int, each: int) -> None:
    whole = parallel.product_tiles(extent, each) == [(0, extent)]
    assert whole == (extent * each < parallel.SMALL_PRODUCT or extent <= parallel.FEWEST_ROWS)


def test_how_work_is_cut_never_depends_on_the_number_of_threads() -> None:
    def all_cuts() -> list[Any]:
        return [parallel.tiles(1000, 77), parallel.row_tiles(5000, 33), parallel.product_tiles(3000, 3000)]

    parallel.set_threads(1)
    first = all_cuts()
    for threads in THREADS:
        parallel.set_threads(threads)
        assert all_cuts() == first


# --- products ---------------------------------------------------------------------------------------------------------

PRODUCTS = [
    (1300, 300, 100),  # tall: cut along m
    (100, 300, 1300),  # wide: cut along n
    (1025, 129, 257),  # ragged
    (40, 30, 20),  # too small to cut
    (1, 5000, 4000),  # one row
    (0, 3, 4),
    (3, 0, 4),
]


def operands(m: int, k: int, n: int, dtype: type, transposed: bool) -> tuple[Any, Any]:
    rng = np.random.default_rng(m + k + n)
    if transposed:  # as weights and weight gradients arrive
        return rng.standard_normal((k, m)).astype(dtype).T, rng.standard_normal((n, k)).astype(dtype).T
    return rng.standard_normal((m, k)).astype(dtype), rng.standard_normal((k, n)).astype(dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_matmul_equals_numpys_product_of_each_tile_to_the_bit(
    shape: tuple[int, int, int], dtype: type, transposed: bool
) -> None:
    m, k, n = shape
    a, b = operands(m, k, n, dtype, transposed)
    wanted = np.empty((m, n), dtype)
    by_rows = m >= n
    extent = m if by_rows else n
    borders = parallel.product_tiles(extent, m * n * k // max(1, extent))
    for i, j in borders:
        if by_rows:
            np.matmul(a[i:j], b, out=wanted[i:j])
        else:
            np.matmul(a, b[:, i:j], out=wanted[:, i:j])
    for threads in THREADS:
        parallel.set_threads(threads)
        out = np.full((m, n), np.nan, dtype)
        assert parallel.matmul(a, b, out=out) is out
        assert out.tobytes() == parallel.matmul(a, b).tobytes() == wanted.tobytes()
    # k products of order one, in any order
    np.testing.assert_allclose(wanted, a.astype(np.float64) @ b, rtol=0, atol=max(1, k) * np.finfo(dtype).eps * 10)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_add_matmul_adds_numpys_product_of_each_tile_to_the_bit(shape: tuple[int, int, int], transposed: bool) -> None:
    m, k, n = shape
    a, b = operands(m, k, n, np.float32, transposed)
    start = np.random.default_rng(1).standard_normal((m, n)).astype(np.float32)
    wanted = start.copy()
    for i, j in parallel.product_tiles(m, n * k):
        wanted[i:j] += np.matmul(a[i:j], b)
    for threads in THREADS:
        parallel.set_threads(threads)
        out = start.copy()
        parallel.add_matmul(out, a, b)
        assert out.tobytes() == wanted.tobytes()


def test_products_above_span_three_tiles_where_they_are_cut() -> None:
    assert len(parallel.product_tiles(1300, 300 * 100)) >= 3
    assert len(parallel.product_tiles(1025, 129 * 257)) >= 3


# --- BLAS -------------------------------------------------------------------------------------------------------------


def test_blas_runs_with_one_thread_a_call_whoever_imported_numpy_first() -> None:
    program = (
        "import numpy as np; np.ones((300, 300)) @ np.ones((300, 300))\n"
        "import oxidizr_ref.parallel as parallel, threadpoolctl\n"
        "np.ones((300, 300)) @ np.ones((300, 300))\n"
        "blas = [x for x in threadpoolctl.threadpool_info() if x['user_api'] == 'blas']\n"
        "assert blas and all(x['num_threads'] == 1 for x in blas), blas\n"
        "assert [x['filepath'] for x in parallel.blas_info()] == [x['filepath'] for x in blas]\n"
        "parallel.set_threads(4); parallel.for_each(8, lambda i: np.ones((300, 300)) @ np.ones((300, 300)))\n"
        "assert all(x['num_threads'] == 1 for x in threadpoolctl.threadpool_info() if x['user_api'] == 'blas')\n"
    )
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "4", "OMP_NUM_THREADS": "4"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=60)


def test_unhurried_work_is_done_by_one_thread_which_rests_unless_somebody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[float | None] = []

    class Hurry(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            rests.append(timeout)
            return True

    seen: list[int] = []
    now = iter(range(100))
    monkeypatch.setattr(parallel.time, "perf_counter", lambda: float(next(now)))
    with parallel.unhurried(Hurry()):
        parallel.for_each(4, lambda _: seen.append(threading.get_ident()))
    assert set(seen) == {threading.get_ident()} and len(seen) == 4
    assert rests == [parallel._REST * 1.0] * 4
    parallel.for_each(4, lambda _: None)
    assert len(rests) == 4, "outside it nobody rests"


def test_when_the_wait_is_interrupted_no_thread_is_still_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by Ctrl-C: whoever gets the exception may close the file that the tiles were written to."""
    caller, gate, at_work = threading.get_ident(), threading.Event(), list[int]()
    parallel.set_threads(2)

    class Interrupted(SimpleQueue):  # type: ignore[type-arg]
        def get(self, block: bool = True, timeout: float | None = None) -> Any:
            if threading.get_ident() == caller:
                gate.set()
                raise KeyboardInterrupt
            return super().get(block, timeout)

    def work(index: int) -> None:
        if threading.get_ident() == caller:
            started.wait(5)
            return
        at_work.append(index)
        started.set()
        gate.wait(5)
        time.sleep(0.02)
        at_work.remove(index)

    started = threading.Event()
    parallel.for_each(2, lambda _: None)  # the helper exists, with a queue of the ordinary kind
    monkeypatch.setattr(parallel, "SimpleQueue", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        parallel.for_each(2, work)
    assert gate.is_set() and at_work == []
