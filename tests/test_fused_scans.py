"""What is special to the state space operations: chunks of any size, prefixes, causality, strong decay, long angles, memory.

On either device, but for memory and tiles. What holds for all fused operations is in test_fused.py. Which of these
statements hold to the bit and which within rounding is said at each: a recurrence that runs token by token does the same
operations at any block size and length, a matrix product over another chunk sums in another order.
"""

from __future__ import annotations

import gc
import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from devices import current, host, place
from fused_examples import (
    Example,
    in_dtype,
    mamba3_scan_example,
    outputs_and_gradients,
    selective_scan_example,
    ssd_example,
)
from hypothesis import given
from hypothesis import strategies as st

from oxidizr_ref import parallel
from oxidizr_ref.autograd import Tensor, no_grad
from oxidizr_ref.fused import chunked_scan
from oxidizr_ref.fused import selective_scan as selective_scan_module
from oxidizr_ref.fused.mamba3 import next_angle
from oxidizr_ref.fused.register import REGISTER

Array = Any

on_both = pytest.mark.usefixtures("device")

T, RANK = 11, 2
#: For each op, which of its inputs run along time (axis 1); the others are parameters.
ALONG_TIME = {
    "causal_conv": (0,),
    "mamba3_scan": (0, 1, 2, 3, 4, 5, 8),
    "running_angle": (0, 1),
    "selective_scan": (0, 1, 4, 5),
    "silu_gate": (0, 1),
    "ssd": (0, 1, 3, 4),
}
CHUNKED = ("mamba3_scan", "ssd")


def example(name: str, chunk: int = 4, length: int = T, dtype: Any = np.float64) -> Example:
    """Two sequences of ``length`` tokens."""
    rng = np.random.default_rng(3)
    if name == "selective_scan":
        made = selective_scan_example(rng, 2, length, E=7, N=3)
    elif name == "ssd":
        made = ssd_example(rng, 2, length, H=6, P=3, G=2, N=5, chunk=chunk)
    elif name == "mamba3_scan":
        made = mamba3_scan_example(rng, 2, length, R=RANK, H=4, P=3, G=2, N=5, S=2, chunk=chunk * RANK)
    elif name == "causal_conv":
        made = Example([rng.standard_normal(shape) for shape in ((2, length, 6), (6, 1, 4), (6,))], {})
    elif name == "running_angle":
        made = Example([rng.uniform(0, 2, (2, length, 3)), rng.standard_normal((2, length, 4))], {})
    else:
        made = Example([rng.standard_normal((2, length, 3, 4)) for _ in range(2)], {})
    return in_dtype(made, dtype)


def output(name: str, arrays: list[Array], options: dict[str, Any]) -> Array:
    with no_grad():
        result: Tensor = REGISTER[name].fused(*(Tensor(place(array)) for array in arrays), **options)
        return host(result.data)


def relative(found: Array, wanted: Array) -> float:
    """The largest error over the largest magnitude."""
    return float(np.max(np.abs(found - wanted), initial=0) / max(float(np.max(np.abs(wanted), initial=0)), 1e-300))


# --- chunks and lengths -----------------------------------------------------------------------------------------------


@on_both
@pytest.mark.parametrize("length", [1, 2, 7, T])
@pytest.mark.parametrize("name", CHUNKED)
def test_every_chunk_size_gives_the_outputs_and_gradients_of_one_token_a_chunk(name: str, length: int) -> None:
    wanted = outputs_and_gradients(REGISTER[name].fused, example(name, 1, length))
    for chunk in range(2, length + 4):
        found = outputs_and_gradients(REGISTER[name].fused, example(name, chunk, length))
        for ours, theirs in zip(found, wanted, strict=True):
            # Sums of at most 11 · 2 positions of order one, in another order: a few hundred roundings of 1e-16. The floor of
            # 1 is for gradients of a sequence of one token, which its decay does not have.
            assert np.max(np.abs(ours - theirs), initial=0) <= 1e-13 * max(1.0, float(np.max(np.abs(theirs), initial=0)))


@on_both
def test_mamba3_s_chunk_smaller_than_its_rank_is_one_token() -> None:
    arrays, _ = example("mamba3_scan")
    one, less = (output("mamba3_scan", arrays, {"chunk": chunk}) for chunk in (RANK, 1))
    np.testing.assert_array_equal(one, less)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_block_size_of_the_selective_scan_gives_the_same_bits(dtype: type) -> None:
    """Block by block only the borders of loops change: every number is made by the same operations in the same order."""
    length = 19
    arrays, options = example("selective_scan", length=length, dtype=dtype)
    wanted = output("selective_scan", arrays, options)
    for block in range(1, length + 4):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(selective_scan_module, "BLOCK", block)
            np.testing.assert_array_equal(output("selective_scan", arrays, options), wanted)


