"""The fused operations: each equals its reference and finite differences at any tile size, itself at any thread count."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from gradcheck import check_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from oxidizr_ref import fused, ops, parallel
from oxidizr_ref.autograd import Function, Tensor, no_grad
from oxidizr_ref.fused import attention as attention_module
from oxidizr_ref.fused import linear as linear_module
from oxidizr_ref.fused import linear_cross_entropy as lce_module
from oxidizr_ref.fused import rms_norm as rms_norm_module
from oxidizr_ref.fused import rope as rope_module
from oxidizr_ref.fused import swiglu as swiglu_module
from oxidizr_ref.fused.register import REGISTER, reference

for _module in pkgutil.iter_modules(fused.__path__):  # a new file registers its ops here too
    importlib.import_module(f"oxidizr_ref.fused.{_module.name}")

attention, linear, rms_norm = attention_module.attention, linear_module.linear, rms_norm_module.rms_norm
linear_cross_entropy, rope, swiglu = lce_module.linear_cross_entropy, rope_module.rope, swiglu_module.swiglu
BF16 = np.dtype(ml_dtypes.bfloat16)
Array = Any
Draw = Callable[[Any], Any]


class Example(NamedTuple):
    """Arguments of one op: the arrays that become tensors, and what follows them."""

    arrays: list[Array]
    options: dict[str, Any]


# --- examples: small ones of any shape, and one large enough for three tiles ------------------------------------------

SMALL: dict[str, Callable[[Draw, np.random.Generator], Example]] = {
    "attention": lambda draw, rng: small_attention(draw, rng),
    "linear": lambda draw, rng: small_linear(draw, rng),
    "linear_cross_entropy": lambda draw, rng: small_linear_cross_entropy(draw, rng),
    "rms_norm": lambda draw, rng: small_rms_norm(draw, rng),
    "rope": lambda draw, rng: small_rope(draw, rng),
    "swiglu": lambda draw, rng: small_swiglu(draw, rng),
}

sizes = st.integers(1, 5)


def small_attention(draw: Draw, rng: np.random.Generator) -> Example:
    B, T, past, K, G, P, V = (draw(s) for s in (st.integers(1, 3), st.integers(1, 7), st.integers(0, 3), *[sizes] * 4))
    K, G = min(K, 3), min(G, 3)
    shapes = (B, T, K * G, P), (B, T + past, K, P), (B, T + past, K, V)
    return Example([rng.standard_normal(shape) for shape in shapes], {"scale": draw(st.sampled_from([1.0, 0.3]))})


def leading(draw: Draw) -> tuple[int, ...]:
    """Axes before the last: rows, [batch, rows], or ragged ones that no tile size divides."""
    return tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=2)))


def small_linear(draw: Draw, rng: np.random.Generator) -> Example:
    n, k = draw(sizes), draw(sizes)
    return Example([rng.standard_normal((*leading(draw), k)), rng.standard_normal((n, k))], {})


def small_linear_cross_entropy(draw: Draw, rng: np.random.Generator) -> Example:
    shape, width, vocab = leading(draw), draw(sizes), draw(st.integers(1, 9))
    options = {"targets": rng.integers(0, vocab, shape), "divisor": draw(st.sampled_from([1.0, 7.0]))}
    return Example([rng.standard_normal((*shape, width)), rng.standard_normal((vocab, width))], options)


def small_rms_norm(draw: Draw, rng: np.random.Generator) -> Example:
    width = draw(sizes)
    # At least 0.3 from zero: 1 / sqrt(mean(x²)) of a tiny row is too steep for finite differences.
    x = rng.uniform(0.3, 2, (*leading(draw), width)) * rng.choice([-1.0, 1.0], width)
    return Example([x, rng.standard_normal(width)], {"eps": 1e-5})


def small_rope(draw: Draw, rng: np.random.Generator) -> Example:
    shape = (draw(sizes), draw(sizes), draw(sizes), 2 * draw(st.integers(1, 3)))
    return Example([rng.standard_normal(shape)], {"theta": 10.0, "start": draw(st.sampled_from([0, 1, 5]))})


def small_swiglu(draw: Draw, rng: np.random.Generator) -> Example:
    hidden, inner = draw(sizes), draw(sizes)
    shapes = (*leading(draw), hidden), (inner, hidden), (inner, hidden), (hidden, inner)
    return Example([rng.standard_normal(shape) for shape in shapes], {})


def large_examples() -> dict[str, Example]:
    """float32, each spanning at least three tiles in every tiled step, the last one ragged."""
    rng = np.random.default_rng(5)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    targets = rng.integers(0, 1024, 1300)
    return {
        "attention": Example([normal(3, 160, 4, 32), normal(3, 170, 2, 32), normal(3, 170, 2, 24)], {"scale": 0.2}),
        "linear": Example([normal(3, 171, 64), normal(390, 64)], {}),
        "linear_cross_entropy": Example([normal(1300, 256), normal(1024, 256)], {"targets": targets, "divisor": 1300.0}),
        "rms_norm": Example([normal(4001, 64), normal(64)], {"eps": 1e-5}),
        "rope": Example([normal(11, 128, 4, 32)], {"theta": 1e4}),
        "swiglu": Example([normal(3, 171, 96), normal(390, 96), normal(390, 96), normal(96, 390)], {}),
    }


LARGE = large_examples()

# --- how work is cut --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def cut(elements: int, cached: int, product: int, queries: int, scores: int, logits: int) -> Iterator[None]:
    """Other tile sizes everywhere; ``product`` rows a tile of every matrix product, however small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "ELEMENTS", elements)
        patch.setattr(parallel, "CACHED", cached)
        patch.setattr(parallel, "SMALL_PRODUCT", 0)
        patch.setattr(parallel, "product_tiles", lambda extent: parallel.tiles(extent, product))
        patch.setattr(attention_module, "QUERY_BLOCK", queries)
        patch.setattr(attention_module, "SCORES", scores)
        patch.setattr(lce_module, "LOGITS", logits)
        patch.setattr(lce_module, "FEWEST_TOKENS", 1)
        yield


