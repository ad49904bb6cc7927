"""The check that every backward formula must pass: autograd against finite differences, in float64, along a direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from devices import host, place

from oxidizr_ref.autograd import Tensor, no_grad
from oxidizr_ref.backend import on_device

# The derivative of s(t) = sum(w * f(x + t v)) at t = 0 by the central difference of fourth order
#     (8 (s(h) - s(-h)) - (s(2h) - s(-2h))) / 12h,    error h⁴/30 · s⁽⁵⁾.
# With x and v of order one and h = 1e-3 the truncation error is 3e-14 · s⁽⁵⁾, the rounding error about
# 1.5 · 1.1e-16 / h = 1.7e-13 times the size of what f computes with. Both are 10⁵ times below the tolerance of 1e-7, which
# leaves room for steep functions (s⁽⁵⁾ up to 10⁶).
STEP = 1e-3
TOLERANCE = 1e-7


def check_gradients(
    function: Callable[..., Tensor], arrays: Sequence[Any], rng: np.random.Generator, tolerance: float = TOLERANCE
) -> None:
    """Compare the derivative of ``sum(w * function(*arrays))`` along a random direction with the one autograd computes.

    ``arrays``: float64, of any memory layout, on the host or where the test computes; autograd sees them as they are, the
    differences see contiguous copies. The error is measured against the sum of the absolute contributions to the
    derivative, which, unlike the derivative itself, cannot cancel to nearly nothing.
    """
    leaves = [Tensor(array if on_device(array) else place(array), requires_grad=True) for array in arrays]
    result = function(*leaves)
    w = rng.standard_normal(result.shape)
    result.backward(place(w))

    arrays = [host(array) for array in arrays]
    directions = [rng.standard_normal(array.shape) for array in arrays]
    contributions = []
    for leaf, direction in zip(leaves, directions, strict=True):
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape
        assert leaf.grad.dtype == np.float64
        contributions.append(np.ravel(host(leaf.grad) * direction))
    every = np.concatenate(contributions)

    def at(t: float) -> Any:
        with no_grad():
            moved = (Tensor(place(array + t * v)) for array, v in zip(arrays, directions, strict=True))
            return host(function(*moved).data)

    # Subtracted before they are summed: what does not change cancels exactly.
    difference = 8 * (at(STEP) - at(-STEP)) - (at(2 * STEP) - at(-2 * STEP))
    numeric = float(np.sum(w * difference)) / (12 * STEP)
    exact = float(np.sum(every))
    # Where the gradient vanishes, rounding (1.7e-13 of the values) is all that is left: hence a floor of 1e-4 of the values.
    scale = max(float(np.sum(np.abs(every))), 1e-4 * float(np.sum(np.abs(w * host(result.data)))), 1e-30)
    assert abs(numeric - exact) <= tolerance * scale, (
        f"finite differences {numeric!r}, autograd {exact!r}: relative error {abs(numeric - exact) / scale:.1e}"
    )