@on_both
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", sorted(ALONG_TIME))
def test_outputs_of_a_prefix_equal_the_prefix_of_the_outputs(name: str, dtype: type) -> None:
    """To the bit, but for the last chunk of a chunked scan where the prefix cuts it: its products have another size. On a
    device the products of all chunks are one call, whose way depends on their number."""
    chunk, length = 4, 23
    arrays, options = example(name, chunk, length, dtype)
    whole = output(name, arrays, options)
    for end in range(1, length):
        shorter = [array[:, :end].copy() if i in ALONG_TIME[name] else array for i, array in enumerate(arrays)]
        found = output(name, shorter, options)
        same = end if name not in CHUNKED else end // chunk * chunk if current() == "cpu" else 0
        np.testing.assert_array_equal(found[:, :same], whole[:, :same])
        # Sums of at most 4 · 2 positions and 5 states: some dozens of roundings.
        assert relative(found, whole[:, :end]) <= 50 * np.finfo(dtype).eps


@on_both
@pytest.mark.parametrize("name", sorted(ALONG_TIME))
def test_output_before_a_changed_token_keeps_its_bits(name: str) -> None:
    """To the bit in the chunked scans too: inside a chunk a later token counts with weight exactly zero."""
    arrays, options = example(name)
    before = output(name, arrays, options)
    for t in range(T):
        changed = [array.copy() for array in arrays]
        for i in ALONG_TIME[name]:
            changed[i][:, t] *= 0.7
        after = output(name, changed, options)
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert np.any(after[:, t] != before[:, t])


@on_both
@pytest.mark.parametrize("name", sorted(ALONG_TIME))
def test_gradient_of_a_past_output_is_exactly_zero_in_the_future(name: str) -> None:
    arrays, options = example(name)
    leaves = [Tensor(place(array), requires_grad=True) for array in arrays]
    REGISTER[name].fused(*leaves, **options)[:, 5].sum().backward()
    for i in ALONG_TIME[name]:
        np.testing.assert_array_equal(host(leaves[i].grad)[:, 6:], 0)
    assert np.all(host(leaves[0].grad)[:, 5] != 0)


# --- decay ------------------------------------------------------------------------------------------------------------


def with_decay(name: str, a: Array) -> Example:
    """A float32 example whose states decay by ``exp(a_t)``, every head and channel alike."""
    B, length = a.shape
    rng = np.random.default_rng(4)
    if name == "selective_scan":
        made = selective_scan_example(rng, B, length, E=5, N=4)
        made.arrays[1][...] = (-a + np.log(-np.expm1(a)))[..., None]  # softplus of it is -a
        made.arrays[2][...], made.arrays[3][...] = 0, -1
    elif name == "ssd":
        made = ssd_example(rng, B, length, H=4, P=4, G=2, N=4, chunk=length)
        made.arrays[1][...], made.arrays[2][...] = -a[..., None], -1
    else:
        made = mamba3_scan_example(rng, B, length, R=1, H=4, P=4, G=2, N=4, S=1, chunk=length)
        made.arrays[1][...] = a[..., None]
    return in_dtype(made, np.float32)


SCANS = ("mamba3_scan", "selective_scan", "ssd")


@on_both
@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("a", [-1e2, -1e4, -1e30])
def test_strong_decay_over_a_long_chunk_neither_overflows_nor_gives_nan_and_leaves_each_token_alone(
    name: str, a: float
) -> None:
    """``exp(-a)``, as of a token ahead, would overflow, and warnings are errors here. What is forgotten at once is as if it
    had never been."""
    strong = with_decay(name, np.full((1, 300), a))
    results = outputs_and_gradients(REGISTER[name].fused, strong)
    assert all(np.all(np.isfinite(result)) for result in results)
    for t in (0, 1, 150, 299):
        alone = [array[:, t : t + 1].copy() if i in ALONG_TIME[name] else array for i, array in enumerate(strong.arrays)]
        # The products of one token, summed in another order: a few roundings of 6e-8.
        assert relative(results[0][:, t : t + 1], output(name, alone, strong.options)) <= 1e-6


@on_both
@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("reset", [-1.0, -10.0, -100.0, -1e4])
def test_a_token_that_clears_the_state_costs_the_tokens_behind_it_no_digits(name: str, reset: float) -> None:
    """Models learn to clear the state (a long time step), and then to keep it for many tokens of the same chunk. Computed as
    a difference of running sums in float32, the weak decay behind a strong one would be that of ±2⁻²⁴ · |strong|."""
    a = np.full((2, 64), -0.01)
    a[:, 3::20] = reset
    single = with_decay(name, a)
    found = outputs_and_gradients(REGISTER[name].fused, single)
    wanted = outputs_and_gradients(REGISTER[name].reference, in_dtype(single, np.float64))
    for number, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        # Sums of at most 64 terms of order one, each rounded a few times at 6e-8.
        assert relative(ours, theirs) <= 1e-5, number