CUTS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "as shipped": contextlib.nullcontext,
    "one row a tile": lambda: cut(elements=1, cached=1, product=1, queries=1, scores=1, logits=1),
    "two or three rows a tile": lambda: cut(elements=12, cached=6, product=2, queries=3, scores=20, logits=20),
    "most rows in one tile": lambda: cut(elements=40, cached=20, product=5, queries=5, scores=100, logits=50),
}


@contextlib.contextmanager
def recorded_tile_counts() -> Iterator[list[int]]:
    """The number of tiles of every call into the thread pool."""
    counts: list[int] = []
    for_each = parallel.for_each

    def spy(count: int, work: Callable[[int], None]) -> None:
        counts.append(count)
        for_each(count, work)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "for_each", spy)
        yield counts


# --- running an op ----------------------------------------------------------------------------------------------------


def outputs_and_gradients(op: Callable[..., Any], example: Example) -> list[Array]:
    leaves = [Tensor(array, requires_grad=True) for array in example.arrays]
    result = op(*leaves, **example.options)
    result.backward(np.random.default_rng(9).standard_normal(result.shape).astype(result.dtype))
    return [result.data, *(leaf.grad for leaf in leaves)]


def nodes_behind(result: Tensor) -> set[type[Function]]:
    found, stack = set(), [result.node]
    while stack:
        node = stack.pop()
        if isinstance(node, Function):
            found.add(type(node))
            stack.extend(node.parents)
    return found


def example_of(name: str, draw: Draw) -> Example:
    assert name in SMALL, f"the fused op {name} has no examples here: write them (small and large)"
    return SMALL[name](draw, np.random.default_rng(draw(st.integers(0, 2**32))))


# --- the pairs --------------------------------------------------------------------------------------------------------


def test_every_fused_op_has_examples_and_no_examples_are_left_over() -> None:
    assert set(SMALL) == set(LARGE) == set(REGISTER)


@pytest.mark.parametrize("cut_name", CUTS)
@pytest.mark.parametrize("name", sorted(REGISTER))
@given(data=st.data())
@settings(max_examples=20)
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
        assert np.max(np.abs(ours - wanted)) <= 1e-12 * max(1.0, float(np.max(np.abs(wanted))))


@pytest.mark.parametrize("cut_name", CUTS)
@pytest.mark.parametrize("name", sorted(REGISTER))
@given(data=st.data())
@settings(max_examples=12)
def test_fused_gradient_equals_finite_differences_at_any_tile_size(name: str, cut_name: str, data: Any) -> None:
    example = example_of(name, data.draw)
    with CUTS[cut_name]():
        op = REGISTER[name].fused
        check_gradients(lambda *x: op(*x, **example.options), example.arrays, np.random.default_rng(1))


