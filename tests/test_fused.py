"""The fused operations: each equals its reference and finite differences at any tile size, itself at any thread count.

What holds for every one of them is here, over the examples of fused_examples.py; what is special to some is in
test_fused_attention.py and test_fused_scans.py. On a device the reference stands for finite differences: its primitives are
held against those in test_ops.py, on a device too.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from architectures import everywhere
from devices import current, host, place
from fused_examples import LARGE, NO_TOKENS, Example, example_of, in_dtype, one_token, outputs_and_gradients
from gradcheck import check_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from oxidizr_ref import ops, parallel
from oxidizr_ref.autograd import Function, Tensor
from oxidizr_ref.backend import xp_of
from oxidizr_ref.fused import attention as attention_module
from oxidizr_ref.fused import chunked_scan as chunked_scan_module
from oxidizr_ref.fused import linear_cross_entropy as lce_module
from oxidizr_ref.fused import selective_scan as selective_scan_module
from oxidizr_ref.fused.linear import linear
from oxidizr_ref.fused.register import REGISTER, reference

BF16 = np.dtype(ml_dtypes.bfloat16)
NAMES = sorted(REGISTER)

on_both = pytest.mark.usefixtures("device")
#: Those of the large examples that the stand-in computes in a second: not 16,004 blocks of threads that wait for each other,
#: which test_kernels_elementwise.py has.
QUICK = [name for name in NAMES if name != "rms_norm"]

# --- how work is cut --------------------------------------------------------------------------------------------------

#: Every constant that decides how a fused op cuts its work, but for `parallel.product_tiles`: a module, and its names there,
#: on the host and on a device.
CONSTANTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "elements": (parallel, ("ELEMENTS",)),
    "cached": (parallel, ("CACHED",)),
    "queries": (attention_module, ("QUERY_BLOCK", "DEVICE_QUERY_BLOCK")),
    "scores": (attention_module, ("SCORES", "DEVICE_SCORES")),
    "logits": (lce_module, ("LOGITS", "DEVICE_LOGITS")),
    "states": (selective_scan_module, ("STATES",)),
    "block": (selective_scan_module, ("BLOCK",)),
    "weights": (chunked_scan_module, ("WEIGHTS", "DEVICE_WEIGHTS")),
}


@contextlib.contextmanager
def cut(product: int, **constants: int) -> Iterator[None]:
    """Other tile sizes everywhere; ``product`` rows a tile of every matrix product, however small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "SMALL_PRODUCT", 0)
        patch.setattr(parallel, "product_tiles", lambda extent, *_: parallel.tiles(extent, product))
        patch.setattr(lce_module, "FEWEST_TOKENS", 1)
        for name, (module, names) in CONSTANTS.items():
            for constant in names:
                patch.setattr(module, constant, constants[name])
        yield


CUTS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "as shipped": contextlib.nullcontext,
    "one row a tile": lambda: cut(product=1, **dict.fromkeys(CONSTANTS, 1)),
    "two or three rows a tile": lambda: cut(
        product=2, elements=12, cached=6, queries=3, scores=20, logits=20, states=6, block=2, weights=20
    ),
    "most rows in one tile": lambda: cut(
        product=5, elements=40, cached=20, queries=5, scores=100, logits=50, states=12, block=5, weights=100
    ),
}


@contextlib.contextmanager
def recorded_tile_counts() -> Iterator[list[int]]:
    """The number of tiles of every call into the thread pool."""
    counts: list[int] = []
    for_each = parallel.for_each

    def spy(count: int, work: Callable[[int], None], like: Any = None) -> None:
        counts.append(count)
        for_each(count, work, like)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "for_each", spy)
        yield counts


def nodes_behind(result: Tensor) -> set[type[Function]]:
    found, stack = set(), [result.node]
    while stack:
        node = stack.pop()
        if isinstance(node, Function):
            found.add(type(node))
            stack.extend(node.parents)
    return found