@on_both
def test_state_that_never_decays_sums_what_enters() -> None:
    rng, length = np.random.default_rng(0), 100
    x, B = rng.standard_normal((1, length, 1, 1, 3)), rng.standard_normal((1, length, 1, 1, 4))
    ones, none = np.ones((1, length, 1)), np.zeros((1, 1, 4))
    arrays = [x, 0 * ones, ones, ones, B, np.ones_like(B), none, none, np.zeros((1, length, 1, 0)), np.zeros(1)]
    wanted = np.cumsum((B.sum(axis=-1, keepdims=True) * x)[:, :, :, 0], axis=1)
    found = output("mamba3_scan", arrays, {"chunk": 16})[:, :, :, 0]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)  # sums of 100 · 4 numbers of order one


# --- angles -----------------------------------------------------------------------------------------------------------


def on_the_circle(a: Array, b: Array) -> Array:
    """The distance of two angles, at most π."""
    return np.abs(np.remainder(a - b + math.pi, 2 * math.pi) - math.pi)


def long_turns(length: int) -> tuple[Array, Array, Array]:
    """float32 dt and angle that turn the same way for ever, and the exact running sum of their turns, in float64."""
    rng = np.random.default_rng(0)
    dt = rng.uniform(0.1, 0.6, (1, length, 2)).astype(np.float32)
    angle = rng.uniform(0.5, 3, (1, length, 3)).astype(np.float32)
    turns = dt.astype(np.float64)[..., None] * (np.tanh(angle.astype(np.float64)) * math.pi)[:, :, None]
    return dt, angle, turns


@on_both
def test_running_angle_of_20000_tokens_keeps_its_digits_in_float32_where_a_plain_sum_loses_them() -> None:
    dt, angle, turns = long_turns(20_000)
    exact = np.cumsum(turns, axis=1)
    found = output("running_angle", [dt, angle], {})
    assert found.dtype == np.float32
    assert np.all((found >= 0) & (found <= np.float32(2 * math.pi)))
    # One rounding to float32, of a number below 8, and 20,000 in float64, of a sum that ends near 20,000.
    tolerance = 2.0**-22 + 20_000 * 2.0**-53 * float(exact.max())
    assert np.max(on_the_circle(found, exact)) <= tolerance
    plain = np.cumsum(turns.astype(np.float32), axis=1)  # even of turns that were rounded only once
    assert np.max(on_the_circle(plain.astype(np.float64), exact)) > 1000 * tolerance


@on_both
def test_angle_carried_on_token_by_token_is_the_running_angle() -> None:
    dt, angle, turns = long_turns(2_000)
    phi, steps = place(np.zeros((1, 2, 3))), []
    placed_dt, placed_angle = place(dt), place(angle)
    for t in range(dt.shape[1]):
        phi = next_angle(phi, placed_dt[:, t], placed_angle[:, t])
        steps.append(host(phi))
        assert steps[-1].dtype == np.float64 and np.all((steps[-1] >= 0) & (steps[-1] <= 2 * math.pi))
    exact = np.cumsum(turns, axis=1)
    # The n-th of the exact sums was rounded n times, as were the steps, each three times below 16.
    tolerance = np.arange(1, dt.shape[1] + 1)[:, None, None] * (exact + 3 * 16) * 2.0**-53
    assert np.all(on_the_circle(np.stack(steps, axis=1), exact) <= tolerance)
    found = output("running_angle", [dt, angle], {})
    assert np.all(on_the_circle(found, np.stack(steps, axis=1)) <= 2.0**-22 + 2 * tolerance)


@on_both
def test_running_angle_turns_backward_as_well_as_forward() -> None:
    dt, angle = np.ones((1, 9, 1)), np.full((1, 9, 2), np.arctanh(0.5))
    angle[..., 1] *= -1
    phi = output("running_angle", [dt, angle], {})[0, :, 0]
    quarters = np.arange(1, 10) * math.pi / 2
    assert np.max(on_the_circle(phi[:, 0], quarters)) <= 1e-14  # nine roundings of numbers below 15
    assert np.max(on_the_circle(phi[:, 1], -quarters)) <= 1e-14


# --- memory -----------------------------------------------------------------------------------------------------------