@pytest.mark.parametrize("name", sorted(REGISTER))
def test_fused_gives_the_same_bits_for_any_number_of_threads_over_three_or_more_tiles(name: str) -> None:
    example, results = LARGE[name], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lce_module, "LOGITS", 1 << 19)  # three chunks
        for threads in (1, 2, 3, 5, 8):
            parallel.set_threads(threads)
            with recorded_tile_counts() as counts:
                results.append(outputs_and_gradients(REGISTER[name].fused, example))
            assert counts
            assert min(counts) >= 3, f"{name} ran in {counts} tiles: the example is too small to prove anything"
    for other in results[1:]:
        assert [x.tobytes() for x in other] == [x.tobytes() for x in results[0]]


@pytest.mark.parametrize("name", sorted(REGISTER))
def test_large_float32_example_agrees_with_the_float64_reference(name: str) -> None:
    example = LARGE[name]
    double = Example([array.astype(np.float64) for array in example.arrays], example.options)
    plain = outputs_and_gradients(REGISTER[name].reference, double)
    for ours, wanted in zip(outputs_and_gradients(REGISTER[name].fused, example), plain, strict=True):
        assert ours.dtype == np.float32
        # Sums of n ≤ 4001 products, each rounded at 6e-8: about sqrt(n) · 6e-8 = 4e-6 of the largest.
        assert np.max(np.abs(ours - wanted)) <= 1e-5 * np.max(np.abs(wanted))


@pytest.mark.parametrize("name", sorted(REGISTER))
def test_inputs_are_never_changed_and_gradients_are_owned_and_contiguous(name: str) -> None:
    example = LARGE[name]
    copies = [array.copy() for array in example.arrays]
    _, *gradients = outputs_and_gradients(REGISTER[name].fused, example)
    for array, copy, gradient in zip(example.arrays, copies, gradients, strict=True):
        np.testing.assert_array_equal(array, copy)
        assert gradient.flags.c_contiguous
        assert gradient.flags.aligned
        assert gradient.flags.writeable
        assert not np.shares_memory(array, gradient)


@pytest.mark.parametrize("name", sorted(REGISTER))
@given(data=st.data())
@settings(max_examples=10)
def test_each_input_alone_receives_the_gradient_it_receives_in_company(name: str, data: Any) -> None:
    example = example_of(name, data.draw)
    together = outputs_and_gradients(REGISTER[name].fused, example)[1:]
    for wanted in range(len(example.arrays)):
        leaves = [Tensor(array, requires_grad=i == wanted) for i, array in enumerate(example.arrays)]
        result = REGISTER[name].fused(*leaves, **example.options)
        result.backward(np.random.default_rng(9).standard_normal(result.shape))
        np.testing.assert_array_equal(leaves[wanted].grad, together[wanted])
        assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i != wanted)


@pytest.mark.parametrize("name", sorted(REGISTER))
@given(data=st.data())
@settings(max_examples=10)
def test_strided_inputs_give_what_contiguous_ones_give(name: str, data: Any) -> None:
    example = example_of(name, data.draw)
    wide = [np.stack([array, array], axis=-1)[..., 0] for array in example.arrays]
    ours = outputs_and_gradients(REGISTER[name].fused, Example(wide, example.options))
    for x, y in zip(ours, outputs_and_gradients(REGISTER[name].fused, example), strict=True):
        # Another layout may take another path through BLAS: equal to rounding, not to the bit.
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12 * max(1.0, float(np.max(np.abs(y)))))


NO_TOKENS = {
    "attention": Example([np.ones((0, 3, 4, 2)), np.ones((0, 3, 2, 2)), np.ones((0, 3, 2, 2))], {"scale": 1.0}),
    "linear": Example([np.ones((0, 3)), np.ones((2, 3))], {}),
    "linear_cross_entropy": Example(
        [np.ones((0, 3)), np.ones((5, 3))], {"targets": np.zeros(0, dtype=np.int64), "divisor": 1.0}
    ),
    "rms_norm": Example([np.ones((0, 3)), np.ones(3)], {"eps": 1e-5}),
    "rope": Example([np.ones((0, 3, 2, 4))], {"theta": 10.0}),
    "swiglu": Example([np.ones((0, 3)), np.ones((5, 3)), np.ones((5, 3)), np.ones((3, 5))], {}),
}


