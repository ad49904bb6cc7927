"""What is special to the fused operations of a Llama: attention, linear + cross-entropy, norm, rotary positions, SwiGLU.

On either device. What holds for all fused operations is in test_fused.py.
"""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from devices import host, place
from fused_examples import small_attention
from hypothesis import given
from hypothesis import strategies as st
from test_fused import CUTS

from oxidizr_ref import parallel
from oxidizr_ref.autograd import Tensor, no_grad
from oxidizr_ref.fused import linear_cross_entropy as lce_module
from oxidizr_ref.fused.attention import attention
from oxidizr_ref.fused.linear_cross_entropy import linear_cross_entropy
from oxidizr_ref.fused.rms_norm import rms_norm
from oxidizr_ref.fused.rope import rope
from oxidizr_ref.fused.swiglu import swiglu

Array = Any

on_both = pytest.mark.usefixtures("device")


def tensor(x: Array) -> Tensor:
    """A tensor where the test computes."""
    return Tensor(place(x))


def leaf_of(x: Array) -> Tensor:
    """One that wants a gradient."""
    return Tensor(place(x), requires_grad=True)


def finite(*leaves: Tensor) -> bool:
    """Whether all gradients are."""
    return all(bool(np.all(np.isfinite(host(leaf.grad)))) for leaf in leaves)


# --- attention --------------------------------------------------------------------------------------------------------


def qkv(rng: np.random.Generator, B: int, T: int, S: int, H: int, K: int, P: int = 8, V: int = 6) -> list[Array]:
    return [rng.standard_normal(shape) for shape in ((B, T, H, P), (B, S, K, P), (B, S, K, V))]


def attend(*arrays: Array, scale: float = 0.35) -> Array:
    with no_grad():
        return host(attention(*(tensor(array) for array in arrays), scale).data)


@on_both
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


@on_both
def test_attention_gradient_of_a_past_output_is_exactly_zero_in_the_future() -> None:
    q, k, v = (leaf_of(x) for x in qkv(np.random.default_rng(0), 1, 7, 7, 2, 1))
    attention(q, k, v, 0.3)[:, 2].sum().backward()
    for x in (q, k, v):
        np.testing.assert_array_equal(host(x.grad)[:, 3:], 0)
        assert np.all(host(x.grad)[:, 2] != 0)


@on_both
@pytest.mark.parametrize("queries", [1, 3, 130])
def test_attention_with_cached_keys_equals_the_tail_of_the_full_pass(queries: int) -> None:
    q, k, v = qkv(np.random.default_rng(0), 2, 300, 300, 4, 2)
    full, tail = attend(q, k, v), attend(q[:, -queries:], k, v)
    # Averages of values of order one over other block borders: sums of 300 terms, rounding 300 · 1e-16.
    np.testing.assert_allclose(tail, full[:, -queries:], rtol=0, atol=3e-14)


@on_both
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_attention_with_scores_of_a_million_neither_overflows_nor_loses_its_weights(dtype: type) -> None:
    q, k, v = (x.astype(dtype) for x in qkv(np.random.default_rng(0), 1, 6, 6, 2, 2))
    leaves = [leaf_of(x) for x in (q * 1000, k * 1000, np.ones_like(v))]
    y = attention(*leaves, 1.0)
    # Averages of ones: p sums to one within a few roundings.
    np.testing.assert_allclose(host(y.data), 1.0, rtol=0, atol=4 * np.finfo(dtype).eps)
    y.sum().backward()
    assert finite(*leaves)


@on_both
@given(data=st.data())
def test_attention_rows_sum_to_one_and_lie_between_the_values(data: Any) -> None:
    q, k, v = small_attention(data.draw, np.random.default_rng(data.draw(st.integers(0, 2**32)))).arrays
    # rounding of at most 10 weights
    np.testing.assert_allclose(attend(q, k, np.ones_like(v)), 1.0, rtol=0, atol=2e-15)
    y = attend(q, k, v)
    assert np.all(y <= v.max() + 1e-14)
    assert np.all(y >= v.min() - 1e-14)


