"""Mamba2 (Dao & Gu 2024): a state space with one decay a head, which chunks of matrix products can compute.

``z, x, B, C, dt = in_proj(u)``; ``x, B, C = silu(conv([x;B;C]))``; the scan; ``out_proj(RMSNorm(y * silu(z)))``, the norm
over each group's channels.

Shapes: B batch, T time, D hidden, H heads, P head width, E = H·P channels, G groups sharing B and C, N state size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from oxidizr_ref import ops, rng
from oxidizr_ref.autograd import Tensor
from oxidizr_ref.backend import Array
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.fused.silu_gate import silu_gate
from oxidizr_ref.fused.ssd import ssd
from oxidizr_ref.layers.state_space import CausalConv, final_state, time_step_bias, zeros_like
from oxidizr_ref.nn import Linear, Module, Parameter, RMSNorm, constant
from oxidizr_ref.watch import named


def decay_rates(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """A recipe: the logarithm of numbers uniform in [1, 16)."""
    return np.log(1 + 15 * rng.uniform(seed, "init", name, 0, shape[0])).astype(np.float32)


@dataclass
class Mamba2Cache:
    """The last inputs of the convolution ``[B,K-1,E+2GN]`` and the state ``[B,H,P,N]``: the same size at any length."""

    tail: Array
    state: Array


class Mamba2(Module):
    """The layer between norm and residual sum."""

    def __init__(self, config: ModelConfig, std: float, output_std: float) -> None:
        self.heads, self.head_dim = config.mamba2_num_heads, config.mamba2_head_dim
        self.groups, self.d_state, self.chunk = config.mamba2_n_groups, config.mamba2_state_size, config.mamba2_chunk_size
        E = self.heads * self.head_dim
        self.BC = self.groups * self.d_state
        self.in_proj = Linear(config.hidden_size, 2 * E + 2 * self.BC + self.heads, std)  # rows z | x | B | C | dt
        self.conv1d = CausalConv(E + 2 * self.BC, config.mamba2_conv_kernel)
        self.dt_bias = Parameter((self.heads,), time_step_bias)
        self.A_log = Parameter((self.heads,), decay_rates)
        self.D = Parameter((self.heads,), constant(1.0))
        self.norm = RMSNorm(E, config.rms_norm_eps, self.groups)
        self.out_proj = Linear(E, config.hidden_size, output_std)

    def __call__(self, u: Tensor, cache: Mamba2Cache | None = None) -> Tensor:
        """u: ``[B,T,D]``. Returns ``[B,T,D]``. A new ``cache`` is filled, for `step` to go on."""
        z, xBC, dt = self._project(u)
        x, B, C = self._parts(self.conv1d(xBC) if cache is None else self.conv1d.step(xBC, cache.tail))
        A = named("A", -ops.exp(self.A_log))
        y = named("y", ssd(x, dt, A, B, C, self.D, self.chunk))
        if cache is not None:
            cache.state[...] = final_state((x.data * dt.data[..., None])[:, :, None], dt.data * A.data, B.data[:, :, None])
        return self.out_proj(self.norm(named("gated", silu_gate(y.reshape(*z.shape), z))))

    def _project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z, what the convolution reads, and dt: ``[B,T,E] [B,T,E+2GN] [B,T,H]``."""
        E = self.heads * self.head_dim
        z, xBC, dt = ops.split(self.in_proj(u), (E, E + 2 * self.BC, self.heads))
        return z, xBC, named("dt", ops.softplus(dt + self.dt_bias))

    def _parts(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, B and C: ``[B,T,H,P] [B,T,G,N] [B,T,G,N]``."""
        (batch, T, _), E = xBC.shape, self.heads * self.head_dim
        x, B, C = ops.split(xBC, (E, self.BC, self.BC))
        B, C = (v.reshape(batch, T, self.groups, self.d_state) for v in (B, C))
        return x.reshape(batch, T, self.heads, self.head_dim), B, C

    def new_cache(self, batch: int) -> Mamba2Cache:
        """The state before the first token."""
        state = zeros_like(self.A_log, batch, self.heads, self.head_dim, self.d_state)
        return Mamba2Cache(self.conv1d.new_tail(batch), state)

    def step(self, u: Tensor, cache: Mamba2Cache) -> Tensor:
        """The next token, by the recurrence itself. u: ``[B,1,D]``. Returns ``[B,1,D]``."""
        batch, H, P, G, N = u.shape[0], self.heads, self.head_dim, self.groups, self.d_state
        z, xBC, dt = self._project(u)
        x, B, C = self._parts(self.conv1d.step(xBC, cache.tail))
        decay = ops.exp(dt * -ops.exp(self.A_log)).reshape(batch, G, H // G, 1, 1)
        entering = (x * dt.reshape(batch, 1, H, 1)).reshape(batch, G, H // G, P, 1) * B.reshape(batch, G, 1, 1, N)
        h = Tensor(cache.state).reshape(batch, G, H // G, P, N) * decay + entering
        cache.state[...] = h.data.reshape(cache.state.shape)
        y = ops.matmul(h, C.reshape(batch, G, 1, N, 1)).reshape(batch, 1, H, P) + x * self.D.reshape(H, 1)
        return self.out_proj(self.norm(silu_gate(y.reshape(*z.shape), z)))
