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
from oxidizr_ref.sums import running_sum
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
        """The next tokens; ``tail`` moves on behind them. x: ``[B,T,C]``. Returns ``[B,T,C]``."""
        window = ops.concatenate(Tensor(tail), x, axis=1)
        y = causal_conv(window, self.weight, self.bias)[:, -x.shape[1] :]
        tail[...] = window.data[:, x.shape[1] :]
        return y


def final_state(x: Array, a: Array, B: Array) -> Array:
    """The state after the last token, ``Σ_t exp(a_{t+1} + … + a_T) Σ_r x_t^r B_t^rᵀ`` (Dao & Gu 2024, section 6: a chunk's).

    x: ``[B,T,R,H,P]`` as it enters, a: ``[B,T,H]``, the logarithm of the decay, B: ``[B,T,R,G,N]``, shared by H/G heads.
    Returns ``[B,H,P,N]``.
    """
    (batch, T, R, H, P), (G, N) = x.shape, B.shape[3:]
    past = running_sum(a.astype(np.float64), axis=1)
    until = xp_of(x).exp(past[:, -1:] - past).astype(x.dtype)
    entering = (x * until[:, :, None, :, None]).reshape(batch, T * R, G, H // G * P)
    state = xp_of(x).matmul(entering.transpose(0, 2, 3, 1), B.reshape(batch, T * R, G, N).transpose(0, 2, 1, 3))
    return state.reshape(batch, H, P, N)


def zeros_like(parameter: Tensor, *shape: int) -> Array:
    """Zeros of this shape where the parameter lives, in its compute dtype: what a decoding state starts with."""
    return xp_of(parameter.data).zeros(shape, dtype=compute_dtype(parameter.dtype))