@on_both
def test_attention_first_token_copies_its_own_value() -> None:
    q, k, v = qkv(np.random.default_rng(0), 2, 5, 5, 4, 2)
    np.testing.assert_array_equal(attend(q, k, v)[:, 0], np.repeat(v[:, 0], 2, axis=1))


@on_both
def test_attention_head_h_reads_key_value_head_h_divided_by_the_group() -> None:
    q, k, v = qkv(np.random.default_rng(0), 1, 5, 5, 6, 2)
    grouped = attend(q, k, v)
    np.testing.assert_allclose(grouped, attend(q, np.repeat(k, 3, axis=2), np.repeat(v, 3, axis=2)), rtol=0, atol=1e-14)


@on_both
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
    # One block's scores of both heads and their gradient, 2 · 64 × 2048, are 2 · 1 MiB; y, dy, dq, dk, dv, and inside the
    # tile k, v and their gradients, 256 KiB each; the small rest under 1 MiB. All scores of one head would be 16 MiB.
    assert peak < 6 * 2**20, peak


# --- linear + cross-entropy -------------------------------------------------------------------------------------------


@on_both
def test_linear_cross_entropy_equals_log_softmax_and_its_uniform_value() -> None:
    rng = np.random.default_rng(0)
    h, w, targets = rng.standard_normal((2, 5, 8)), rng.standard_normal((13, 8)), rng.integers(0, 13, (2, 5))
    logits = h @ w.T
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    wanted = -np.take_along_axis(log_p, targets[..., None], -1).sum() / 10
    # Ten sums of 13 terms of order one.
    assert linear_cross_entropy(tensor(h), tensor(w), targets, 10.0).item() == pytest.approx(wanted, rel=1e-14)
    uniform = linear_cross_entropy(tensor(h), tensor(np.zeros((13, 8))), targets, 10.0).item()
    assert uniform == pytest.approx(np.log(13), rel=1e-15)


@on_both
def test_linear_cross_entropy_of_huge_logits_is_finite_in_float32() -> None:
    h = np.full((2, 4), 1e4, dtype=np.float32)
    w = np.array([[1e4] * 4, [-1e4] * 4], dtype=np.float32)
    leaves = leaf_of(h), leaf_of(w)
    loss = linear_cross_entropy(*leaves, np.array([0, 1]), 1.0)
    assert loss.item() == np.float32(8e8)  # logits ±4e8: no loss for the first token, their distance for the second
    loss.backward()
    assert finite(*leaves)


@on_both
def test_linear_cross_entropy_computes_no_gradient_that_nobody_wants() -> None:
    h, w, targets = np.ones((4, 3)), np.ones((5, 3)), np.zeros(4, dtype=np.int64)
    calls: list[str] = []
    matmul, add_matmul = parallel.matmul, parallel.add_matmul
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "matmul", lambda *a, **o: (calls.append("matmul"), matmul(*a, **o))[1])
        patch.setattr(parallel, "add_matmul", lambda *a: (calls.append("add_matmul"), add_matmul(*a))[1])
        with no_grad():
            linear_cross_entropy(leaf_of(h), leaf_of(w), targets, 1.0)
        assert calls == ["matmul"]
        calls.clear()
        linear_cross_entropy(leaf_of(h), tensor(w), targets, 1.0)
        assert calls == ["matmul", "matmul"]
        calls.clear()
        linear_cross_entropy(tensor(h), leaf_of(w), targets, 1.0)
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


@on_both
@pytest.mark.parametrize("size", [1e-18, 1e-6, 1.0, 1e6, 1e18])
def test_rms_norm_of_any_size_has_unit_mean_square_unless_eps_rules(size: float) -> None:
    rng = np.random.default_rng(0)
    x = (rng.choice([-1.0, 1.0], (7, 16)) * size).astype(np.float32)
    leaf = leaf_of(x)
    y = rms_norm(leaf, tensor(np.ones(16, dtype=np.float32)), 1e-5)
    wanted = size / np.sqrt(size * size + 1e-5)
    # Square, mean, sum with eps, root, reciprocal, product: six roundings of 6e-8.
    np.testing.assert_allclose(np.abs(host(y.data)), wanted, rtol=4e-7)
    y.sum().backward()
    assert finite(leaf)


