"""What the three Mambas share: the causal convolution with its decoding form, and the first values of time steps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from oxidizr_ref import ops, rng
from oxidizr_ref.autograd import Tensor
from oxidizr_ref.backend import Array, compute_dtype, xp_of
from oxidizr_ref.fused.causal_conv import causal_conv
from oxidizr_ref.nn import Module, Parameter, uniform
from oxidizr_ref.watch import named

#: Range of the first time steps, which are log-uniform in it, and a floor (Gu & Dao 2023, section 3.6 and their code).
DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4


def time_step_bias(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """A recipe: biases whose softplus is log-uniform, by its inverse ``dt + log(1 - exp(-dt))``."""
    drawn = rng.uniform(seed, "init", name, 0, int(np.prod(shape, dtype=np.int64)))
    dt = np.maximum(np.exp(drawn * math.log(DT_MAX / DT_MIN) + math.log(DT_MIN)), DT_FLOOR)
    return (dt + np.log(-np.expm1(-dt))).astype(np.float32).reshape(shape)


class CausalConv(Module):
    """Causal depthwise convolution with bias, then silu. weight ``[C,1,K]``, bias ``[C]``: first values as in PyTorch."""

    def __init__(self, channels: int, kernel: int) -> None:
        self.weight = Parameter((channels, 1, kernel), uniform(kernel**-0.5))
        self.bias = Parameter((channels,), uniform(kernel**-0.5))

    def __call__(self, x: Tensor) -> Tensor:
        """x: ``[B,T,C]``. Returns ``[B,T,C]``."""
        return named("output", causal_conv(x, self.weight, self.bias))

    def new_tail(self, batch: int) -> Array:
        """The inputs before the first token, K-1 of them: zeros ``[B,K-1,C]``."""
        channels, _, kernel = self.weight.shape
        return zeros_like(self.weight, batch, kernel - 1, channels)

    def step(self, x: Tensor, tail: Array) -> Tensor:
        """The next token; ``tail`` moves on by one. x: ``[B,1,C]``. Returns ``[B,1,C]``."""
        window = ops.concatenate(Tensor(tail), x, axis=1)
        y = causal_conv(window, self.weight, self.bias)[:, -1:]
        tail[...] = window.data[:, 1:]
        return y


def zeros_like(parameter: Tensor, *shape: int) -> Array:
    """Zeros of this shape where the parameter lives, in its compute dtype: what a decoding state starts with."""
    return xp_of(parameter.data).zeros(shape, dtype=compute_dtype(parameter.dtype))
