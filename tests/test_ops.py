"""The primitives: every gradient by finite differences over shapes, broadcasts and memory layouts; dtypes; errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from devices import current, host, place
from gradcheck import check_gradients
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import mutually_broadcastable_shapes

from oxidizr_ref import ops
from oxidizr_ref.autograd import Function, Tensor
from oxidizr_ref.backend import Array, xp_of
from oxidizr_ref.sums import segment_sum

pytestmark = pytest.mark.usefixtures("device")

BF16 = np.dtype(ml_dtypes.bfloat16)
Draw = Callable[[Any], Any]
#: An op applied to some arrays: the function of tensors, and the arrays, which lie where the test computes.
Case = tuple[Callable[..., Tensor], list[Array]]


def tensor(x: Any, requires_grad: bool = False) -> Tensor:
    """A tensor where the test computes."""
    return Tensor(place(x), requires_grad)


# --- arrays of any layout ---------------------------------------------------------------------------------------------

LAYOUTS = ("plain", "fortran", "strided", "reversed", "offset")


def in_layout(x: Array, layout: str) -> Array:
    """The same values, lying differently in memory."""
    xp = xp_of(x)
    if x.ndim == 0 or layout == "plain":
        return x
    if layout == "fortran":
        return xp.array(x, order="F")
    if layout == "strided":
        wide = xp.full((*x.shape[:-1], 2 * x.shape[-1]), np.nan, dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "reversed":
        return x[..., ::-1].copy()[..., ::-1]
    wide = xp.full((x.shape[0] + 2, *x.shape[1:]), np.nan, dtype=x.dtype)
    wide[1:-1] = x
    return wide[1:-1]


def numbers(draw: Draw, shape: tuple[int, ...], low: float = -2.0, high: float = 2.0) -> Array:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return in_layout(place(rng.uniform(low, high, shape)), draw(st.sampled_from(LAYOUTS)))


def shape_of(draw: Draw, min_dims: int = 0, max_dims: int = 3, min_side: int = 0) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.integers(min_side, 4), min_size=min_dims, max_size=max_dims)))


def broadcast_shapes(draw: Draw, count: int) -> tuple[tuple[int, ...], ...]:
    shapes: tuple[tuple[int, ...], ...] = draw(
        mutually_broadcastable_shapes(num_shapes=count, min_side=0, max_side=4, max_dims=3)
    ).input_shapes
    return shapes


# --- one example generator for every op -------------------------------------------------------------------------------

CASES: dict[type[Function], Callable[[Draw], Case]] = {}


def case(op: type[Function]) -> Callable[[Callable[[Draw], Case]], Callable[[Draw], Case]]:
    def remember(generate: Callable[[Draw], Case]) -> Callable[[Draw], Case]:
        CASES[op] = generate
        return generate

    return remember


def two_operands(op: type[Function], low: float = -2.0) -> None:
    def generate(draw: Draw) -> Case:
        a, b = broadcast_shapes(draw, 2)
        return op.apply, [numbers(draw, a), numbers(draw, b, low)]

    CASES[op] = generate


def one_operand(op: type[Function], low: float = -2.0) -> None:
    CASES[op] = lambda draw: (op.apply, [numbers(draw, shape_of(draw), low)])


two_operands(ops.Add)
two_operands(ops.Sub)
two_operands(ops.Mul)
two_operands(ops.Div, low=0.5)  # away from the pole
one_operand(ops.Exp)
one_operand(ops.Log, low=0.5)
one_operand(ops.Sqrt, low=0.5)
one_operand(ops.Sin)
one_operand(ops.Cos)
one_operand(ops.Tanh)
one_operand(ops.Sigmoid)


@case(ops.Softplus)
def softplus_case(draw: Draw) -> Case:
    # Steps of the difference must not cross 0: log1p(exp(-|x|)) is written with a kink there, though the sum has none.
    x = numbers(draw, shape_of(draw), 0.1)
    return ops.softplus, [x * draw(st.sampled_from([-1.0, 1.0]))]


@case(ops.MatMul)
def matmul_case(draw: Draw) -> Case:
    a, b = broadcast_shapes(draw, 2)
    m, n, k = (draw(st.integers(0, 4)) for _ in range(3))
    return ops.matmul, [numbers(draw, (*a, m, k)), numbers(draw, (*b, k, n))]


@case(ops.Where)
def where_case(draw: Draw) -> Case:
    a, b, c = broadcast_shapes(draw, 3)
    condition = numbers(draw, c) > 0
    return lambda x, y: ops.where(x, y, condition=condition), [numbers(draw, a), numbers(draw, b)]


@case(ops.Power)
def power_case(draw: Draw) -> Case:
    exponent = draw(st.sampled_from([2, 3, 0.5, -1, -0.5, 1, 0]))
    return lambda x: x**exponent, [numbers(draw, shape_of(draw), 0.5)]


@case(ops.Sum)
def sum_case(draw: Draw) -> Case:
    shape = shape_of(draw)
    axis = draw(st.none() | st.lists(st.sampled_from(range(len(shape))), unique=True).map(tuple) if shape else st.none())
    keepdims = draw(st.booleans())
    return lambda x: x.sum(axis=axis, keepdims=keepdims), [numbers(draw, shape)]


def axis_and_shape(draw: Draw) -> tuple[int, tuple[int, ...]]:
    """A shape, and one of its axes, counted from either end, that has at least one element."""
    before, after = shape_of(draw, max_dims=1), shape_of(draw, max_dims=1)
    shape = (*before, draw(st.integers(1, 4)), *after)
    return len(before) - draw(st.sampled_from([0, len(shape)])), shape


@case(ops.Max)
def max_case(draw: Draw) -> Case:
    axis, shape = axis_and_shape(draw)
    rng, size = np.random.default_rng(draw(st.integers(0, 2**32))), int(np.prod(shape))
    # 0.1 apart, so that no step of the difference (directions of a few units times 2e-3) changes which is the largest.
    x = 0.1 * rng.permutation(size).reshape(shape)
    keepdims = draw(st.booleans())
    return lambda x: ops.amax(x, axis=axis, keepdims=keepdims), [in_layout(place(x), draw(st.sampled_from(LAYOUTS)))]


def along_axis(op: type[Function]) -> None:
    def generate(draw: Draw) -> Case:
        axis, shape = axis_and_shape(draw)
        return lambda x: op.apply(x, axis=axis), [numbers(draw, shape)]

    CASES[op] = generate


along_axis(ops.Softmax)
along_axis(ops.LogSoftmax)
along_axis(ops.CumSum)


@case(ops.Reshape)
def reshape_case(draw: Draw) -> Case:
    shape = shape_of(draw, min_dims=1)
    new = draw(st.sampled_from([shape[::-1], (*shape, 1), (int(np.prod(shape)),), (1, *shape)]))
    return lambda x: x.reshape(*new), [numbers(draw, shape)]


@case(ops.Transpose)
def transpose_case(draw: Draw) -> Case:
    shape = shape_of(draw)
    order = tuple(draw(st.permutations(range(len(shape)))))
    return lambda x: ops.transpose(x, order=order), [numbers(draw, shape)]


@case(ops.BroadcastTo)
def broadcast_case(draw: Draw) -> Case:
    found = draw(mutually_broadcastable_shapes(num_shapes=2, min_side=0, max_side=4, max_dims=3))
    return lambda x: ops.broadcast_to(x, shape=found.result_shape), [numbers(draw, found.input_shapes[0])]


@case(ops.GetItem)
def getitem_case(draw: Draw) -> Case:
    shape = shape_of(draw)
    parts: list[Any] = []
    for length in shape[: draw(st.integers(0, len(shape)))]:
        choices = [st.slices(length)] + ([st.integers(-length, length - 1)] if length else [])
        parts.append(draw(st.one_of(choices)))
    if draw(st.booleans()):
        parts.append(...)
    if draw(st.booleans()):
        parts.insert(draw(st.integers(0, len(parts))), None)
    index = parts[0] if len(parts) == 1 and draw(st.booleans()) else tuple(parts)
    return lambda x: x[index], [numbers(draw, shape)]


@case(ops.Pad)
def pad_case(draw: Draw) -> Case:
    shape = shape_of(draw, min_dims=1)  # numpy.pad refuses 0-d arrays
    widths = tuple((draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in shape)
    return lambda x: ops.pad(x, widths=widths), [numbers(draw, shape)]


@case(ops.Concatenate)
def concatenate_case(draw: Draw) -> Case:
    before, after = shape_of(draw, max_dims=1), shape_of(draw, max_dims=1)
    axis = len(before) - draw(st.sampled_from([0, len(before) + 1 + len(after)]))
    lengths = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
    return lambda *parts: ops.concatenate(*parts, axis=axis), [numbers(draw, (*before, n, *after)) for n in lengths]


one_operand(ops.Whole)


@case(ops.Part)
def part_case(draw: Draw) -> Case:
    """One part of a `split`, of any length, at any place along any axis."""
    axis, shape = axis_and_shape(draw)
    start = draw(st.integers(0, shape[axis]))
    index = (*[slice(None)] * (axis % len(shape)), slice(start, draw(st.integers(start, shape[axis]))))

    def part(x: Tensor) -> Tensor:
        whole = ops.Whole.apply(x)
        return ops.Part.apply(whole, index=index, whole=whole.node)

    return part, [numbers(draw, shape)]


@case(ops.Lookup)
def lookup_case(draw: Draw) -> Case:
    rows, row = draw(st.integers(1, 4)), shape_of(draw, min_dims=1, max_dims=2)
    ids = np.random.default_rng(draw(st.integers(0, 2**32))).integers(0, rows, shape_of(draw))
    return lambda table: ops.lookup(table, ids=ids), [numbers(draw, (rows, *row))]


@case(ops.TakeAlong)
def take_along_case(draw: Draw) -> Case:
    before, width, count = shape_of(draw, max_dims=2, min_side=1), draw(st.integers(1, 4)), draw(st.integers(0, 4))
    ids = np.random.default_rng(draw(st.integers(0, 2**32))).integers(0, width, (*before, count))
    return lambda x: ops.take_along(x, ids=ids), [numbers(draw, (*before, width))]


ALL_OPS = sorted(
    (
        value
        for value in vars(ops).values()
        if isinstance(value, type) and issubclass(value, Function) and value is not Function
    ),
    key=lambda op: op.__name__,
)


def name_of(op: type[Function]) -> str:
    return op.__name__


def case_of(op: type[Function], draw: Draw) -> Case:
    assert op in CASES, f"{op.__name__} has no examples here: write a case for it"
    return CASES[op](draw)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ALL_OPS, ids=name_of)
@given(data=st.data())
def test_gradient_equals_finite_differences_for_every_op_shape_and_layout(op: type[Function], data: Any) -> None:
    function, arrays = case_of(op, data.draw)
    check_gradients(function, arrays, np.random.default_rng(0))


@pytest.mark.parametrize("op", ALL_OPS, ids=name_of)
@given(data=st.data())
def test_gradient_is_left_out_for_inputs_that_want_none(op: type[Function], data: Any) -> None:
    function, arrays = case_of(op, data.draw)
    wanted = data.draw(st.integers(0, len(arrays) - 1))
    leaves = [Tensor(array, requires_grad=i == wanted) for i, array in enumerate(arrays)]
    result = function(*leaves)
    result.backward(place(np.ones(result.shape)))
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is None) == (i != wanted)


@pytest.mark.parametrize("op", ALL_OPS, ids=name_of)
@given(data=st.data())
def test_inputs_and_incoming_gradient_are_never_changed(op: type[Function], data: Any) -> None:
    function, arrays = case_of(op, data.draw)
    copies = [host(array).copy() for array in arrays]
    result = function(*(Tensor(array, requires_grad=True) for array in arrays))
    dy = place(np.random.default_rng(1).standard_normal(result.shape))
    dy_copy = host(dy).copy()
    result.backward(dy)
    for array, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(host(array), copy)
    np.testing.assert_array_equal(host(dy), dy_copy)


@given(data=st.data())
def test_gradients_of_the_composed_functions_equal_finite_differences(data: Any) -> None:
    rng = np.random.default_rng(0)
    shape = shape_of(data.draw, min_dims=1, min_side=1)
    axis = data.draw(st.none() | st.integers(-len(shape), len(shape) - 1))
    a, b = (data.draw(st.integers(-len(shape), len(shape) - 1)) for _ in range(2))
    x = numbers(data.draw, shape)
    check_gradients(ops.silu, [x], rng)
    check_gradients(lambda x: x.mean(axis=axis), [x], rng)
    check_gradients(lambda x: x.mean(axis=axis, keepdims=True), [x], rng)
    check_gradients(lambda x: x.swapaxes(a, b), [x], rng)


def test_equal_largest_elements_share_the_gradient_evenly() -> None:
    x = tensor(np.array([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [5.0, 4.0, 3.0]]), requires_grad=True)
    ops.amax(x, axis=-1).backward(place(np.array([1.0, 6.0, 2.0])))
    np.testing.assert_array_equal(host(x.grad), [[0, 0.5, 0.5], [2, 2, 2], [2, 0, 0]])


def test_row_read_three_times_receives_three_gradients_and_unread_rows_zero() -> None:
    table = tensor(np.zeros((4, 2)), requires_grad=True)
    ops.lookup(table, ids=np.array([[2, 0], [2, 2]])).backward(place(np.arange(8.0).reshape(2, 2, 2)))
    np.testing.assert_array_equal(host(table.grad), [[2, 3], [0, 0], [0 + 4 + 6, 1 + 5 + 7], [0, 0]])


def test_element_taken_twice_receives_both_gradients() -> None:
    x = tensor(np.zeros((2, 3)), requires_grad=True)
    ops.take_along(x, ids=np.array([[1, 1, 0], [2, 2, 2]])).backward(place(np.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])))
    np.testing.assert_array_equal(host(x.grad), [[4, 3, 0], [0, 0, 56]])


def test_take_along_of_no_rows_has_an_empty_gradient() -> None:
    x = tensor(np.zeros((0, 3)), requires_grad=True)
    y = ops.take_along(x, ids=np.zeros((0, 2), dtype=np.int64))
    assert y.shape == (0, 2)
    y.backward(place(np.zeros((0, 2))))
    assert x.grad.shape == (0, 3)


@pytest.mark.parametrize("width", [1, 2, 7, 32])
def test_sum_of_a_reused_row_depends_on_its_own_rows_in_their_order_and_on_nothing_else(width: int) -> None:
    rng = np.random.default_rng(0)
    rows, ids = rng.standard_normal((3000, width)).astype(np.float32), rng.integers(0, 5, 3000)
    together = host(segment_sum(place(rows), ids, 6))
    for segment in range(5):
        alone = rows[ids == segment]
        by_itself = host(segment_sum(place(alone), np.zeros(len(alone), dtype=np.int64), 1))
        np.testing.assert_array_equal(together[segment], by_itself[0])
        # float32 sums of n = 600 numbers in any order: within n · 2⁻²⁴ · Σ|row| of the exact one.
        bound = len(alone) * 2.0**-24 * np.abs(alone).sum(axis=0)
        assert np.all(np.abs(together[segment] - alone.astype(np.float64).sum(axis=0)) <= bound)
    np.testing.assert_array_equal(together[5], 0)


# --- values -----------------------------------------------------------------------------------------------------------

OPERATOR_EXAMPLES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "__add__": (lambda t: t + 2, lambda x: x + 2),
    "__radd__": (lambda t: 2 + t, lambda x: 2 + x),
    "__sub__": (lambda t: t - 2, lambda x: x - 2),
    "__rsub__": (lambda t: 2 - t, lambda x: 2 - x),
    "__mul__": (lambda t: t * 3, lambda x: x * 3),
    "__rmul__": (lambda t: 3 * t, lambda x: 3 * x),
    "__truediv__": (lambda t: t / 3, lambda x: x / 3),
    "__rtruediv__": (lambda t: 3 / t, lambda x: 3 / x),
    "__neg__": (lambda t: -t, lambda x: -x),
    "__pow__": (lambda t: t**3, lambda x: x**3),
    "__matmul__": (lambda t: t @ t.swapaxes(0, 1), lambda x: x @ x.T),
    "__getitem__": (lambda t: t[1:, None, ::-1], lambda x: x[1:, None, ::-1]),
    "sum": (lambda t: t.sum(axis=1, keepdims=True), lambda x: x.sum(axis=1, keepdims=True)),
    "mean": (lambda t: t.mean(axis=0), lambda x: x.sum(axis=0) / x.shape[0]),
    "reshape": (lambda t: t.reshape(2, -1), lambda x: x.reshape(2, -1)),
    "swapaxes": (lambda t: t.swapaxes(-1, 0), lambda x: x.swapaxes(-1, 0)),
}
#: What a device may round otherwise: powers, which CUDA gives within 4 units in the last place and NumPy within one, and
#: sums of at most 4 positive terms in another order, 4 roundings each. All else is one IEEE operation.
ROUNDED_OTHERWISE = ("__pow__", "__matmul__", "sum", "mean")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", sorted(ops.OPERATORS))
def test_operator_computes_what_numpy_computes_in_the_same_dtype(name: str, dtype: type) -> None:
    assert hasattr(Tensor, name)
    ours, theirs = OPERATOR_EXAMPLES[name]
    x = np.random.default_rng(0).uniform(0.5, 2, (4, 3)).astype(dtype)
    result = ours(tensor(x)).data
    assert result.dtype == dtype
    if name in ROUNDED_OTHERWISE and current() == "gpu":
        np.testing.assert_allclose(host(result), theirs(x), rtol=8 * np.finfo(dtype).eps)
    else:
        np.testing.assert_array_equal(host(result), theirs(x))


def test_tensor_with_tensor_operators_take_both_operands() -> None:
    a, b = np.array([[3.0, 5.0]]), np.array([[2.0], [4.0]])
    for ours, theirs in [
        (tensor(a) + tensor(b), a + b),
        (tensor(a) - tensor(b), a - b),
        (tensor(a) * tensor(b), a * b),
        (tensor(a) / tensor(b), a / b),
        (tensor(b) @ tensor(a), b @ a),
    ]:
        np.testing.assert_array_equal(host(ours.data), theirs)


@given(x=st.floats(-(2.0**100), 2.0**100, width=32))
def test_sigmoid_and_softplus_never_overflow(x: float) -> None:
    array = np.array([x], dtype=np.float32)  # a warning would be an error
    assert 0 <= host(ops.sigmoid(tensor(array)).data)[0] <= 1
    # max(x, 0) <= log(1 + exp(x)) <= max(x, 0) + log(2), the sum rounded to float32; on a device exp and log1p may each be
    # off by two units in the last place of numbers below 1: by 2 · 2⁻²⁴, which is 1.5 · 2⁻²³ of log(2).
    rounding = 2**-23 if current() == "cpu" else 4 * 2**-23
    assert max(x, 0.0) <= float(host(ops.softplus(tensor(array)).data)[0]) <= (max(x, 0.0) + np.log(2)) * (1 + rounding)


def test_softmax_of_huge_and_masked_scores_is_a_distribution() -> None:
    x = np.array([[1e30, 1e30, -1e30, -np.inf], [0, -np.inf, -np.inf, -np.inf]], dtype=np.float32)
    np.testing.assert_array_equal(host(ops.softmax(tensor(x)).data), [[0.5, 0.5, 0, 0], [1, 0, 0, 0]])


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ALL_OPS, ids=name_of)
@given(data=st.data())
def test_float32_stays_float32_in_result_and_gradient(op: type[Function], data: Any) -> None:
    function, arrays = case_of(op, data.draw)
    leaves = [Tensor(array.astype(np.float32), requires_grad=True) for array in arrays]
    result = function(*leaves)
    assert result.dtype == np.float32
    result.backward(place(np.ones(result.shape, dtype=np.float32)))
    assert [leaf.grad.dtype for leaf in leaves] == [np.float32] * len(leaves)


@pytest.mark.parametrize("storage", [np.dtype(np.float16), BF16], ids=str)
@pytest.mark.parametrize("op", ALL_OPS, ids=name_of)
@given(data=st.data())
def test_half_precision_storage_computes_in_float32(op: type[Function], storage: np.dtype[Any], data: Any) -> None:
    function, arrays = case_of(op, data.draw)
    stored = [array.astype(storage) for array in arrays]
    halves = [Tensor(array, requires_grad=True) for array in stored]
    singles = [Tensor(array.astype(np.float32), requires_grad=True) for array in stored]
    ours, wanted = function(*halves), function(*singles)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(host(ours.data), host(wanted.data))
    for result in (ours, wanted):
        result.backward(place(np.ones(result.shape, dtype=np.float32)))
    for half, single in zip(halves, singles, strict=True):
        assert half.grad.dtype == np.float32
        np.testing.assert_array_equal(host(half.grad), host(single.grad))


@pytest.mark.parametrize("scalar", [2, 2.0, True, np.float64(2), np.float32(2), np.int64(2)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("storage", [np.dtype(np.float32), np.dtype(np.float16), BF16], ids=str)
def test_scalars_never_promote(storage: np.dtype[Any], scalar: Any) -> None:
    x = tensor(np.ones(3, dtype=storage), requires_grad=True)
    for y in (x + scalar, scalar + x, x - scalar, scalar - x, x * scalar, scalar * x, x / scalar, scalar / x):
        assert y.dtype == np.float32
        y.sum().backward()
    assert x.grad.dtype == np.float32


@pytest.mark.parametrize("exponent", [2, 2.0, np.float64(2), np.int64(2)], ids=lambda s: type(s).__name__)
def test_exponent_never_promotes(exponent: Any) -> None:
    x = tensor(np.ones(3, dtype=np.float32), requires_grad=True)
    y = x**exponent
    assert y.dtype == np.float32
    y.sum().backward()
    assert x.grad.dtype == np.float32


def test_array_on_the_left_of_an_operator_gives_one_tensor_and_one_of_the_host_does_not_mix_with_a_device() -> None:
    x = tensor(np.ones(3, dtype=np.float32))
    if current() == "gpu":
        with pytest.raises(TypeError):
            np.arange(3.0) * x
    y = place(np.arange(3.0)) * x
    assert isinstance(y, Tensor)
    np.testing.assert_array_equal(host(y.data), [0, 1, 2])


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [np.array([0, 1]), [0, 1], (0, np.array([1])), np.array([True, False]), 1.0], ids=repr)
def test_indexing_by_anything_but_integers_and_slices_names_the_ops_that_do_it(index: Any) -> None:
    with pytest.raises(TypeError, match="lookup and take_along"):
        tensor(np.zeros((2, 2)))[index]


@pytest.mark.parametrize(("a", "b"), [((3,), (3, 2)), ((2, 3), (3,)), ((3,), (3,)), ((), (2, 2))])
def test_matmul_of_vectors_is_refused_with_both_shapes(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="matmul needs matrices") as caught:
        tensor(np.zeros(a)) @ tensor(np.zeros(b))
    assert str(a) in str(caught.value)
    assert str(b) in str(caught.value)


def test_tensor_exponent_is_refused_with_the_way_to_write_it() -> None:
    with pytest.raises(TypeError, match="exp\\(log\\(x\\) \\* y\\)"):
        tensor(np.ones(2)) ** tensor(np.ones(2))


@pytest.mark.parametrize("axis", [2, -3, (0, 2)], ids=str)
def test_axis_that_does_not_exist_is_an_error(axis: Any) -> None:
    x = tensor(np.arange(6.0).reshape(2, 3))
    with pytest.raises(ValueError):
        x.sum(axis=axis)
    with pytest.raises(ValueError):
        x.mean(axis=axis)


def test_concatenation_along_an_axis_that_does_not_exist_is_an_error() -> None:
    x = tensor(np.ones((2, 2)))
    with pytest.raises(ValueError):
        ops.concatenate(x, x, axis=2)


@pytest.mark.parametrize("operand", [None, "2"], ids=repr)
def test_operand_that_is_no_number_is_an_error(operand: Any) -> None:
    with pytest.raises(TypeError):
        tensor(np.ones(2)) + operand


def test_shapes_that_do_not_broadcast_are_an_error() -> None:
    with pytest.raises(ValueError, match="broadcast"):
        tensor(np.ones(2)) + tensor(np.ones(3))