def largest(x: Any) -> float:
    """The largest magnitude; 0 of nothing."""
    return float(np.max(np.abs(x), initial=0))


# --- the pairs --------------------------------------------------------------------------------------------------------


EVERY_CUT = list(itertools.product(NAMES, CUTS))
#: A device does few ops in pieces, cut by constants of its own.
IN_PIECES = ("attention", "linear_cross_entropy", "mamba3_scan", "ssd")
SMALLEST = [*itertools.product(NAMES, ["as shipped"]), *itertools.product(IN_PIECES, list(CUTS)[1:3])]


@everywhere("name,cut_name", EVERY_CUT, SMALLEST)
@given(data=st.data())
@settings(max_examples=12)
def test_fused_equals_reference_in_output_and_every_gradient_at_any_tile_size(name: str, cut_name: str, data: Any) -> None:
    example = example_of(name, data.draw)
    with CUTS[cut_name]():
        fast = outputs_and_gradients(REGISTER[name].fused, example)
    plain = outputs_and_gradients(REGISTER[name].reference, example)
    for ours, wanted in zip(fast, plain, strict=True):
        assert ours.shape == wanted.shape
        assert ours.dtype == wanted.dtype == np.float64
        # Sums of at most a few hundred terms of order one (10 at most): rounding up to 10⁻¹³. The floor of 1 counts where
        # those terms cancel (softmax over one key has gradient 0).
        assert largest(ours - wanted) <= 1e-12 * max(1.0, largest(wanted))


@pytest.mark.parametrize("cut_name", CUTS)
@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=12)
def test_fused_gradient_equals_finite_differences_at_any_tile_size(name: str, cut_name: str, data: Any) -> None:
    example = example_of(name, data.draw)
    with CUTS[cut_name]():
        op = REGISTER[name].fused
        check_gradients(lambda *x: op(*x, **example.options), example.arrays, np.random.default_rng(1))


@pytest.mark.parametrize("name", NAMES)
def test_fused_gives_the_same_bits_for_any_number_of_threads_over_three_or_more_tiles(name: str) -> None:
    example, results = LARGE[name], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lce_module, "LOGITS", 1 << 19)  # three chunks
        patch.setattr(selective_scan_module, "STATES", 1 << 11)
        patch.setattr(chunked_scan_module, "WEIGHTS", 1 << 16)
        patch.setattr(attention_module, "SCORES", 1 << 16)
        patch.setattr(parallel, "ELEMENTS", 1 << 16)
        patch.setattr(parallel, "CACHED", 1 << 14)
        patch.setattr(parallel, "product_tiles", lambda extent, *_: parallel.tiles(extent, 128))
        for threads in (1, 2, 3, 5, 8):
            parallel.set_threads(threads)
            with recorded_tile_counts() as counts:
                results.append(outputs_and_gradients(REGISTER[name].fused, example))
            assert counts
            assert min(counts) >= 3, f"{name} ran in {counts} tiles: the example is too small to prove anything"
    for other in results[1:]:
        assert [x.tobytes() for x in other] == [x.tobytes() for x in results[0]]


@everywhere("name", NAMES, QUICK)
def test_large_float32_example_agrees_with_the_float64_reference(name: str) -> None:
    example = LARGE[name]
    plain = outputs_and_gradients(REGISTER[name].reference, in_dtype(example, np.float64))
    for ours, wanted in zip(outputs_and_gradients(REGISTER[name].fused, example), plain, strict=True):
        assert ours.dtype == np.float32
        # Sums of n ≤ 4001 products, each rounded at 6e-8: about sqrt(n) · 6e-8 = 4e-6 of the largest.
        assert largest(ours - wanted) <= 1e-5 * largest(wanted)