@pytest.mark.parametrize("name", sorted(REGISTER))
def test_no_tokens_give_an_empty_result_and_zero_weight_gradients_as_the_reference_does(name: str) -> None:
    example = NO_TOKENS[name]
    fast = outputs_and_gradients(REGISTER[name].fused, example)
    plain = outputs_and_gradients(REGISTER[name].reference, example)
    for ours, wanted in zip(fast, plain, strict=True):
        np.testing.assert_array_equal(ours, wanted)
        assert ours.shape == wanted.shape


# --- the switch -------------------------------------------------------------------------------------------------------

FRONT = {
    "attention": attention,
    "linear": linear,
    "linear_cross_entropy": linear_cross_entropy,
    "rms_norm": rms_norm,
    "rope": rope,
    "swiglu": swiglu,
}


def runs_plain(name: str) -> bool:
    example = NO_TOKENS[name]
    arrays = [np.ones((1, *a.shape[1:])) if a.shape[0] == 0 else a for a in example.arrays]
    options = {**example.options}
    if "targets" in options:
        options["targets"] = np.zeros(1, dtype=np.int64)
    nodes = nodes_behind(FRONT[name](*(Tensor(a, requires_grad=True) for a in arrays), **options))
    plain = all(node.__module__ == "oxidizr_ref.ops" for node in nodes)
    assert plain or [node.__module__ for node in nodes] == [f"oxidizr_ref.fused.{name}"]
    return plain


@pytest.mark.parametrize("name", sorted(REGISTER))
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


def test_reference_never_enters_a_fused_forward() -> None:
    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("the fused side ran inside reference()")

    with pytest.MonkeyPatch.context() as patch:
        for module in (attention_module, linear_module, lce_module, rms_norm_module, rope_module, swiglu_module):
            for value in vars(module).values():
                if isinstance(value, type) and issubclass(value, Function) and value.__module__ == module.__name__:
                    patch.setattr(value, "forward", forbidden)
        with reference():
            assert all(runs_plain(name) for name in REGISTER)
        for name in REGISTER:
            with pytest.raises(AssertionError, match="inside reference"):
                runs_plain(name)


# --- attention --------------------------------------------------------------------------------------------------------


def qkv(rng: np.random.Generator, B: int, T: int, S: int, H: int, K: int, P: int = 8, V: int = 6) -> list[Array]:
    return [rng.standard_normal(shape) for shape in ((B, T, H, P), (B, S, K, P), (B, S, K, V))]


def attend(*arrays: Array, scale: float = 0.35) -> Array:
    with no_grad():
        return attention(*(Tensor(array) for array in arrays), scale).data


@pytest.mark.parametrize("cut_name", CUTS)
def test_attention_output_before_a_changed_token_keeps_its_bits(cut_name: str) -> None:
    q, k, v = qkv(np.random.default_rng(0), 2, 9, 9, 4, 2)
    with CUTS[cut_name]():
        before = attend(q, k, v)
        for t in range(9):
            q2, k2, v2 = q.copy(), k.copy(), v.copy()
            for x in (q2, k2, v2):
                x[:, t] += 3
            after = attend(q2, k2, v2)
            np.testing.assert_array_equal(after[:, :t], before[:, :t])
            assert not np.any(np.all(after[:, t:] == before[:, t:], axis=-1))


def test_attention_gradient_of_a_past_output_is_exactly_zero_in_the_future() -> None:
    q, k, v = (Tensor(x, requires_grad=True) for x in qkv(np.random.default_rng(0), 1, 7, 7, 2, 1))
    attention(q, k, v, 0.3)[:, 2].sum().backward()
    for x in (q, k, v):
        np.testing.assert_array_equal(x.grad[:, 3:], 0)
        assert np.all(x.grad[:, 2] != 0)


@pytest.mark.parametrize("queries", [1, 3, 130])
def test_attention_with_cached_keys_equals_the_tail_of_the_full_pass(queries: int) -> None:
    q, k, v = qkv(np.random.default_rng(0), 2, 300, 300, 4, 2)
    full, tail = attend(q, k, v), attend(q[:, -queries:], k, v)
    # Averages of values of order one over other block borders: sums of 300 terms, rounding 300 · 1e-16.
    np.testing.assert_allclose(tail, full[:, -queries:], rtol=0, atol=3e-14)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_attention_with_scores_of_a_million_neither_overflows_nor_loses_its_weights(dtype: type) -> None:
    q, k, v = (x.astype(dtype) for x in qkv(np.random.default_rng(0), 1, 6, 6, 2, 2))
    leaves = [Tensor(x, requires_grad=True) for x in (q * 1000, k * 1000, np.ones_like(v))]
    y = attention(*leaves, 1.0)
    # Averages of ones: p sums to one within a few roundings.
    np.testing.assert_allclose(y.data, 1.0, rtol=0, atol=4 * np.finfo(dtype).eps)
    y.sum().backward()
    assert all(np.all(np.isfinite(leaf.grad)) for leaf in leaves)


