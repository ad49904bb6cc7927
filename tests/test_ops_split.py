"""`ops.split`, on either device: its parts are slices, and their gradients meet in one array.

More of its two primitives is in test_ops.py.
"""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from devices import host, place
from gradcheck import check_gradients
from hypothesis import given
from hypothesis import strategies as st
from test_ops import Draw, axis_and_shape, numbers

from oxidizr_ref import ops
from oxidizr_ref.autograd import Tensor
from oxidizr_ref.backend import Array

on_both = pytest.mark.usefixtures("device")


def cuts(draw: Draw) -> tuple[Array, list[int], int]:
    """An array, and lengths of parts (some of them empty) that add up to that of one of its axes."""
    axis, shape = axis_and_shape(draw)
    borders = sorted(draw(st.lists(st.integers(0, shape[axis]), max_size=3)))
    parts = [stop - start for start, stop in zip([0, *borders], [*borders, shape[axis]], strict=True)]
    return numbers(draw, shape), parts, axis


@on_both
@given(data=st.data())
def test_split_cuts_as_numpy_does_and_its_gradients_are_those_of_slicing_to_the_bit(data: Any) -> None:
    x, parts, axis = cuts(data.draw)
    leaf, sliced = Tensor(x, requires_grad=True), Tensor(x, requires_grad=True)
    found = ops.split(leaf, parts, axis)
    wanted = np.split(host(x), np.cumsum(parts)[:-1], axis)
    rng = np.random.default_rng(0)
    total, plain = None, None
    for n, (part, array) in enumerate(zip(found, wanted, strict=True)):
        np.testing.assert_array_equal(host(part.data), array)
        start = sum(parts[:n])
        index = (*[slice(None)] * (axis % x.ndim), slice(start, start + parts[n]))
        weights = [Tensor(place(rng.standard_normal(array.shape))) for _ in range(2)]
        for weight in weights:  # every part is read twice
            terms = (part * weight).sum(), (sliced[index] * weight).sum()
            total, plain = terms if total is None or plain is None else (total + terms[0], plain + terms[1])
    total.backward()
    plain.backward()
    np.testing.assert_array_equal(host(leaf.grad), host(sliced.grad))


@on_both
@given(data=st.data())
def test_gradient_of_split_equals_finite_differences(data: Any) -> None:
    x, parts, axis = cuts(data.draw)
    # The parts change places and meet again as factors, so each gradient depends on the other parts.
    check_gradients(
        lambda x: (
            ops.concatenate(*(part * (n + 1.0) for n, part in enumerate(ops.split(x, parts, axis)[::-1])), axis=axis)
            * ops.concatenate(*ops.split(x, parts, axis), axis=axis)
        ),
        [x],
        np.random.default_rng(0),
    )


@on_both
def test_part_of_a_split_that_nobody_reads_receives_zero_and_all_parts_unread_nothing() -> None:
    x = Tensor(place(np.arange(12.0).reshape(2, 6)), requires_grad=True)
    _, middle, _ = ops.split(x, (1, 3, 2))
    (middle * 2.0).sum().backward()
    np.testing.assert_array_equal(host(x.grad), [[0, 2, 2, 2, 0, 0]] * 2)
    y = Tensor(place(np.ones(3)), requires_grad=True)
    ops.split(y, (1, 2))
    (y * 3.0).sum().backward()
    np.testing.assert_array_equal(host(y.grad), 3.0)


@on_both
def test_split_of_something_computed_passes_the_gradient_on_beside_its_other_readers() -> None:
    x = Tensor(place([1.0, 2.0, 3.0]), requires_grad=True)
    squares = x * x
    first, rest = ops.split(squares, (1, 2))
    (first.sum() * 5.0 + rest.sum() * 7.0 + squares.sum()).backward()
    np.testing.assert_array_equal(host(x.grad), [2 * 6, 4 * 8, 6 * 8])


def test_gradients_of_the_parts_of_a_split_meet_in_one_array() -> None:
    """Slicing would make an array of the whole for every part: ten here."""
    x = Tensor(np.ones((500, 1000)), requires_grad=True)  # 4 MB
    parts = ops.split(x, [100] * 10)
    total = parts[0].sum()
    for part in parts[1:]:
        total = total + part.sum()
    given_out: list[int] = []
    tracemalloc.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            differentiate = ops.Part.differentiate

            def watched(self: ops.Part, dy: Any) -> Any:
                gradients = differentiate(self, dy)
                given_out.extend(dx.size for dx in gradients if dx is not None)
                return gradients

            patch.setattr(ops.Part, "differentiate", watched)
            total.backward()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert given_out == [500_000]
    # That one, the copy of it that the leaf owns, and the gradients of all parts, which wait beside it.
    assert peak < 3.1 * x.data.nbytes, peak / x.data.nbytes
    np.testing.assert_array_equal(x.grad, 1.0)


@on_both
@pytest.mark.parametrize("parts", [(1, 1), (2, 2), ()], ids=str)
def test_split_into_parts_that_do_not_add_up_is_an_error(parts: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError):
        ops.split(Tensor(place(np.ones((2, 3)))), parts)