@on_both
def test_rms_norm_of_a_zero_row_is_zero_with_finite_gradient() -> None:
    x = leaf_of(np.zeros((2, 4), dtype=np.float32))
    y = rms_norm(x, tensor(np.ones(4, dtype=np.float32)), 1e-5)
    np.testing.assert_array_equal(host(y.data), 0)
    y.sum().backward()
    # y = x / sqrt(eps) near zero; two roundings of 6e-8 and that of eps.
    np.testing.assert_allclose(host(x.grad), 1 / np.sqrt(1e-5), rtol=2e-7)


def turn(x: Array, theta: float = 100.0, start: int = 0) -> Array:
    with no_grad():
        return host(rope(tensor(x), theta, start).data)


@on_both
def test_rope_at_position_zero_changes_nothing_and_keeps_lengths_elsewhere() -> None:
    x = np.random.default_rng(0).standard_normal((2, 5, 3, 8))
    y = turn(x)
    np.testing.assert_array_equal(y[:, 0], x[:, 0])
    # Pairs (i, i + half) keep their length: two products and a sum, each rounded at 1.1e-16.
    np.testing.assert_allclose(y[..., :4] ** 2 + y[..., 4:] ** 2, x[..., :4] ** 2 + x[..., 4:] ** 2, rtol=2e-15)


@on_both
def test_rope_turns_pair_i_at_position_t_by_t_theta_to_the_minus_2i_over_d() -> None:
    x = np.zeros((1, 6, 1, 8))
    x[..., :4] = 1
    y = turn(x, theta=50.0, start=3)
    angles = np.outer(np.arange(3, 9), [50.0 ** (-2 * i / 8) for i in range(4)])
    np.testing.assert_allclose(y[0, :, 0, :4], np.cos(angles), rtol=0, atol=4e-15)  # angles below 9, rounded at 1e-16 each
    np.testing.assert_allclose(y[0, :, 0, 4:], np.sin(angles), rtol=0, atol=4e-15)


@on_both
def test_rope_gradient_is_the_inverse_rotation() -> None:
    x = leaf_of(np.random.default_rng(0).standard_normal((2, 5, 3, 8)))
    y = rope(x, 100.0, 7)
    y.backward(y.data)
    # cos² + sin² of values of order 3, four roundings
    np.testing.assert_allclose(host(x.grad), host(x.data), rtol=0, atol=2e-15)


@on_both
@given(first=st.integers(0, 50), distance=st.integers(0, 20), shift=st.integers(0, 1000))
def test_rope_scores_depend_on_the_distance_of_positions_only(first: int, distance: int, shift: int) -> None:
    rng = np.random.default_rng(first)
    q, k = rng.standard_normal((2, 1, 1, 1, 8))

    def score(start: int) -> float:
        return float((turn(q, start=start + distance) * turn(k, start=start)).sum())

    # Angles up to 1070 are rounded at 1.1e-13; the scores are of order 10.
    assert score(first) == pytest.approx(score(first + shift), abs=1e-11)


@on_both
def test_rope_from_a_start_equals_the_tail_of_the_whole_to_the_bit() -> None:
    x = np.random.default_rng(0).standard_normal((2, 9, 3, 8)).astype(np.float32)
    np.testing.assert_array_equal(turn(x[:, 4:], start=4), turn(x)[:, 4:])


@on_both
@pytest.mark.parametrize("width", [1, 3, 5])
def test_rope_refuses_an_odd_width(width: int) -> None:
    with pytest.raises(ValueError, match=f"a width of {width} is odd"):
        rope(tensor(np.ones((1, 2, 1, width))), 10.0)


@on_both
def test_swiglu_of_huge_gates_is_the_gate_or_zero() -> None:
    eye = np.eye(2, dtype=np.float32)
    x = np.array([[1e10, -1e10]], dtype=np.float32)
    leaf = leaf_of(x)
    y = swiglu(leaf, tensor(eye), tensor(eye / 1e10), tensor(eye))
    # silu(1e10) = 1e10, up = 1; silu(-1e10) = 0. One rounding of 1e-10 and one of the product.
    np.testing.assert_allclose(host(y.data), [[1e10, 0]], rtol=2e-7)
    y.sum().backward()
    assert finite(leaf)