@given(data=st.data())
def test_attention_rows_sum_to_one_and_lie_between_the_values(data: Any) -> None:
    q, k, v = small_attention(data.draw, np.random.default_rng(data.draw(st.integers(0, 2**32)))).arrays
    # rounding of at most 10 weights
    np.testing.assert_allclose(attend(q, k, np.ones_like(v)), 1.0, rtol=0, atol=2e-15)
    y = attend(q, k, v)
    assert np.all(y <= v.max() + 1e-14)
    assert np.all(y >= v.min() - 1e-14)


def test_attention_first_token_copies_its_own_value() -> None:
    q, k, v = qkv(np.random.default_rng(0), 2, 5, 5, 4, 2)
    np.testing.assert_array_equal(attend(q, k, v)[:, 0], np.repeat(v[:, 0], 2, axis=1))


def test_attention_head_h_reads_key_value_head_h_divided_by_the_group() -> None:
    q, k, v = qkv(np.random.default_rng(0), 1, 5, 5, 6, 2)
    grouped = attend(q, k, v)
    np.testing.assert_allclose(grouped, attend(q, np.repeat(k, 3, axis=2), np.repeat(v, 3, axis=2)), rtol=0, atol=1e-14)


def test_attention_over_no_future_refuses_fewer_keys_than_queries() -> None:
    q, k, v = qkv(np.random.default_rng(0), 1, 5, 3, 2, 2)
    with pytest.raises(ValueError):
        attend(q, k, v)


def test_attention_keeps_no_array_of_queries_times_keys() -> None:
    q, k, v = (x.astype(np.float32) for x in qkv(np.random.default_rng(0), 1, 2048, 2048, 2, 2, 16, 16))
    parallel.set_threads(1)
    tracemalloc.start()
    try:
        attention(*(Tensor(x, requires_grad=True) for x in (q, k, v)), 0.25).sum().backward()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # One block's scores and their gradient, 128 × 2048, are 2 · 1 MiB; y, dy, dq, dk, dv 256 KiB each; the bias and the
    # small rest under 1 MiB. All scores of one head would be 16 MiB.
    assert peak < 5 * 2**20, peak


# --- linear + cross-entropy -------------------------------------------------------------------------------------------


def test_linear_cross_entropy_equals_log_softmax_and_its_uniform_value() -> None:
    rng = np.random.default_rng(0)
    h, w, targets = rng.standard_normal((2, 5, 8)), rng.standard_normal((13, 8)), rng.integers(0, 13, (2, 5))
    logits = h @ w.T
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    wanted = -np.take_along_axis(log_p, targets[..., None], -1).sum() / 10
    # Ten sums of 13 terms of order one.
    assert linear_cross_entropy(Tensor(h), Tensor(w), targets, 10.0).item() == pytest.approx(wanted, rel=1e-14)
    uniform = linear_cross_entropy(Tensor(h), Tensor(np.zeros((13, 8))), targets, 10.0).item()
    assert uniform == pytest.approx(np.log(13), rel=1e-15)


def test_linear_cross_entropy_of_huge_logits_is_finite_in_float32() -> None:
    h = np.full((2, 4), 1e4, dtype=np.float32)
    w = np.array([[1e4] * 4, [-1e4] * 4], dtype=np.float32)
    leaves = Tensor(h, requires_grad=True), Tensor(w, requires_grad=True)
    loss = linear_cross_entropy(*leaves, np.array([0, 1]), 1.0)
    assert loss.item() == np.float32(8e8)  # logits ±4e8: no loss for the first token, their distance for the second
    loss.backward()
    assert all(np.all(np.isfinite(leaf.grad)) for leaf in leaves)


