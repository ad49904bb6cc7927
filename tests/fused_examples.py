"""Examples of every fused operation, for the tests that hold for all of them: small ones of any shape, and large ones.

`SMALL` makes float64 examples of a few numbers each, for Hypothesis: tokens fewer than a chunk, kernels longer than the
sequence, one token, no rotated pair. `LARGE` are float32 and span three tiles in every tiled step, the last one ragged.
`NO_TOKENS` are empty.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from devices import host, place
from hypothesis import strategies as st

from oxidizr_ref import fused
from oxidizr_ref.autograd import Tensor
from oxidizr_ref.backend import on_device
from oxidizr_ref.fused.register import REGISTER

for _module in pkgutil.iter_modules(fused.__path__):  # a new file registers its ops here too
    importlib.import_module(f"oxidizr_ref.fused.{_module.name}")

Array = Any
Draw = Callable[[Any], Any]
Rng = np.random.Generator


class Example(NamedTuple):
    """Arguments of one op: the arrays that become tensors, and what follows them."""

    arrays: list[Array]
    options: dict[str, Any]


def outputs_and_gradients(op: Callable[..., Any], example: Example) -> list[Array]:
    """The result, and the gradient of every array for one fixed random gradient of the result, computed where the test is.

    The example's arrays may be there already, or are placed.
    What a plain composition never reads, as the decay of a sequence of one token, receives nothing there: that is zero.
    """
    leaves = [Tensor(array if on_device(array) else place(array), requires_grad=True) for array in example.arrays]
    result = op(*leaves, **example.options)
    result.backward(place(np.random.default_rng(9).standard_normal(result.shape).astype(result.dtype)))
    zeros = (np.zeros(leaf.shape, leaf.dtype) for leaf in leaves)
    gradients = [none if leaf.grad is None else host(leaf.grad) for leaf, none in zip(leaves, zeros, strict=True)]
    return [host(result.data), *gradients]


def in_dtype(example: Example, dtype: Any) -> Example:
    """The same example, its arrays stored otherwise."""
    return Example([array.astype(dtype) for array in example.arrays], example.options)


def example_of(name: str, draw: Draw) -> Example:
    """A small example of the op."""
    assert name in SMALL, f"the fused op {name} has no examples here: write them (small, large and without tokens)"
    return SMALL[name](draw, np.random.default_rng(draw(st.integers(0, 2**32))))


# --- small ------------------------------------------------------------------------------------------------------------

sizes = st.integers(1, 5)
few = st.integers(1, 3)


def leading(draw: Draw) -> tuple[int, ...]:
    """Axes before the last: rows, [batch, rows], or ragged ones that no tile size divides."""
    return tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=2)))


def small_attention(draw: Draw, rng: Rng) -> Example:
    B, T, past, K, G, P, V = (draw(s) for s in (few, st.integers(1, 7), st.integers(0, 3), few, few, sizes, sizes))
    shapes = (B, T, K * G, P), (B, T + past, K, P), (B, T + past, K, V)
    return Example([rng.standard_normal(shape) for shape in shapes], {"scale": draw(st.sampled_from([1.0, 0.3]))})


def small_linear(draw: Draw, rng: Rng) -> Example:
    n, k = draw(sizes), draw(sizes)
    return Example([rng.standard_normal((*leading(draw), k)), rng.standard_normal((n, k))], {})


def small_linear_cross_entropy(draw: Draw, rng: Rng) -> Example:
    shape, width, vocab = leading(draw), draw(sizes), draw(st.integers(1, 9))
    options = {"targets": rng.integers(0, vocab, shape), "divisor": draw(st.sampled_from([1.0, 7.0]))}
    return Example([rng.standard_normal((*shape, width)), rng.standard_normal((vocab, width))], options)


def small_rms_norm(draw: Draw, rng: Rng) -> Example:
    groups = draw(few)
    width = groups * draw(sizes)
    # At least 0.3 from zero: 1 / sqrt(mean(x²)) of a tiny row is too steep for finite differences.
    x = rng.uniform(0.3, 2, (*leading(draw), width)) * rng.choice([-1.0, 1.0], width)
    return Example([x, rng.standard_normal(width)], {"eps": 1e-5, "groups": groups})


def small_rope(draw: Draw, rng: Rng) -> Example:
    shape = (draw(sizes), draw(sizes), draw(sizes), 2 * draw(few))
    return Example([rng.standard_normal(shape)], {"theta": 10.0, "start": draw(st.sampled_from([0, 1, 5]))})


def small_swiglu(draw: Draw, rng: Rng) -> Example:
    hidden, inner = draw(sizes), draw(sizes)
    shapes = (*leading(draw), hidden), (inner, hidden), (inner, hidden), (hidden, inner)
    return Example([rng.standard_normal(shape) for shape in shapes], {})


def small_causal_conv(draw: Draw, rng: Rng) -> Example:
    """Kernels may be longer than the sequence: then some weights only ever see what lies before it."""
    B, T, C, K = draw(few), draw(st.integers(1, 7)), draw(sizes), draw(st.integers(1, 7))
    return Example([rng.standard_normal(shape) for shape in ((B, T, C), (C, 1, K), (C,))], {})


def small_silu_gate(draw: Draw, rng: Rng) -> Example:
    shape = (draw(few), draw(st.integers(1, 7)), *draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    return Example([rng.standard_normal(shape), rng.standard_normal(shape)], {})


def small_selective_scan(draw: Draw, rng: Rng) -> Example:
    B, T, E, N = draw(few), draw(st.integers(1, 7)), draw(sizes), draw(sizes)
    return selective_scan_example(rng, B, T, E, N)


def selective_scan_example(rng: Rng, B: int, T: int, E: int, N: int) -> Example:
    x, raw, bias, D = (rng.standard_normal(shape) for shape in ((B, T, E), (B, T, E), (E,), (E,)))
    B_, C = rng.standard_normal((2, B, T, N))
    return Example([x, raw, bias, -rng.uniform(0.2, 2, (E, N)), B_, C, D], {})


def chunk_of(draw: Draw, T: int) -> int:
    """One token a chunk, a divisor of the length or not, the length, more."""
    return int(draw(st.integers(1, T + 3)))


def small_ssd(draw: Draw, rng: Rng) -> Example:
    B, T, G, h = draw(few), draw(st.integers(1, 9)), draw(few), draw(few)
    return ssd_example(rng, B, T, G * h, draw(sizes), G, draw(sizes), chunk_of(draw, T))


def ssd_example(rng: Rng, B: int, T: int, H: int, P: int, G: int, N: int, chunk: int) -> Example:
    x, dt, A = rng.standard_normal((B, T, H, P)), rng.uniform(0.05, 1, (B, T, H)), -rng.uniform(0.2, 2, H)
    B_, C = rng.standard_normal((2, B, T, G, N))
    return Example([x, dt, A, B_, C, rng.standard_normal(H)], {"chunk": chunk})


def small_mamba3_scan(draw: Draw, rng: Rng) -> Example:
    B, T, R, G, h, N = draw(few), draw(st.integers(1, 7)), draw(few), draw(few), draw(few), draw(sizes)
    return mamba3_scan_example(rng, B, T, R, G * h, draw(sizes), G, N, draw(st.integers(0, N // 2)), chunk_of(draw, T * R))


def mamba3_scan_example(
    rng: Rng, B: int, T: int, R: int, H: int, P: int, G: int, N: int, S: int, chunk: int
) -> Example:  # fmt: skip
    x, a = rng.standard_normal((B, T, R, H, P)), -rng.uniform(0.02, 1, (B, T, H))
    inflow, diagonal = rng.uniform(0.1, 1, (2, B, T, H))
    B_, C = rng.standard_normal((2, B, T, R, G, N))
    B_bias, C_bias = rng.standard_normal((2, H, R, N))
    phi = rng.uniform(0, 2 * math.pi, (B, T, H, S))
    return Example([x, a, inflow, diagonal, B_, C, B_bias, C_bias, phi, rng.standard_normal(H)], {"chunk": chunk})


def small_running_angle(draw: Draw, rng: Rng) -> Example:
    return running_angle_example(rng, draw(few), draw(st.integers(1, 7)), draw(few), draw(st.integers(0, 3)), 1.0, 0.02)


def running_angle_example(rng: Rng, B: int, T: int, H: int, S: int, turning: float, noise: float) -> Example:
    """Angles that jump from 2π to 0, or back, between tokens, and never at one, where rounding or the step of a difference
    would decide: each pair turns by about an odd number of halves first, then by whole turns or hardly at all.
    ``turning``: the share of tokens that may turn; ``noise``: how much else they do."""
    halves = 2 * rng.integers(0, 3, (B, T, H)) * (rng.random((B, T, H)) < turning)
    halves[:, 0] = rng.choice([1, 3], (B, H))
    dt = 2 * halves + rng.uniform(0, noise, (B, T, H))  # the speed π tanh(angle) is about ±π/2: two units are half a turn
    angle = np.arctanh(0.5) * rng.choice([-1.0, 1.0], (B, 1, S)) + rng.uniform(-noise, noise, (B, T, S)) / 4
    total = np.cumsum(dt[..., None] * (math.pi * np.tanh(angle))[:, :, None], axis=1)
    assert np.all(np.cos(total) < -0.3)
    return Example([dt, angle], {})


SMALL: dict[str, Callable[[Draw, Rng], Example]] = {
    "attention": small_attention,
    "causal_conv": small_causal_conv,
    "linear": small_linear,
    "linear_cross_entropy": small_linear_cross_entropy,
    "mamba3_scan": small_mamba3_scan,
    "rms_norm": small_rms_norm,
    "rope": small_rope,
    "running_angle": small_running_angle,
    "selective_scan": small_selective_scan,
    "silu_gate": small_silu_gate,
    "ssd": small_ssd,
    "swiglu": small_swiglu,
}

# --- large ------------------------------------------------------------------------------------------------------------


def large_examples() -> dict[str, Example]:
    rng = np.random.default_rng(5)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape)

    targets = rng.integers(0, 1024, 1300)
    examples = {
        "attention": Example([normal(3, 160, 4, 32), normal(3, 170, 2, 32), normal(3, 170, 2, 24)], {"scale": 0.2}),
        "causal_conv": Example([normal(2, 300, 130), normal(130, 1, 4), normal(130)], {}),
        "linear": Example([normal(3, 171, 64), normal(390, 64)], {}),
        "linear_cross_entropy": Example([normal(1300, 256), normal(1024, 256)], {"targets": targets, "divisor": 1300.0}),
        "mamba3_scan": mamba3_scan_example(rng, B=3, T=40, R=3, H=60, P=8, G=2, N=8, S=2, chunk=48),
        "rms_norm": Example([normal(4001, 64), normal(64)], {"eps": 1e-5, "groups": 4}),
        "rope": Example([normal(11, 128, 4, 32)], {"theta": 1e4}),
        "running_angle": running_angle_example(rng, B=5, T=100, H=3, S=4, turning=0.05, noise=0.002),
        "selective_scan": selective_scan_example(rng, B=2, T=50, E=600, N=8),
        "silu_gate": Example([normal(2, 200, 8, 24), normal(2, 200, 8, 24)], {}),
        "ssd": ssd_example(rng, B=3, T=150, H=40, P=12, G=2, N=16, chunk=64),
        "swiglu": Example([normal(3, 171, 96), normal(390, 96), normal(390, 96), normal(96, 390)], {}),
    }
    return {name: in_dtype(example, np.float32) for name, example in examples.items()}


LARGE = large_examples()

# --- empty ------------------------------------------------------------------------------------------------------------


def _empty(*shapes: tuple[int, ...], **options: Any) -> Example:
    return Example([np.ones(shape) for shape in shapes], options)


NO_TOKENS = {
    "attention": _empty((0, 3, 4, 2), (0, 3, 2, 2), (0, 3, 2, 2), scale=1.0),
    "causal_conv": _empty((0, 3, 2), (2, 1, 4), (2,)),
    "linear": _empty((0, 3), (2, 3)),
    "linear_cross_entropy": _empty((0, 3), (5, 3), targets=np.zeros(0, dtype=np.int64), divisor=1.0),
    "mamba3_scan": _empty(
        *((0, 3, 2, 4, 5), (0, 3, 4), (0, 3, 4), (0, 3, 4), (0, 3, 2, 2, 6), (0, 3, 2, 2, 6)),
        *((4, 2, 6), (4, 2, 6), (0, 3, 4, 1), (4,)),
        chunk=2,
    ),
    "rms_norm": _empty((0, 3), (3,), eps=1e-5),
    "rope": _empty((0, 3, 2, 4), theta=10.0),
    "running_angle": _empty((0, 3, 2), (0, 3, 4)),
    "selective_scan": _empty((0, 3, 4), (0, 3, 4), (4,), (4, 2), (0, 3, 2), (0, 3, 2), (4,)),
    "silu_gate": _empty((0, 3, 2, 4), (0, 3, 2, 4)),
    "ssd": _empty((0, 3, 4, 5), (0, 3, 4), (4,), (0, 3, 2, 6), (0, 3, 2, 6), (4,), chunk=2),
    "swiglu": _empty((0, 3), (5, 3), (5, 3), (3, 5)),
}


def one_token(name: str) -> Example:
    """The example without tokens, with one row in every empty axis."""
    arrays, options = NO_TOKENS[name]
    rows = [np.ones((1, *array.shape[1:])) if array.shape[0] == 0 else array for array in arrays]
    return Example(rows, {**options, "targets": np.zeros(1, dtype=np.int64)} if "targets" in options else options)


assert set(SMALL) == set(LARGE) == set(NO_TOKENS) == set(REGISTER), "every fused op has its examples, and no others do"
