"""The tape, on either device: what is added up, who owns it, when it is freed; nothing depends on depth or chance."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from devices import current, host, place

from oxidizr_ref import ops
from oxidizr_ref.autograd import Function, Tensor, no_grad
from oxidizr_ref.backend import Array, xp_of

on_both = pytest.mark.usefixtures("device")


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return Tensor(place(np.random.default_rng(seed).standard_normal(shape)), requires_grad=True)


# --- what is added up -------------------------------------------------------------------------------------------------


@on_both
def test_value_used_by_three_consumers_receives_the_sum_of_their_gradients() -> None:
    x = Tensor(place(np.array([2.0])), requires_grad=True)
    y = x * 3
    (y * y + y * 5 + y).backward()  # d/dx (9x² + 15x + 3x) = 18x + 18
    np.testing.assert_array_equal(host(x.grad), [54.0])


@on_both
def test_leaf_that_is_both_operands_receives_both_gradients() -> None:
    x = Tensor(place(np.array([3.0])), requires_grad=True)
    for result, gradient in [(x + x, 2.0), (x * x, 6.0), (x - x, 0.0), (x / x, 0.0)]:
        x.grad = None
        result.backward()
        np.testing.assert_array_equal(host(x.grad), [gradient])


@on_both
def test_leaf_used_before_and_after_a_chain_receives_both_gradients() -> None:
    x = Tensor(place(np.array([2.0])), requires_grad=True)
    (ops.exp(x) * x).backward()
    np.testing.assert_allclose(host(x.grad), np.exp(2.0) * 3.0, rtol=4e-16)  # one rounding each in exp, product and sum


@on_both
def test_two_backward_calls_add_and_leave_the_first_gradient_array_alone() -> None:
    x = leaf(3)
    (x * 2).sum().backward()
    first = x.grad
    (x * 5).sum().backward()
    np.testing.assert_array_equal(host(x.grad), [7.0] * 3)
    np.testing.assert_array_equal(host(first), [2.0] * 3)


@on_both
def test_only_leaves_that_require_a_gradient_receive_one() -> None:
    x, constant = leaf(2), Tensor(place(np.ones(2)))
    y = x * constant
    y.sum().backward()
    assert x.grad is not None
    assert constant.grad is None
    assert y.grad is None
    assert not (constant * 2).requires_grad


@on_both
def test_backward_of_a_leaf_is_its_own_gradient() -> None:
    x = Tensor(place(np.array([1.0, 2.0])), requires_grad=True)
    x.backward(place([3.0, 4.0]))
    x.backward(place([1.0, 1.0]))
    np.testing.assert_array_equal(host(x.grad), [4.0, 5.0])


# --- who owns it ------------------------------------------------------------------------------------------------------

# Each of these hands a gradient on as it came or as a view of it.
PASSES_ON: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "the same leaf twice": lambda a, b: (a + a) + (b + b),
    "reshape": lambda a, b: (a.reshape(6) + b.reshape(6)).reshape(3, 2),
    "transpose": lambda a, b: a.swapaxes(0, 1) + b.swapaxes(0, 1),
    "negated, then transposed": lambda a, b: (-a).swapaxes(0, 1) + (b * 2).swapaxes(0, 1),
    "exponential of a transpose": lambda a, b: ops.exp(a.swapaxes(0, 1)) * b.swapaxes(0, 1),
    "broadcast": lambda a, b: ops.broadcast_to(a, shape=(4, 2, 3)) + ops.broadcast_to(b, shape=(4, 2, 3)),
    "broadcast to itself": lambda a, b: ops.broadcast_to(a, shape=(2, 3)) + ops.broadcast_to(b, shape=(2, 3)),
    "concatenate": lambda a, b: ops.concatenate(a, b, axis=1),
    "pad": lambda a, b: ops.pad(a, widths=((1, 0), (0, 2))) + ops.pad(b, widths=((0, 1), (2, 0))),
    "getitem": lambda a, b: a[::-1, ::2] + b[:, 1:],
    "sum": lambda a, b: a.sum(axis=0) + b.sum(axis=0),
    "no axes summed": lambda a, b: a.sum(axis=()) + b,
    "where": lambda a, b: ops.where(a, b, condition=place(True)),
    "power one": lambda a, b: a**1 + b**1,
    "matmul": lambda a, b: ops.matmul(a, b.swapaxes(0, 1)),
    "take_along": lambda a, b: ops.take_along(a, ids=np.array([[0], [1]])) + b,
    "lookup": lambda a, b: ops.lookup(a, ids=np.array([1, 1])) + ops.lookup(b, ids=np.array([0, 1])),
}


def arrays_of_backward(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor, Array]:
    a, b = leaf(2, 3), leaf(2, 3, seed=1)
    y = function(a, b)
    gradient = place(np.random.default_rng(2).standard_normal(y.shape))
    y.backward(gradient)
    return a, b, gradient


def share_memory(a: Array, b: Array) -> bool:
    """On a device: whether it could be, by where they begin and end."""
    return np.shares_memory(a, b) if current() == "cpu" else bool(xp_of(a).may_share_memory(a, b))


@on_both
@pytest.mark.parametrize("name", PASSES_ON)
def test_leaf_gradient_shares_memory_with_no_other_array(name: str) -> None:
    a, b, gradient = arrays_of_backward(PASSES_ON[name])
    arrays = [a.grad, b.grad, gradient, a.data, b.data]
    for i, one in enumerate(arrays):
        for other in arrays[i + 1 :]:
            assert not share_memory(one, other)
    others = [array.copy() for array in arrays[1:]]
    a.grad[...] = np.nan
    for array, copy in zip(arrays[1:], others, strict=True):
        np.testing.assert_array_equal(host(array), host(copy))


@on_both
@pytest.mark.parametrize("name", PASSES_ON)
def test_leaf_gradient_is_a_contiguous_writable_array(name: str) -> None:
    a, b, _ = arrays_of_backward(PASSES_ON[name])
    for grad in (a.grad, b.grad):
        assert type(grad) is type(a.data)
        assert grad.flags.c_contiguous  # another layout may round differently in BLAS and in reductions
        if current() == "cpu":  # on a device every array is
            assert grad.flags.aligned
            assert grad.flags.writeable


@on_both
def test_gradient_of_a_scalar_leaf_is_an_array() -> None:
    x = Tensor(place(np.array(2.0)), requires_grad=True)
    (x * Tensor(place(np.ones((2, 3))))).sum().backward()
    assert type(x.grad) is type(x.data)
    np.testing.assert_array_equal(host(x.grad), 6.0)


@on_both
def test_gradient_given_to_a_leaf_is_copied() -> None:
    x, given = leaf(2), place(np.ones(2))
    x.backward(given)
    given[...] = 7
    np.testing.assert_array_equal(host(x.grad), [1.0, 1.0])


# --- when it is freed -------------------------------------------------------------------------------------------------


@on_both
def test_second_backward_through_the_same_graph_is_refused() -> None:
    x = leaf(2)
    y = (x * x).sum()
    y.backward()
    before = x.grad.copy()
    with pytest.raises(RuntimeError, match="already walked backward and freed"):
        y.backward()
    np.testing.assert_array_equal(host(x.grad), host(before))


@on_both
def test_graph_that_reaches_into_a_freed_one_is_refused_before_any_gradient_changes() -> None:
    x, z = leaf(2), leaf(2, seed=1)
    shared = ops.exp(x)
    (shared * 2).sum().backward()
    before = x.grad.copy()
    with pytest.raises(RuntimeError, match="freed"):
        (shared * z).sum().backward()
    np.testing.assert_array_equal(host(x.grad), host(before))
    assert z.grad is None


@on_both
def test_intermediate_arrays_are_released_by_backward_even_while_the_result_lives() -> None:
    x = leaf(4)
    kept: list[weakref.ref[Any]] = []

    def forward() -> Tensor:
        a = ops.exp(x)
        b = ops.tanh(a * 2)
        kept.extend(weakref.ref(t.data) for t in (a, b))
        return (b * b).sum()

    loss = forward()
    gc.disable()  # released at once, not when the cycle collector happens to run
    try:
        assert all(ref() is not None for ref in kept)
        loss.backward()
        assert [ref() for ref in kept] == [None, None]
    finally:
        gc.enable()
    assert loss.node is not None


@on_both
def test_graph_that_is_dropped_unwalked_releases_its_arrays_without_the_cycle_collector() -> None:
    gc.disable()
    try:
        y = ops.exp(leaf(4) * 2)
        ref = weakref.ref(y.data)
        del y
        assert ref() is None
    finally:
        gc.enable()


@on_both
def test_each_array_is_released_as_soon_as_its_formula_has_run() -> None:
    alive: list[int] = []
    kept: list[weakref.ref[Any]] = []

    class Probe(Function):
        def forward(self, x: Any) -> Any:
            self.y = x * 1.0
            kept.append(weakref.ref(self.y))
            return self.y

        def backward(self, dy: Any) -> tuple[Any, ...]:
            alive.append(sum(ref() is not None for ref in kept))
            return (dy * 1.0,)

    y = leaf(2)
    for _ in range(5):
        y = Probe.apply(y)
    loss = y.sum()
    del y
    loss.backward()
    assert alive == [5, 4, 3, 2, 1]


@on_both
def test_each_incoming_gradient_is_released_as_soon_as_it_was_used() -> None:
    alive: list[int] = []
    kept: list[weakref.ref[Any]] = []

    class Probe(Function):
        def forward(self, x: Any) -> Any:
            return x * 1.0

        def backward(self, dy: Any) -> tuple[Any, ...]:
            alive.append(sum(ref() is not None for ref in kept))
            dx = dy * 1.0
            kept.append(weakref.ref(dx))
            return (dx,)

    y = leaf(2)
    for _ in range(6):
        y = Probe.apply(y)
    y.sum().backward()
    # Alive when a formula starts: its own incoming gradient, and nothing from further up.
    assert alive == [0, 1, 1, 1, 1, 1]


# --- no_grad, detach --------------------------------------------------------------------------------------------------


@on_both
def test_no_grad_remembers_nothing() -> None:
    x = leaf(2)
    with no_grad():
        y = x * 2
    assert not y.requires_grad
    assert y.node is None
    with pytest.raises(RuntimeError, match="not computed from any tensor requiring a gradient"):
        y.sum().backward()


def test_no_grad_nests_and_ends_with_an_exception() -> None:
    x = leaf(2)
    with no_grad():
        with no_grad():
            assert not (x * 2).requires_grad
        assert not (x * 2).requires_grad
    assert (x * 2).requires_grad
    with pytest.raises(KeyError), no_grad():
        raise KeyError
    assert (x * 2).requires_grad


def test_no_grad_in_one_thread_leaves_the_others_alone() -> None:
    x, seen = leaf(2), []
    with no_grad():
        thread = threading.Thread(target=lambda: seen.append((x * 2).requires_grad))
        thread.start()
        thread.join()
    assert seen == [True]


@on_both
def test_detached_tensor_has_the_same_array_and_passes_no_gradient_on() -> None:
    x = leaf(2)
    y = x * 3
    assert y.detach().data is y.data
    assert not y.detach().requires_grad
    (y.detach() * x).sum().backward()
    np.testing.assert_array_equal(host(x.grad), host(y.data))


# --- the argument of backward -----------------------------------------------------------------------------------------


@on_both
def test_backward_of_a_non_scalar_without_a_gradient_is_refused_with_its_shape() -> None:
    with pytest.raises(RuntimeError, match=r"\(2, 3\) needs a gradient"):
        (leaf(2, 3) * 2).backward()
    with pytest.raises(RuntimeError, match="needs a gradient"):
        (leaf(0) * 2).backward()


@on_both
@pytest.mark.parametrize("shape", [(2, 3), (1,), (), (4,)], ids=str)
def test_gradient_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    x = leaf(3)
    with pytest.raises((RuntimeError, ValueError)):
        (x * 2).backward(place(np.ones(shape)))
    with pytest.raises((RuntimeError, ValueError)):
        x.backward(place(np.ones(shape)))
    assert x.grad is None


@on_both
def test_gradient_argument_weights_the_elements() -> None:
    x = leaf(3)
    (x * 2).backward(place([1.0, 0.0, -3.0]))
    np.testing.assert_array_equal(host(x.grad), [2.0, 0.0, -6.0])


@on_both
@pytest.mark.parametrize(
    ("storage", "compute"),
    [(np.float64, np.float64), (np.float32, np.float32), (np.float16, np.float32), (ml_dtypes.bfloat16, np.float32)],
)
def test_grad_has_the_compute_dtype_whatever_dtype_the_given_gradient_has(storage: Any, compute: Any) -> None:
    for given in (np.float32, np.float64):
        x = Tensor(place(np.ones(3, dtype=storage)), requires_grad=True)
        (x * 2).backward(place(np.ones(3, dtype=given)))
        assert x.grad.dtype == compute


@on_both
@pytest.mark.parametrize("storage", [np.float16, ml_dtypes.bfloat16])
def test_grad_of_a_half_precision_leaf_on_its_own_has_the_compute_dtype(storage: Any) -> None:
    x = Tensor(place(np.ones(1, dtype=storage)), requires_grad=True)
    x.backward()
    assert x.grad.dtype == np.float32


@on_both
def test_gradient_of_another_shape_from_an_op_is_caught_with_the_ops_name() -> None:
    class Wrong(Function):
        def forward(self, x: Any) -> Any:
            return x * 1.0

        def backward(self, dy: Any) -> tuple[Any, ...]:
            return (dy[:1],)

    with pytest.raises(AssertionError, match="gradient of Wrong"):
        Wrong.apply(leaf(3)).sum().backward()


@on_both
def test_item_is_the_only_element_of_a_tensor_of_any_number_of_axes() -> None:
    for shape in [(), (1,), (1, 1)]:
        value = Tensor(place(np.full(shape, 2.5))).item()
        assert type(value) is float
        assert value == 2.5


# --- depth and order --------------------------------------------------------------------------------------------------


def test_chain_of_20000_ops_needs_no_recursion() -> None:
    x = Tensor(np.array([1.0]), requires_grad=True)
    y = x
    for _ in range(20_000):
        y = y + 1.0
    y.backward()
    np.testing.assert_array_equal(host(x.grad), [1.0])


@pytest.mark.thorough
def test_chain_of_100000_ops_is_dropped_unwalked_without_a_crash() -> None:
    y = Tensor(np.array([1.0]), requires_grad=True)
    for _ in range(100_000):
        y = y + 1.0
    del y


@on_both
def test_graph_of_2_to_the_60_paths_is_walked_once_a_node() -> None:
    x = Tensor(place([1.0]), requires_grad=True)
    y = x
    for _ in range(60):
        y = y + y
    y.backward()
    np.testing.assert_array_equal(host(x.grad), [2.0**60])


@on_both
def test_repeated_walks_of_a_tangled_graph_visit_nodes_in_one_order_and_give_the_same_bits() -> None:
    order: list[int] = []

    class Numbered(Function):
        def forward(self, *inputs: Any, number: int) -> Any:
            self.number, self.count = number, len(inputs)
            total = inputs[0]
            for x in inputs[1:]:
                total = total + x
            return xp_of(total).tanh(total)

        def backward(self, dy: Any) -> tuple[Any, ...]:
            order.append(self.number)
            return tuple(dy * np.float32(0.7 + 0.1 * i) for i in range(self.count))

    def once() -> tuple[list[int], bytes]:
        rng = np.random.default_rng(3)
        x = Tensor(place(np.linspace(-1, 1, 7, dtype=np.float32)), requires_grad=True)
        pool = [x]
        for number in range(60):
            inputs = [pool[i] for i in rng.integers(max(0, len(pool) - 6), len(pool), 3)]
            pool.append(Numbered.apply(*inputs, number=number))
        order.clear()
        ops.concatenate(*pool[1:], axis=0).sum().backward()
        return list(order), host(x.grad).tobytes()

    first = once()
    assert sorted(first[0]) == list(range(60))
    clutter = []
    for size in range(20):  # other objects at other addresses: an order by id() would change
        clutter.append(bytearray(size * 100))
        assert once() == first


@on_both
def test_consumers_are_differentiated_before_their_producers() -> None:
    order: list[str] = []

    class Named(Function):
        def forward(self, *inputs: Any, name: str) -> Any:
            self.name, self.count = name, len(inputs)
            return sum(inputs) * 1.0

        def backward(self, dy: Any) -> tuple[Any, ...]:
            order.append(self.name)
            return (dy,) * self.count

    a = Named.apply(leaf(1), name="a")
    b = Named.apply(a, name="b")
    c = Named.apply(a, b, name="c")
    Named.apply(c, a, b, name="d").backward()
    assert order == ["d", "c", "b", "a"]


def test_tensor_from_a_list_and_representation() -> None:
    x = Tensor([[1.0, 2.0]], requires_grad=True)
    assert (x.shape, x.ndim, x.dtype) == ((1, 2), 2, np.float64)
    assert repr(x * 2) == "Tensor(shape=(1, 2), dtype=float64, from Mul)"