def test_linear_cross_entropy_computes_no_gradient_that_nobody_wants() -> None:
    h, w, targets = np.ones((4, 3)), np.ones((5, 3)), np.zeros(4, dtype=np.int64)
    calls: list[str] = []
    matmul, add_matmul = parallel.matmul, parallel.add_matmul
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "matmul", lambda *a, **o: (calls.append("matmul"), matmul(*a, **o))[1])
        patch.setattr(parallel, "add_matmul", lambda *a: (calls.append("add_matmul"), add_matmul(*a))[1])
        with no_grad():
            linear_cross_entropy(Tensor(h, requires_grad=True), Tensor(w, requires_grad=True), targets, 1.0)
        assert calls == ["matmul"]
        calls.clear()
        linear_cross_entropy(Tensor(h, requires_grad=True), Tensor(w), targets, 1.0)
        assert calls == ["matmul", "matmul"]
        calls.clear()
        linear_cross_entropy(Tensor(h), Tensor(w, requires_grad=True), targets, 1.0)
        assert calls == ["matmul", "add_matmul"]


def test_linear_cross_entropy_never_holds_the_full_logits() -> None:
    tokens, vocab, width, chunk = 4096, 8192, 16, 1 << 20
    rng = np.random.default_rng(0)
    h = Tensor(rng.standard_normal((tokens, width)).astype(np.float32), requires_grad=True)
    w = Tensor(rng.standard_normal((vocab, width)).astype(np.float32), requires_grad=True)
    targets = rng.integers(0, vocab, tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lce_module, "LOGITS", chunk)
        tracemalloc.start()
        try:
            linear_cross_entropy(h, w, targets, float(tokens)).backward()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    # Two chunks of logits (the next is computed before the name of the last is given up), dh, dW, one tile's product on the
    # way into dW (no larger than dW), and 1 MiB for the rest. The full logits would be 128 MiB.
    assert peak < 4 * (2 * chunk + tokens * width + 2 * vocab * width) + 2**20, peak


def test_linear_cross_entropy_holds_one_chunk_of_logits_at_a_time() -> None:
    tokens, vocab, width, chunk = 1024, 8192, 16, 1 << 20
    h, w = Tensor(np.ones((tokens, width), dtype=np.float32)), Tensor(np.ones((vocab, width), dtype=np.float32))
    with pytest.MonkeyPatch.context() as patch, no_grad():
        patch.setattr(lce_module, "LOGITS", chunk)
        tracemalloc.start()
        try:
            linear_cross_entropy(h, w, np.zeros(tokens, dtype=np.int64), 1.0)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 1.5 * 4 * chunk, f"{peak / (4 * chunk):.2f} chunks"


# --- norms and positions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-18, 1e-6, 1.0, 1e6, 1e18])
def test_rms_norm_of_any_size_has_unit_mean_square_unless_eps_rules(size: float) -> None:
    rng = np.random.default_rng(0)
    x = (rng.choice([-1.0, 1.0], (7, 16)) * size).astype(np.float32)
    leaf = Tensor(x, requires_grad=True)
    y = rms_norm(leaf, Tensor(np.ones(16, dtype=np.float32)), 1e-5)
    wanted = size / np.sqrt(size * size + 1e-5)
    # Square, mean, sum with eps, root, reciprocal, product: six roundings of 6e-8.
    np.testing.assert_allclose(np.abs(y.data), wanted, rtol=4e-7)
    y.sum().backward()
    assert np.all(np.isfinite(leaf.grad))


def test_rms_norm_of_a_zero_row_is_zero_with_finite_gradient() -> None:
    x = Tensor(np.zeros((2, 4), dtype=np.float32), requires_grad=True)
    y = rms_norm(x, Tensor(np.ones(4, dtype=np.float32)), 1e-5)
    np.testing.assert_array_equal(y.data, 0)
    y.sum().backward()
    # y = x / sqrt(eps) near zero; two roundings of 6e-8 and that of eps.
    np.testing.assert_allclose(x.grad, 1 / np.sqrt(1e-5), rtol=2e-7)


def turn(x: Array, theta: float = 100.0, start: int = 0) -> Array:
    with no_grad():
        return rope(Tensor(x), theta, start).data


def test_rope_at_position_zero_changes_nothing_and_keeps_lengths_elsewhere() -> None:
    x = np.random.default_rng(0).standard_normal((2, 5, 3, 8))
    y = turn(x)
    np.testing.assert_array_equal(y[:, 0], x[:, 0])
    # Pairs (i, i + half) keep their length: two products and a sum, each rounded at 1.1e-16.
    np.testing.assert_allclose(y[..., :4] ** 2 + y[..., 4:] ** 2, x[..., :4] ** 2 + x[..., 4:] ** 2, rtol=2e-15)