@everywhere("name", NAMES, QUICK)
def test_inputs_are_never_changed_and_gradients_are_owned_and_contiguous(name: str) -> None:
    arrays, options = LARGE[name]
    copies = [array.copy() for array in arrays]
    leaves = [Tensor(place(array), requires_grad=True) for array in arrays]
    result = REGISTER[name].fused(*leaves, **options)
    result.backward(place(np.random.default_rng(9).standard_normal(result.shape).astype(result.dtype)))
    for leaf, copy in zip(leaves, copies, strict=True):
        np.testing.assert_array_equal(host(leaf.data), copy)
        assert leaf.grad.flags.c_contiguous
        if current() == "cpu":  # on a device every array is
            assert leaf.grad.flags.aligned
            assert leaf.grad.flags.writeable
        assert not xp_of(leaf.grad).may_share_memory(leaf.data, leaf.grad)


@on_both
@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=10)
def test_each_input_alone_receives_the_gradient_it_receives_in_company(name: str, data: Any) -> None:
    example = example_of(name, data.draw)
    together = outputs_and_gradients(REGISTER[name].fused, example)[1:]
    for wanted in range(len(example.arrays)):
        leaves = [Tensor(place(array), requires_grad=i == wanted) for i, array in enumerate(example.arrays)]
        result = REGISTER[name].fused(*leaves, **example.options)
        result.backward(place(np.random.default_rng(9).standard_normal(result.shape)))
        np.testing.assert_array_equal(host(leaves[wanted].grad), together[wanted])
        assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i != wanted)


@on_both
@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=10)
def test_strided_inputs_give_what_contiguous_ones_give(name: str, data: Any) -> None:
    example = example_of(name, data.draw)
    wide = [place(np.stack([array, array], axis=-1))[..., 0] for array in example.arrays]
    ours = outputs_and_gradients(REGISTER[name].fused, Example(wide, example.options))
    for x, y in zip(ours, outputs_and_gradients(REGISTER[name].fused, example), strict=True):
        # Another layout may take another path through BLAS: equal to rounding, not to the bit.
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12 * max(1.0, largest(y)))


@on_both
@pytest.mark.parametrize("name", NAMES)
def test_no_tokens_give_an_empty_result_and_zero_weight_gradients_as_the_reference_does(name: str) -> None:
    example = NO_TOKENS[name]
    fast = outputs_and_gradients(REGISTER[name].fused, example)
    plain = outputs_and_gradients(REGISTER[name].reference, example)
    for ours, wanted in zip(fast, plain, strict=True):
        np.testing.assert_array_equal(ours, wanted)
        assert ours.shape == wanted.shape


def test_every_constant_that_cuts_a_fused_op_is_varied_here() -> None:
    """A tile size that is added later must be added to `CONSTANTS`: otherwise its tiles would be tried at one size only."""
    found = {
        (module.__name__, name)
        for module in {sys.modules[pair.fused.__module__] for pair in REGISTER.values()} | {parallel, chunked_scan_module}
        for name, value in vars(module).items()
        if name.isupper() and not name.startswith("_") and isinstance(value, int)
    }
    varied = {(module.__name__, name) for module, names in CONSTANTS.values() for name in names}
    others = {
        *((parallel.__name__, name) for name in ("SMALL_PRODUCT", "ROWS", "FEWEST_ROWS")),
        (attention_module.__name__, "FEWEST_SCORES"),
        *((lce_module.__name__, name) for name in ("FEWEST_TOKENS", "ENOUGH_TOKENS", "ENOUGH_LOGITS")),
        *((lce_module.__name__, name) for name in ("ENOUGH_DEVICE_TOKENS", "ENOUGH_DEVICE_LOGITS")),
    }
    assert found == varied | others


# --- storage in half precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [np.dtype(np.float16), BF16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_storage_gives_the_bits_of_the_same_values_in_float32(name: str, storage: np.dtype[Any]) -> None:
    """On the host. On a device products are of 16 bits: below for `linear`, in test_kernels_….py for the others."""
    stored = in_dtype(LARGE[name], storage)
    halves = outputs_and_gradients(REGISTER[name].fused, stored)
    singles = outputs_and_gradients(REGISTER[name].fused, in_dtype(stored, np.float32))
    for half, single in zip(halves, singles, strict=True):
        assert half.dtype == np.float32
        np.testing.assert_array_equal(half, single)


