"""Attention, the scans and the loss on a device: each gives what its host version gives, at any size of its pieces.

On the stand-in for CUDA, and on CuPy where there is a GPU (``-m gpu``).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import devices
import ml_dtypes
import numpy as np
import pytest
import stand_in
from devices import host, place
from fused_examples import (
    LARGE,
    NO_TOKENS,
    Example,
    example_of,
    in_dtype,
    mamba3_scan_example,
    one_token,
    selective_scan_example,
    ssd_example,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from oxidizr_ref.autograd import Tensor, no_grad
from oxidizr_ref.fused import attention as attention_module
from oxidizr_ref.fused import chunked_scan as chunked_scan_module
from oxidizr_ref.fused import linear_cross_entropy as lce_module
from oxidizr_ref.fused import rows
from oxidizr_ref.fused.mamba3 import next_angle, running_angle, turn
from oxidizr_ref.fused.register import REGISTER

Array = Any

NAMES = ["attention", "linear_cross_entropy", "mamba3_scan", "running_angle", "selective_scan", "ssd"]
BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)


@pytest.fixture(autouse=True, params=["stand-in", pytest.param("cupy", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A CUDA device, or the stand-in for one."""
    with devices.computing_on(request.param, monkeypatch):
        yield request.param


def run(op: Any, example: Example, where: Callable[[Array], Array]) -> tuple[Tensor, list[Tensor], Array]:
    """The op on arrays that ``where`` makes of the example's: its result, its inputs, and a gradient for the result."""
    leaves = [Tensor(where(array), requires_grad=True) for array in example.arrays]
    result = op(*leaves, **example.options)
    return result, leaves, where(np.asarray(np.random.default_rng(9).standard_normal(result.shape)).astype(result.dtype))


def results(op: Any, example: Example, where: Callable[[Array], Array]) -> list[Array]:
    """The result and the gradient of every input (zero where it received none), brought back."""
    result, leaves, dy = run(op, example, where)
    result.backward(dy)
    for array, leaf in zip(example.arrays, leaves, strict=True):
        np.testing.assert_array_equal(host(leaf.data), array)  # inputs are never changed
    zeros = (np.zeros(leaf.shape, leaf.dtype) for leaf in leaves)
    return [host(result.data), *(none if x.grad is None else host(x.grad) for x, none in zip(leaves, zeros, strict=True))]


def on_the_host(op: Any, example: Example) -> list[Array]:
    return results(op, example, lambda array: array)


def on_the_device(op: Any, example: Example) -> list[Array]:
    return results(op, example, place)


def strided_on_the_device(op: Any, example: Example) -> list[Array]:
    """Nothing that the op is given lies contiguously."""
    return results(op, example, lambda array: place(np.stack([array, array], axis=-1))[..., 0])


def largest(x: Array) -> float:
    """The largest magnitude; 0 of nothing."""
    return float(np.max(np.abs(x), initial=0))


def assert_close(ours: list[Array], theirs: list[Array], relative: float, floor: float = 0.0) -> None:
    """Each array within ``relative`` of the largest number of the other, or of ``floor``."""
    for x, y in zip(ours, theirs, strict=True):
        assert x.shape == y.shape
        assert largest(x - y) <= relative * max(floor, largest(y))


def assert_same_bits(ours: list[Array], theirs: list[Array]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


#: Either version of a small example makes its numbers by sums of at most 9 · 9 · 5 terms (tokens, heads, state or channels)
#: of order one, with fewer than 100 operations on each: below 500 roundings, all one way, on numbers of which the largest of
#: a result, or 1, stands for all. Two versions are compared.
ROUNDINGS = 1000

# --- against the host -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=15)
def test_device_equals_the_host_and_the_reference_in_output_and_every_gradient(name: str, dtype: Any, data: Any) -> None:
    example = in_dtype(example_of(name, data.draw), dtype)
    ours = on_the_device(REGISTER[name].fused, example)
    assert all(x.dtype == dtype for x in ours)
    for theirs in (REGISTER[name].fused, REGISTER[name].reference):
        assert_close(ours, on_the_host(theirs, example), ROUNDINGS * np.finfo(dtype).eps / 2, floor=1)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=4)
def test_reference_runs_on_a_device_and_gives_what_it_gives_on_the_host(name: str, data: Any) -> None:
    example, op = example_of(name, data.draw), REGISTER[name].reference
    eps = np.finfo(np.float64).eps
    assert_close(on_the_device(op, example), on_the_host(op, example), ROUNDINGS * eps / 2, floor=1)