def test_rope_turns_pair_i_at_position_t_by_t_theta_to_the_minus_2i_over_d() -> None:
    x = np.zeros((1, 6, 1, 8))
    x[..., :4] = 1
    y = turn(x, theta=50.0, start=3)
    angles = np.outer(np.arange(3, 9), [50.0 ** (-2 * i / 8) for i in range(4)])
    np.testing.assert_allclose(y[0, :, 0, :4], np.cos(angles), rtol=0, atol=4e-15)  # angles below 9, rounded at 1e-16 each
    np.testing.assert_allclose(y[0, :, 0, 4:], np.sin(angles), rtol=0, atol=4e-15)


def test_rope_gradient_is_the_inverse_rotation() -> None:
    x = Tensor(np.random.default_rng(0).standard_normal((2, 5, 3, 8)), requires_grad=True)
    y = rope(x, 100.0, 7)
    y.backward(y.data)
    np.testing.assert_allclose(x.grad, x.data, rtol=0, atol=2e-15)  # cos² + sin² of values of order 3, four roundings


@given(first=st.integers(0, 50), distance=st.integers(0, 20), shift=st.integers(0, 1000))
def test_rope_scores_depend_on_the_distance_of_positions_only(first: int, distance: int, shift: int) -> None:
    rng = np.random.default_rng(first)
    q, k = rng.standard_normal((2, 1, 1, 1, 8))

    def score(start: int) -> float:
        return float((turn(q, start=start + distance) * turn(k, start=start)).sum())

    # Angles up to 1070 are rounded at 1.1e-13; the scores are of order 10.
    assert score(first) == pytest.approx(score(first + shift), abs=1e-11)


def test_rope_from_a_start_equals_the_tail_of_the_whole_to_the_bit() -> None:
    x = np.random.default_rng(0).standard_normal((2, 9, 3, 8)).astype(np.float32)
    np.testing.assert_array_equal(turn(x[:, 4:], start=4), turn(x)[:, 4:])


@pytest.mark.parametrize("width", [1, 3, 5])
def test_rope_refuses_an_odd_width(width: int) -> None:
    with pytest.raises(ValueError):
        turn(np.ones((1, 2, 1, width)))


# --- storage in half precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [np.dtype(np.float16), BF16], ids=str)
@pytest.mark.parametrize("name", sorted(REGISTER))
def test_half_precision_storage_gives_the_bits_of_the_same_values_in_float32(name: str, storage: np.dtype[Any]) -> None:
    example = LARGE[name]
    stored = [array.astype(storage) for array in example.arrays]
    halves = outputs_and_gradients(REGISTER[name].fused, Example(stored, example.options))
    singles = outputs_and_gradients(
        REGISTER[name].fused, Example([array.astype(np.float32) for array in stored], example.options)
    )
    for half, single in zip(halves, singles, strict=True):
        assert half.dtype == np.float32
        np.testing.assert_array_equal(half, single)


def test_linear_keeps_a_half_precision_weight_in_its_storage_dtype_for_backward() -> None:
    weight = Tensor(np.ones((4, 3), dtype=BF16), requires_grad=True)
    node = linear(Tensor(np.ones((2, 3), dtype=np.float32)), weight).node
    assert node.weight is weight.data


def test_swiglu_of_huge_gates_is_the_gate_or_zero() -> None:
    eye = np.eye(2, dtype=np.float32)
    x = np.array([[1e10, -1e10]], dtype=np.float32)
    leaf = Tensor(x, requires_grad=True)
    y = swiglu(leaf, Tensor(eye), Tensor(eye / 1e10), Tensor(eye))
    # silu(1e10) = 1e10, up = 1; silu(-1e10) = 0. One rounding of 1e-10 and one of the product.
    np.testing.assert_allclose(y.data, [[1e10, 0]], rtol=2e-7)
    y.sum().backward()
    assert np.all(np.isfinite(leaf.grad))


def test_ops_of_the_reference_side_are_the_primitives_themselves() -> None:
    x, w = Tensor(np.ones((2, 3)), requires_grad=True), Tensor(np.ones((4, 3)), requires_grad=True)
    with reference():
        assert nodes_behind(linear(x, w)) == {ops.MatMul, ops.Transpose}