@on_both
@pytest.mark.parametrize("wide", ["x", "dy"])
@pytest.mark.parametrize("storage", [np.dtype(np.float16), BF16], ids=str)
def test_linear_rounds_operands_and_products_to_the_16_bits_of_its_weight_on_a_device_and_nothing_on_the_host(
    storage: np.dtype[Any], wide: str
) -> None:
    """Eighths of 12 bits, which 16-bit numbers round, times small integers: sums below 2¹⁵, so exact in float32."""
    rng = np.random.default_rng(0)
    eighths = {"x": rng.integers(-4095, 4096, (6, 8)) / 8, "dy": rng.integers(-4095, 4096, (6, 5)) / 8}
    small = {"x": rng.integers(-3, 4, (6, 8)), "dy": rng.integers(-3, 4, (6, 5))}
    x, dy = (np.float64({**small, wide: eighths[wide]}[name]) for name in ("x", "dy"))
    w = np.float64(rng.integers(-9, 10, (5, 8)))

    def rounded(v: Any) -> Any:
        return v.astype(storage).astype(np.float64) if current() == "gpu" else v

    leaves = Tensor(place(x.astype(np.float32)), requires_grad=True), Tensor(place(w.astype(storage)), requires_grad=True)
    y = linear(*leaves)
    y.backward(place(dy.astype(np.float32)))
    x, dy = rounded(x), rounded(dy)
    for found, exact in ((y.data, x @ w.T), (leaves[0].grad, dy @ w), (leaves[1].grad, dy.T @ x)):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(host(found), rounded(exact))


@on_both
def test_linear_keeps_a_half_precision_weight_in_its_storage_dtype_for_backward() -> None:
    weight = Tensor(place(np.ones((4, 3), dtype=BF16)), requires_grad=True)
    node = linear(Tensor(place(np.ones((2, 3), dtype=np.float32))), weight).node
    assert node.weight is weight.data


# --- the switch -------------------------------------------------------------------------------------------------------


def runs_plain(name: str) -> bool:
    """Whether the op, called as a model calls it, is made of primitives now; if not, it is one node of its own file."""
    arrays, options = one_token(name)
    file = REGISTER[name].fused.__module__
    front = getattr(sys.modules[file], name)
    nodes = nodes_behind(front(*(Tensor(place(array), requires_grad=True) for array in arrays), **options))
    plain = all(node.__module__ == "oxidizr_ref.ops" for node in nodes)
    assert plain or [node.__module__ for node in nodes] == [file]
    return plain


@on_both
@pytest.mark.parametrize("name", NAMES)
def test_reference_runs_the_plain_composition_nests_and_is_left_on_exit_and_on_exception(name: str) -> None:
    assert not runs_plain(name)
    with reference():
        assert runs_plain(name)
        with reference():
            assert runs_plain(name)
        assert runs_plain(name)
    assert not runs_plain(name)
    with pytest.raises(KeyError), reference():
        raise KeyError
    assert not runs_plain(name)


@on_both
def test_reference_never_enters_a_fused_forward() -> None:
    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("the fused side ran inside reference()")

    with pytest.MonkeyPatch.context() as patch:
        for file in {pair.fused.__module__ for pair in REGISTER.values()}:
            for value in vars(sys.modules[file]).values():
                if isinstance(value, type) and issubclass(value, Function) and value.__module__ == file:
                    patch.setattr(value, "forward", forbidden)
        with reference():
            assert all(runs_plain(name) for name in REGISTER)
        for name in REGISTER:
            with pytest.raises(AssertionError, match="inside reference"):
                runs_plain(name)


@on_both
def test_ops_of_the_reference_side_are_the_primitives_themselves() -> None:
    x, w = (Tensor(place(np.ones(shape)), requires_grad=True) for shape in ((2, 3), (4, 3)))
    with reference():
        assert nodes_behind(linear(x, w)) == {ops.MatMul, ops.Transpose}
