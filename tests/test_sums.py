"""Sums in a fixed order: by id and along an axis, the same bits on the host and on a device where additions are the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from devices import current, host, place
from hypothesis import given
from hypothesis import strategies as st

from oxidizr_ref.sums import running_sum, segment_sum

pytestmark = pytest.mark.usefixtures("device")


def one_by_one(rows: Any, ids: Any, count: int) -> Any:
    out = np.zeros((count, rows.shape[1]), dtype=rows.dtype)
    for row, i in zip(rows, ids, strict=True):
        out[i] += row
    return out


@given(st.data(), st.sampled_from([np.float32, np.float64]))
def test_rows_of_equal_id_are_added_in_their_order(data: st.DataObject, dtype: Any) -> None:
    n, width, count = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 5)), data.draw(st.integers(1, 9))
    ids = np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=n, max_size=n)), dtype=np.int64)
    rows = np.random.default_rng(n).standard_normal((n, width)).astype(dtype)
    found, wanted = host(segment_sum(place(rows), ids, count)), one_by_one(rows, ids, count)
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    if current() == "gpu":  # a thread adds one after the other, from zero, as the loop above does
        np.testing.assert_array_equal(found, wanted)
    else:  # NumPy adds eight at a time
        np.testing.assert_allclose(found, wanted, rtol=0, atol=40 * np.finfo(dtype).eps * 4)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=3), st.integers(0, 2), st.booleans(), st.integers(0, 99))
def test_a_running_sum_adds_from_one_end_to_the_other(shape: list[int], axis: int, reverse: bool, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal(shape)
    axis %= len(shape)
    ordered = np.flip(x, axis) if reverse else x
    wanted = np.cumsum(ordered, axis=axis)
    found = host(running_sum(place(x), axis, reverse))
    np.testing.assert_array_equal(found, np.flip(wanted, axis) if reverse else wanted)