@pytest.mark.parametrize("name", NAMES)
def test_large_example_agrees_with_the_host_in_float64_and_in_float32(name: str) -> None:
    op, double = REGISTER[name].fused, in_dtype(LARGE[name], np.float64)
    wanted = on_the_host(op, double)
    # Sums of n ≤ 2000 terms (tokens of all sequences, heads, the vocabulary): about sqrt(n) = 45 roundings of 1.1e-16; and
    # angles that grow to 72 before they lose their whole turns. In float32 6e-8; of the loss times its logits, up to 90.
    assert_close(on_the_device(op, double), wanted, 1e-13)
    assert_close(on_the_device(op, LARGE[name]), wanted, 2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_two_runs_give_the_same_bits(name: str) -> None:
    first, second = (on_the_device(REGISTER[name].fused, LARGE[name]) for _ in range(2))
    assert_same_bits(first, second)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reference", [False, True])
def test_no_tokens_give_an_empty_result_and_zero_gradients(name: str, reference: bool) -> None:
    op = REGISTER[name].reference if reference else REGISTER[name].fused
    assert_same_bits(on_the_device(op, NO_TOKENS[name]), on_the_host(op, NO_TOKENS[name]))


@pytest.mark.parametrize("name", NAMES)
def test_one_token_is_a_sequence(name: str) -> None:
    op = REGISTER[name].fused
    eps = np.finfo(np.float64).eps
    assert_close(on_the_device(op, one_token(name)), on_the_host(op, one_token(name)), 50 * eps, floor=1)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=5)
def test_inputs_and_gradients_may_be_strided(name: str, data: Any) -> None:
    example, op = example_of(name, data.draw), REGISTER[name].fused
    eps = np.finfo(np.float64).eps  # another layout may take another path through BLAS
    assert_close(strided_on_the_device(op, example), on_the_device(op, example), ROUNDINGS * eps / 2, floor=1)


