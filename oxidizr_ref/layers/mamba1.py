"""Mamba, the first (Gu & Dao 2023): a selective state space with a decay for every channel and state.

``x, z = in_proj(u)``; ``x = silu(conv(x))``; ``dt, B, C = x_proj(x)``; the selective scan over x; ``out_proj(y * silu(z))``.

Shapes: B batch, T time, D hidden, E = expand·D channels, N states a channel, r = ⌈D/16⌉ rank of dt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from oxidizr_ref import ops
from oxidizr_ref.autograd import Tensor
from oxidizr_ref.backend import Array, xp_of
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.fused.linear import linear
from oxidizr_ref.fused.selective_scan import selective_scan
from oxidizr_ref.fused.silu_gate import silu_gate
from oxidizr_ref.layers.state_space import CausalConv, time_step_bias, zeros_like
from oxidizr_ref.nn import Linear, Module, Parameter, constant, uniform
from oxidizr_ref.sums import running_sum
from oxidizr_ref.watch import named


def decay_rates(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:  # noqa: ARG001
    """A recipe: ``log(1 … N)`` for every channel, so that A = -1 … -N (S4D-Real, Gu et al. 2022)."""
    return np.broadcast_to(np.log(np.arange(1, shape[1] + 1)), shape).astype(np.float32)


class TimeStep(Module):
    """``softplus(weight · dt + bias)``: from rank r to a time step for every channel. The softplus is the scan's."""

    def __init__(self, rank: int, channels: int) -> None:
        self.weight = Parameter((channels, rank), uniform(rank**-0.5))
        self.bias = Parameter((channels,), time_step_bias)


@dataclass
class Mamba1Cache:
    """The last inputs of the convolution ``[B,K-1,E]`` and the state ``[B,E,N]``: the same size at any length."""

    tail: Array
    state: Array


class Mamba1(Module):
    """The layer between norm and residual sum."""

    def __init__(self, config: ModelConfig, std: float, output_std: float) -> None:
        D, N = config.hidden_size, config.mamba_d_state
        self.channels, self.rank, self.d_state = config.mamba_expand * D, math.ceil(D / 16), N
        self.in_proj = Linear(D, 2 * self.channels, std)  # rows x | z
        self.conv1d = CausalConv(self.channels, config.mamba_d_conv)
        self.x_proj = Linear(self.channels, self.rank + 2 * N, std)  # rows dt | B | C
        self.dt_proj = TimeStep(self.rank, self.channels)
        self.A_log = Parameter((self.channels, N), decay_rates)
        self.D = Parameter((self.channels,), constant(1.0))
        self.out_proj = Linear(self.channels, D, output_std)

    def __call__(self, u: Tensor, cache: Mamba1Cache | None = None) -> Tensor:
        """u: ``[B,T,D]``. Returns ``[B,T,D]``. A new ``cache`` is filled, for `step` to go on."""
        x, z = ops.split(self.in_proj(u), (self.channels, self.channels))
        x = self.conv1d(x) if cache is None else self.conv1d.step(x, cache.tail)
        raw, B, C = self._select(x)
        A = named("A", -ops.exp(self.A_log))
        y = named("y", selective_scan(x, raw, self.dt_proj.bias, A, B, C, self.D))
        if cache is not None:
            self._fill(cache.state, ops.softplus(raw + self.dt_proj.bias).data, x.data, A.data, B.data)
        return self.out_proj(named("gated", silu_gate(y, z)))

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt before bias and softplus, B and C, from the input: ``[B,T,E] [B,T,N] [B,T,N]``."""
        dt, B, C = ops.split(self.x_proj(x), (self.rank, self.d_state, self.d_state))
        return named("dt_proj.output", linear(dt, self.dt_proj.weight)), B, C

    def _fill(self, state: Array, dt: Array, x: Array, A: Array, B: Array) -> None:
        """The state after the last token: ``Σ_t exp(A (dt_{t+1} + … + dt_T)) dt_t x_t B_tᵀ``."""
        past, entering = running_sum(dt.astype(np.float64), axis=1), dt * x
        until = (past[:, -1:] - past).astype(dt.dtype)  # [B,T,E]
        for n in range(self.d_state):
            state[:, :, n] = (xp_of(dt).exp(until * A[:, n]) * entering * B[:, :, n : n + 1]).sum(axis=1)

    def new_cache(self, batch: int) -> Mamba1Cache:
        """The state before the first token."""
        return Mamba1Cache(self.conv1d.new_tail(batch), zeros_like(self.A_log, batch, self.channels, self.d_state))

    def step(self, u: Tensor, cache: Mamba1Cache) -> Tensor:
        """The next token, by the recurrence itself. u: ``[B,1,D]``. Returns ``[B,1,D]``."""
        batch, E, N = u.shape[0], self.channels, self.d_state
        x, z = ops.split(self.in_proj(u), (E, E))
        x = self.conv1d.step(x, cache.tail)
        raw, B, C = self._select(x)
        dt = ops.softplus(raw + self.dt_proj.bias)
        decay = ops.exp(dt.reshape(batch, E, 1) * -ops.exp(self.A_log))
        h = Tensor(cache.state) * decay + (dt * x).reshape(batch, E, 1) * B.reshape(batch, 1, N)
        cache.state[...] = h.data
        y = ops.matmul(h, C.reshape(batch, N, 1)).reshape(batch, 1, E) + x * self.D
        return self.out_proj(silu_gate(y, z))