def memory(run: Callable[[], Tensor]) -> tuple[int, int, int]:
    """Bytes: the most while ``run()`` goes forward, what is kept for the way back, the most while going back."""
    parallel.set_threads(1)
    gc.collect()
    tracemalloc.start()
    try:
        result = run()
        kept, forward = tracemalloc.get_traced_memory()
        dy = np.ones_like(result.data)
        tracemalloc.reset_peak()
        result.backward(dy)
        return forward, kept, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def leaves_of(made: Example) -> list[Tensor]:
    return [Tensor(array.astype(np.float32), requires_grad=True) for array in made.arrays]


MIB = 2**20


def test_ssd_makes_no_array_of_tokens_by_tokens_nor_of_states_a_token() -> None:
    B, length, H, N, chunk = 2, 4096, 16, 64, 64
    made = ssd_example(np.random.default_rng(0), B, length, H, P=4, G=1, N=N, chunk=chunk)
    leaves = leaves_of(made)
    forward, kept, backward = memory(lambda: REGISTER["ssd"].fused(*leaves, **made.options))
    y, states = 4 * B * length * H * 4, length // chunk * B * H * N * 4 * 4  # 2 MiB each
    assert kept < y + states + MIB // 4
    # One sequence's and head's tokens by tokens are 64 MiB, B by head for all tokens 32 MiB.
    # A tile has 2^19 weights, 2 MiB, and on the way back as many decays, products of both, and gradients of each.
    assert forward < 10 * MIB and backward < 28 * MIB, (forward, backward)


def test_mamba3_scan_keeps_no_rotated_b_or_c_of_every_head() -> None:
    B, length, H, N, chunk = 8, 512, 16, 64, 64
    made = mamba3_scan_example(np.random.default_rng(0), B, length, R=1, H=H, P=4, G=1, N=N, S=16, chunk=chunk)
    leaves = leaves_of(made)
    forward, kept, backward = memory(lambda: REGISTER["mamba3_scan"].fused(*leaves, **made.options))
    y, states = 4 * B * length * H * 4, length // chunk * B * H * N * 4 * 4  # 1 MiB each
    assert kept < y + states + MIB // 4
    by_head = 4 * B * length * H * N  # 16 MiB: B̄, or C̄, of all tokens and heads
    assert forward < by_head, forward
    # On the way back the gradients of B and C wait by head until they are summed over each group; what they are made from
    # exists for one tile (an eighth here) at a time.
    assert backward < 4 * by_head, backward


def test_selective_scan_keeps_a_state_a_block_and_no_state_of_every_token() -> None:
    B, length, E, N = 2, 1024, 256, 16
    made = selective_scan_example(np.random.default_rng(0), B, length, E, N)
    leaves = leaves_of(made)
    forward, kept, backward = memory(lambda: REGISTER["selective_scan"].fused(*leaves))
    y, states = 4 * B * length * E, 4 * length // selective_scan_module.BLOCK * B * E * N  # 2 MiB each
    assert kept < y + states + MIB // 4
    # The states of every token are 32 MiB.
    assert forward < 10 * MIB and backward < 20 * MIB, (forward, backward)


# --- how lanes are cut ------------------------------------------------------------------------------------------------


@given(
    B=st.integers(0, 5),
    T=st.integers(0, 30),
    G=st.integers(1, 5),
    h=st.integers(1, 7),
    Q=st.integers(1, 12),
    R=st.integers(1, 4),
    weights=st.integers(1, 9000),
)
def test_lane_tiles_cover_every_token_of_every_head_once_and_number_the_cuts_of_a_group(
    B: int, T: int, G: int, h: int, Q: int, R: int, weights: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_scan, "WEIGHTS", weights)
        tiles = chunked_scan.lane_tiles(B, T, G, h, Q, R)
    seen, chunks = np.zeros((B, T, G, h), dtype=int), np.zeros((B, chunked_scan.number_of_chunks(T, Q), G, h), dtype=int)
    for tile in tiles:
        ones = np.ones((B, T, G, h), dtype=int)
        tile.of_numbers(seen)[...] += 1
        tile.of_states(chunks)[...] += 1
        assert tile.of_numbers(ones).shape[-1] == tile.Q <= Q
        lanes = math.prod(part.stop - part.start for part in tile[:4])
        assert lanes == 1 or lanes * (tile.Q * R) ** 2 <= weights
    np.testing.assert_array_equal(seen, 1)
    np.testing.assert_array_equal(chunks, 1)
    # Tiles that hold heads of one group add to the same B and C: they must go by different numbers.
    places = [
        (tile, b, m, g)
        for tile in tiles
        for b in _each(tile.sequences)
        for m in _each(tile.chunks)
        for g in _each(tile.groups)
    ]
    written = [(b, m, g, tile.part) for tile, b, m, g in places]
    assert len(set(written)) == len(written)


def _each(part: slice) -> range:
    return range(part.start, part.stop)