@pytest.mark.parametrize("storage", [F16, BF16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_storage_gives_the_bits_of_the_same_values_in_float32(name: str, storage: np.dtype[Any]) -> None:
    """Of the loss too: its logits are not rounded to 16 bits, as other products of a device are."""
    stored, op = in_dtype(LARGE[name], storage), REGISTER[name].fused
    assert_same_bits(on_the_device(op, stored), on_the_device(op, in_dtype(stored, np.float32)))


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_never_wait_for_the_device(gpu: str, name: str) -> None:
    if gpu == "cupy":
        pytest.skip("the stand-in counts how often the host waits; CuPy does not tell")
    with stand_in.counted() as counts:
        result, _, dy = run(REGISTER[name].fused, LARGE[name], place)
        result.backward(dy)
    assert counts() == (0, 0)


@pytest.mark.parametrize("name", NAMES)
def test_device_keeps_for_the_backward_pass_as_much_as_the_host(name: str) -> None:
    """So that the memory estimate, which counts what the host keeps, holds on both."""
    ours, theirs = (run(REGISTER[name].fused, LARGE[name], where)[0].node for where in (place, lambda array: array))
    assert kept(ours) == kept(theirs)


def kept(node: Any) -> list[int]:
    """The sizes of all arrays that the node keeps, its inputs among them."""
    found: list[int] = []
    for value in vars(node).values():
        parts = value if isinstance(value, list | tuple) else (value,)
        found += [part.size for part in parts if hasattr(part, "strides")]
    return sorted(found)


# --- how work is cut --------------------------------------------------------------------------------------------------


def short_attention() -> Example:
    rng = np.random.default_rng(0)
    return Example([rng.standard_normal((2, 25, heads, 3)) for heads in (4, 2, 2)], {"scale": 0.5})


#: Every constant that decides how an op cuts its work on a device, and what is cut by it: many pieces, and the smallest.
PIECES = [
    (attention_module, {"DEVICE_QUERY_BLOCK": 64, "DEVICE_SCORES": 1 << 16}, "attention", LARGE["attention"]),
    (attention_module, {"DEVICE_QUERY_BLOCK": 3, "DEVICE_SCORES": 1}, "attention", short_attention()),
    (lce_module, {"DEVICE_LOGITS": 1 << 18}, "linear_cross_entropy", LARGE["linear_cross_entropy"]),
    (chunked_scan_module, {"DEVICE_WEIGHTS": 20_000}, "mamba3_scan", LARGE["mamba3_scan"]),
    (chunked_scan_module, {"DEVICE_WEIGHTS": 40_000}, "ssd", LARGE["ssd"]),
    (
        chunked_scan_module,
        {"DEVICE_WEIGHTS": 1},
        "mamba3_scan",
        mamba3_scan_example(np.random.default_rng(0), 2, 13, R=2, H=6, P=3, G=2, N=5, S=2, chunk=8),
    ),
    (
        chunked_scan_module,
        {"DEVICE_WEIGHTS": 1},
        "ssd",
        ssd_example(np.random.default_rng(0), 2, 13, H=6, P=3, G=2, N=5, chunk=4),
    ),
]


@pytest.mark.parametrize(("module", "constants", "name", "example"), PIECES, ids=[f"{p[2]}-{p[1]}" for p in PIECES])
def test_smaller_pieces_of_work_give_the_same_result(
    monkeypatch: pytest.MonkeyPatch, module: Any, constants: dict[str, int], name: str, example: Example
) -> None:
    example = in_dtype(example, np.float64)
    whole = on_the_device(REGISTER[name].fused, example)
    for constant, value in constants.items():
        monkeypatch.setattr(module, constant, value)
    assert_close(on_the_device(REGISTER[name].fused, example), whole, 1e-13)  # the sums of the large examples, cut otherwise


def test_every_constant_that_cuts_the_work_of_a_device_is_varied_here() -> None:
    found = {
        (module.__name__, name)
        for module in {sys.modules[pair.fused.__module__] for pair in REGISTER.values()} | {chunked_scan_module}
        for name in vars(module)
        if name.isupper() and "DEVICE" in name and "ENOUGH" not in name
    }
    assert found == {(module.__name__, constant) for module, constants, _, _ in PIECES for constant in constants}


def test_chunks_of_the_loss_on_a_device_hold_bounded_logits() -> None:
    for vocabulary in (2, 256, 1024, 50_257, 128_256, 1 << 23):
        here, there = (lce_module.tokens_of_a_chunk(vocabulary, where) for where in (False, True))
        assert here <= there  # a device wants its work in larger pieces
        assert there * vocabulary <= max(lce_module.DEVICE_LOGITS, lce_module.FEWEST_TOKENS * vocabulary)


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_huge_logits_give_finite_losses_and_gradients() -> None:
    h = np.array([[1e4], [-1e4], [3e4]], dtype=np.float32)
    w = np.array([[1.0], [2.0], [-3.0]], dtype=np.float32)
    example = Example([h, w], {"targets": np.array([1, 2, 0]), "divisor": 1.0})
    ours, theirs = (
        on_the_device(lce_module.linear_cross_entropy, example),
        on_the_host(lce_module.linear_cross_entropy, example),
    )
    assert ours[0] == 30_000  # 2h - h, of the last token; the others' targets have the largest logits by far
    assert_same_bits(ours, theirs)


def test_a_vocabulary_smaller_and_one_larger_than_a_block_of_threads() -> None:
    rng = np.random.default_rng(0)
    for vocabulary in (1, 2, 255, 256, 257, 5000):
        arrays = [rng.standard_normal((7, 3)), rng.standard_normal((vocabulary, 3))]
        example = Example(arrays, {"targets": rng.integers(0, vocabulary, 7), "divisor": 7.0})
        op = lce_module.linear_cross_entropy
        # Sums of 5000 exponentials, in another order: sqrt(5000) roundings of 1.1e-16.
        assert_close(on_the_device(op, example), on_the_host(op, example), 1e-14, floor=1 / 7)


def test_loss_of_integer_targets_of_any_width() -> None:
    arrays, options = LARGE["linear_cross_entropy"]
    narrow = Example(arrays, {**options, "targets": options["targets"].astype(np.int32)})
    op = lce_module.linear_cross_entropy
    assert_same_bits(on_the_device(op, narrow), on_the_device(op, Example(arrays, options)))


# --- the scans --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("states", [1, 3, 130])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 33])
@pytest.mark.parametrize("channels", [1, 127, 129])
def test_selective_scan_of_any_number_of_tokens_channels_and_states(length: int, channels: int, states: int) -> None:
    """Blocks of 16 tokens and 128 channels, whole and ragged; states as many as one likes."""
    example = selective_scan_example(np.random.default_rng(length), 2, length, channels, states)
    op = REGISTER["selective_scan"].fused
    # Sums over up to 130 states, 129 channels or 66 tokens: as for the large examples.
    assert_close(on_the_device(op, example), on_the_host(op, example), 1e-13, floor=1)


@pytest.mark.parametrize("name", ["mamba3_scan", "selective_scan", "ssd"])
@pytest.mark.parametrize("a", [-1e2, -1e4, -1e30])
def test_strong_decay_neither_overflows_nor_gives_nan(name: str, a: float) -> None:
    """``exp(-a)``, as of a token ahead, would overflow."""
    rng = np.random.default_rng(4)
    if name == "selective_scan":
        example = selective_scan_example(rng, 2, 40, 5, 4)
        example.arrays[1][...], example.arrays[3][...] = -a, -1.0
        example.arrays[2][...] = 0
        if a < -1e4:
            example.arrays[0][...] = 0  # dt x would not be of order one
    elif name == "ssd":
        example = ssd_example(rng, 2, 40, H=4, P=4, G=2, N=4, chunk=16)
        example.arrays[2][...] = a / example.arrays[1].min()
    else:
        example = mamba3_scan_example(rng, 2, 40, R=2, H=4, P=4, G=2, N=4, S=1, chunk=32)
        example.arrays[1][...] = a
    example = in_dtype(example, np.float32)
    ours, theirs = on_the_device(REGISTER[name].fused, example), on_the_host(REGISTER[name].fused, example)
    assert all(np.all(np.isfinite(x)) for x in ours)
    assert_close(ours, theirs, ROUNDINGS * 6e-8, floor=1)


def test_a_token_that_clears_the_state_costs_the_tokens_behind_it_no_digits() -> None:
    """Inside a chunk decays are differences of running sums: in float32 the weak ones behind -1e4 would be wrong by 1e-3."""
    example = ssd_example(np.random.default_rng(4), 2, 64, H=4, P=4, G=2, N=4, chunk=64)
    example.arrays[1][...], example.arrays[2][...] = 0.01, -1
    example.arrays[1][:, 3::20] = 1e4
    example.arrays[0][:, 3::20] = 0
    single = in_dtype(example, np.float32)
    ours = on_the_device(REGISTER["ssd"].fused, single)[0]
    wanted = on_the_host(REGISTER["ssd"].reference, in_dtype(single, np.float64))[0]
    assert largest(ours - wanted) <= 2e-5 * largest(wanted)  # sums of 64 tokens · 4 states, rounded at 6e-8


# --- angles -----------------------------------------------------------------------------------------------------------


def test_angle_of_a_long_sequence_keeps_its_digits_in_float32() -> None:
    rng = np.random.default_rng(0)
    dt, angle = (v.astype(np.float32) for v in (rng.uniform(0, 2, (1, 3000, 2)), rng.standard_normal((1, 3000, 3))))
    with no_grad():
        ours = host(running_angle(Tensor(place(dt)), Tensor(place(angle))).data)
    speed = np.pi * np.tanh(angle.astype(np.float64))
    exact = np.cumsum(dt.astype(np.float64)[..., None] * speed[:, :, None], axis=1)
    apart = np.abs(np.exp(1j * ours) - np.exp(1j * exact))
    assert np.max(apart) <= 4e-7  # one rounding of an angle below 2π
    assert ours.min() >= 0 and ours.max() <= 2 * math.pi


def test_turn_and_next_angle_give_on_a_device_what_they_give_on_the_host() -> None:
    rng = np.random.default_rng(0)
    v, phi = rng.standard_normal((2, 3, 4, 7)), rng.uniform(0, 6, (2, 3, 4, 2))
    # A sum of two products, and cosines, rounded at 1.1e-16.
    np.testing.assert_allclose(host(turn(place(v), place(phi))), turn(v, phi), rtol=0, atol=4e-15)
    angles, dt, angle = rng.uniform(0, 6, (2, 4, 3)), rng.uniform(0, 1, (2, 4)), rng.standard_normal((2, 3))
    found = host(next_angle(place(angles), place(dt), place(angle)))
    np.testing.assert_allclose(found, next_angle(angles, dt, angle), rtol=0, atol=1e-14)  # angles below 10


# --- rows -------------------------------------------------------------------------------------------------------------


def test_sums_and_repetitions_of_rows_are_those_of_the_host() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(-9, 9, (2, 2, 5, 7)).astype(np.float64)  # whole numbers: nothing is rounded
    for ours, theirs in [
        (rows.row_sums(place(a)), rows.row_sums(a)),
        (rows.column_sums(place(a)), rows.column_sums(a)),
        (rows.row_dots(place(a), place(b)), rows.row_dots(a, b)),
        (rows.row_dots(place(a), place(b[0])), rows.row_dots(a, b[0])),
        (rows.repeated(place(a), 3), rows.repeated(a, 3)),
        (rows.repeated(place(a.swapaxes(0, 2)), 2), rows.repeated(a.swapaxes(0, 2), 2)),
    ]:
        np.testing.assert_array_equal(host(ours), theirs)
